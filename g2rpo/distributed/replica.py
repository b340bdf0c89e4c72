"""The whole of a sharded transformer, on every rank, for as long as completions last.

Completions are 99 % of an update's forwards, and change no weight: gathered once for all of them,
the weights cost one gather a rollout, where FSDP gathers them again in every forward. In FP8 it is
a byte a weight of the token linears, block by block, and the rest as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..optimizers import modulation_linears
from ..policy import FluxPolicy
from .ranks import Ranks
from .shards import whole_values


class Replica:
    """A second transformer whose memory is there only within `filled`.

    policy: of the trained transformer, before it is sharded. dtype: of the replica; None: as that.
    must: it is filled whether it fits or not.
    """

    def __init__(
        self, policy: FluxPolicy, dtype: torch.dtype | None, ranks: Ranks, must: bool
    ) -> None:
        self._ranks, self._must = ranks, must
        transformer = copy.deepcopy(policy.transformer, _without_memory(policy.transformer, dtype))
        self.policy = FluxPolicy(transformer, policy.image_ids, policy.guidance or 0.0)
        self._parameters = dict(transformer.named_parameters())
        self._sizes = {p.untyped_storage()._cdata: 0 for p in self._parameters.values()}
        for parameter in self._parameters.values():
            end = (parameter.storage_offset() + parameter.numel()) * parameter.element_size()
            key = parameter.untyped_storage()._cdata
            self._sizes[key] = max(self._sizes[key], end)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._modulations = [
            names[id(linear.weight)] for linear in modulation_linears(transformer)
        ]
        self._of_block = {
            block: [names[id(weight)] for weight in _token_weights(block)]
            for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        }
        self._trained: Mapping[str, Tensor] = {}

    def follow(self, trained: Mapping[str, Tensor]) -> None:
        """trained: by name, the parameters that it is to be the whole of."""
        self._trained = trained

    @property
    def nbytes(self) -> int:
        """Of all of it, in its dtype."""
        return sum(parameter.nbytes for parameter in self._parameters.values())

    def fits(self) -> bool:
        """Whether every rank's GPU has room for all of it now, and a tenth more."""
        device = self.policy.device
        if self._must or device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return not self._ranks.any(free + cached < 1.1 * self.nbytes)

    @contextmanager
    def filled(self, all_weights: bool) -> Iterator[None]:
        """Within the block it has the trained weights of now; all_weights: those of the blocks'
        token linears, too, which `block` else gives one block at a time."""
        of_tokens = {name for names in self._of_block.values() for name in names}
        names = [n for n in self._parameters if all_weights or n not in of_tokens]
        try:
            self._fill(names)
            yield
        finally:
            self._free(self._parameters)

    @contextmanager
    def block(self, block: nn.Module) -> Iterator[None]:
        """Within it, the token linears of one block have their weights."""
        names = self._of_block[block]
        try:
            self._fill(names)
            yield
        finally:
            self._free(names)

    def drop_modulations(self) -> None:
        """Give back, until the next filling, what a rollout has computed with already: 3.23 of
        FLUX.1-dev's 11.9 billion parameters."""
        self._free(self._modulations)

    @torch.no_grad()
    def _fill(self, names: Iterable[str]) -> None:
        names = list(names)
        self._allocate(names)
        some = {name: self._trained[name] for name in names}
        for name, value in whole_values(some, None, keep=True):
            self._parameters[name].copy_(value)

    def _allocate(self, names: Iterable[str]) -> None:
        for name in names:
            parameter = self._parameters[name]
            storage = parameter.untyped_storage()
            if not storage.nbytes():
                storage.resize_(self._sizes[storage._cdata])

    def _free(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._parameters[name].untyped_storage().resize_(0)


def _without_memory(
    transformer: nn.Module, dtype: torch.dtype | None
) -> dict[int, object]:
    """For copy.deepcopy: parameters that lie to one another as the transformer's do (fused ones of
    one GEMM side by side), in storages that are given back at once."""
    memo: dict[int, object] = {}
    together: dict[int, list[nn.Parameter]] = {}
    for parameter in transformer.parameters():
        together.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
    for parameters in together.values():
        ends = (p.storage_offset() + p.numel() for p in parameters)
        first = parameters[0]
        flat = torch.empty(max(ends), dtype=dtype or first.dtype, device=first.device)
        for p in parameters:
            mine = flat.as_strided(p.shape, p.stride(), p.storage_offset())
            memo[id(p)] = nn.Parameter(mine, requires_grad=False)
        flat.untyped_storage().resize_(0)
    return memo


def _token_weights(block: nn.Module) -> list[nn.Parameter]:
    """Of a block's linears that see every token, and their adapters'."""
    return [
        module.weight
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "norm" not in name
    ]
