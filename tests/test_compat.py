"""Every function of g2rpo_kernels.compat against its peer's formula in float64 (peers.py).

One row of `peers.PEERS` a way of calling a compat function: what it is called with, and which of
the peers' steps it must be. Values, gradients, dtypes and noise are checked for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import cases
import peers
import pytest
import torch
from cases import Target
from peers import PEERS, STEPS, Call, Named, Peer, run, schedule
from torch import Tensor

import g2rpo_kernels as gk

SHAPES = {"packed": (3, 24, 16), "image": (2, 4, 9, 7), "past_chunk": (2, 4099), "one_row": (1, 80)}
DTYPES = {name: cases.DTYPES[name] for name in ("float32", "mixed", "bfloat16", "float16")}


def random_calls(peer: Peer, shape: tuple[int, ...], dtypes: tuple, device: str) -> Iterator[Call]:
    """Step 0 (sigma = 1), the last two and random ones, of schedules with shifts 1 and 3."""
    random = cases.generator(peer.dynamics, shape, str(dtypes))
    for index in (0, STEPS - 2, STEPS - 1, *torch.randint(1, STEPS - 2, (2,), generator=random)):
        rows = shape[0] if peer.per_row else 1
        indices = torch.randint(0, STEPS - 1, (rows,), generator=random).tolist()
        indices[0] = int(index)
        velocity, latents = (torch.randn(shape, generator=random).to(device) for _ in range(2))
        sigmas = schedule(shift=3.0 if index % 2 else 1.0)
        yield Call(velocity.to(dtypes[0]), latents.to(dtypes[1]), sigmas, indices, peer.level)


def truth(
    peer: Peer, call: Call, noise: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> peers.Step:
    """The peer's step of the tensors as they are given, computed in `dtype`."""
    ones = [1] * (call.latents.ndim - 1)

    def column(values: Tensor) -> Tensor:
        return values.to(call.latents.device, dtype).view(-1, *ones)

    return peers.step(
        peer.dynamics,
        call.velocity.to(dtype),
        call.latents.to(dtype),
        column(call.sigmas[call.indices]),
        column(call.sigmas[[i + 1 for i in call.indices]]),
        column(torch.tensor([call.level], dtype=torch.float64)),
        sigma_max=column(call.sigmas[1:2]),
        prev_sample=None if call.prev_sample is None else call.prev_sample.to(dtype),
        noise=None if noise is None else noise.to(dtype),
        constant=peer.constant,
    )


def draw(name: str, call: Call, seed: int) -> Named:
    """The step with prev_sample drawn from `seed`."""
    generator = torch.Generator(call.latents.device) if PEERS[name].generator else None
    (generator or torch).manual_seed(seed)
    return run(name, replace(call, prev_sample=None, generator=generator))


def noise_of(name: str, call: Call, seed: int) -> Tensor:
    """What the peer would draw: in float32, or in its own inputs' dtype."""
    peer, like = PEERS[name], call.velocity
    if peer.generator:
        generator = torch.Generator(like.device).manual_seed(seed)
        dtype = torch.float32 if peer.float32 else like.dtype
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=dtype)
    torch.manual_seed(seed)
    return torch.randn_like(call.latents + call.velocity)


def assert_values(got: Named, exact: peers.Step) -> None:
    """Means within 2e-6, log-probabilities within 1e-6 of themselves.

    A log-probability is a sum that may pass through zero, where no float32 is relatively accurate:
    there, below a tenth of its terms' magnitudes, it is within 1e-6 of those.
    """
    for name, value in got.items():
        true = getattr(exact, name)
        assert value.shape == (true.shape if name != "std" or value.ndim else ()), name
        error = (value.double() - true).abs()
        if name == "log_prob":
            allowed = torch.where(true.abs() > exact.scale / 10, true.abs(), exact.scale)
            assert (error <= 1e-6 * allowed + 1e-12).all(), f"{name}: {error} of {true}"
        elif name in ("mean", "prev_sample", "x0"):
            assert error.max() <= 2e-6, f"{name} errs by {error.max():.3g}"
        else:
            assert (error <= 1e-6 * true.abs()).all(), f"{name}: {value} is not {true}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PEERS)
def test_values(name: str, shape: str, dtype: str, target: Target) -> None:
    """A drawn step, then the same one scored, against the formula of what it was given."""
    peer = PEERS[name]
    for call in random_calls(peer, SHAPES[shape], DTYPES[dtype], target.device):
        drawn = draw(name, call, seed=5)
        exact = truth(peer, call, noise_of(name, call, seed=5))
        assert_values({k: v for k, v in drawn.items() if k != "log_prob"}, exact)
        scored = replace(call, prev_sample=drawn["prev_sample"])
        got = run(name, scored)
        assert_values(got, truth(peer, scored))
        assert all(value.dtype == torch.float32 for value in [*drawn.values(), *got.values()])
        assert all(torch.equal(drawn[k], got[k]) for k in got)  # the same bits, log_prob too


