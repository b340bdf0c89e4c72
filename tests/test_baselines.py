"""Every method's steps, log-probs and advantages are its peer's: real updates against the published
formulas in float64 (baselines.py). Losses and gradients: test_baseline_losses.py.

Different on purpose, and compared with what is published times the known factor where there is one:

    noise of the last step   Flow-GRPO draws it, and trains all but it; here it is an Euler step.
                             DanceGRPO's image, the x0-prediction of its last step, is that step's.
    window                   MixGRPO's stops before step T - 2, and is cut and then empty there;
                             here its last place is the last one where it fits.
    log-prob's constant      DanceGRPO's code drops it: ratios do not see it.
    std of the advantages    Flow-GRPO's: numpy's (over n) + 1e-4; here over n - 1, + 1e-8.
    several rewards          Flow-GRPO adds rewards; here, as in MixGRPO, advantages are added.
    KL                       Flow-GRPO's code divides by the diffusion's square, here by the step's:
                             theirs is -dt of it.
    GRPO-Guard               its code takes one bias for a whole batch, and divides losses by -dt;
                             here a bias for each row, as in the paper, and no division.
"""

from __future__ import annotations

import baseline_updates as updates
import baselines
import peers
import pytest
import torch
from baseline_updates import (
    GROUP,
    PROMPTS,
    ROWS,
    close,
    per_step,
    published_advantages,
    record,
)
from baselines import METHODS, STEPS
from tiny import TinyModel, brightness, contrast
from torch import Tensor

from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer

RUNS = [name for name, method in METHODS.items() if not method.granularities]
BRANCHES = [name for name, method in METHODS.items() if method.granularities]


def stochastic_steps(latents: Tensor, velocity: Tensor) -> list[int]:
    """[N + 1, M, *S], [N, M, *S] -> the steps that are not Euler's; none is in between."""
    sigmas, found = baselines.schedule(), []
    for k, (x, v, following) in enumerate(zip(latents, velocity, latents[1:], strict=False)):
        euler = peers.euler(v.double(), x.double(), sigmas[k], sigmas[k + 1])
        away = (following - euler).abs().flatten(1).amax(1)  # [M]
        if float(away.max()) > 1e-6:
            assert float(away.min()) > 0.02, f"step {k} is {away} from Euler's"
            found.append(k)
    return found


# Which steps are stochastic, and what they draw


@pytest.mark.parametrize("preset", METHODS)
def test_the_preset_is_the_published_method(preset: str) -> None:
    """What the recordings do not show: the presets' keys that are made small for them, or act in
    later updates alone."""
    config = updates.preset_config(preset)
    method, rollout, objective = METHODS[preset], config.rollout, config.objective
    assert (rollout.steps, rollout.shift) == (STEPS, 3.0)
    assert (objective.clip_range, objective.advantage_clip) == (method.clip_range, 5.0)
    assert (objective.kl, objective.ratio, objective.stepping) == (0.0, "plain", "accumulate")
    assert rollout.window_updates == (method.moves or 1)


