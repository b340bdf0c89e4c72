"""Anchor, branches, completions: what is evaluated how often, and that sharing changes nothing."""

from collections import Counter

import pytest
import torch
from tiny import TinyModel, brightness, tiny_config

import g2rpo_kernels as gk
from g2rpo.completions import complete, plan_completions
from g2rpo.engine import plain_forward
from g2rpo.rewards import Reward
from g2rpo.rollout import branch_out, run_ode
from g2rpo.schedule import noise_schedule
from g2rpo.seeds import anchor_seeds, branch_seeds
from g2rpo.trainer import Trainer

T, G, POSITIONS = 16, 12, list(range(8))
SIGMAS = noise_schedule(T, 3.0)


def roll_out(model, prompt_ids, positions=POSITIONS, group_size=G, update=1):
    prompts = [model.prompts[i] for i in prompt_ids]
    conditions = model.embed(prompts)
    noise = gk.normal(anchor_seeds(0, update, prompt_ids), model.latent_shape)
    coefficients = gk.step_coefficients(SIGMAS[positions], SIGMAS[[k + 1 for k in positions]], 0.7)
    seeds = branch_seeds(0, update, prompt_ids, positions, group_size)
    with torch.no_grad():
        branches = branch_out(
            model.policy, noise, conditions, SIGMAS.float(), positions, coefficients, seeds
        )
    return branches, conditions


def finish(model, branches, conditions, granularities, batch_size, positions=POSITIONS):
    prompts, group_size = branches.x_next.shape[:2]
    plan = plan_completions(SIGMAS, positions, granularities, prompts, group_size, batch_size)
    predict = plain_forward(model.policy, conditions)
    with torch.no_grad():
        images, _ = complete(predict, plan, branches.x_next, branches.anchors)
        return plan, images


def expected_evaluations(granularities) -> int:
    """A prefix tree of the design's sigma paths, as nested dicts."""
    total = T
    for k in POSITIONS:
        tree: dict = {}
        for granularity in granularities:
            path = [k + 1, *range(k + 2, T + 1, granularity)]
            node = tree
            for sigma in path[:-1]:
                node = node.setdefault(sigma, {})

        def size(node):
            return sum(1 + size(child) for child in node.values())

        total += G * size(tree)
    return total


PUBLISHED = [([1], 1120), ([1, 2], 1504), ([1, 2, 3], 1708)]


@pytest.mark.parametrize("granularities, published", PUBLISHED)
def test_evaluations_of_one_prompt(granularities, published):
    """Counted by a hook on the transformer, and each (sigma, latents) evaluated once."""
    model = TinyModel()
    seen, rows = Counter(), 0

    def hook(module, arguments, keywords):
        nonlocal rows
        rows += len(keywords["timestep"])
        for sigma, latents in zip(keywords["timestep"], keywords["hidden_states"], strict=True):
            seen[sigma.item(), latents.numpy().tobytes()] += 1

    model.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    branches, conditions = roll_out(model, [0])
    assert rows == max(POSITIONS) + 1  # the rest of the anchor's way goes with the completions
    plan, _ = finish(model, branches, conditions, granularities, batch_size=4)
    assert plan.padding == 0  # so the hook's rows are real ones
    assert rows == published == expected_evaluations(granularities)
    assert max(POSITIONS) + 1 + plan.evaluations == rows
    assert set(seen.values()) == {1}


def unshared(model, branches, conditions, granularities):
    """Every branch at every granularity on its own, evaluating its whole path: [J, B, G, K, *S]."""
    images = []
    for granularity in granularities:
        for p, g, i in [
            (p, g, i)
            for p in range(branches.x_next.shape[0])
            for g in range(branches.x_next.shape[1])
            for i in range(branches.x_next.shape[2])
        ]:
            x = branches.x_next[p : p + 1, g, i]
            path = [POSITIONS[i] + 1, *range(POSITIONS[i] + 2, T + 1, granularity)]
            for here, there in zip(path[:-1], path[1:], strict=True):
                sigma, sigma_next = SIGMAS[here].float(), SIGMAS[there].float()
                with torch.no_grad():
                    v = model.policy.velocity(x, sigma.view(1), conditions[p : p + 1])
                x0, x = x - sigma * v, x + (sigma_next - sigma) * v
            images.append(x0)
    return torch.cat(images).view(len(granularities), *branches.x_next.shape)


