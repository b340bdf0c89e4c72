"""What lives in a GPU's memory in which phase of an update, in bytes, and what in host memory.

`config` is of one GPU: where several share a run, of its part of it (`gpus.share_of`).

All of it is arithmetic on shapes, of the steady state: from the second update on, since AdamW makes
its states in the first step. Of rewards the weights of the published scorers are counted, whose
activations are less than those of decoding; functions and classes of the user's are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..completions import completion_tree
from ..config import Config
from ..distributed.layout import BUCKET
from .activations import Activations, modulation_row
from .gpus import ONE, Gpus
from .model import Sizes
from .rewards import scorers_of
from .shards import completing_copy, in_flight
from .states import Trained, anchor_rows, dtype_of, loose_gradients, trained

PHASES = ("load", "embed", "anchor", "completions", "rewards", "backward", "step")
ROLLOUT = ("anchor", "completions", "rewards")
UPDATE = ("backward", "step")
DECODED = 4  # images the autoencoder decodes at once, at most: flux.images.BATCH
CUBLAS = 32 * 2**20  # bytes of workspace, on Hopper and with CUBLAS_WORKSPACE_CONFIG=:4096:8


@dataclass(frozen=True)
class Row:
    """Something in memory: bytes by phase, of those it is there in."""

    name: str
    bytes: Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """Rows of GPU memory by phase and of host memory; what a phase needs is the sum of its rows."""

    phases: tuple[str, ...]
    rows: tuple[Row, ...]
    host: tuple[tuple[str, int], ...]

    @property
    def totals(self) -> dict[str, int]:
        return {p: sum(row.bytes.get(p, 0) for row in self.rows) for p in self.phases}

    @property
    def peak(self) -> int:
        return max(self.totals.values())

    @property
    def peak_phase(self) -> str:
        return max(self.totals, key=self.totals.__getitem__)

    @property
    def on_host(self) -> int:
        return sum(count for _, count in self.host)


def activations(config: Config, sizes: Sizes, rows: int) -> Activations:
    lora = config.model.lora
    return Activations(
        sizes, rows, dtype_of(config).itemsize, config.model.fuse,
        config.model.gradient_checkpointing, list(lora.targets) if lora.rank else None, lora.rank,
    )  # fmt: skip


def plan_memory(
    config: Config, sizes: Sizes, multiprocessors: int = 132, gpus: Gpus = ONE
) -> Memory:
    """The whole table of one GPU. multiprocessors: it has, for what attention's backward takes."""
    rollout, made = config.rollout, trained(config, sizes, gpus)
    sharded, phase = gpus.sharded(config), config.distributed.gather == "phase"
    itemsize, fp8 = dtype_of(config).itemsize, rollout.precision == "fp8"
    embeds = config.model.path != "digits" and config.data.embeddings is None
    phases = PHASES if embeds else tuple(p for p in PHASES if p != "embed")
    after_load = phases[1:]
    states = ("embed", "step") if config.optimizer.offload else after_load
    update = activations(config, sizes, anchor_rows(config))
    completion = activations(config, sizes, rollout.branch_batch)
    kept = _branches(config, sizes)
    table = _table(config, sizes) if config.model.fuse else 0
    scorers = scorers_of(config)
    completing = completion.forward(fp8, rollout=config.model.fuse)
    copied = completing_copy(config, sizes, itemsize, completing) if sharded and phase else 0
    # Summed over replicas through one bucket; of 16 bits also its pieces are made float32.
    halves = itemsize == 2 and not config.model.lora.rank
    bucket = min(BUCKET, made.count) * 4 * (2 if halves else 1)
    rows = (
        # Read whole, and cut.
        Row("weights", {
            **dict.fromkeys(phases, made.weights), "load": trained(config, sizes).weights
        }),
        Row("blocks in flight", in_flight(config, sizes, itemsize, loose_gradients(config))
            if sharded else {}),
        Row("low bits of the master", dict.fromkeys(states, made.low_bits)),
        Row("optimizer's moments", dict.fromkeys(states, made.moments)),
        Row("gradients", {"backward": made.held, "step": made.gradients}),
        Row("gradient factors", {"backward": made.factors, "step": made.all_factors}),
        Row("reduction's bucket", {"step": bucket} if gpus.count > 1 and not sharded else {}),
        # Made anew from the weights of each update; see `CompletionEngine`.
        Row("FP8 weights", {"completions": sizes.fp8_bytes if fp8 else 0}),
        Row("bfloat16 copy", dict.fromkeys(
            after_load,
            2 * sizes.parameters if rollout.precision == "bfloat16" and not sharded else 0,
        )),
        Row("whole copy", {"completions": copied}),
        Row("branches, latents", kept),
        Row("prompts, modulations", {
            p: _conditions(config, sizes) + (table if p == "completions" else 0)
            for p in after_load
        }),
        Row("activations", {
            "anchor": max(update.forward(), 2 * _chunk(config, sizes)),
            "completions": completing,
            "rewards": _decoding(sizes, rollout.branch_batch, itemsize),
            "backward": update.backward(),
        }),
        Row("workspaces", {
            **dict.fromkeys(ROLLOUT, CUBLAS),
            "backward": CUBLAS + _attention(sizes, update.rows, multiprocessors),
            "step": made.step,
        }),
        Row("autoencoder", dict.fromkeys(phases, sizes.vae_parameters * itemsize)),
        Row("text encoders", {"embed": sizes.encoder_bytes} if embeds else {}),
        Row("reward models", {
            p: scorers.staying + (scorers.visiting if p == "rewards" else 0) for p in phases
        }),
    )  # fmt: skip
    rows = tuple(row for row in rows if any(row.bytes.get(p, 0) for p in phases))
    return Memory(phases, rows, _host(config, sizes, made, itemsize, embeds))


