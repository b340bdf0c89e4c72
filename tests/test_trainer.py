"""The update: on-policy to the last bit, both steppings, what is skipped, what is counted."""

import copy
import math

import pytest
import torch
from tiny import PROMPTS, TinyModel, brightness, broken, constant, contrast, tiny_config

import g2rpo_kernels as gk
from g2rpo.rewards import Reward
from g2rpo.trainer import Interrupted, Trainer


def make_trainer(config=None, rewards=None, **callbacks) -> Trainer:
    rewards = rewards or [Reward("brightness", brightness)]
    return Trainer(config or tiny_config(), TinyModel(), rewards, **callbacks)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.policy.transformer.state_dict())


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def losses(monkeypatch):
    calls, original = [], gk.policy_loss

    def spy(velocity, latents, x_next, old_log_prob, advantages, *rest, **keywords):
        out = original(velocity, latents, x_next, old_log_prob, advantages, *rest, **keywords)
        calls.append((old_log_prob, advantages, out))
        return out

    monkeypatch.setattr(gk, "policy_loss", spy)
    return calls


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_ratio_is_exactly_one(losses, dynamics):
    """accumulate: the stored old_log_prob and the update's own log_prob are the same bits."""
    config = tiny_config(dynamics=dynamics)
    config.optimizer.lr = 0.01  # so that a stale velocity would show
    trainer = make_trainer(config)
    for _ in range(2):
        before, row = weights(trainer), trainer.update()
        assert row["ratio_mean"] == row["ratio_max"] == 1.0
        assert row["clip_fraction"] == row["approx_kl"] == 0.0
        assert not same(before, weights(trainer))
    assert len(losses) == 2 * 3
    for old_log_prob, advantages, out in losses:
        assert old_log_prob.shape == advantages.shape == (2, 4)
        assert not old_log_prob.requires_grad
        assert torch.equal(out.log_prob, old_log_prob)
        assert advantages.std() > 0.1


def test_ratio_is_exactly_one_in_chunks(losses):
    """More prompts than a forward holds: anchor and update share their chunks."""
    config = tiny_config(branch_batch=2)
    config.train.prompts_per_update = 5
    row = make_trainer(config).update()
    assert [len(old) for old, _, _ in losses] == [2, 2, 1] * 3
    assert row["ratio_mean"] == row["ratio_max"] == 1.0


def test_per_position_leaves_the_policy(losses):
    """A step after every position: the first is on-policy, the later ones no longer."""
    config = tiny_config()
    config.objective.stepping = "per_position"
    trainer = make_trainer(config)
    steps = []
    original = trainer.improver.optimizer.step
    trainer.improver.optimizer.step = lambda: (steps.append(len(losses)), original())
    row = trainer.update()
    assert steps == [1, 2, 3]
    ratios = [(out.log_prob - old).exp() for old, _, out in losses]
    assert (ratios[0] == 1).all()
    assert (ratios[1] != 1).all() and (ratios[2] != 1).all()
    assert row["ratio_max"] > 1


def gradients(config) -> dict[str, torch.Tensor]:
    trainer, found = make_trainer(config), {}

    def keep():
        named = trainer.policy.transformer.named_parameters()
        found.update({name: p.grad.clone() for name, p in named})

    trainer.improver.optimizer.step = keep
    trainer.update()
    return found


def test_chunks_do_not_change_the_gradient():
    """The mean over rows is the same however they are cut."""
    together, apart = tiny_config(branch_batch=8), tiny_config(branch_batch=2)
    for config in (together, apart):
        config.train.prompts_per_update = 5  # chunks of 2, 2, 1: unequal shares
        config.optimizer.max_grad_norm = 1e9
    a, b = gradients(together), gradients(apart)
    scale = max(g.abs().max() for g in a.values())
    assert scale > 0
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-4 * scale, name


