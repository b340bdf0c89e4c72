"""One update of a real Trainer with a preset's configuration, and all that it can be judged by:
every forward of its transformer, what left the rollout, and what the update made of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import torch
from baselines import METHODS, STEPS, Method, flow_grpo_advantages, schedule, standardised
from tiny import TinyModel, brightness, contrast
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo.arguments import make_parser, named_config
from g2rpo.config import Config
from g2rpo.policy import Conditions
from g2rpo.rewards import Reward
from g2rpo.seeds import branch_seeds
from g2rpo.trainer import Trainer

GROUP, PROMPTS = 4, 3
ROWS = PROMPTS * GROUP


@dataclass
class Forward:
    """One call of the transformer."""

    phase: str
    latents: Tensor  # [R, *S]
    sigma: Tensor  # [R]
    velocity: Tensor  # [R, *S]
    with_gradients: bool
    gradient: Tensor | None = None  # of the whole loss, into velocity


@dataclass
class Trained:
    """The steps of one forward of the update, with what the rollout had of them."""

    rows: Tensor  # int64 [R] of all rows of the update
    steps: Tensor  # int64 [R] of the schedule
    forward: Forward
    x_next: Tensor  # [R, G, *S]
    old_velocity: Tensor  # [R, *S] of the rollout
    old_log_prob: Tensor  # [R, G]
    advantages: Tensor  # [R, G]
    out: gk.PolicyLoss


@dataclass
class Recording:
    method: Method
    config: Config
    latents: Tensor  # [N + 1, M, *S]: along M runs, or along G2RPO's anchors to their last branches
    velocity: Tensor  # [N, M, *S]
    noise: dict[int, Tensor]  # by stochastic step: [M, G, *S], what its seeds give
    branches: dict[int, Tensor]  # of G2RPO, by step: [M, G, *S]
    finished: Tensor  # [J, B * G, P, *S] what was scored
    model: TinyModel  # with the rollout's weights
    conditions: Conditions  # of the M rows
    trained: list[Trained] = field(default_factory=list)

    def reached(self, k: int) -> Tensor:  # [M, G, *S]
        """Where the stochastic step k of each row has led to."""
        return self.branches[k] if self.branches else self.latents[k + 1].unsqueeze(1)


def nearest_step(sigma: Tensor) -> Tensor:
    steps = (schedule()[:-1] - sigma.double()[:, None]).abs().min(1)
    assert steps.values.max() < 1e-7
    return steps.indices


def drift(model: TinyModel, amount: float, seed: int) -> None:
    """Change every weight by about `amount` of its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.policy.transformer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += amount * parameter.square().mean().sqrt() * noise


def preset_config(preset: str, **changed: object) -> Config:
    """The preset, made small: 3 prompts, groups of 4, forwards of 8 rows; and keys changed."""
    changed = {
        "rollout.group_size": GROUP, "train.prompts_per_update": PROMPTS,
        "rollout.branch_batch": 8, "optimizer.max_grad_norm": 1e9, **changed,
    }  # fmt: skip
    given = [f"--{key}={value}" for key, value in changed.items()]
    config, _ = named_config(make_parser(), [preset, *given])
    config.validate()
    return config


def make_trainer(config: Config, weight: float = 1.0, **options: object) -> Trainer:
    """With the presets' two kinds of reward, one that is trained and one that is only reported."""
    rewards = [Reward("contrast", contrast, 0.0), Reward("brightness", brightness, weight)]
    trainer = Trainer(config, TinyModel(), rewards, **options)
    if config.rollout.sampling == "singular":
        trainer.sampling.update_batch = 2  # forwards of 2 rows and 1
    return trainer


def watch(trainer: Trainer) -> list[Forward]:
    """Every forward of the transformer from here on."""
    forwards: list[Forward] = []

    def keep(module, arguments, keywords, output):
        velocity = output[0]
        made = Forward(
            trainer.phases.name, keywords["hidden_states"].detach().clone(),
            keywords["timestep"].clone(), velocity.detach().clone(), velocity.requires_grad,
        )  # fmt: skip
        if velocity.requires_grad:
            velocity.register_hook(lambda gradient: setattr(made, "gradient", gradient.clone()))
        forwards.append(made)

    trainer.policy.transformer.register_forward_hook(keep, with_kwargs=True)
    return forwards


def along_runs(forwards: list[Forward], phase: str) -> tuple[Tensor, Tensor]:
    """Latents and velocities [N, M, *S] of a phase that takes batch after batch down the steps."""
    chunks: list[list[Forward]] = []
    for made in (f for f in forwards if f.phase == phase):
        (at,) = set(nearest_step(made.sigma).tolist())  # one step for all rows
        if at == 0:
            chunks.append([])
        assert at == len(chunks[-1])  # in order, none left out
        chunks[-1].append(made)
    return tuple(
        torch.stack([torch.cat(parts) for parts in zip(*columns, strict=True)])
        for columns in (
            [[f.latents for f in chunk] for chunk in chunks],
            [[f.velocity for f in chunk] for chunk in chunks],
        )
    )


