"""Every method's loss and gradient are its peer's, off-policy, inside and outside the clip: real
updates against the published formulas in float64 (baselines.py). What differs on purpose is
said in test_baselines.py.
"""

from __future__ import annotations

import baselines
import pytest
import torch
from baseline_updates import (
    GROUP,
    Recording,
    Trained,
    close,
    per_step,
    published_advantages,
    record,
)
from baselines import METHODS
from tiny import TinyModel
from torch import Tensor

RUNS = [name for name, method in METHODS.items() if not method.granularities]

# The weights drift between rollout and update, so that some ratios are clipped and some are not.
CASES = {
    "published": {},
    "guard": {"moved": 250.0, "ratio": "normalised"},
    "kl": {"kl": 0.04},
    "beyond_5": {"weight": 8.0},
}


@pytest.mark.parametrize(
    "preset, case",
    [
        *((preset, case) for preset in [*RUNS, "g2rpo-digits"] for case in CASES),
        ("g2rpo-no-mgai-digits", "published"),
    ],
)
def test_loss_and_gradient(preset: str, case: str) -> None:
    """The mean over all rows, branches and steps, and its gradient into every velocity."""
    run = record(preset, **CASES[case])
    losses, velocities = check_losses(run, case == "guard", **CASES[case])
    torch.cat(losses).mean().backward()
    check_gradients(run, velocities, some_are_zero=preset in RUNS and case != "kl")


def test_a_step_of_the_optimizer_after_every_position() -> None:
    """Granular-GRPO's code: a step's loss is the mean over its own rows and branches alone."""
    run = record("g2rpo-digits", stepping="per_position")
    losses, velocities = check_losses(run)
    assert [len(loss) for loss in losses] == [2 * GROUP, GROUP] * 8
    for first, second in zip(losses[::2], losses[1::2], strict=True):
        torch.cat([first, second]).mean().backward()
    check_gradients(run, velocities)


def check_losses(
    run: Recording, guard: bool = False, *, kl: float = 0.0, weight: float = 1.0, **recorded: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The published losses [R * G] of every forward, that its mean is the update's own, and the
    velocities they are of."""
    method, starting = run.method, TinyModel().policy
    advantages, losses, velocities, outside = published_advantages(run, weight), [], [], []
    for index, made in enumerate(run.trained):
        latents = made.forward.latents
        velocity = made.forward.velocity.double().requires_grad_()
        reference = starting.predict(latents, made.forward.sigma, run.conditions[made.rows])
        ours, old, start = (
            baselines.step(
                method, v, latents, made.steps, made.x_next,
                constant=method.dynamics != "dance",  # as in DanceGRPO's code
            )
            for v in (velocity, made.old_velocity, reference)
        )  # fmt: skip
        if guard:
            ratio = baselines.guard_ratio(ours, old, method.dynamics)
        else:
            ratio = baselines.ratio(ours, old)
        given = per_step(run, advantages, index).flatten()
        loss = baselines.clipped(ratio, given, method.clip_range)
        if kl:
            divergence = baselines.divergence(ours, start, method.dynamics)
            loss = loss + kl * divergence
            close(made.out.kl, divergence.detach().mean(), atol=0, rtol=3e-6)
            if method.one_std and method.dynamics == "flow":  # as Flow-GRPO's code has it
                theirs = (ours.mean - start.mean) ** 2 / (2 * ours.diffusion**2)
                (dt,) = set(ours.dt.flatten().tolist())
                close(made.out.kl * -dt, theirs.detach().mean(), atol=0, rtol=3e-6)
        rounding = 4e-7 * float(given.clamp(-5, 5).abs().mean())  # of ratios in float32
        close(made.out.loss, loss.detach().mean(), atol=rounding, rtol=1e-6)
        losses.append(loss), velocities.append(velocity)
        outside.append((ratio.detach() - 1).abs() > method.clip_range)
    assert len(losses) == 2 * method.trained
    assert 0.05 < torch.cat(outside).double().mean() < 0.95
    assert bool((advantages.abs() > 5).any()) == (weight > 5)
    return losses, velocities


def check_gradients(run: Recording, velocities: list[Tensor], some_are_zero: bool = False) -> None:
    """Into velocities, within 5e-6 of the largest element of a forward's.

    some_are_zero: rows of one branch, where a clipped one has no gradient at all."""
    largest = max(float(velocity.grad.abs().max()) for velocity in velocities)
    compared = zero = 0
    for made, velocity in zip(run.trained, velocities, strict=True):
        got, truth = made.forward.gradient, velocity.grad
        scale = max(float(truth.abs().max()), 1e-3 * largest)
        sure = ~rows_at_edge(run, made)
        if sure.any():
            close(got[sure], truth[sure], atol=5e-6 * scale)
        clipped = [(gradient[sure] == 0).flatten(1).all(1) for gradient in (got, truth)]
        assert torch.equal(*clipped)
        compared, zero = compared + len(clipped[0]), zero + int(clipped[0].sum())
    assert zero < compared > 0.8 * sum(len(made.rows) for made in run.trained)
    assert zero > 0 or not some_are_zero


def rows_at_edge(run: Recording, made: Trained) -> Tensor:  # bool [R]
    """Rows with a ratio so near to the clip that float32 may put it on the other side."""
    ours, old = (
        baselines.step(run.method, v, made.forward.latents, made.steps, made.x_next)
        for v in (made.forward.velocity, made.old_velocity)
    )
    guard = run.config.objective.ratio == "normalised"
    plain = baselines.ratio(ours, old)
    ratio = baselines.guard_ratio(ours, old, run.method.dynamics) if guard else plain
    edge = ((ratio - 1).abs() - run.method.clip_range).abs() < 6e-7
    return edge.view(made.old_log_prob.shape).any(1)
