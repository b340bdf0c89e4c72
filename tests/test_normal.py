"""The noise: Philox's published vectors, Triton's element order and formula, and a normal law."""

from __future__ import annotations

import math

import cases
import formulas
import numpy as np
import pytest
import torch
from cases import Target
from formulas import MASK, philox4x32
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels.normal import _box_muller, _uniform, philox

SEEDS = (0, 1, -1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)
COUNTERS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345, 2**61)

# Random123's known answers for philox4x32-10: counter, key -> output.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# What Triton 3.9.0's `tl.randn4x(seed, e // 4)` gives for elements e = 0..7 (interpreter, CPU).
TRITON = {
    0: [0.046552, 0.669995, 0.274198, -1.095427, -0.388361, -2.373033, 0.885052, 0.445284],
    42: [0.660613, -0.275227, -0.815317, -1.782475, -1.542714, -2.243454, 0.199438, -0.128986],
    -1: [0.235842, 0.405959, -0.090687, 0.742773, -1.512938, -0.948280, 0.003263, -0.719226],
    0x0123456789ABCDEF: [
        -1.037067, 0.289714, 1.841316, -0.507662, -0.588271, -0.734458, -0.541894, -0.418593,
    ],
    -(2**63): [
        0.812016, -0.059184, -0.681351, -2.738126, -0.734566, 1.550168, 0.287795, 1.105823,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_the_transcription_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == output
    as_numpy = [tuple(np.array([word], dtype=np.uint64) for word in x) for x in (counter, key)]
    assert tuple(int(word[0]) for word in philox4x32(*as_numpy)) == output


@pytest.mark.parametrize("seed", SEEDS)
def test_integers_are_those_of_the_transcription(seed: int) -> None:
    """Python integers against ours, counters beyond 2^32 and negative seeds included."""
    ours = philox(torch.tensor(COUNTERS), torch.tensor(seed))
    assert all(word.dtype == torch.int64 for word in ours)
    for i, counter in enumerate(COUNTERS):
        key = (seed & MASK, (seed >> 32) & MASK)
        want = philox4x32((counter & MASK, counter >> 32, 0, 0), key)
        assert tuple(word[i].item() for word in ours) == want


def test_integers_over_many_seeds_and_counters() -> None:
    seeds = cases.random_seeds((500,), "philox")
    for first in (0, 2**32 - 50):
        counter = torch.arange(first, first + 100)
        ours = torch.stack(philox(counter, seeds[:, None]), -1).flatten(1)
        theirs = formulas.words_of(seeds.numpy(), 400, first)
        assert np.array_equal(ours.numpy(), theirs.astype(np.int64))


@pytest.mark.parametrize("seed", TRITON)
def test_floats_are_tritons(seed: int, target: Target) -> None:
    noise = gk.normal(torch.tensor(seed, device=target.device), (len(TRITON[seed]),))
    torch.testing.assert_close(noise.cpu(), torch.tensor(TRITON[seed]), rtol=0, atol=1e-5)


def test_element_order_is_four_outputs_a_counter(target: Target) -> None:
    """Element e is output e % 4 of counter e // 4, through the row in memory order."""
    seed = torch.tensor(SEEDS[-1], device=target.device)
    flat = gk.normal(seed, (2 * 3 * 7,))
    assert torch.equal(gk.normal(seed, (2, 3, 7)).flatten(), flat)
    for e in range(0, 40, 4):
        key = (SEEDS[-1] & MASK, SEEDS[-1] >> 32)
        words = philox4x32((e // 4, 0, 0, 0), key)
        uniform = [min(word, word ^ MASK) * 4.6566127342e-10 for word in words]
        pairs = []
        for u1, u2 in (uniform[:2], uniform[2:]):
            radius, angle = math.sqrt(-2 * math.log(max(u1, 1e-7))), 2 * math.pi * u2
            pairs += [radius * math.cos(angle), radius * math.sin(angle)]
        torch.testing.assert_close(flat[e : e + 4].cpu(), torch.tensor(pairs), rtol=0, atol=1e-5)


def test_floats_stay_close_in_the_tails_and_near_one(target: Target) -> None:
    """Against float64 over 4 M draws: small uniforms (large noise) and those next to 1 included."""
    seeds = cases.random_seeds((64,), "tails").to(target.device)
    noise, exact = gk.normal(seeds, (65536,)), formulas.normal(seeds, (65536,))
    assert (noise.double() - exact).abs().max() < 1e-5
    assert 4.8 < noise.abs().max() < 5.7


def test_extreme_words_give_finite_noise() -> None:
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    uniform = _uniform(words)
    assert uniform.dtype == torch.float32
    assert (uniform >= 0).all() and (uniform < 1).all()
    assert torch.equal(uniform[:3], uniform[3:].flip(0))  # int32 x and -x - 1 are one
    for u2 in uniform:
        cosine, sine = _box_muller(uniform, u2)
        assert cosine.isfinite().all() and sine.isfinite().all()
        torch.testing.assert_close(
            cosine**2 + sine**2, -2 * uniform.clamp_min(1e-7).log(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 77, 4096])
def test_a_shorter_draw_is_a_prefix_of_a_longer(count: int, target: Target) -> None:
    seeds = cases.random_seeds((3, 2), "prefix").to(target.device)
    assert torch.equal(gk.normal(seeds, (4099,))[..., :count], gk.normal(seeds, (count,)))


@pytest.mark.parametrize("shape", [(), (1,), (7, 11), (16, 4), (2025, 64)])
def test_a_seed_draws_the_same_in_any_batch(shape: tuple[int, ...], target: Target) -> None:
    seeds = cases.random_seeds((3, 4), "batch").to(target.device)
    together = gk.normal(seeds, shape)
    assert together.shape == (3, 4, *shape) and together.is_contiguous()
    for p in range(3):
        for g in range(4):
            assert torch.equal(together[p, g], gk.normal(seeds[p, g], shape))
    assert torch.equal(gk.normal(seeds.T, shape), together.transpose(0, 1))
    assert torch.equal(gk.normal(seeds.flip(1), shape), together.flip(1))


def test_empty_draws(target: Target) -> None:
    seeds = cases.random_seeds((3, 2), "empty").to(target.device)
    assert gk.normal(seeds, (0, 4)).shape == (3, 2, 0, 4)
    assert gk.normal(seeds[:0], (5,)).shape == (0, 2, 5)


def test_the_law_is_normal(target: Target) -> None:
    """Moments within 4.5 standard errors and Kolmogorov-Smirnov at the 0.1 % level, 1 M draws."""
    noise = gk.normal(torch.arange(1000, device=target.device), (1000,)).double().flatten()
    n = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (noise**power).mean().item() - moment
        assert abs(error) < 4.5 * math.sqrt(variance / n), f"moment {power} is off by {error}"
    cdf = torch.special.ndtr(noise.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64, device=noise.device) / n
    distance = torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()).item()
    assert distance < 1.95 / math.sqrt(n)


def test_elements_and_seeds_are_uncorrelated(target: Target) -> None:
    """Consecutive seeds, and the elements of one seed: no correlation beyond chance."""
    noise = gk.normal(torch.arange(256, device=target.device), (4096,)).double()
    for rows in (noise, noise.T[:256].contiguous()):
        correlation = correlations(rows)
        assert correlation.abs().max() < 5.2 / math.sqrt(rows.shape[1])


def correlations(rows: Tensor) -> Tensor:
    """Between every two different rows."""
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    matrix = rows @ rows.T / rows.shape[1]
    return matrix.fill_diagonal_(0)


def test_no_two_seeds_share_their_draws() -> None:
    """All 128 bits of the first counter, of seeds that differ in the low or in the high word."""
    low = torch.arange(5000)
    seeds = torch.cat([low, (low + 1) << 32, -(low + 1), cases.random_seeds((5000,), "share")])
    assert len(seeds.unique()) == len(seeds)
    words = torch.stack(philox(torch.tensor([0]), seeds[:, None]), -1).flatten(1)
    assert len(words.unique(dim=0)) == len(seeds)
    assert len(gk.normal(low, (8,)).unique(dim=0)) == len(low)
