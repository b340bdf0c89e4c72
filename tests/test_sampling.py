"""Trajectories and windows: what is stochastic, what is trained, and that ratios are exactly 1."""

import math

import pytest
import torch
from tiny import TinyModel, brightness, contrast, roll_out, tiny_config

import g2rpo_kernels as gk
from g2rpo.errors import ConfigurationError
from g2rpo.objective import loss_table, summarise_losses
from g2rpo.rewards import Reward
from g2rpo.sampling import window_positions
from g2rpo.seeds import shuffled_steps
from g2rpo.trainer import Trainer


def trajectories(**rollout):
    settings = {"sampling": "trajectories", "granularities": [1], "branch_batch": 4, **rollout}
    return tiny_config(**settings)


def make_trainer(config, rewards=None, **options):
    rewards = rewards or [Reward("brightness", brightness)]
    return Trainer(config, TinyModel(), rewards, **options)


@pytest.mark.parametrize("common", [True, False])
def test_trajectories_are_stochastic_where_told(common):
    """At the positions each run takes a step of its own, at the others the Euler step."""
    config = trajectories(common_noise=common, sde_positions=[1, 3], branch_batch=8)
    trainer = make_trainer(config)
    rollout = roll_out(trainer)
    ((rows, runs),) = rollout.chunks
    assert (rows, len(runs)) == (slice(0, 8), 2)
    assert rollout.finished.shape == (1, 8, 1, 16, 4) and rollout.anchors is None
    first = runs.step(0).latents  # after the deterministic step 0
    assert torch.equal(first[0], first[1]) == common
    assert not torch.equal(runs.x_next[0, 0], runs.x_next[0, 1])
    for index, k in enumerate([1, 3]):
        step = runs.step(index)
        assert torch.equal(step.sigmas, trainer.sigmas[k].expand(8))
        velocity = trainer.policy.predict(step.latents, step.sigmas, rollout.conditions)
        a, b, s, w, c = step.coefficients.table[0].double().tolist()
        mean = a * step.latents.double() + b * velocity.double()
        noise = (step.x_next[:, 0].double() - mean) / s
        assert 0.8 < noise.std() < 1.2 and noise.mean().abs() < 0.2
        expected = -w * (step.x_next[:, 0].double() - mean).square().flatten(1).mean(1) + c
        torch.testing.assert_close(step.old_log_prob[:, 0].double(), expected, atol=2e-5, rtol=1e-5)
    # between the two: an Euler step of the policy's own velocity
    at, sigma, then = runs.x_next[0], trainer.sigmas[2].expand(8), trainer.sigmas[3]
    euler = at + (then - sigma[0]) * trainer.policy.predict(at, sigma, rollout.conditions)
    torch.testing.assert_close(runs.step(1).latents, euler, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.6])
@pytest.mark.parametrize("ratio", ["plain", "normalised"])
def test_ratio_is_exactly_one(fraction, ratio, monkeypatch):
    config = trajectories(trained_fraction=fraction, sde_positions=[0, 1, 2, 3])
    config.objective.ratio = ratio
    row = make_trainer(config).update()
    assert row["ratio_mean"] == row["ratio_max"] == 1
    assert row["grad_norm"] > 0 and math.isfinite(row["loss"])


def test_every_step_of_a_run_has_its_one_advantage(monkeypatch):
    import g2rpo_kernels as gk

    seen, original = [], gk.policy_loss

    def look(velocity, latents, x_next, old, advantages, *rest, **named):
        seen.append(advantages.clone())
        return original(velocity, latents, x_next, old, advantages, *rest, **named)

    monkeypatch.setattr(gk, "policy_loss", look)
    config = trajectories(branch_batch=8)
    make_trainer(config, [Reward("b", brightness), Reward("c", contrast)]).update()
    assert len(seen) == 3 and all(a.shape == (8, 1) for a in seen)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    groups = seen[0].view(2, 4)  # two prompts, four runs: normalised within a prompt
    torch.testing.assert_close(groups.sum(1), torch.zeros(2), atol=1e-5, rtol=0)


def test_batches_do_not_change_the_runs():
    one, other = (roll_out(make_trainer(trajectories(branch_batch=b))) for b in (8, 4))
    torch.testing.assert_close(one.finished, other.finished, atol=1e-5, rtol=1e-5)
    assert len(other.chunks) == 2


def test_evaluations_of_trajectories_are_counted():
    config = trajectories(trained_fraction=0.5, sde_positions=[0, 1, 2, 3])
    config.objective.kl = 0.1
    trainer, rows = make_trainer(config), 0

    def hook(module, arguments, keywords):
        nonlocal rows
        rows += len(keywords["timestep"])

    trainer.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    row = trainer.update()
    assert row["evaluations"] == rows == 8 * (6 + 2 * 2)


