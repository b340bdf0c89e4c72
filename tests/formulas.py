"""What each op computes, in plain PyTorch: the tests' truth, the benchmarks' eager baseline.

Each function takes the public op's arguments with every floating tensor already in one dtype, and
computes in it. Nothing here is computed by the package under test.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from g2rpo_kernels import StepCoefficients


def per_row(table: Tensor, index: int, like: Tensor) -> Tensor:
    return table[:, index].view(-1, *[1] * (like.ndim - 1))


def ode_step(velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return latents + (sigma_next - sigma).view(-1, *[1] * (latents.ndim - 1)) * velocity


def step_mean(velocity: Tensor, latents: Tensor, coefficients: StepCoefficients) -> Tensor:
    table = coefficients.table
    return per_row(table, 0, latents) * latents + per_row(table, 1, latents) * velocity


def branch_log_prob(
    velocity: Tensor, latents: Tensor, x_next: Tensor, coefficients: StepCoefficients
) -> Tensor:
    mean = step_mean(velocity, latents, coefficients)
    branched = x_next.ndim - mean.ndim
    gap = x_next - (mean.unsqueeze(1) if branched else mean)
    square = gap.reshape(*gap.shape[: 1 + branched], math.prod(mean.shape[1:])).square().mean(-1)
    table = coefficients.table
    return -per_row(table, 3, square) * square + per_row(table, 4, square)


def sde_step(
    velocity: Tensor, latents: Tensor, coefficients: StepCoefficients, noise: Tensor
) -> tuple[Tensor, Tensor]:
    mean = step_mean(velocity, latents, coefficients)
    mean = mean.unsqueeze(1) if noise.ndim > mean.ndim else mean
    x_next = mean + per_row(coefficients.table, 2, mean) * noise
    return x_next, branch_log_prob(velocity, latents, x_next, coefficients)


def policy_loss(
    velocity: Tensor,
    latents: Tensor,
    x_next: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    coefficients: StepCoefficients,
    clip_range: float = 1e-4,
    advantage_clip: float | None = None,
    reference_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    old_velocity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, log_prob, statistics; the options spelled out from the means themselves."""
    table, dims = coefficients.table, tuple(range(1, velocity.ndim))

    def gap_of_means(other: Tensor) -> Tensor:
        mean = step_mean(velocity, latents, coefficients)
        square = (mean - step_mean(other, latents, coefficients)).square()
        return table[:, 3] * (square.mean(dims) if dims else square)

    log_prob = branch_log_prob(velocity, latents, x_next, coefficients)
    log_ratio = log_prob - old_log_prob
    if old_velocity is not None:
        shift = gap_of_means(old_velocity)
        log_ratio = log_ratio + (shift.unsqueeze(1) if log_ratio.ndim > 1 else shift)
        log_ratio = log_ratio * per_row(table, 2, log_ratio)
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    kl = loss.new_zeros(())
    if reference_velocity is not None:
        kl = gap_of_means(reference_velocity).mean()
    outside = ((ratio - 1).abs() > clip_range).to(ratio.dtype).mean()
    statistics = [ratio.mean(), ratio.max(), outside, (ratio - 1 - log_ratio).mean(), kl]
    return loss + kl_weight * kl, log_prob, torch.stack(statistics).detach()


def group_advantages(
    rewards: Tensor, group_size: int, weights: list[float] | None = None, eps: float = 1e-8
) -> Tensor:
    models, granularities, samples, positions = rewards.shape
    total = rewards.new_zeros(samples, positions)
    for r in range(models):
        for j in range(granularities):
            groups = rewards[r, j].view(-1, group_size, positions)
            spread = groups.std(1, keepdim=True) + eps
            advantage = (groups - groups.mean(1, keepdim=True)) / spread
            total += (1.0 if weights is None else weights[r]) * advantage.view(samples, positions)
    return total


MASK = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple) -> tuple:
    """Philox4x32-10 as Salmon et al. (SC 2011) define it; of Python ints, or of numpy's uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(10):
        if step:
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
    return c0, c1, c2, c3


def words_of(seeds: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """`count` words from counter `first` on: int64 seeds [*B] -> uint64 [*B, count]."""
    key = np.ascontiguousarray(seeds, dtype=np.int64).view(np.uint64)[..., None]
    counter = np.arange(first, first + -(-count // 4), dtype=np.uint64)
    zero = np.zeros_like(counter)
    shift, mask = np.uint64(32), np.uint64(MASK)
    words = philox4x32((counter & mask, counter >> shift, zero, zero), (key & mask, key >> shift))
    return np.stack(np.broadcast_arrays(*words), axis=-1).reshape(*seeds.shape, -1)[..., :count]


def normal(seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Triton's uniform and Box-Muller on those words: float32 uniforms, the rest in `dtype`."""
    count = math.prod(shape)
    words = words_of(seeds.cpu().numpy(), -(-count // 2) * 2).astype(np.int64)
    signed = np.where(words >= 2**31, words - 2**32, words).astype(np.int32)
    folded = np.where(signed < 0, -signed - 1, signed).astype(np.float32)
    uniform = torch.from_numpy(folded * np.float32(4.6566127342e-10)).to(dtype)
    u1, u2 = uniform[..., 0::2].clamp_min(1e-7), uniform[..., 1::2]
    radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
    noise = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)
    return noise[..., :count].reshape(*seeds.shape, *shape).to(seeds.device)


def noise_bits(seeds: Tensor, count: int) -> Tensor:
    """The noise as the C++, CUDA and Triton backends compute it, operation by operation in float32.

    Cephes' log and sine polynomials, no contraction: the same bits wherever float32 is IEEE's.
    """
    f = np.float32
    words = words_of(seeds.numpy(), -(-count // 4) * 4).astype(np.uint32).view(np.int32)
    uniform = (words ^ (words >> 31)).astype(f) * f(4.6566127342e-10)
    u1, u2 = np.maximum(uniform[..., 0::2], f(1e-7)), uniform[..., 1::2]
    bits = u1.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23
    x = (bits - exponent * np.int32(0x800000)).view(f) - f(1)
    e, z = exponent.astype(f), x * x
    p = f(7.0376836292e-2)
    for c in (
        -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    ):  # fmt: skip
        p = p * x + f(c)
    log = (x + (((x * z) * p + e * f(-2.12194440e-4)) - f(0.5) * z)) + e * f(0.693359375)
    radius = np.sqrt(f(-2) * log)
    turns = f(4) * u2
    quadrant = (turns + f(0.5)).astype(np.int32)
    r = (turns - quadrant.astype(f)) * f(1.57079632679489662)
    z = r * r
    s = (((f(-1.9515295891e-4) * z + f(8.3321608736e-3)) * z + f(-1.6666654611e-1)) * z) * r + r
    c = (f(2.443315711809948e-5) * z + f(-1.388731625493765e-3)) * z + f(4.166664568298827e-2)
    c = (c * z) * z + (f(1) - f(0.5) * z)
    q = quadrant & 3
    cosine = np.choose(q, [c, -s, -c, s])
    sine = np.choose(q, [s, c, -s, -c])
    noise = np.stack([radius * cosine, radius * sine], -1).reshape(*words.shape)
    assert noise.dtype == f
    return torch.from_numpy(np.ascontiguousarray(noise[..., :count]))
