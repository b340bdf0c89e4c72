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
from .rewards import short_names
from .rewards.load import names as scorer_names
from .schedule import noise_schedule

# The attentions' linears of all of FLUX's blocks, the feed-forwards' of the double ones.
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip


def _expect(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigurationError(f"{name} is {value!r}; expected {expected}")


def _finite(value: float) -> bool:
    return math.isfinite(value)


@dataclass
class LoraConfig:
    """Low-rank adapters (PEFT) instead of full fine-tuning."""

    rank: int = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: float | None = None
    """Their scale times the rank; null: the rank, a scale of 1."""
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Linear layers that get one, by the end of their names."""

    def validate(self) -> None:
        _expect("model.lora.rank", self.rank, self.rank >= 0, "at least 0")
        alpha = self.alpha
        ok = alpha is None or (alpha > 0 and _finite(alpha))
        _expect("model.lora.alpha", alpha, ok, "> 0, or null")
        _distinct("model.lora.targets", self.targets)


@dataclass
class ModelConfig:
    """What is trained, and where."""

    path: str = "digits"
    """What to train: 'digits', the embedded flow model of handwritten digits; or a FLUX pipeline,
    as a folder or a Hugging Face hub id such as black-forest-labs/FLUX.1-dev."""
    transformer: str | None = None
    """A .safetensors file with all weights of the transformer to start from; null: path's own."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the transformer's weights and arithmetic; null: bfloat16, and float32 for the digits."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    fuse: bool = False
    """Run the transformer's blocks on g2rpo_kernels' fused ops; the same weights and files."""
    attention: Literal[
        "auto", "native", "cudnn", "flash-attn-3", "flash-attn", "flash", "efficient", "math"
    ] = "auto"
    """Attention of FLUX: auto measures those there are, once for each GPU; native leaves it to
    PyTorch, as do CPUs; flash-attn needs that package, cudnn and the last three none."""
    gradient_checkpointing: bool = False
    """Forward twice in the update instead of keeping every activation."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:0; 'auto' takes the GPU when there is one."""


@dataclass
class DataConfig:
    """What it is asked to draw."""

    prompts: str | None = None
    """Prompts: a text file, one a line; .jsonl with an object a line; or .csv with a header. null:
    the prompts the model comes with."""
    evaluation_prompts: str | None = None
    """Prompts of the evaluations, in such a file, best of none that is trained on; null: those of
    data.prompts."""
    column: str = "prompt"
    """Key or column that holds the prompt, in .jsonl and .csv files."""
    embeddings: str | None = None
    """Folder that `g2rpo embed` fills and training reads; null: training embeds as it goes."""
    max_sequence_length: int = 512
    """T5 tokens of a prompt, 1 to 512; longer prompts are cut."""

    def validate(self) -> None:
        length = self.max_sequence_length
        _expect("data.max_sequence_length", length, 1 <= length <= 512, "1 to 512")


@dataclass
class RolloutConfig:
    """What an update draws."""

    sampling: Literal["singular", "trajectories"] = "singular"
    """singular: branches leave a deterministic anchor by one stochastic step each, whose advantage
    is their reward (G2RPO). trajectories: runs that are stochastic at all sde_positions, each with
    one reward for all its steps (Flow-GRPO, DanceGRPO, MixGRPO)."""

    height: int | None = None
    """Height of the images in pixels, a multiple of 16; null: 720, and 8 for the digits."""
    width: int | None = None
    """Width of the images in pixels, a multiple of 16; null: 720, and 8 for the digits."""
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
    """Steps, 0 .. T-2, at which branches leave the anchor, or at which trajectories are
    stochastic."""
    window: int | None = None
    """Of sde_positions, how many an update uses: as many in a row, which move; null: all."""
    window_order: Literal["progressive", "random"] = "progressive"
    """Whether the window slides from the first positions to the last and begins again, or jumps."""
    window_updates: int = 1
    """Updates after which the window moves."""
    window_stride: int = 1
    """Positions that it moves by."""
    granularities: list[int] = field(default_factory=lambda: [1, 2])
    """Step sizes, in steps of the schedule, at which every branch is completed."""
    group_size: int = 12
    """Branches G per prompt and position, or trajectories per prompt, at least 2."""
    common_noise: bool = True
    """Whether a prompt's trajectories begin at one noise; branches do."""
    trained_fraction: float = 1.0
    """Of each trajectory's stochastic steps, how many are trained, drawn for each anew; in (0, 1].
    """
    precision: Literal["fp8", "bfloat16"] | None = None
    """Of the completions' forwards: fp8 (needs model.fuse) for their token linears; bfloat16 by a
    copy of a float32 transformer; null: as the update's. Anchors, and with them the importance
    ratios, never see it."""
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    """How the completions' forwards run: graph (needs model.fuse) replays a CUDA graph, compile
    goes through torch.compile; auto: graph on a GPU, and eager on a CPU and without model.fuse."""
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
        self._validate_sampling()
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


    def _validate_sampling(self) -> None:
        window, count = self.window, len(self.sde_positions)
        ok = window is None or 1 <= window <= count
        _expect("rollout.window", window, ok, f"1 to {count} (of rollout.sde_positions), or null")
        for key in ("window_updates", "window_stride"):
            value = getattr(self, key)
            _expect(f"rollout.{key}", value, value >= 1, "at least 1")
        fraction = self.trained_fraction
        _expect("rollout.trained_fraction", fraction, 0 < fraction <= 1, "in (0, 1]")
        singular = self.sampling == "singular"
        for key, value, only, where in (
            ("trained_fraction", fraction, 1.0, singular),
            ("common_noise", self.common_noise, True, singular),
            ("granularities", self.granularities, [1], not singular),
            ("precision", self.precision, None, not singular),
            ("engine", self.engine, "auto", not singular),
        ):
            expected = f"{only!r} with rollout.sampling {self.sampling!r}"
            _expect(f"rollout.{key}", value, not where or value == only, expected)


def _distinct(name: str, values: list[int] | list[str]) -> None:
    _expect(name, values, len(values) > 0, "at least one")
    _expect(name, values, len(set(values)) == len(values), "no value twice")


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
        _expect(
            "name of a reward", name, ":" in name or name in scorers,
            f"'package.module:function', 'package.module:Class' or one of {', '.join(scorers)}",
        )  # fmt: skip
        weight, label = self.weight, self.label
        ok = weight >= 0 and _finite(weight)
        _expect(f"weight of reward {name!r}", weight, ok, ">= 0")
        ok = label is None or (bool(label) and label == label.strip() and label.isprintable())
        ok_options = all(isinstance(key, str) for key in self.options)
        _expect(f"options of reward {name!r}", list(self.options), ok_options, "names as keys")
        _expect(
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
        _expect("objective.clip_range", self.clip_range, self.clip_range > 0, "> 0")
        clip = self.advantage_clip
        _expect("objective.advantage_clip", clip, clip is None or clip > 0, "> 0, or null")
        _expect("objective.kl", self.kl, self.kl >= 0 and _finite(self.kl), ">= 0")


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
            _expect(f"optimizer.{key}", value, ok, expected)
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
            _expect(f"train.{name}", value, value >= low, f"at least {low}")
        _expect("train.seed", self.seed, self.seed < 2**63, "less than 2^63")
        _expect("train.ema", self.ema, self.ema is None or 0 <= self.ema < 1, "in [0, 1), or null")


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

    def validate(self, training: bool = True) -> None:
        """Raise ConfigurationError naming the key, its value and what was expected.

        training: False where no reward is needed.
        """
        _expect(
            "rollout.precision", self.rollout.precision,
            self.rollout.precision != "fp8" or self.model.fuse, "null, or model.fuse true with it",
        )  # fmt: skip
        _expect(
            "rollout.engine", self.rollout.engine,
            self.rollout.engine != "graph" or self.model.fuse,
            "'auto', 'eager' or 'compile', or model.fuse true with it",
        )  # fmt: skip
        for group in (self.model.lora, self.data, self.rollout, self.objective):
            group.validate()
        for group in (self.optimizer, self.train):
            group.validate()
        stop = self.train.hacking_stop
        ok = any(r.heldout for r in self.rewards) and self.train.evaluation_samples >= 2
        expected = "0, or a held-out reward and train.evaluation_samples of at least 2 with it"
        _expect("train.hacking_stop", stop, stop == 0 or ok or not training, expected)
        for reward in self.rewards:
            reward.validate()
        names = [r.name for r in self.rewards]
        trained = any(r.weight > 0 and not r.heldout for r in self.rewards)
        ok = trained or not training
        _expect("rewards", names, ok, "at least one of weight > 0 that is not held out")
        short = short_names(names, [r.label for r in self.rewards])
        _expect(
            "rewards", short, len(set(short)) == len(short),
            "no reward twice: a label of its own for each of one name",
        )  # fmt: skip
        coloured = [name for name in names if name in scorer_names()]
        _expect(
            "rewards", names, not (coloured and training and self.model.path == "digits"),
            f"others than {', '.join(coloured)}, which scores images of 3 channels: those of "
            "model.path 'digits' have 1",
        )  # fmt: skip
