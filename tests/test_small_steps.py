"""What lr 2e-6 makes of bfloat16 weights: with AdamW nothing, with AdamW8bit a step."""

import pytest
import torch
from tiny import TinyModel, brightness, tiny_config

from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer
from g2rpo_kernels.optim.arithmetic import join_master

UPDATES = 4


def weights_after(name: str, dtype: torch.dtype, lr: float = 2e-6) -> tuple[torch.Tensor, ...]:
    """All weights before and after some updates, with what an optimizer keeps beside them."""
    config = tiny_config()
    config.optimizer.name, config.optimizer.lr = name, lr
    config.validate()
    model = TinyModel()
    torch.nn.Module.to(model.policy.transformer, dtype)  # diffusers' own warns
    model.policy.dtype = dtype
    trainer = Trainer(config, model, [Reward("brightness", brightness)])
    parameters = list(trainer.weights.parameters.values())
    before = torch.cat([p.detach().float().flatten() for p in parameters])
    for _ in range(UPDATES):
        assert trainer.update()["grad_norm"] > 0
    optimizer = trainer.improver.optimizer
    after = []
    for p in parameters:
        low = optimizer.state[p].get("low_bits")
        w = p.detach()
        after.append((join_master(w, low, 8) if low is not None else w.float()).flatten())
    return before, torch.cat(after)


def test_small_steps_are_kept():
    before, nearest = weights_after("adamw", torch.bfloat16)
    assert (nearest == before).float().mean() > 0.95
    start, ours = weights_after("adamw8bit", torch.bfloat16)
    assert torch.equal(start, before)
    # As far as float32 goes from weights that are all but the same.
    first, exact = weights_after("adamw", torch.float32)
    moved, expected = float((ours - start).norm()), float((exact - first).norm())
    assert moved == pytest.approx(expected, rel=0.1)
    assert (ours != start).float().mean() > 0.9
