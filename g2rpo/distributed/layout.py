"""Where the trained weights lie, and how the ranks' gradients become one.

    replicate   whole on every rank; gradients are summed over the ranks before a step
    shard       FSDP2: a part on each rank, gathered block by block where a forward needs it
    hybrid      FSDP2: parts within a node, replicas across nodes

A rank's loss is its share of the mean over all rows of the update (each of `count` ranks has as
many), so that gradients add up, in float32 whatever the weights are in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ..config import Config, DistributedConfig
from ..errors import ConfigurationError
from ..policy import FluxPolicy
from ..weights import TrainedWeights
from .ranks import Ranks
from .replica import Replica

BUCKET = 2**24  # float32 elements that are reduced at once: 64 MiB


class Replicated:
    """Every rank has all weights."""

    sharded = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.count = ranks, ranks.count

    def before_backward(self, last: bool) -> None:
        """last: of those before a step."""

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every rank's gradients the sum of all ranks'; the same bits on each."""
        if self.ranks.watch is None:
            return
        for parameter in parameters:
            factors = getattr(parameter, "grad_factors", None)
            if factors is not None and factors.numel * self.count >= parameter.numel():
                parameter.grad = factors.dense(parameter.dtype)  # no larger than all ranks' rows
                del parameter.grad_factors
        gradients = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([piece.float() for piece in bucket])
            self.ranks.sum_(flat)
            for piece, summed in zip(bucket, flat.split([len(piece) for piece in bucket])):
                piece.copy_(summed)
        for parameter in parameters:
            if (factors := getattr(parameter, "grad_factors", None)) is not None:
                factors.gather(self.ranks.all_rows)


class Sharded:
    """FSDP2 over all ranks, or over those of a node."""

    sharded = True

    def __init__(self, transformer: nn.Module, config: DistributedConfig, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.transformer, self.count = transformer, ranks.count
        self.reduces_once = config.gradients == "whole"
        device = next(transformer.parameters()).device.type
        if config.strategy == "hybrid":
            if ranks.count % ranks.per_node:
                raise ConfigurationError(
                    f"distributed.strategy is 'hybrid' with {ranks.count} ranks, {ranks.per_node} "
                    "on this node; expected as many on each, or 'shard'"
                )
            shape, names = (ranks.count // ranks.per_node, ranks.per_node), ("replicate", "shard")
            mesh = init_device_mesh(device, shape, mesh_dim_names=names)
        else:
            mesh = init_device_mesh(device, (ranks.count,), mesh_dim_names=("shard",))
        # Nothing here writes into what a block returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root, too, or it would go on with the weights of before a change that follows no
        # backward: a moving average's, the starting policy's.
        fully_shard(transformer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for module in (transformer, *blocks):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums alone

    def before_backward(self, last: bool) -> None:
        self.transformer.set_requires_gradient_sync(last or not self.reduces_once)
        self.transformer.set_is_last_backward(last or not self.reduces_once)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """FSDP has, in the last backward."""


Layout = Replicated | Sharded


def make_layout(
    config: Config, policy: FluxPolicy, weights: TrainedWeights, ranks: Ranks
) -> tuple[Layout, Replica | None]:
    """Lay the transformer's weights out over the ranks, in place: what distributed.strategy says.

    Also the replica that makes the completions of a sharded one, where distributed.gather has one.
    Raises ConfigurationError for what the strategy cannot do.
    """
    asked, rollout = config.distributed, config.rollout
    if ranks.watch is None or asked.strategy == "replicate":
        return Replicated(ranks), None
    replica = None
    if asked.gather == "phase" or (asked.gather == "auto" and rollout.sampling == "singular"):
        dtype = torch.bfloat16 if rollout.precision == "bfloat16" else None
        replica = Replica(policy, dtype, ranks, must=asked.gather == "phase")
    layout = Sharded(policy.transformer, asked, ranks)
    weights.reread()
    policy.sharded = True
    if replica is not None:
        replica.follow(dict(policy.transformer.named_parameters()))
    return layout, replica


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat views of all gradients, cut so that each list has BUCKET elements at most."""
    pieces = chain.from_iterable(gradient.view(-1).split(BUCKET) for gradient in gradients)
    bucket: list[Tensor] = []
    room = BUCKET
    for piece in pieces:
        if len(piece) > room and bucket:
            yield bucket
            bucket, room = [], BUCKET
        bucket.append(piece)
        room -= len(piece)
    if bucket:
        yield bucket