def test_each_run_trains_steps_of_its_own():
    seeds = torch.randint(2**62, (10, 500), generator=torch.Generator().manual_seed(0))
    chosen = shuffled_steps(seeds, 6)
    assert chosen.shape == (6, 500)
    assert all(len(set(column)) == 6 for column in chosen.T.tolist())
    share = torch.stack([(chosen == k).any(0).double().mean() for k in range(10)])
    assert ((share - 0.6).abs() < 0.08).all()
    trainer = make_trainer(trajectories(trained_fraction=0.5, sde_positions=[0, 1, 2, 3]))
    ((_, runs), *_) = roll_out(trainer).chunks
    step = runs.step(0)
    assert len(runs) == 2 and len(set(step.sigmas.tolist())) > 1
    table = trainer.sampling.coefficients([0, 1, 2, 3]).table
    for row, sigma in enumerate(step.sigmas):
        k = trainer.sigmas.tolist().index(sigma.item())
        assert torch.equal(step.coefficients.table[row], table[k])


def test_windows_slide_and_jump():
    config = tiny_config(
        steps=16, sde_positions=list(range(8)), window=3, window_updates=2, window_stride=2
    )
    starts = [window_positions(config, update)[0] for update in range(1, 10)]
    assert starts == [0, 0, 2, 2, 4, 4, 0, 0, 2]
    assert window_positions(config, 1) == [0, 1, 2]
    config.rollout.window_order, config.rollout.window_stride = "random", 1
    jumps = [window_positions(config, update) for update in range(1, 41, 2)]
    assert {w[0] for w in jumps} == set(range(6)) and all(len(w) == 3 for w in jumps)
    assert jumps == [window_positions(config, update) for update in range(2, 42, 2)]


@pytest.mark.parametrize("sampling", ["singular", "trajectories"])
def test_a_window_moves_in_training(sampling):
    config = tiny_config(
        sampling=sampling, granularities=[1], sde_positions=[0, 1, 2, 3], window=2, steps=8
    )
    trainer = make_trainer(config)
    counts = [trainer.evaluations_per_update]
    rows = [trainer.update()]
    counts.append(trainer.evaluations_per_update)
    rows.append(trainer.update())
    assert rows[0]["evaluations"] == counts[0]
    assert rows[1]["evaluations"] == sum(counts)
    assert (counts[0] > counts[1]) == (sampling == "singular")  # later branches are shorter


@pytest.mark.parametrize("sampling", ["singular", "trajectories"])
def test_normalised_ratio_weighs_steps_alike(sampling):
    """GRPO-Guard: the gradient of a step is s times that of the plain ratio, on-policy."""
    found = {}
    for ratio in ("plain", "normalised"):
        config = tiny_config(
            sampling=sampling, granularities=[1], sde_positions=[1], branch_batch=8
        )
        config.objective.ratio, config.optimizer.max_grad_norm = ratio, 1e9
        trainer = make_trainer(config)
        trainer.improver.optimizer.step = lambda: None
        found[ratio] = trainer.update()["grad_norm"]
    s = trainer.sampling.coefficients([1]).table[0, 2].item()
    assert found["normalised"] == pytest.approx(s * found["plain"], rel=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"granularities": [1, 2]}, r"rollout.granularities is \[1, 2\]; expected \[1\] with"),
        ({"trained_fraction": 0.0}, r"rollout.trained_fraction is 0.0; expected in \(0, 1\]"),
        ({"trained_fraction": 1.5}, "rollout.trained_fraction is 1.5"),
        ({"window": 4}, r"rollout.window is 4; expected 1 to 3"),
        ({"window": 2, "window_stride": 0}, "rollout.window_stride is 0; expected at least 1"),
        ({"precision": "fp8"}, "expected null, or model.fuse true with it|rollout.precision"),
        ({"sampling": "singular", "common_noise": False}, "rollout.common_noise is False"),
        ({"sampling": "singular", "trained_fraction": 0.5}, "rollout.trained_fraction is 0.5"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        trajectories(**settings)


def test_means_of_the_losses_weigh_branches_alike():
    """However an update's rows are cut into forwards."""

    def loss(value: float, branches: int) -> gk.PolicyLoss:
        statistics = torch.tensor([1.0, 1.0 + value, value, 0.0, 0.0])
        return gk.PolicyLoss(torch.tensor(value), torch.zeros(branches, 1), statistics)

    row = summarise_losses(loss_table([loss(1.0, 8), loss(4.0, 4)]))
    assert row["loss"] == row["clip_fraction"] == pytest.approx(2.0)
    assert row["ratio_max"] == 5.0 and row["ratio_mean"] == 1.0