def test_sharing_changes_no_image():
    """The same bits at the same batch composition (one row), 1e-5 at any other."""
    model, granularities = TinyModel(), [1, 2, 3]
    branches, conditions = roll_out(model, [0, 3], group_size=2)
    alone = unshared(model, branches, conditions, granularities).flatten(1, 2)
    assert alone.std() > 0.1  # images that differ, or the comparison would say nothing
    _, shared = finish(model, branches, conditions, granularities, batch_size=1)
    assert torch.equal(shared, alone)
    for batch_size in (5, 64):
        _, shared = finish(model, branches, conditions, granularities, batch_size)
        assert (shared - alone).abs().max() <= 1e-5


def test_packing_does_not_matter():
    """Bit-equal under any packing at one batch size: prompts in another order, other company."""
    model = TinyModel()
    branches, conditions = roll_out(model, [0, 1, 2], group_size=2)
    _, images = finish(model, branches, conditions, [1, 2], batch_size=8)
    images = images.view(2, 3, 2, *images.shape[2:])
    order = [2, 0, 1]
    branches, conditions = roll_out(model, [[0, 1, 2][i] for i in order], group_size=2)
    _, permuted = finish(model, branches, conditions, [1, 2], batch_size=8)
    permuted = permuted.view(2, 3, 2, *permuted.shape[2:])
    assert torch.equal(permuted, images[:, order])
    branches, conditions = roll_out(model, [0, 4, 5], group_size=2)
    _, others = finish(model, branches, conditions, [1, 2], batch_size=8)
    others = others.view(2, 3, 2, *others.shape[2:])
    assert torch.equal(others[:, 0], images[:, 0])
    assert not torch.equal(others[:, 1], images[:, 1])


def test_a_prompts_rollout_does_not_depend_on_the_batch():
    """Alone or with others: the same draws exactly, the same floats to 1e-5."""
    model = TinyModel()
    alone, conditions = roll_out(model, [3])
    _, images = finish(model, alone, conditions, [1, 2], batch_size=8)
    together, conditions = roll_out(model, [5, 3, 1])
    _, all_images = finish(model, together, conditions, [1, 2], batch_size=32)
    all_images = all_images.view(2, 3, G, *all_images.shape[2:])
    assert torch.equal(alone.latents[0, 0], together.latents[0, 1])  # the noise itself
    assert (alone.latents[:, 0] - together.latents[:, 1]).abs().max() <= 1e-5
    assert (alone.x_next[0] - together.x_next[1]).abs().max() <= 1e-5
    assert (images - all_images[:, 1]).abs().max() <= 1e-5


def test_branches_leave_the_anchor():
    """x_next is one SDE step from the anchor's x_k with the anchor's own velocity."""
    model = TinyModel()
    branches, conditions = roll_out(model, [0, 1], positions=[0, 5], group_size=3)
    noise = gk.normal(anchor_seeds(0, 1, [0, 1]), model.latent_shape)
    with torch.no_grad():
        run = list(run_ode(model.policy, noise, conditions, SIGMAS.float()))
    assert len(run) == T and torch.equal(run[0][1], noise)
    assert torch.equal(branches.anchors, run[5][3])
    plan = plan_completions(SIGMAS, [0, 5], [2], 2, 3, batch_size=2)
    predict = plain_forward(model.policy, conditions)
    with torch.no_grad():
        _, anchors = complete(predict, plan, branches.x_next, branches.anchors)
    assert (anchors - run[-1][3]).abs().max() <= 1e-5
    for index, k in enumerate((0, 5)):
        _, x, v, _ = run[k]
        assert torch.equal(branches.latents[index], x)
        c = gk.step_coefficients(float(SIGMAS[k]), float(SIGMAS[k + 1]), 0.7)
        draws = (branches.x_next[:, :, index] - gk.step_mean(v, x, c).unsqueeze(1)) / c.table[0, 2]
        assert draws.std() == pytest.approx(1, abs=0.2)
        log_prob = gk.branch_log_prob(v, x, branches.x_next[:, :, index], c)
        assert torch.equal(log_prob, branches.old_log_prob[index])
    assert branches.x_next.flatten(3).std(1).min() > 0  # no two branches alike