def test_gradient_is_that_of_the_plain_objective():
    """accumulate = d/dtheta of the mean over positions of -mean(A * log_prob), written out."""
    config = tiny_config()
    config.optimizer.max_grad_norm = 1e9
    found = gradients(config)
    trainer = make_trainer(config)
    kept = []
    original = trainer.improver.improve
    trainer.improver.improve = lambda *given: (kept.append(given), original(*given))[1]
    trainer.improver.optimizer.step = lambda: None
    trainer.update()
    ((_, chunk),), conditions, advantages = kept[0]
    loss = 0.0
    positions = trainer.sampling.positions(1)
    for index, k in enumerate(positions):
        sigma = trainer.sigmas[k].expand(2)
        v = trainer.policy.velocity(chunk.latents[index], sigma, conditions)
        a, b, s, _, _ = trainer.sampling.coefficients(positions).table[index]
        mean = (a * chunk.latents[index] + b * v).unsqueeze(1)
        square = ((chunk.x_next[:, :, index] - mean) / s).square().flatten(2).mean(2)
        clipped = advantages[:, index].clamp(-5, 5)
        loss = loss - (clipped * -0.5 * square).mean() / len(positions)
    loss.backward()
    expected = {n: p.grad for n, p in trainer.policy.transformer.named_parameters()}
    scale = max(g.abs().max() for g in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


def test_training_improves_the_reward():
    config = tiny_config()
    trainer = make_trainer(config)
    before = trainer.evaluate()[0]["reward/brightness/mean"]
    rows = [trainer.update() for _ in range(15)]
    after = trainer.evaluate()[0]["reward/brightness/mean"]
    assert after > before + 0.005
    assert [row["update"] for row in rows] == list(range(1, 16))
    assert rows[-1]["evaluations"] == 15 * trainer.evaluations_per_update


def test_evaluations_are_counted(losses):
    """What the row says is what went through the transformer, padding apart."""
    rows = 0
    trainer = make_trainer()

    def hook(module, arguments, keywords):
        nonlocal rows
        rows += len(keywords["timestep"])

    trainer.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    told = []
    trainer.on_evaluations = told.append
    row = trainer.update()
    assert row["evaluations"] == rows - trainer.sampling.plan([0, 1, 2]).padding == sum(told)
    assert row["evaluations"] == trainer.evaluations_per_update


def test_constant_reward_moves_nothing():
    trainer = make_trainer(rewards=[Reward("constant", constant)])
    before = weights(trainer)
    row = trainer.update()
    assert same(before, weights(trainer))
    assert row["zero_spread_groups"] == row["reward_groups"] == 2 * 2 * 3
    assert row["advantage_std"] == row["grad_norm"] == row["loss"] == 0
    assert row["skipped_updates"] == 1 and row["failed_groups"] == 0


def test_failed_judges():
    """One failing judge beside a working one is counted; all failing stops, weights untouched."""
    working, failing = Reward("brightness", brightness), Reward("broken", broken)
    row = make_trainer(rewards=[working, failing]).update()
    alone = make_trainer(rewards=[working]).update()
    assert row["failed_groups"] == 12 and row["reward_groups"] == 24
    assert row["grad_norm"] == alone["grad_norm"] > 0
    assert math.isnan(row["rollout/broken/mean"])
    trainer = make_trainer(rewards=[failing])
    before = weights(trainer)
    with pytest.raises(RuntimeError, match="all 12 groups hold a NaN or infinite reward"):
        trainer.update()
    assert same(before, weights(trainer)) and trainer.updates == 0


def test_a_few_failed_scores():
    """A NaN takes its own group with it and no other."""

    def sometimes(images, prompts):
        values = brightness(images, prompts)
        if len(images) > 2:  # not the anchors
            values[1] = torch.nan
        return values

    row = make_trainer(rewards=[Reward("sometimes", sometimes)]).update()
    assert 0 < row["failed_groups"] < row["reward_groups"]
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    assert math.isfinite(row["rollout/sometimes/mean"])


def test_gradient_that_is_not_finite_is_skipped(monkeypatch):
    trainer = make_trainer()
    trainer.update()
    before, moments = weights(trainer), copy.deepcopy(trainer.improver.optimizer.state_dict())
    parameter = trainer.improver.parameters[0]
    handle = parameter.register_hook(lambda grad: grad * torch.nan)
    row = trainer.update()
    assert math.isnan(row["grad_norm"]) and row["skipped_updates"] == 1
    assert same(before, weights(trainer))
    after = trainer.improver.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["exp_avg"], s["exp_avg"]) for i, s in moments["state"].items())
    handle.remove()
    assert trainer.update()["skipped_updates"] == 1


