"""ModulationTable: shifts, scales and gates of a fused FLUX, computed once a (prompt, sigma).

    table = ModulationTable(transformer, sigmas, pooled, guidance)
    with table.rows(index):            # [B], prompt * S + sigma of each row of the batch
        velocity = transformer(...)

The modulation linears are 3.23 of FLUX.1-dev's 11.9 billion parameters and depend on nothing but
the sigma, the guidance and the pooled embedding: a rollout's forwards, hundreds over a few sigmas,
would read all of them every time. The table takes 2.1 MB a row in bfloat16.

A row of the table is as rounded as one of a forward is, but the last bit may differ, since a matrix
product's may with the number of its rows: for completions, never where a log-probability is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flux import blocks_of, is_fused
from .flux_blocks import is_double


class ModulationTable:
    """The modulations of S sigmas and P prompts, for as long as the weights stay as they are.

    transformer: as `fuse_flux` returned it. sigmas: [S], as `timestep` is given. pooled: [P, E].
    guidance: the distilled guidance scale, None for a transformer without guidance embeddings.
    """

    @torch.no_grad()
    def __init__(
        self,
        transformer: nn.Module,
        sigmas: Tensor,  # [S] float32
        pooled: Tensor,  # [P, E]
        guidance: float | None = None,
    ) -> None:
        blocks = blocks_of(transformer)
        if not all(is_fused(block) for block in blocks):
            raise ValueError("transformer is not fused; expected what fuse_flux has returned")
        self.sigmas, self.prompts = len(sigmas), len(pooled)
        dtype = transformer.x_embedder.weight.dtype
        # As FluxTransformer2DModel.forward has it, a row a (prompt, sigma).
        timestep = sigmas.repeat(self.prompts).to(dtype) * 1000
        rows = pooled.repeat_interleave(self.sigmas, dim=0).to(dtype)
        given = (timestep,)
        if guidance is not None:
            given += (torch.full_like(timestep, guidance) * 1000,)
        embedding = F.silu(transformer.time_text_embed(*given, rows))
        self._norms = [
            norm
            for block in blocks
            for norm in ((block.norm1, block.norm1_context) if is_double(block) else (block.norm,))
        ]
        self._tables = [norm.linear(embedding) for norm in self._norms]  # [P * S, parts * D]

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables)

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Within the block, a forward's row i takes the modulations of row index[i].

        index: int64 [B], prompt * S + sigma, on the transformer's device.
        """
        for norm, table in zip(self._norms, self._tables, strict=True):
            norm.__dict__["table"] = table, index  # past nn.Module: this is nothing of its state
        try:
            yield
        finally:
            for norm in self._norms:
                norm.__dict__.pop("table", None)
