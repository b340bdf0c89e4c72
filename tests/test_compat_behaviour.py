"""What a drop-in keeps of its peer beside the values of a step: Flow-GRPO, DanceGRPO, MixGRPO.

Signatures, the variants of each, noise levels of zero, noise as diffusers draws it, and diffusers'
own scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import cases
import peers
import pytest
import torch
from peers import STEPS, Scheduler, schedule
from torch import Tensor

from g2rpo_kernels import compat
from g2rpo_kernels.compat import _step

SIGMAS = schedule()
SHAPE = (3, 5, 8)

SIGNATURES = {
    "sde_step_with_logprob": "model_output timestep sample noise_level=0.7 prev_sample=None "
    "generator=None sde_type='sde' return_sqrt_dt=False",
    "flux_step": "model_output latents eta sigmas index prev_sample grpo sde_solver",
    "dance_grpo_step": "model_output latents eta sigmas index prev_sample grpo sde_solver "
    "sde_type='sde' noise_level=None",
    "flow_grpo_step": "model_output latents eta sigmas index prev_sample generator=None",
    "mix_grpo_step": "model_output latents eta sigmas index prev_sample generator=None "
    "determistic=False sde_type='sde' noise_level=None",
    "flow_factory_step": "noise_pred timestep latents next_latents=None timestep_next=None "
    "generator=None noise_level=None compute_log_prob=True return_dict=True return_kwargs "
    "dynamics_type=None sigma_max=None",
}
METHODS = ("sde_step_with_logprob", "flow_factory_step")  # whose first argument is the scheduler


def tensors(*key: object, count: int = 2) -> list[Tensor]:
    draw = cases.generator(*key)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def formula(
    dynamics: str, velocity: Tensor, latents: Tensor, indices: list[int], level: float, **given
) -> peers.Step:
    def column(values: Tensor | list) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1)

    return peers.step(
        dynamics, velocity.double(), latents.double(), column(SIGMAS[indices]),
        column(SIGMAS[[i + 1 for i in indices]]), column(level), sigma_max=column([SIGMAS[1]]),
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()},
    )  # fmt: skip


def euler(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
    wide = (x.double() for x in (velocity, latents, SIGMAS[index], SIGMAS[index + 1]))
    return peers.euler(*wide)


def close(got: Tensor, exact: Tensor, atol: float = 2e-6, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), exact.double(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_peers(name: str) -> None:
    parameters = list(inspect.signature(getattr(compat, name)).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    shown = [
        p.name if p.default is p.empty or p.name == "return_kwargs" else f"{p.name}={p.default!r}"
        for p in positional[name in METHODS :]
    ]
    assert " ".join(shown) == SIGNATURES[name]
    # What is ours is keyword-only and changes nothing unless it is given.
    assert all(
        p.kind is p.KEYWORD_ONLY and p.default is False for p in parameters[len(positional) :]
    )


# Flow-GRPO


def test_flow_grpo_first_versions() -> None:
    velocity, latents = tensors("determistic")
    scheduler, timestep = Scheduler(SIGMAS), (SIGMAS * 1000)[[2, 0, 7]]
    torch.manual_seed(4)
    got = compat.sde_step_with_logprob(
        scheduler, velocity, timestep, latents, determistic=True, return_step_std=True
    )
    after = torch.randn(3)
    torch.manual_seed(4)
    torch.randn(SHAPE)
    assert torch.equal(after, torch.randn(3))  # the noise nobody uses has been drawn
    stepped = torch.cat(
        [euler(velocity[i : i + 1], latents[i : i + 1], k) for i, k in enumerate((2, 0, 7))]
    )
    exact = formula("flow", velocity, latents, [2, 0, 7], 0.7, prev_sample=got[0])
    close(got[0], stepped)
    close(got[1], exact.log_prob)
    close(got[2], exact.mean)
    close(got[3], exact.std)


def test_flow_grpo_timesteps_and_sqrt_dt() -> None:
    velocity, latents = tensors("timesteps")
    scheduler = Scheduler(SIGMAS)
    one = scheduler.timesteps[3]
    for timestep in (one.view(1), one, one.item(), [one.item()]):
        got = compat.sde_step_with_logprob(
            scheduler, velocity, timestep, latents, prev_sample=latents, return_sqrt_dt=True
        )
        exact = formula("flow", velocity, latents, [3], 0.7, prev_sample=latents)
        assert got[3].shape == got[4].shape == (1, 1, 1)
        close(got[1], exact.log_prob)
        close(got[3], exact.diffusion)
        close(got[4], (-exact.dt).sqrt())
    each = compat.sde_step_with_logprob(
        scheduler, velocity, one.repeat(3), latents, prev_sample=latents
    )
    assert each[3].shape == (3, 1, 1) and all(torch.equal(*pair) for pair in zip(each[:3], got))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_no_noise_is_the_ode(sde_type: str) -> None:
    velocity, latents = tensors("no noise")
    scheduler = Scheduler(SIGMAS)
    for index in (0, 5, STEPS - 1):
        timestep, exact = scheduler.timesteps[index].view(1), euler(velocity, latents, index)
        options = {"noise_level": 0.0, "sde_type": sde_type}
        got = compat.sde_step_with_logprob(scheduler, velocity, timestep, latents, **options)
        close(got[0], exact)
        close(got[2], exact)
        assert not got[3].any()
        mix = compat.mix_grpo_step(velocity, latents, 0, SIGMAS, index, None, **options)
        assert torch.equal(mix[0], got[0]) and torch.equal(mix[3], got[2]) and mix[4] == 0
        scored = compat.sde_step_with_logprob(
            scheduler, velocity, timestep, latents, prev_sample=latents, **options
        )[1]
        if sde_type == "cps":
            assert not got[1].any() and not mix[2].any()
            close(scored, -(latents.double() - exact).square().flatten(1).mean(1))
        else:
            granular = compat.flow_grpo_step(velocity, latents, 0, SIGMAS, index, None)
            assert torch.equal(granular[0], got[0])
            for log_prob in (got[1], mix[2], scored, granular[2]):
                assert log_prob.shape == (3,) and log_prob.isnan().all()


# DanceGRPO and MixGRPO


@pytest.mark.parametrize("step", [compat.flux_step, compat.dance_grpo_step])
@pytest.mark.parametrize("sde_solver", [True, False])
def test_dance_without_grpo(step: Callable, sde_solver: bool) -> None:
    velocity, latents = tensors("without grpo")
    state = torch.get_rng_state()
    for index in (0, torch.tensor(6), STEPS - 1):
        for ignored in (None, velocity):
            mean, x0 = step(velocity, latents, 0.3, SIGMAS, index, ignored, False, sde_solver)
            dynamics = "dance" if sde_solver else "dance-ode"
            exact = formula(dynamics, velocity, latents, [int(index)], 0.3, prev_sample=latents)
            close(mean, exact.mean)
            close(x0, exact.x0)
    assert torch.equal(torch.get_rng_state(), state)
    mean, _ = step(velocity, latents, 0, SIGMAS, 2, None, False, sde_solver)
    close(mean, euler(velocity, latents, 2))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_mix_grpo_without_solver_draws_nothing(sde_type: str) -> None:
    velocity, latents = tensors("without solver")
    state = torch.get_rng_state()
    got = compat.dance_grpo_step(velocity, latents, 0.3, SIGMAS, 4, None, True, False, sde_type)
    assert torch.equal(torch.get_rng_state(), state) and not got[2].any()
    exact = formula("cps", velocity, latents, [4], 0.8, prev_sample=latents).mean
    close(got[0], exact if sde_type == "cps" else euler(velocity, latents, 4))


def test_mix_grpo_determistic() -> None:
    velocity, latents = tensors("mix determistic")
    for given in (None, velocity):
        got = compat.mix_grpo_step(velocity, latents, 0.7, SIGMAS, 4, given, determistic=True)
        close(got[0], euler(velocity, latents, 4))
        exact = formula("flow", velocity, latents, [4], 0.7, prev_sample=got[0])
        close(got[2], exact.log_prob)
        close(got[3], exact.mean)


def test_mix_grpo_noise_levels() -> None:
    velocity, latents, given = tensors("noise levels", count=3)
    for options, dynamics, level in (
        ({"noise_level": 0.5}, "flow", 0.5),
        ({"sde_type": "cps"}, "cps", 0.8),  # and not eta
        ({"sde_type": "cps", "noise_level": 0.5}, "cps", 0.5),
    ):
        exact = formula(dynamics, velocity, latents, [4], level, prev_sample=given)
        got = compat.mix_grpo_step(velocity, latents, 0.7, SIGMAS, 4, given, **options)
        close(got[2], exact.log_prob)
        close(got[4], exact.std.squeeze())


def test_given_sample_is_returned_itself() -> None:
    velocity, latents, given = tensors("given", count=3)
    assert compat.flux_step(velocity, latents, 0.3, SIGMAS, 1, given, True, True)[0] is given
    assert compat.flow_grpo_step(velocity, latents, 0.7, SIGMAS, 1, given)[0] is given
    half = given.bfloat16()
    timestep = SIGMAS[1:2] * 1000
    got = compat.sde_step_with_logprob(
        Scheduler(SIGMAS), velocity, timestep, latents, prev_sample=half
    )
    assert torch.equal(got[0], half.float())


# Noise and schedulers of diffusers


def test_noise_is_diffusers_randn_tensor() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    device = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        for seeds in ([3], [3, 1, 4]):
            ours, theirs = (
                [torch.Generator().manual_seed(seed) for seed in seeds] for _ in range(2)
            )
            exact = randn_tensor(SHAPE, theirs, device, dtype)
            assert torch.equal(_step.randn(torch.Size(SHAPE), ours, device, dtype), exact)
        torch.manual_seed(2)
        exact = randn_tensor(SHAPE, None, device, dtype)
        torch.manual_seed(2)
        assert torch.equal(_step.randn(torch.Size(SHAPE), None, device, dtype), exact)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_scheduler_of_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    velocity, latents, given = tensors("diffusers", count=3)
    for index, timestep in enumerate(scheduler.timesteps):
        got = compat.sde_step_with_logprob(
            scheduler, velocity, timestep.repeat(3), latents, prev_sample=given
        )
        like = compat.flow_grpo_step(velocity, latents, 0.7, scheduler.sigmas, index, given)
        assert torch.equal(got[1], like[2])