def gradients(call: Call, output: str, function: Callable[[Call], object]) -> list[Tensor]:
    """Of one output, weighted at random, into velocity and latents."""
    leaves = [x.clone().requires_grad_() for x in (call.velocity, call.latents)]
    got = function(replace(call, velocity=leaves[0], latents=leaves[1]))
    value = got[output] if isinstance(got, dict) else getattr(got, output)
    weight = torch.randn(value.shape, generator=cases.generator(output)).to(value)
    return torch.autograd.grad(value, leaves, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "scored"])
@pytest.mark.parametrize("name", PEERS)
def test_gradients(name: str, drawn: bool, dtype: str, target: Target) -> None:
    """Of every output: as accurate as the formula is in float32, rounded to the input's dtype."""
    for call in random_calls(PEERS[name], SHAPES["image"], DTYPES[dtype], target.device):
        plain, noise = draw(name, call, seed=7), noise_of(name, call, seed=7)
        call = call if drawn else replace(call, prev_sample=plain["prev_sample"])
        function = partial(draw, name, seed=7) if drawn else partial(run, name)
        differentiable = ["mean", "x0", "log_prob"] + ["prev_sample"] * drawn
        for output in [k for k in plain if k in differentiable]:
            got = gradients(call, output, function)
            exact, eager = (
                gradients(call, output, partial(truth, PEERS[name], noise=noise, dtype=dtype))
                for dtype in (torch.float64, torch.float32)
            )
            for ours, true, formula in zip(got, exact, eager, strict=True):
                assert ours.dtype == true.dtype
                allowed = 2 * (formula.double() - true.double()).abs().max()
                allowed = allowed + 5e-7 * true.double().abs().max()
                ulp = true.double().abs().clamp_min(torch.finfo(true.dtype).smallest_normal)
                allowed = allowed + torch.finfo(true.dtype).eps * ulp
                error = (ours.double() - true.double()).abs()
                assert (error <= allowed).all(), f"{output}: {(error - allowed).max():.3g} too far"


@pytest.mark.parametrize("name", PEERS)
def test_gradients_do_not_change_the_bits(name: str, target: Target) -> None:
    for call in random_calls(PEERS[name], SHAPES["packed"], DTYPES["mixed"], target.device):
        plain = draw(name, call, seed=7)
        for which in ({"velocity"}, {"latents"}, {"velocity", "latents"}):
            leaves = {k: getattr(call, k).clone().requires_grad_() for k in which}
            got = draw(name, replace(call, **leaves), seed=7)
            assert all(torch.equal(got[k], plain[k]) for k in plain)
            with torch.no_grad():
                assert not any(
                    x.requires_grad for x in draw(name, replace(call, **leaves), 7).values()
                )
        given = plain["prev_sample"].clone().requires_grad_()
        assert not run(name, replace(call, prev_sample=given))["log_prob"].requires_grad


@pytest.mark.parametrize("name", [name for name in PEERS if not PEERS[name].float32])
def test_float64(name: str) -> None:
    """Where the peer does not cast to float32, neither do we."""
    float64 = (torch.float64, torch.float64)
    with gk.use_backend("reference"):
        for call in random_calls(PEERS[name], SHAPES["packed"], float64, "cpu"):
            got = draw(name, call, seed=3)
            scored = replace(call, prev_sample=got["prev_sample"])
            assert_values(got, truth(PEERS[name], scored))
            assert {v.dtype for k, v in got.items() if k != "std"} == {torch.float64}


@pytest.mark.parametrize("name", [name for name in PEERS if PEERS[name].float32])
def test_float64_is_cast_where_the_peer_casts_it(name: str, target: Target) -> None:
    float64 = (torch.float64, torch.float64)
    for call in random_calls(PEERS[name], SHAPES["packed"], float64, target.device):
        cast = replace(call, velocity=call.velocity.float(), latents=call.latents.float())
        got, same = draw(name, call, seed=3), draw(name, cast, seed=3)
        assert all(torch.equal(got[k], same[k]) for k in got)
        assert {value.dtype for value in got.values()} == {torch.float32}


@pytest.mark.parametrize("name", PEERS)
def test_random_states_end_where_the_peers_do(name: str, target: Target) -> None:
    call = next(random_calls(PEERS[name], SHAPES["packed"], DTYPES["mixed"], target.device))
    generator = torch.Generator(target.device).manual_seed(1) if PEERS[name].generator else None
    torch.manual_seed(1)
    run(name, replace(call, generator=generator))
    ours = torch.randn(5, generator=generator, device=target.device)
    noise_of(name, call, seed=1)  # leaves torch's own generator where one is not taken
    if generator is not None:
        theirs = torch.Generator(target.device).manual_seed(1)
        dtype = torch.float32 if PEERS[name].float32 else call.velocity.dtype
        torch.randn(call.velocity.shape, generator=theirs, device=target.device, dtype=dtype)
        assert torch.equal(ours, torch.randn(5, generator=theirs, device=target.device))
    else:
        assert torch.equal(ours, torch.randn(5, device=target.device))
