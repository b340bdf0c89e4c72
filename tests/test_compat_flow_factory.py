"""What the step of Flow-Factory keeps of its peer beside the values of a step."""

from __future__ import annotations

import warnings

import cases
import peers
import pytest
import torch
from peers import STEPS, Scheduler, schedule
from torch import Tensor

from g2rpo_kernels import compat
from g2rpo_kernels.compat import flow_factory

SIGMAS = schedule()
LEVELS = {"Flow-SDE": ("flow", 0.7), "Dance-SDE": ("dance", 0.3), "CPS": ("cps", 0.8)}
step = compat.flow_factory_step


def tensors(*key: object, count: int = 2) -> list[Tensor]:
    draw = cases.generator(*key)
    return [torch.randn(3, 5, 8, generator=draw) for _ in range(count)]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def close(got: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(got.double(), exact.double(), atol=2e-6, rtol=1e-6)


def same(one: compat.SDESchedulerOutput, other: compat.SDESchedulerOutput) -> bool:
    pairs = zip(one.to_dict().values(), other.to_dict().values(), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_ode() -> None:
    velocity, latents, given = tensors("ode", count=3)
    scheduler = Scheduler(SIGMAS, dynamics_type="ODE")
    state = torch.get_rng_state()
    for index in (0, 6, STEPS - 1):
        timestep = scheduler.timesteps[index]
        got = step(scheduler, velocity, timestep, latents)
        sigma, sigma_next = SIGMAS[index].double(), SIGMAS[index + 1].double()
        close(got.next_latents, peers.euler(velocity.double(), latents.double(), sigma, sigma_next))
        assert torch.equal(got.next_latents_mean, got.next_latents)
        assert got.std_dev_t.shape == got.dt.shape == (3, 1, 1) and not got.std_dev_t.any()
        assert torch.equal(got.log_prob, torch.zeros(3))
        close(got.dt, (sigma_next - sigma).expand(3, 1, 1))
        kept = step(scheduler, velocity, timestep, latents, given)
        assert torch.equal(kept.next_latents, given)
        assert torch.equal(kept.next_latents_mean, got.next_latents)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dynamics_type", LEVELS)
def test_noise_where_the_scheduler_says(dynamics_type: str) -> None:
    """noise_level None: the scheduler's at its chosen steps and 0 elsewhere, a sample its own."""
    velocity, latents, given = tensors("levels", count=3)
    dynamics, level = LEVELS[dynamics_type]
    chosen = {"current_sde_steps": torch.tensor([5, 2]), "noise_level": level}
    scheduler = Scheduler(SIGMAS, dynamics_type=dynamics_type, **chosen)
    timestep = scheduler.timesteps[[2, 3, 5]]
    got = step(scheduler, velocity, timestep, latents, given)
    explicit = step(scheduler, velocity, timestep, latents, given,
                    noise_level=torch.tensor([level, 0.0, level]))  # fmt: skip
    exact = peers.step(
        dynamics, velocity.double(), latents.double(), column(*SIGMAS[[2, 3, 5]]),
        column(*SIGMAS[[3, 4, 6]]), column(level, 0, level), sigma_max=column(SIGMAS[1]),
        prev_sample=given.double(),
    )  # fmt: skip
    for output in (got, explicit):
        close(output.next_latents_mean, exact.mean)
        close(output.std_dev_t, exact.diffusion if dynamics == "flow" else exact.std)
        close(output.log_prob[::2], exact.log_prob[::2])
        if dynamics == "cps":
            close(output.log_prob[1], exact.log_prob[1])
        else:
            assert output.log_prob[1].isnan()
    scheduler.is_eval = True
    quiet = step(scheduler, velocity, timestep, latents, noise_level=0.9)
    steps_to = column(*SIGMAS[[2, 3, 5]]), column(*SIGMAS[[3, 4, 6]])
    close(quiet.next_latents, peers.euler(velocity.double(), latents.double(), *steps_to))
    assert not quiet.std_dev_t.any()


@pytest.mark.parametrize("dynamics_type", LEVELS)
def test_timestep_next(dynamics_type: str) -> None:
    """Any two levels, numbers or tensors; with the schedule's own ones it changes nothing."""
    velocity, latents, given = tensors("next", count=3)
    dynamics, level = LEVELS[dynamics_type]
    scheduler = Scheduler(SIGMAS, dynamics_type=dynamics_type, noise_level=level)
    for now, then in ((1000.0, 640.0), (torch.tensor([1000.0, 910.0, 555.0]), 300.0)):
        got = step(scheduler, velocity, now, latents, given, then, noise_level=level)
        sigma = (torch.as_tensor(now) / 1000).double().view(-1, 1, 1)
        exact = peers.step(
            dynamics, velocity.double(), latents.double(), sigma, column(torch.tensor(then / 1000)),
            column(level), sigma_max=column(SIGMAS[1]), prev_sample=given.double(),
        )  # fmt: skip
        close(got.log_prob, exact.log_prob)
        close(got.next_latents_mean, exact.mean)
    first = scheduler.timesteps[:2]  # 1000 and what 1000 * sigma rounds to
    plain = step(scheduler, velocity, first[0], latents, given)
    assert same(plain, step(scheduler, velocity, first[0], latents, given, SIGMAS[1] * 1000))


def test_sigma_max() -> None:
    velocity, latents, given = tensors("sigma_max", count=3)
    scheduler = Scheduler(SIGMAS)
    for sigma_max in (0.9, 0.99, None, SIGMAS[1].item()):
        got = step(scheduler, velocity, 1000.0, latents, given, sigma_max=sigma_max)
        exact = peers.step(
            "flow", velocity.double(), latents.double(), column(1), column(SIGMAS[1]), column(0.7),
            sigma_max=column(sigma_max or SIGMAS[1]), prev_sample=given.double(),
        )  # fmt: skip
        close(got.log_prob, exact.log_prob)
        close(got.std_dev_t, exact.diffusion.expand(3, 1, 1))


def test_an_integer_is_an_index_and_warned_of() -> None:
    velocity, latents, given = tensors("integer", count=3)
    scheduler = Scheduler(SIGMAS)
    exact = step(scheduler, velocity, scheduler.timesteps[4], latents, given)
    for index in (4, torch.tensor(4), torch.tensor([4], dtype=torch.int32)):
        with pytest.warns(UserWarning, match="timestep is .*4.* index of a step") as caught:
            got = step(scheduler, velocity, index, latents, given)
        assert same(got, exact) and caught[0].filename == __file__


def test_only_what_is_asked_for() -> None:
    velocity, latents = tensors("asked")
    scheduler = Scheduler(SIGMAS)
    timestep = scheduler.timesteps[4]

    def run(**options: object) -> compat.SDESchedulerOutput | tuple:
        generator = torch.Generator().manual_seed(1)
        return step(scheduler, velocity, timestep, latents, generator=generator, **options)

    every = run()
    names = list(every.to_dict())
    assert names == list(flow_factory._FIELDS) and None not in every.to_dict().values()
    for name in names:
        only = run(return_kwargs=[name]).to_dict()
        assert torch.equal(only.pop(name), getattr(every, name))
        assert set(only.values()) == {None}
    assert run(compute_log_prob=False).log_prob is None
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    for got, name in zip(run(return_dict=False, return_kwargs=[]), order, strict=True):
        assert torch.equal(got, getattr(every, name))
    with pytest.warns(UserWarning, match="'sigma'.*next_latents"):
        run(return_kwargs=["sigma", "dt"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(return_kwargs=("dt",))


def test_output_reads_like_diffusers() -> None:
    output = compat.SDESchedulerOutput.from_dict({"dt": torch.ones(1), "x0": None})
    assert output["dt"] is output.dt is output[0] and output["log_prob"] is None
    assert output.to_tuple() == (output.dt,)
    assert set(output.to_dict()) == set(flow_factory._FIELDS)


def test_as_the_method_of_a_scheduler() -> None:
    """The one-line change of docs/integrate.md, with a scheduler of diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class SDEScheduler(FlowMatchEulerDiscreteScheduler):
        is_eval, noise_level, dynamics_type = False, 0.7, "Flow-SDE"
        current_sde_steps = torch.arange(9)

        from g2rpo_kernels.compat import flow_factory_step as step  # after the class's own methods

    scheduler = SDEScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    velocity, latents, given = tensors("method", count=3)
    for index, timestep in enumerate(scheduler.timesteps[:-1]):
        got = scheduler.step(
            noise_pred=velocity, timestep=timestep, latents=latents, next_latents=given
        )
        like = compat.mix_grpo_step(velocity, latents, 0.7, scheduler.sigmas, index, given)
        assert torch.equal(got.log_prob, like[2])
        assert torch.equal(got.next_latents_mean, like[3])
    last = scheduler.step(velocity, scheduler.timesteps[-1], latents, compute_log_prob=False)
    assert not last.std_dev_t.any()  # the last step is not one of current_sde_steps