@pytest.mark.parametrize("preset", METHODS)
def test_steps(preset: str) -> None:
    """x' = mean + std * noise at the stochastic steps, Euler's at the others, within 1e-6."""
    run = record(preset)
    method, drawn = run.method, stochastic_steps(run.latents, run.velocity)
    if method.granularities:
        assert (drawn, len(run.velocity), len(run.velocity[0])) == ([], STEPS // 2, PROMPTS)
        drawn = list(run.branches)
    else:
        assert run.velocity.shape[:2] == (STEPS, ROWS)
    assert drawn in method.windows(1)
    for k in drawn:
        x_next, steps = run.reached(k), torch.full([run.velocity.shape[1]], k)
        truth = baselines.step(method, run.velocity[k], run.latents[k], steps, noise=run.noise[k])
        close(x_next.flatten(0, 1), truth.prev_sample, atol=1e-6)
        noise = (x_next.flatten(0, 1) - truth.mean) / truth.std
        assert len(noise) == ROWS and abs(noise.std() - 1) < 0.15 and abs(noise.mean()) < 0.15
        assert torch.pdist(noise.flatten(1)).min() > 1  # of each branch and run its own


@pytest.mark.parametrize("preset", RUNS)
def test_initial_noise(preset: str) -> None:
    """DanceGRPO and MixGRPO begin a prompt's runs at one noise, Flow-GRPO each at its own."""
    noise = record(preset).latents[0].view(PROMPTS, GROUP, -1)
    assert noise.mean().abs() < 0.15 and (noise.std() - 1).abs() < 0.15
    assert torch.pdist(noise[:, 0]).min() > 1  # another one for another prompt
    for group in noise:
        apart = torch.pdist(group)
        assert (apart.max() == 0) if METHODS[preset].common_noise else (apart.min() > 1)


@pytest.mark.parametrize(
    "preset, numbers",
    [("mix-grpo-digits", [1, 8, 9, 17, 96, 97]), ("flow-grpo-fast-digits", range(1, 13))],
)
def test_windows(preset: str, numbers: list[int]) -> None:
    """MixGRPO's slides on by one; Flow-GRPO-Fast's is anywhere in the first half."""
    config = updates.preset_config(preset, **{"train.prompts_per_update": 1})
    trainer = updates.make_trainer(config)
    forwards, starts = updates.watch(trainer), []
    for update in numbers:
        forwards.clear()
        ids = trainer.sampler.ids(update)
        conditions = trainer.model.embed([trainer.sampler.prompts[i] for i in ids])
        with trainer.phases("trajectories"):
            finished = trainer.roll_out(update, ids, conditions).finished[0, :, 0]
        latents, velocity = updates.along_runs(forwards, "trajectories")
        drawn = stochastic_steps(torch.cat([latents, finished[None]]), velocity)
        assert drawn in METHODS[preset].windows(update)
        starts.append(drawn[0])
    if METHODS[preset].moves:
        assert starts == [0, 0, 1, 2, 11, 0]
    else:
        moves = {b - a for a, b in zip(starts, starts[1:], strict=False)}
        assert len(set(starts)) >= 4 and len(moves) >= 4  # it does not slide


@pytest.mark.parametrize("preset", METHODS)
def test_trained_steps(preset: str) -> None:
    """All stochastic ones of every run, in order; DanceGRPO's 9 of 15, shuffled for each."""
    run = record(preset)
    rows = PROMPTS if run.branches else ROWS
    of_row: dict[int, list[int]] = {row: [] for row in range(rows)}
    for trained in run.trained:
        for row, k in zip(trained.rows.tolist(), trained.steps.tolist(), strict=True):
            of_row[row].append(k)
    if run.method.fraction < 1:
        assert all(len(ks) == len(set(ks)) == 9 for ks in of_row.values())
        assert len({tuple(ks) for ks in of_row.values()}) == ROWS
        assert {k for ks in of_row.values() for k in ks} == set(run.method.stochastic)
    else:
        assert all(ks == of_row[0] for ks in of_row.values())
        assert of_row[0] in run.method.windows(1)


@pytest.mark.parametrize("preset", METHODS)
def test_log_probs(preset: str) -> None:
    """Of the rollout and, off-policy, of the update; means over all elements, within 1e-6."""
    run, method, compared = record(preset), METHODS[preset], 0
    for made in run.trained:
        latents, x_next = made.forward.latents, made.x_next

        def truth(velocity: Tensor, constant: bool = True) -> peers.Step:
            given = method, velocity, latents, made.steps, x_next  # noqa: B023
            return baselines.step(*given, constant=constant)

        old, new = truth(made.old_velocity), truth(made.forward.velocity)
        for got, exact in ((made.old_log_prob, old), (made.out.log_prob, new)):
            error = (got.flatten() - exact.log_prob).abs()
            assert (error <= 1e-6 * exact.scale).all() and error.isfinite().all()
            compared += got.numel()
        moved = made.out.log_prob - made.old_log_prob
        dropped = [truth(v, constant=False) for v in (made.forward.velocity, made.old_velocity)]
        close(moved.flatten(), dropped[0].log_prob - dropped[1].log_prob, atol=8e-7)
        if method.dynamics == "cps":  # -(x' - mean)^2, all constants removed
            squared = (x_next.flatten(0, 1) - old.mean).square().flatten(1).mean(1)
            close(made.old_log_prob.flatten(), -squared, atol=2e-7)
    assert compared == 2 * ROWS * method.trained


# Advantages


@pytest.mark.parametrize("preset", METHODS)
def test_advantages(preset: str) -> None:
    """Those that the update was given, of every row and step, within 2e-6."""
    run = record(preset)
    method, truth = run.method, published_advantages(run)
    places = len(method.stochastic) if method.granularities else 1
    assert run.finished.shape[:3] == (max(1, len(method.granularities)), ROWS, places)
    assert truth.shape == (PROMPTS, places, GROUP) and truth.std() > 0.5
    for index, made in enumerate(run.trained):
        close(made.advantages, per_step(run, truth, index), atol=2e-6)


@pytest.mark.parametrize("preset", BRANCHES)
def test_completions_at_every_granularity(preset: str) -> None:
    """Granular-GRPO: on from sigma[k + 1] along sigmas[k + 2::g]; the image is the x0-prediction of
    the last evaluation. By a policy of the rollout's weights, within 5e-6."""
    run, sigmas, compared = record(preset), baselines.schedule(), 0
    everyone = run.conditions[torch.arange(PROMPTS).repeat_interleave(GROUP)]
    for j, g in enumerate(run.method.granularities):
        for place, (k, branches) in enumerate(run.branches.items()):
            x, path = branches.flatten(0, 1).double(), [k + 1, *range(k + 2, STEPS + 1, g)]
            for i, following in zip(path, path[1:], strict=False):
                sigma = sigmas[i].float().expand(len(x))
                velocity = run.model.policy.predict(x.float(), sigma, everyone).double()
                x0, _ = peers.x0_and_x1(velocity, x, sigmas[i])
                x = peers.euler(velocity, x, sigmas[i], sigmas[following])
            close(run.finished[j, :, place], x0, atol=5e-6)
            compared += 1
    assert compared == 8 * len(run.method.granularities)


def test_several_rewards_of_mix_grpo(monkeypatch: pytest.MonkeyPatch) -> None:
    """advantage_aggr: each reward's own advantages of a prompt's group, then the weighted sum."""
    made = [Reward("b", brightness, 0.25), Reward("c", contrast, 0.75)]
    trainer = Trainer(updates.preset_config("mix-grpo-digits"), TinyModel(), made)
    kept, roll_out, improve = {}, trainer.roll_out, trainer.improver.improve

    def keep_rollout(*arguments):
        kept["finished"] = roll_out(*arguments)
        return kept["finished"]

    def keep_advantages(chunks, conditions, advantages):
        kept["advantages"] = advantages
        return improve(chunks, conditions, advantages)

    monkeypatch.setattr(trainer, "roll_out", keep_rollout)
    monkeypatch.setattr(trainer.improver, "improve", keep_advantages)
    trainer.update()
    images = trainer.model.decode(kept["finished"].finished.flatten(0, 2))
    truth = sum(
        reward.weight
        * baselines.standardised(
            reward.function(images, []).double().view(PROMPTS, GROUP), 1
        ).flatten()
        for reward in made
    )
    assert kept["advantages"].shape == (ROWS, 4, 1)
    close(kept["advantages"], truth.view(-1, 1, 1).expand(-1, 4, 1), atol=2e-6)
