"""The caches of g2rpo_kernels.compat: never stale, bounded, usable in every autograd mode.

Coefficients are kept by the numbers they come from; schedules on a GPU, by the tensor and its
version. Here the second is made to think that the CPU is a GPU.
"""

from __future__ import annotations

import gc
import math
import warnings

import cases
import pytest
import torch
from peers import Scheduler, schedule
from torch import Tensor

from g2rpo_kernels import compat
from g2rpo_kernels.compat import _schedule

SIGMAS = schedule()


def tensors(*key: object, count: int = 3) -> list[Tensor]:
    draw = cases.generator(*key)
    return [torch.randn(3, 5, 8, generator=draw) for _ in range(count)]


def test_coefficients_made_in_inference_mode_serve_the_backward() -> None:
    _schedule._steps.cache_clear()
    velocity, latents, given = tensors("inference")
    arguments = (0.61, SIGMAS, 4)
    with torch.inference_mode():
        old = compat.flow_grpo_step(velocity, latents, *arguments, given)[2]
    leaf = velocity.clone().requires_grad_()
    new = compat.flow_grpo_step(leaf, latents, *arguments, given)[2]
    new.sum().backward()
    assert _schedule._steps.cache_info().hits == 1
    assert torch.equal(new, old) and leaf.grad.abs().sum() > 0


def test_a_schedule_that_changes_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schedule, "_is_cheap", lambda values: False)  # as on a GPU
    velocity, latents, given = tensors("stale")
    kept = len(_schedule._on_host)
    sigmas = schedule()

    def log_prob(sigmas: Tensor) -> Tensor:
        return compat.flow_grpo_step(velocity, latents, 0.7, sigmas, 4, given)[2]

    first = log_prob(sigmas)
    (copy,) = [entry[2] for entry in _schedule._on_host.values() if entry[0]() is sigmas]
    assert torch.equal(log_prob(sigmas), first)
    assert _schedule.on_host(sigmas) is copy  # read once
    sigmas[4:6].mul_(0.9)  # through a view, in place
    fresh = log_prob(sigmas.clone())
    assert torch.equal(log_prob(sigmas), fresh) and not torch.equal(fresh, first)
    with torch.inference_mode():
        uncounted = schedule()
        before = log_prob(uncounted)
        uncounted[4:6].mul_(0.9)
        after = log_prob(uncounted)
    assert torch.equal(before, first) and torch.equal(after, fresh)
    del sigmas
    gc.collect()
    assert len(_schedule._on_host) == kept


def test_caches_are_bounded_and_closed() -> None:
    assert _schedule._steps.cache_info().maxsize == 1024
    velocity, latents, given = tensors("closed")
    timestep = SIGMAS[4:5] * 1000
    for _ in range(2):
        *_, std, sqrt_dt = compat.sde_step_with_logprob(
            Scheduler(SIGMAS), velocity, timestep, latents, prev_sample=given, return_sqrt_dt=True
        )
        elapsed = (SIGMAS[4] - SIGMAS[5]).item()
        diffusion = 0.7 * math.sqrt(SIGMAS[4] / (1 - SIGMAS[4]))
        assert std.item() == pytest.approx(diffusion, rel=1e-6)
        assert sqrt_dt.item() == pytest.approx(math.sqrt(elapsed), rel=1e-6)
        std.zero_(), sqrt_dt.zero_()  # the caller's own
        step_std = compat.mix_grpo_step(velocity, latents, 0.7, SIGMAS, 4, given)[4]
        assert step_std.item() == pytest.approx(diffusion * math.sqrt(elapsed), rel=1e-6)
        step_std.zero_()
        output = compat.flow_factory_step(
            Scheduler(SIGMAS), velocity, timestep, latents, given, dynamics_type="CPS"
        )
        std = SIGMAS[5].item() * math.sin(0.7 * math.pi / 2)
        assert output.std_dev_t.flatten().tolist() == pytest.approx([std] * 3, rel=1e-6)
        assert output.dt.flatten().tolist() == pytest.approx([-elapsed] * 3, rel=1e-6)
        output.std_dev_t.zero_(), output.dt.zero_()


def test_a_compiled_caller_breaks_its_graph_and_goes_on() -> None:
    velocity, latents, given = tensors("compiled")

    def log_prob(velocity: Tensor) -> Tensor:
        return 2 * compat.flow_grpo_step(2 * velocity, latents, 0.7, SIGMAS, 4, given)[2]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tracing into the cache would be warned of
        compiled = torch.compile(log_prob, backend="eager")(velocity)
    assert torch.equal(compiled, log_prob(velocity))