def _branches(config: Config, sizes: Sizes) -> dict[str, int]:
    """Latents, float32: the branches x' [B, G, K], kept from the anchor to the update; while they
    are completed a copy of them, and the pool, of which each granularity of a branch has a slot on
    its way and one when it is finished, and an anchor two; anchors' x_k and, for a moment, v_k.

    The last anchors run beside the branches of those before them, and make theirs when their
    activations are gone.
    """
    rollout, prompts = config.rollout, config.train.prompts_per_update
    latent = 4 * sizes.latent
    positions = len(rollout.sde_positions)
    branches = prompts * rollout.group_size * positions * latent
    anchors = prompts * positions * latent
    pool = 2 * (branches * len(rollout.granularities) + prompts * latent)
    return {
        "anchor": branches - _chunk(config, sizes) + 2 * anchors,
        "completions": 2 * branches + anchors + pool,
        "rewards": branches + anchors + pool,
        **dict.fromkeys(UPDATE, branches + anchors),
    }


def _chunk(config: Config, sizes: Sizes) -> int:
    """The branches of one anchor's forward."""
    rollout = config.rollout
    branches = rollout.group_size * len(rollout.sde_positions)
    return anchor_rows(config) * branches * 4 * sizes.latent


def _conditions(config: Config, sizes: Sizes) -> int:
    """Embeddings of an update's prompts: bfloat16, and float32 of the digits."""
    item = 4 if config.model.path == "digits" else 2
    row = sizes.text * sizes.text_width + sizes.pooled
    return config.train.prompts_per_update * row * item


def _table(config: Config, sizes: Sizes) -> int:
    """What `gk.FluxRollout` computes once: modulations a (prompt, sigma), embedded text a prompt.
    While they are put together they are there twice, but no activations yet."""
    prompts = config.train.prompts_per_update
    made = (config.rollout.steps + 1) * modulation_row(sizes) + sizes.text * sizes.width
    return prompts * made * dtype_of(config).itemsize


def _decoding(sizes: Sizes, batch: int, itemsize: int) -> int:
    """Peak of decoding: three feature maps of twice the channels at the images' own resolution, in
    the autoencoder's last block of four, beside a batch of images in float32 and its copy."""
    pixels = sizes.pixels[0] * sizes.pixels[1]
    decoded = 6 * min(batch, DECODED) * pixels * sizes.vae_width * itemsize
    return decoded + 2 * 4 * 3 * batch * pixels


def _attention(sizes: Sizes, rows: int, multiprocessors: int) -> int:
    """What flash attention's deterministic backward sums the gradient of q in: a float32 copy a
    split, of which it makes as many as keep all multiprocessors at work."""
    splits = -(-multiprocessors // (rows * sizes.heads))
    tokens = -(-sizes.tokens // 128) * 128
    return 4 * splits * rows * tokens * sizes.width


def _host(
    config: Config, sizes: Sizes, made: Trained, itemsize: int, embeds: bool
) -> tuple[tuple[str, int], ...]:
    """Host memory beside the process itself."""
    train = config.train
    average = 0
    if train.ema is not None:  # and the weights themselves, while evaluations use it
        average = (4 + (4 if config.model.lora.rank else itemsize)) * made.count
    start = 0
    if config.objective.kl and not config.model.lora.rank:  # and the weights, while it is in force
        start = 2 * made.weights
    offloaded = made.low_bits + made.moments if config.optimizer.offload else 0
    rows = (
        ("moving average", average),
        ("starting policy", start),
        ("optimizer's states, pinned", made.streamed + offloaded),
        ("text encoders", sizes.encoder_bytes if embeds else 0),
        ("embeddings, at most", 2**30 if embeds else 0),
        ("reward models", scorers_of(config).host),
    )
    return tuple((name, count) for name, count in rows if count)


def completion_evaluations(config: Config) -> int:
    """Evaluations that complete one prompt's branches and its anchor, whose last part is one."""
    rollout = config.rollout
    nodes = sum(
        completion_tree(k, rollout.granularities, rollout.steps).count()
        for k in rollout.sde_positions
    )
    return rollout.group_size * nodes + rollout.steps - 1 - max(rollout.sde_positions)
