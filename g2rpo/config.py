"""The typed configuration of a run: dataclasses, YAML presets, dotted overrides.

Defaults are those of the G2RPO authors' code. The docstring under a key is its `--help` text, with
its unit. A key exists only once it acts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import g2rpo_kernels as gk

from .errors import ConfigurationError
from .schedule import noise_schedule


def _expect(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigurationError(f"{name} is {value!r}; expected {expected}")


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclass
class ModelConfig:
    """What is trained, and where."""

    path: str = "digits"
    """What to train: 'digits', the embedded flow model of handwritten digits."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:0; 'auto' takes the GPU when there is one."""


@dataclass
class DataConfig:
    """What it is asked to draw."""

    prompts: str | None = None
    """Text file, one prompt a line; null: the prompts the model comes with."""


@dataclass
class RolloutConfig:
    """Anchor, branches and completions."""

    steps: int = 16
    """Steps T of the sampling schedule."""
    shift: float = 3.0
    """Shift of the schedule, sigma = shift*t / (1 + (shift-1)*t); 1 is linear."""
    guidance: float = 3.5
    """Distilled guidance scale; acts on transformers with guidance embeddings (FLUX.1-dev)."""
    eta: float = 0.7
    """Stochasticity of the one SDE step (unitless; cps: at most 1)."""
    dynamics: Literal["flow", "dance", "cps", "dpm1"] = "flow"
    """SDE of that step: flow (G2RPO, Flow-GRPO), dance, cps or dpm1 (not at position 0)."""
    sde_positions: list[int] = field(default_factory=lambda: list(range(8)))
    """Steps of the anchor, 0 .. T-2, at which branches leave it."""
    granularities: list[int] = field(default_factory=lambda: [1, 2])
    """Step sizes, in steps of the schedule, at which every branch is completed."""
    group_size: int = 12
    """Branches G per prompt and position, at least 2."""
    branch_batch: int = 16
    """Rows of one transformer forward; completions are packed into batches of exactly this size."""

    def validate(self) -> None:
        _expect("rollout.steps", self.steps, self.steps >= 2, "at least 2 steps")
        _expect("rollout.shift", self.shift, self.shift > 0 and _finite(self.shift), "> 0")
        _expect("rollout.guidance", self.guidance, _finite(self.guidance), "a finite number")
        _expect("rollout.group_size", self.group_size, self.group_size >= 2, "at least 2 branches")
        _expect("rollout.branch_batch", self.branch_batch, self.branch_batch >= 1, "at least 1 row")
        _distinct("rollout.sde_positions", self.sde_positions)
        _distinct("rollout.granularities", self.granularities)
        for k in self.sde_positions:
            _expect(
                "rollout.sde_positions", self.sde_positions, 0 <= k <= self.steps - 2,
                f"positions 0 to {self.steps - 2} (rollout.steps - 2), since a branch must be "
                "completed by at least one evaluation",
            )  # fmt: skip
        for g in self.granularities:
            _expect("rollout.granularities", self.granularities, g >= 1, "step sizes of at least 1")
        sigmas = noise_schedule(self.steps, self.shift)
        _expect(
            "rollout.shift", self.shift, bool((sigmas.float().diff() < 0).all()),
            f"one that leaves {self.steps} steps (rollout.steps) decreasing sigmas in float32",
        )  # fmt: skip
        try:  # eta, dynamics and positions must make a step
            for k in self.sde_positions:
                gk.step_coefficients(
                    float(sigmas[k]), float(sigmas[k + 1]), self.eta, self.dynamics
                )
        except ValueError as error:
            raise ConfigurationError(
                f"rollout.eta {self.eta}, rollout.dynamics {self.dynamics!r} and position {k} of "
                f"rollout.sde_positions do not go together: {error}"
            ) from error


def _distinct(name: str, values: list[int]) -> None:
    _expect(name, values, len(values) > 0, "at least one")
    _expect(name, values, len(set(values)) == len(values), "no value twice")


@dataclass
class RewardConfig:
    """One reward function and its part in the run."""

    name: str
    """Import path of a callable reward(images, prompts) -> [N]: 'package.module:function'."""
    weight: float = 1.0
    """Weight of its normalised advantage, >= 0; 0: reported, not trained on."""
    heldout: bool = False
    """Scored at evaluations only, as a judge the training never sees."""


@dataclass
class ObjectiveConfig:
    """The clipped policy loss."""

    clip_range: float = 1e-4
    """Half-width of the window of the importance ratio around 1."""
    advantage_clip: float | None = 5.0
    """Advantages are clamped to plus or minus this (standard deviations); null: not at all."""
    stepping: Literal["accumulate", "per_position"] = "accumulate"
    """One optimizer step an update, exactly on-policy; or one after every SDE position."""

    def validate(self) -> None:
        _expect("objective.clip_range", self.clip_range, self.clip_range > 0, "> 0")
        clip = self.advantage_clip
        _expect("objective.advantage_clip", clip, clip is None or clip > 0, "> 0, or null")


@dataclass
class OptimizerConfig:
    """AdamW and gradient clipping."""

    lr: float = 2e-6
    """Learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the square root of AdamW's second moment (units of the gradient)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, a step times lr."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""

    def validate(self) -> None:
        _expect("optimizer.lr", self.lr, self.lr > 0 and _finite(self.lr), "> 0")
        _expect("optimizer.betas", self.betas, all(0 <= b < 1 for b in self.betas), "in [0, 1)")
        _expect("optimizer.eps", self.eps, self.eps > 0 and _finite(self.eps), "> 0")
        decay = self.weight_decay
        _expect("optimizer.weight_decay", decay, decay >= 0 and _finite(decay), ">= 0")
        _expect("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "> 0")


@dataclass
class TrainConfig:
    """How long, from which seed, and what is kept."""

    updates: int = 300
    """Updates to train for, in all."""
    prompts_per_update: int = 1
    """Prompts an update rolls out."""
    seed: int = 0
    """Seed of the run: prompt order, anchor noises, branch noises."""
    save_every: int = 50
    """Updates between checkpoints; one is also written at the end and on Ctrl-C."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones; 0 keeps all."""
    evaluate_every: int = 10
    """Updates between evaluations; there is always one before the first update and at the end."""
    evaluation_samples: int = 32
    """Images of an evaluation: the prompts in turn, the same noises every time."""
    output: str | None = None
    """Run directory; null: runs/<preset>-<time>."""

    def validate(self) -> None:
        for name, low in (
            ("updates", 1), ("prompts_per_update", 1), ("seed", 0), ("save_every", 1),
            ("keep_last", 0), ("evaluate_every", 1), ("evaluation_samples", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            _expect(f"train.{name}", value, value >= low, f"at least {low}")
        _expect("train.seed", self.seed, self.seed < 2**63, "less than 2^63")


@dataclass
class Config:
    """The rewards, and with them the groups below: all of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    """Rewards, at least one of weight > 0 that is not held out."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self) -> None:
        """Raise ConfigurationError naming the key, its value and what was expected."""
        for group in (self.rollout, self.objective, self.optimizer, self.train):
            group.validate()
        trained = [r.name for r in self.rewards if r.weight > 0 and not r.heldout]
        names = [r.name for r in self.rewards]
        _expect("rewards", names, bool(trained), "at least one of weight > 0 that is not held out")
        _expect("rewards", names, len(set(names)) == len(names), "no reward twice")
        for reward in self.rewards:
            ok = reward.weight >= 0 and _finite(reward.weight)
            _expect(f"weight of reward {reward.name!r}", reward.weight, ok, ">= 0")