@pytest.mark.parametrize("batch_size", [1, 7, 96, 1000])
def test_plan(batch_size):
    """Every item once, batches of one size, no slot overwritten before it was read."""
    plan = plan_completions(SIGMAS, POSITIONS, [1, 2], 2, 3, batch_size)
    assert plan.evaluations == 2 * 3 * (1504 - T) // G + 2 * (T - 8)
    filled = set(range(plan.branches + 2))
    for batch in plan.batches:
        assert len(batch.slots) == len(batch.sigmas) == len(batch.prompts) == batch_size
        read = batch.slots[: batch.rows].tolist()
        assert len(set(read)) == batch.rows and set(read) <= filled
        filled -= set(read)
        written = batch.step_slots.tolist()
        assert len(set(written)) == len(written) and not set(written) & filled
        filled |= set(written)
        assert (batch.step_sigmas_next < batch.step_sigmas).all()
        assert torch.equal(batch.step_sigmas, batch.sigmas[batch.step_rows])
    assert filled == set(range(plan.slots - 2 * plan.branches - 2, plan.slots))
    # Longest path first keeps batches full to the end: all but the last few
    short = [index for index, batch in enumerate(plan.batches) if batch.rows < batch_size]
    assert len(plan.batches) - min(short, default=len(plan.batches)) <= T


def test_plan_refuses():
    with pytest.raises(ValueError, match="batch_size is 0"):
        plan_completions(SIGMAS, [0], [1], 1, 2, 0)
    model = TinyModel()
    branches, conditions = roll_out(model, [0, 1], group_size=2)
    plan = plan_completions(SIGMAS, POSITIONS, [1], 1, 2, 4)
    predict = plain_forward(model.policy, conditions)
    with pytest.raises(ValueError, match="2 x 2 x 8 branches; the plan expects 16 of 1 prompts"):
        complete(predict, plan, branches.x_next, branches.anchors)


def test_guidance_and_sigma_per_row():
    """A guidance-distilled transformer gets its scale; each row is evaluated at its own sigma."""
    model = TinyModel(guidance_embeds=True)
    x = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    conditions, sigma = model.embed(["up", "down", "west"]), torch.tensor([1.0, 0.5, 0.1])
    with torch.no_grad():
        together = model.policy.velocity(x, sigma, conditions)
        for row in range(3):
            one = model.policy.velocity(x[row : row + 1], sigma[row : row + 1],
                                        conditions[row : row + 1])  # fmt: skip
            torch.testing.assert_close(one[0], together[row], atol=1e-5, rtol=0)
        model.policy.guidance = 1.0
        assert not torch.allclose(model.policy.velocity(x, sigma, conditions), together, atol=1e-4)


@pytest.mark.parametrize("granularities, published", PUBLISHED)
def test_evaluations_of_a_whole_update(granularities, published):
    """The trainer's own update of one prompt: the published count, and 8 more with gradients."""
    config = tiny_config(
        steps=T, sde_positions=POSITIONS, granularities=granularities, group_size=G, branch_batch=4
    )
    config.train.prompts_per_update = 1
    trainer = Trainer(config, TinyModel(), [Reward("brightness", brightness)])
    rows = Counter()

    def hook(module, arguments, keywords):
        rows[torch.is_grad_enabled()] += len(keywords["timestep"])

    trainer.policy.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    row = trainer.update()
    assert rows[False] - trainer.sampling.plan(trainer.sampling.positions(1)).padding == published
    assert rows[True] == len(POSITIONS)
    assert row["evaluations"] == published + len(POSITIONS)