@cache  # a recording is not to be changed
def record(
    preset: str,
    *,
    weight: float = 1.0,
    ratio: str = "plain",
    kl: float = 0.0,
    stepping: str = "accumulate",
    moved: float = 60.0,  # how far the weights drift between rollout and update, in clip ranges
) -> Recording:
    """The first update, of weights that are no longer the starting policy's."""
    objective = {"ratio": ratio, "kl": kl, "stepping": stepping}
    config = preset_config(preset, **{f"objective.{key}": v for key, v in objective.items()})
    method, kept = METHODS[preset], {}

    def on_phase(name: str) -> None:
        if name == "update":  # once, between rollout and update
            kept["weights"] = {
                n: p.detach().clone() for n, p in trainer.policy.transformer.named_parameters()
            }
            drift(trainer.model, moved * config.objective.clip_range, seed=2)

    trainer = make_trainer(config, weight, on_phase=on_phase)
    drift(trainer.model, 0.1, seed=1)
    roll_out, improve = trainer.roll_out, trainer.improver.improve

    def keep_rollout(*arguments):
        kept["rollout"] = roll_out(*arguments)
        return kept["rollout"]

    def keep_update(chunks, conditions, advantages):
        kept["update"] = improve(chunks, conditions, advantages)
        kept["advantages"] = advantages
        return kept["update"]

    trainer.roll_out, trainer.improver.improve = keep_rollout, keep_update
    forwards = watch(trainer)
    trainer.update()
    rollout, singular = kept["rollout"], config.rollout.sampling == "singular"
    latents, velocity = along_runs(forwards, "anchor" if singular else "trajectories")
    ids = trainer.sampler.ids(1)
    branches: dict[int, Tensor] = {}
    if singular:
        last = torch.cat([steps.anchors for _, steps in rollout.chunks])
        x_next = torch.cat([steps.x_next for _, steps in rollout.chunks])  # [M, G, K, *S]
        branches = dict(zip(method.stochastic, x_next.unbind(2), strict=True))
    else:
        last = rollout.finished[0, :, 0]
    seeds = branch_seeds(config.train.seed, 1, ids, range(STEPS), GROUP)  # [T, B, G]
    noise = gk.normal(seeds, trainer.model.latent_shape)
    noise = noise if singular else noise.flatten(1, 2).unsqueeze(2)
    model = TinyModel()
    model.policy.transformer.load_state_dict(kept["weights"])
    made = Recording(
        method, config, torch.cat([latents, last[None]]), velocity, dict(enumerate(noise)),
        branches, rollout.finished, model, rollout.conditions,
    )  # fmt: skip
    _add_trained(made, rollout.chunks, [f for f in forwards if f.with_gradients], kept)
    return made


def _add_trained(made: Recording, chunks: list, forwards: list[Forward], kept: dict) -> None:
    """The update's forwards: a stochastic step of every chunk of rows, then the next."""
    places = [(i, rows, steps) for i in range(len(chunks[0][1])) for rows, steps in chunks]
    losses, advantages = kept["update"].losses, kept["advantages"]
    for (i, chunk, steps), forward, out in zip(places, forwards, losses, strict=True):
        rows, at = torch.arange(chunk.start, chunk.stop), nearest_step(forward.sigma)
        # The rollout's own latents, of these rows at these steps.
        assert torch.equal(forward.latents, made.latents[at, rows])
        x_next = torch.stack([made.reached(k)[m] for k, m in zip(at.tolist(), rows, strict=True)])
        made.trained.append(
            Trained(
                rows, at, forward, x_next, made.velocity[at, rows], steps.old_log_prob[i],
                advantages[rows, i], out,
            )
        )  # fmt: skip


def rewards_of(run: Recording) -> Tensor:  # float64 [J, B, G, P]
    finished = run.finished.flatten(0, 2)
    scores = brightness(run.model.decode(finished), [])
    return scores.double().view(run.finished.shape[0], PROMPTS, GROUP, -1)


def published_advantages(run: Recording, weight: float = 1.0) -> Tensor:  # [B, P, G]
    """By the peer's formula, with our divisor in place of Flow-GRPO's."""
    rewards = rewards_of(run)
    if run.method.one_std:
        ((rewards,),) = rewards.permute(0, 3, 1, 2)  # [B, G]
        theirs = rewards.std(correction=0) + 1e-4
        advantages = flow_grpo_advantages(rewards) * theirs / (rewards.std() + 1e-8)
        return weight * advantages[:, None]
    return weight * standardised(rewards, 2).sum(0).transpose(1, 2)


def per_step(run: Recording, advantages: Tensor, index: int) -> Tensor:  # [R, G] of a forward
    made = run.trained[index]
    if run.branches:
        position = torch.tensor([list(run.branches).index(k) for k in made.steps.tolist()])
        return advantages[made.rows, position]
    return advantages.flatten()[made.rows, None]


def close(ours: Tensor, truth: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Of numbers that are there."""
    assert ours.shape == truth.shape and ours.numel() and math.isfinite(float(truth.abs().sum()))
    torch.testing.assert_close(ours.double(), truth.double(), atol=atol, rtol=rtol)
