"""Towards what, by which loss and optimizer, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..rewards.load import names as scorer_names
from .checks import expect, finite


@dataclass
class RewardConfig:
    """One reward and its part in the run."""

    name: str
    """What scores: the import path 'package.module:function' of a reward(images, prompts) -> [N],
    or 'package.module:Class' of one that is made once; or a published scorer: hps-v2.1,
    clip-score-224, clip-score-378, pickscore, aesthetic, imagereward, judge."""
    weight: float = 1.0
    """Weight of its normalised advantage, >= 0; 0: reported, not trained on."""
    heldout: bool = False
    """Scored at evaluations only, as a judge the training never sees."""
    path: str | None = None
    """File or folder of a published scorer; null: its folder in the user's cache. Of a judge its
    endpoint, as http://host:8000/v1. A class is given it as `path`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a published scorer's weights and arithmetic. A class is given it as `dtype`, if it is not
    float32."""
    options: dict = field(default_factory=dict)  # of dict[str, Any], text would be read as YAML
    """Further arguments of a published scorer or a class by name, such as tokenizer, batch_size or
    a judge's model. No place for secrets: api_key_env names the variable that holds a key."""
    offload: bool = False
    """Its weights are on the device while it scores, and in host memory otherwise."""
    label: str | None = None
    """What it is called in metrics and reports; null: by its function, class or scorer."""

    def validate(self) -> None:
        scorers, name = scorer_names(), self.name
        expect(
            "name of a reward", name, ":" in name or name in scorers,
            f"'package.module:function', 'package.module:Class' or one of {', '.join(scorers)}",
        )  # fmt: skip
        weight, label = self.weight, self.label
        ok = weight >= 0 and finite(weight)
        expect(f"weight of reward {name!r}", weight, ok, ">= 0")
        ok = label is None or (bool(label) and label == label.strip() and label.isprintable())
        ok_options = all(isinstance(key, str) for key in self.options)
        expect(f"options of reward {name!r}", list(self.options), ok_options, "names as keys")
        expect(
            f"label of reward {name!r}", label, ok and "/" not in (label or ""),
            "text without '/' and without white space at its ends, or null",
        )  # fmt: skip


@dataclass
class ObjectiveConfig:
    """The clipped policy loss."""

    clip_range: float = 1e-4
    """Half-width of the window of the importance ratio around 1."""
    advantage_clip: float | None = 5.0
    """Advantages are clamped to plus or minus this (standard deviations); null: not at all."""
    stepping: Literal["accumulate", "per_position"] = "accumulate"
    """One optimizer step an update, exactly on-policy; or one after every SDE position."""
    advantage_std: Literal["group", "update"] = "group"
    """What a group's rewards, less their mean, are divided by: their own standard deviation, or
    that of all of the update's (Flow-GRPO)."""
    ratio: Literal["plain", "normalised"] = "plain"
    """Importance ratio: as it is, or GRPO-Guard's (arXiv 2510.22319), whose mean and spread are the
    same at every step."""
    kl: float = 0.0
    """Weight of the KL divergence to the starting policy, in the loss; 0: not computed."""

    def validate(self) -> None:
        expect("objective.clip_range", self.clip_range, self.clip_range > 0, "> 0")
        clip = self.advantage_clip
        expect("objective.advantage_clip", clip, clip is None or clip > 0, "> 0, or null")
        expect("objective.kl", self.kl, self.kl >= 0 and finite(self.kl), ">= 0")


@dataclass
class OptimizerConfig:
    """AdamW and gradient clipping."""

    name: Literal["adamw", "adamw8bit", "adamw_streamed", "bitsandbytes", "torchao"] = "adamw"
    """adamw: torch's, on the parameters as they are, for model.dtype float32. adamw8bit: bfloat16
    weights, extra bits of a master, moments of 8 bits. adamw_streamed: float32 master and moments
    in host memory, through the GPU in every step. Or the AdamW8bit of a package."""
    master_bits: Literal[16, 24, 32] = 24
    """adamw8bit: bits of a bfloat16 weight's master; stochastic rounding below, but for 32."""
    codec: Literal["dynamic", "fp8"] = "dynamic"
    """adamw8bit: code of its moments, bitsandbytes' dynamic one or e4m3."""
    offload: bool = False
    """adamw8bit: its states are in host memory during rollouts and evaluations."""
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
        for key, value, default in (
            ("master_bits", self.master_bits, 24),
            ("codec", self.codec, "dynamic"),
            ("offload", self.offload, False),
        ):
            ok = self.name == "adamw8bit" or value == default
            expected = f"{default!r}, or optimizer.name 'adamw8bit' with it"
            expect(f"optimizer.{key}", value, ok, expected)
        expect("optimizer.lr", self.lr, self.lr > 0 and finite(self.lr), "> 0")
        expect("optimizer.betas", self.betas, all(0 <= b < 1 for b in self.betas), "in [0, 1)")
        expect("optimizer.eps", self.eps, self.eps > 0 and finite(self.eps), "> 0")
        decay = self.weight_decay
        expect("optimizer.weight_decay", decay, decay >= 0 and finite(decay), ">= 0")
        expect("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "> 0")


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
    """Images of an evaluation: its prompts in turn from the first, the same noises every time."""
    ema: float | None = None
    """Decay of a moving average of the weights, an update, in [0, 1); evaluations then use it.
    null: none is kept."""
    max_skipped: int = 5
    """Updates in a row with a loss or gradient that is not finite, after which the run ends."""
    hacking_stop: int = 0
    """Evaluations in a row that warn of reward hacking (a trained reward above its start, a
    held-out one below the 95 % interval of its own), after which the run ends with a checkpoint;
    0: it goes on."""
    deterministic: bool = True
    """Only algorithms that give the same bits every time, so that a resumed run goes on as if it
    had not ended."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Where metrics go besides metrics.jsonl; must be installed."""
    output: str | None = None
    """Run directory; null: runs/<preset>-<time>."""

    def validate(self) -> None:
        for name, low in (
            ("updates", 1), ("prompts_per_update", 1), ("seed", 0), ("save_every", 1),
            ("keep_last", 0), ("evaluate_every", 1), ("evaluation_samples", 1), ("max_skipped", 1),
            ("hacking_stop", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            expect(f"train.{name}", value, value >= low, f"at least {low}")
        expect("train.seed", self.seed, self.seed < 2**63, "less than 2^63")
        expect("train.ema", self.ema, self.ema is None or 0 <= self.ema < 1, "in [0, 1), or null")