def test_gradient_is_clipped():
    config = tiny_config()
    config.optimizer.max_grad_norm = 1e-3
    norms = {name: g.norm() for name, g in gradients(config).items()}
    assert torch.stack(list(norms.values())).norm() == pytest.approx(1e-3, rel=1e-3)


def test_rewards_combine_at_the_advantage_level(losses):
    """Weights scale advantages, not rewards; weight 0 and held-out judges only watch."""
    names = [("brightness", brightness), ("contrast", contrast)]

    def advantages(*weighted):
        losses.clear()
        make_trainer(rewards=[Reward(n, f, w, h) for (n, f), w, h in weighted]).update()
        return torch.stack([a for _, a, _ in losses])

    first, second = (advantages((pair, 1.0, False)) for pair in names)
    both = advantages((names[0], 1.0, False), (names[1], 0.5, False))
    torch.testing.assert_close(both, first + 0.5 * second)
    watched = advantages((names[0], 1.0, False), (names[1], 0.0, False))
    assert torch.equal(watched, first)
    judged = advantages((names[0], 1.0, False), (names[1], 1.0, True))
    assert torch.equal(judged, first)


def test_evaluation_is_fixed():
    """The same prompts and noises every time and in every run, not counted as training."""
    config = tiny_config()
    trainer = make_trainer(config, [Reward("b", brightness), Reward("c", contrast, heldout=True)])
    row, images, scores = trainer.evaluate()
    prompts = trainer.evaluation_prompts
    assert images.shape == (6, 1, 16, 4) and prompts == list(PROMPTS)
    assert torch.equal(scores[1], contrast(images, prompts).double())
    assert {"reward/b/mean", "reward/b/std", "heldout/c/mean", "heldout/c/std"} <= set(row)
    assert row["heldout/c/mean"] == pytest.approx(contrast(images, prompts).mean().item())
    assert trainer.evaluations == 0
    trainer.update()
    assert not torch.equal(trainer.evaluate()[1], images)
    other = tiny_config()
    other.train.seed = 7
    assert torch.equal(make_trainer(other).evaluate()[1], images)


def test_runs_depend_on_their_seed_alone():
    def one(seed):
        config = tiny_config()
        config.train.seed = seed
        trainer = make_trainer(config)
        torch.manual_seed(torch.seed())  # the global generator plays no part
        trainer.update()
        return weights(trainer)

    assert same(one(3), one(3))
    assert not same(one(3), one(4))


def test_interruption_changes_nothing():
    """Asked to stop in the middle of a rollout, the trainer is as it was before the update."""
    asked = []
    trainer = make_trainer(should_stop=lambda: len(asked) > 0)
    trainer.update()
    before = weights(trainer)
    trainer.on_evaluations = lambda rows: asked.append(rows) if trainer.updates else None
    with pytest.raises(Interrupted):
        trainer.update()
    assert trainer.updates == 1 and same(before, weights(trainer))
    asked.clear()
    trainer.on_evaluations = lambda rows: None
    trainer.update()
    undisturbed = make_trainer()
    undisturbed.update()
    undisturbed.update()
    assert same(weights(trainer), weights(undisturbed))


def test_state_goes_on_bit_for_bit():
    straight, first = make_trainer(), make_trainer()
    rows = [straight.update() for _ in range(4)]
    first.update()
    first.update()
    state, saved = copy.deepcopy(first.state_dict()), weights(first)
    second = make_trainer()
    second.load_state_dict(state, saved)
    resumed = [second.update() for _ in range(2)]
    assert same(weights(straight), weights(second))
    for a, b in zip(rows[2:], resumed, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k and "memory" not in k} == {
            k: v for k, v in b.items() if "second" not in k and "memory" not in k
        }


def test_all_phases_are_timed():
    phases = []
    trainer = make_trainer(on_phase=phases.append)
    row = trainer.update()
    assert phases == ["prompts", "anchor", "completions", "rewards", "update"]
    assert {f"seconds/{phase}" for phase in phases} <= set(row)
    assert sum(row[f"seconds/{phase}"] for phase in phases) <= row["seconds"]
    assert row["peak_memory_bytes"] > 2**26
