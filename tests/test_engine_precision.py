"""Completions in bfloat16 by a copy, and compiled without fused blocks: only rewards can tell."""

import pytest
import torch
from tiny import TinyModel, brightness, roll_out, tiny_config

from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer


def make_trainer(fuse=False, **rollout):
    config = tiny_config(**rollout)
    config.model.fuse = fuse
    return Trainer(config, TinyModel(), [Reward("brightness", brightness)])


@pytest.mark.parametrize("fuse", [False, True])
def test_bfloat16_completions_are_near_and_the_ratio_is_exactly_one(fuse):
    plain, half = make_trainer(fuse), make_trainer(fuse, precision="bfloat16")
    seen = []
    copied = half.sampling.engine.policy
    assert copied is not half.policy and copied.dtype == torch.bfloat16
    copied.transformer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["hidden_states"].dtype),
        with_kwargs=True,
    )
    a, b = roll_out(plain), roll_out(half)
    for (_, ours), (_, theirs) in zip(a.chunks, b.chunks, strict=True):
        assert torch.equal(ours.x_next, theirs.x_next)
        assert torch.equal(ours.old_log_prob, theirs.old_log_prob)
    assert not torch.equal(a.finished, b.finished)
    spread = a.finished.std()
    assert (a.finished - b.finished).abs().mean() < 0.05 * spread
    assert fuse or set(seen) == {torch.bfloat16}
    row = half.update()
    assert row["ratio_mean"] == row["ratio_max"] == 1


def test_the_copy_has_the_weights_of_each_update():
    trainer = make_trainer(precision="bfloat16")
    trainer.update()
    roll_out(trainer, 2)
    copied = trainer.sampling.engine.policy.transformer.parameters()
    pairs = list(zip(copied, trainer.policy.transformer.parameters(), strict=True))
    assert all(torch.equal(mine, trained.bfloat16()) for mine, trained in pairs)
    assert not any(mine.requires_grad for mine, _ in pairs)


def test_a_bfloat16_transformer_needs_no_copy():
    model = TinyModel()
    model.policy.transformer.to(torch.bfloat16)
    model.policy.dtype = torch.bfloat16
    with pytest.raises(ConfigurationError, match="rollout.precision is 'bfloat16', and so is"):
        Trainer(tiny_config(precision="bfloat16"), model, [Reward("brightness", brightness)])


def test_compiled_completions_follow_the_weights():
    """Compiled once: what changes afterwards are the weights, its inputs."""
    plain, compiled = make_trainer(), make_trainer(engine="compile")
    for update in (1, 2):
        a, b = roll_out(plain, update), roll_out(compiled, update)
        torch.testing.assert_close(a.finished, b.finished, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            for parameters in (plain.policy, compiled.policy):
                for parameter in parameters.transformer.parameters():
                    parameter.mul_(1.01)
    row = compiled.update()
    assert row["ratio_mean"] == row["ratio_max"] == 1
