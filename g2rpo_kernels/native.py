"""Native backends: the ops of g2rpo_kernels._C, in C++ on CPUs and in CUDA C++ on NVIDIA GPUs.

The extension takes raw pointers and checks nothing. Its functions have the same arguments on both
kinds of device, so each op has one launcher here: allocate the outputs, name the addresses, call.
Arguments come as `_library` hands them to every backend: checked, contiguous and not float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the order of ops.h
_NOT_GIVEN = (0, 0)
# The ops that have native code; the others are Triton's and the reference's.
NATIVE = (
    "step_mean", "ode_step", "normal", "sde_step", "branch_log_prob", "policy_loss",
    "log_prob_backward", "group_advantages",
)  # fmt: skip


def native_implementations(ops: ModuleType, cuda: bool) -> dict[str, Callable]:
    """Launchers by op name, for `_C.cpu` or `_C.cuda`."""
    launchers = _Launchers(ops, cuda)
    return {name: getattr(launchers, name) for name in NATIVE}


def _array(x: Tensor | None) -> tuple[int, int]:
    return _NOT_GIVEN if x is None else (x.data_ptr(), _DTYPES[x.dtype])


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _row_size(velocity: Tensor) -> int:
    """N, the elements of one row, also where there is no row."""
    rows = velocity.shape[0]
    return velocity.numel() // rows if rows else math.prod(velocity.shape[1:])


def _step(velocity: Tensor, latents: Tensor, table: Tensor) -> tuple[int, ...]:
    """velocity, latents [P, *S] with their dtypes, the table with its stride, and P."""
    return (
        velocity.data_ptr(),
        _DTYPES[velocity.dtype],
        latents.data_ptr(),
        _DTYPES[latents.dtype],
        table.data_ptr(),
        5 if table.shape[0] > 1 else 0,
        velocity.shape[0],
    )


class _Launchers:
    """One method an op, each with the signature of the op's reference.

    On small tensors a call is mostly Python and allocation. So outputs are made by `new_empty` of a
    float32 tensor that is there anyway (the table), with sizes as arguments: half the time of
    `torch.empty(shape, dtype=..., device=...)`.
    """

    def __init__(self, ops: ModuleType, cuda: bool) -> None:
        self.ops, self.cuda = ops, cuda

    def where(self, x: Tensor) -> tuple[int, int]:
        """Device index and current stream."""
        if not self.cuda:
            return _NOT_GIVEN
        index = x.get_device()
        return index, torch._C._cuda_getCurrentRawStream(index)

    def scratch(
        self, table: Tensor, rows: int, branches: int, count: int, extras: int = 0
    ) -> Tensor:
        """For the partial sums of a reduction on a GPU; the CPU keeps its own."""
        return table.new_empty(self.ops.scratch_size(rows, branches, count, extras))

    def step_mean(self, velocity: Tensor, latents: Tensor, table: Tensor) -> Tensor:
        mean = table.new_empty(*velocity.shape)
        self.ops.step_mean(
            *_step(velocity, latents, table), _row_size(velocity), mean.data_ptr(),
            *self.where(velocity),
        )  # fmt: skip
        return mean

    def ode_step(
        self, velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor
    ) -> Tensor:
        x_next = sigma.new_empty(*velocity.shape)
        self.ops.ode_step(
            *_array(velocity), *_array(latents),
            sigma.data_ptr(), int(sigma.shape[0] > 1),
            sigma_next.data_ptr(), int(sigma_next.shape[0] > 1),
            velocity.shape[0], _row_size(velocity), x_next.data_ptr(), *self.where(velocity),
        )  # fmt: skip
        return x_next

    def normal(self, seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
        noise = torch.empty((*seeds.shape, *shape), dtype=torch.float32, device=seeds.device)
        self.ops.normal(
            seeds.data_ptr(), seeds.numel(), math.prod(shape), noise.data_ptr(), *self.where(seeds)
        )
        return noise

    def sde_step(
        self,
        velocity: Tensor,
        latents: Tensor,
        table: Tensor,
        seeds: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if noise is None:
            leading = seeds.shape
            x_next = table.new_empty(*leading, *velocity.shape[1:])
        else:
            leading = noise.shape[: 1 + noise.ndim - velocity.ndim]
            x_next = table.new_empty(*noise.shape)
        log_prob = table.new_empty(*leading)
        branches, count = leading[1] if len(leading) > 1 else 1, _row_size(velocity)
        scratch = self.scratch(table, leading[0], branches, count) if self.cuda else None
        self.ops.sde_step(
            *_step(velocity, latents, table), branches, count,
            _pointer(seeds), *_array(noise),
            x_next.data_ptr(), log_prob.data_ptr(), _pointer(scratch), *self.where(velocity),
        )  # fmt: skip
        return x_next, log_prob

    def branch_log_prob(
        self, velocity: Tensor, latents: Tensor, x_next: Tensor, table: Tensor
    ) -> Tensor:
        leading = x_next.shape[: 1 + x_next.ndim - velocity.ndim]
        log_prob = table.new_empty(*leading)
        branches, count = leading[1] if len(leading) > 1 else 1, _row_size(velocity)
        scratch = self.scratch(table, leading[0], branches, count) if self.cuda else None
        self.ops.branch_log_prob(
            *_step(velocity, latents, table), branches, count, *_array(x_next),
            log_prob.data_ptr(), _pointer(scratch), *self.where(velocity),
        )  # fmt: skip
        return log_prob

    def policy_loss(
        self, velocity, latents, x_next, old_log_prob, advantages, table,
        clip_range, advantage_clip, reference_velocity, kl_weight, old_velocity,
    ):  # fmt: skip
        leading = old_log_prob.shape
        branches, count = leading[1] if len(leading) > 1 else 1, _row_size(velocity)
        if old_log_prob.dtype is not torch.float32 or advantages.dtype is not torch.float32:
            old_log_prob, advantages = old_log_prob.float(), advantages.float()
        loss, statistics = table.new_empty(()), table.new_empty(5)
        log_prob, grad_log_prob = torch.empty_like(old_log_prob), torch.empty_like(old_log_prob)
        extras = (reference_velocity is not None) + (old_velocity is not None)
        scratch = self.scratch(table, leading[0], branches, count, extras) if self.cuda else None
        self.ops.policy_loss(
            *_step(velocity, latents, table), branches, count, *_array(x_next),
            old_log_prob.data_ptr(), advantages.data_ptr(),
            *_array(reference_velocity), *_array(old_velocity),
            1 - clip_range, 1 + clip_range, clip_range,
            math.inf if advantage_clip is None else advantage_clip, kl_weight,
            loss.data_ptr(), log_prob.data_ptr(), grad_log_prob.data_ptr(), statistics.data_ptr(),
            _pointer(scratch), *self.where(velocity),
        )  # fmt: skip
        return loss, log_prob, grad_log_prob, statistics

    def log_prob_backward(
        self, grad_log_prob, velocity, latents, x_next, table,
        scale=None, old_velocity=None, reference_velocity=None, kl_weight=0.0,
    ):  # fmt: skip
        leading = grad_log_prob.shape
        grad_log_prob = grad_log_prob.float()
        scale = None if scale is None else scale.float()
        grad_velocity = torch.empty_like(velocity)
        self.ops.log_prob_backward(
            *_step(velocity, latents, table),
            leading[1] if len(leading) > 1 else 1, _row_size(velocity),
            *_array(x_next), grad_log_prob.data_ptr(), _pointer(scale),
            *_array(old_velocity), *_array(reference_velocity), kl_weight,
            grad_velocity.data_ptr(), *self.where(velocity),
        )  # fmt: skip
        return grad_velocity

    def group_advantages(
        self, rewards: Tensor, group_size: int, weights: list[float] | None, eps: float
    ) -> Tensor:
        models, granularities, samples, positions = rewards.shape
        if self.cuda and weights is not None and len(weights) > self.ops.most_models:
            raise ValueError(
                f"weights has {len(weights)} numbers; the cuda backend takes at most "
                f"{self.ops.most_models} reward models in one call"
            )
        advantages = torch.empty((samples, positions), dtype=torch.float32, device=rewards.device)
        self.ops.group_advantages(
            *_array(rewards), models, granularities, samples // group_size, group_size, positions,
            weights or [], eps, advantages.data_ptr(), *self.where(rewards),
        )  # fmt: skip
        return advantages
