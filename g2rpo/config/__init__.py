"""The typed configuration of a run: dataclasses, YAML presets, dotted overrides.

Defaults are those of the G2RPO authors' code. The docstring under a key is its `--help` text, with
its unit. A key exists only once it acts.

    model.py     model, data
    rollout.py   rollout
    training.py  rewards, objective, optimizer, train
    distributed.py  distributed
    checks.py    what values are held to
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..rewards import short_names
from ..rewards.load import names as scorer_names
from .checks import expect
from .distributed import DistributedConfig
from .model import LORA_TARGETS, DataConfig, LoraConfig, ModelConfig
from .rollout import RolloutConfig
from .training import ObjectiveConfig, OptimizerConfig, RewardConfig, TrainConfig

__all__ = [
    "LORA_TARGETS", "Config", "DataConfig", "DistributedConfig", "LoraConfig", "ModelConfig",
    "ObjectiveConfig", "OptimizerConfig", "RewardConfig", "RolloutConfig", "TrainConfig",
]  # fmt: skip


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
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def validate(self, training: bool = True) -> None:
        """Raise ConfigurationError naming the key, its value and what was expected.

        training: False where no reward is needed.
        """
        expect(
            "rollout.precision", self.rollout.precision,
            self.rollout.precision != "fp8" or self.model.fuse, "null, or model.fuse true with it",
        )  # fmt: skip
        expect(
            "rollout.engine", self.rollout.engine,
            self.rollout.engine != "graph" or self.model.fuse,
            "'auto', 'eager' or 'compile', or model.fuse true with it",
        )  # fmt: skip
        for group in (self.model.lora, self.data, self.rollout, self.objective):
            group.validate()
        for group in (self.optimizer, self.train, self.distributed):
            group.validate()
        forward = self.distributed.gather == "forward"
        for key, value, ok in (
            ("precision", self.rollout.precision, self.rollout.precision is None),
            ("engine", self.rollout.engine, self.rollout.engine in ("auto", "eager")),
        ):
            expected = "a copy of the weights for it: distributed.gather 'auto' or 'phase'"
            expect(f"rollout.{key}", value, ok or not forward, expected)
        stop = self.train.hacking_stop
        ok = any(r.heldout for r in self.rewards) and self.train.evaluation_samples >= 2
        expected = "0, or a held-out reward and train.evaluation_samples of at least 2 with it"
        expect("train.hacking_stop", stop, stop == 0 or ok or not training, expected)
        for reward in self.rewards:
            reward.validate()
        names = [r.name for r in self.rewards]
        trained = any(r.weight > 0 and not r.heldout for r in self.rewards)
        ok = trained or not training
        expect("rewards", names, ok, "at least one of weight > 0 that is not held out")
        short = short_names(names, [r.label for r in self.rewards])
        expect(
            "rewards", short, len(set(short)) == len(short),
            "no reward twice: a label of its own for each of one name",
        )  # fmt: skip
        coloured = [name for name in names if name in scorer_names()]
        expect(
            "rewards", names, not (coloured and training and self.model.path == "digits"),
            f"others than {', '.join(coloured)}, which scores images of 3 channels: those of "
            "model.path 'digits' have 1",
        )  # fmt: skip
