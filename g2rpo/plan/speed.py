"""How much work an update is and how long a card would take: FLOPs, rates, seconds, cost.

Rates are those of benchmarks/results/*.json where one is of this very card; else those published
for FLUX.1-dev on an H100, in the share of the card's own peak that they are of the H100's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ConfigurationError
from .cards import Card
from .gpus import ONE, Gpus
from .memory import completion_evaluations
from .model import Sizes
from .states import anchor_rows, dtype_of, steps, trained

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout

# Seconds of 28 steps at 1024 x 1024, batch 4, text encoders and autoencoder included, on an H100 80
# GB: eager 24.828, torch.compile 15.948, and with rowwise FP8 11.692 (sayakpaul/diffusers-torchao,
# README.md). A forward is 74.4 TFLOP.
FORWARDS = 4 * 28 * 74.4e12
H100_BF16, H100_FP8 = 989.4e12, 1978.9e12
SHARES = {
    "eager": FORWARDS / 24.828 / H100_BF16,
    "fused": FORWARDS / 15.948 / H100_BF16,  # as torch.compile's
    "fp8": FORWARDS / 11.692 / H100_FP8,
}
PUBLISHED = {"eager": "as diffusers", "fused": "as torch.compile", "fp8": "as torchao FP8"}
SOURCE = "FLUX.1-dev on an H100, sayakpaul/diffusers-torchao"
FLOAT32_SHARE = 0.8  # of float32 without tensor cores, which is what PyTorch computes in: assumed
BANDWIDTH_SHARE = 0.85  # of the memory's published one, in an optimizer's step: assumed
LINK_SHARE = 0.7  # of the published link to the host: assumed
SMALL = 10**9  # parameters below which a rate says nothing
DECODING_SHARE = 0.3  # of bfloat16's peak, in the autoencoder's convolutions: assumed


def forward_flops(sizes: Sizes) -> int:
    """Of one row: linears 2 * weights * tokens, attention 4 * L^2 * D a block; no others.

    Modulations, and the embedders of timestep, guidance and pooled text, see one token an image.
    """
    square, blocks = sizes.width**2, sizes.doubles + sizes.singles
    # q, k, v, out: 4 D^2; MLP: 8 D^2. A single block's are the same, in other matrices.
    token_linears = 12 * square * blocks * sizes.tokens
    ends = sizes.width * (2 * sizes.channels * sizes.image + sizes.text_width * sizes.text)
    modulations = square * (12 * sizes.doubles + 3 * sizes.singles + 2)
    embedders = 3 * square + sizes.width * (2 * 256 + sizes.pooled)
    attention = 4 * sizes.tokens**2 * sizes.width * blocks
    return 2 * (token_linears + ends + modulations + embedders) + attention


@dataclass(frozen=True)
class Rate:
    """FLOP/s, and where they are from."""

    value: float
    source: str  # "measured: FILE" or "published: ..." or "assumed: ..."


@dataclass(frozen=True)
class Phase:
    """Work of an update's phase, its seconds, and what they rest on; None: rates are unknown."""

    name: str
    flops: float
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Work:
    """An update's work by phase, and a run's."""

    forward: float  # FLOPs of one row
    evaluations: int  # of an update: anchors, completions, forwards with gradients
    run_evaluations: int  # of all updates; the fixed evaluations of the policy apart
    phases: tuple[Phase, ...]
    evaluation: Phase  # one of the fixed evaluations
    evaluations_of_policy: int
    updates: int
    prompts: int

    @property
    def seconds(self) -> float | None:
        """Of one update."""
        known = [phase.seconds for phase in self.phases]
        return None if None in known else sum(known)

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def hours(self) -> float | None:
        """Of the run, on one GPU."""
        if self.seconds is None or self.evaluation.seconds is None:
            return None
        whole = self.updates * self.seconds
        return (whole + self.evaluations_of_policy * self.evaluation.seconds) / 3600


def plan_work(
    config: Config, sizes: Sizes, card: Card, results: Path = RESULTS, gpus: Gpus = ONE
) -> Work:
    """The work of a run and its seconds on a card, of one GPU: what it sends to others apart.
    results: the folder of measurements."""
    rollout, train = config.rollout, config.train
    prompts, positions = train.prompts_per_update, len(rollout.sde_positions)
    forward = forward_flops(sizes)
    rates = _rates(config, sizes, card, results)
    anchors = prompts * (max(rollout.sde_positions) + 1)
    completions = prompts * completion_evaluations(config)
    references = prompts * positions if config.objective.kl else 0
    samples = prompts * (positions * rollout.group_size * len(rollout.granularities) + 1)
    # A backward is two forwards, and with checkpointing one more; frozen weights spare half of it.
    backward = 1 if config.model.lora.rank else 2
    passes = 1 + backward + (1 if config.model.gradient_checkpointing else 0)
    moved, basis = _step_seconds(config, sizes, card, gpus)

    def phase(name: str, flops: float, rate: Rate) -> Phase:
        seconds = 0.0 if not flops else flops / rate.value if rate.value else None
        return Phase(name, flops, seconds, rate.source if flops else "nothing to decode")

    gradients = prompts * positions
    phases = (
        phase("anchor", anchors * forward, rates["anchor"]),
        phase("completions", completions * forward, rates["completions"]),
        phase("decode", samples * sizes.vae_flops, rates["decode"]),
        phase("forward, backward", (passes * gradients + references) * forward, rates["anchor"]),
        Phase("optimizer", 0.0, None if moved is None else steps(config) * moved, basis),
    )
    shown = train.evaluation_samples
    evaluation = phase(
        "evaluation", shown * (rollout.steps * forward + sizes.vae_flops), rates["anchor"]
    )
    evaluations = anchors + completions + gradients + references
    return Work(
        forward=forward,
        evaluations=evaluations,
        run_evaluations=evaluations * train.updates,
        phases=phases,
        evaluation=evaluation,
        evaluations_of_policy=1 + -(-train.updates // train.evaluate_every),
        updates=train.updates,
        prompts=prompts,
    )


def _rates(config: Config, sizes: Sizes, card: Card, results: Path) -> dict[str, Rate]:
    """FLOP/s of the anchor's and update's forwards, the completions' and the decoder's."""
    fused, fp8 = config.model.fuse, config.rollout.precision == "fp8"
    if fp8 and card.bf16 and not card.fp8:
        raise ConfigurationError(
            f"rollout.precision is 'fp8', for which {card.name} has no hardware; expected null "
            "(--rollout.precision null)"
        )
    why = ""
    if not card.bf16:
        why = f"no rates are known of {card.name}"
    elif sizes.parameters < SMALL:
        why = "so small a model waits for launches"
    if why:
        return dict.fromkeys(("anchor", "completions", "decode"), Rate(0.0, why))
    if dtype_of(config).itemsize == 4:
        rate = Rate(FLOAT32_SHARE * card.fp32, f"assumed: {FLOAT32_SHARE:.0%} of float32's peak")
        completing = _share(card.fp8, "fp8") if fp8 else rate
        if config.rollout.precision == "bfloat16":
            completing = _share(card.bf16, "fused" if fused else "eager")
        return {"anchor": rate, "completions": completing, "decode": rate}
    anchor = _share(card.bf16, "fused" if fused else "eager")
    completing = _share(card.fp8, "fp8") if fp8 else anchor
    decode = Rate(
        DECODING_SHARE * card.bf16, f"assumed: {DECODING_SHARE:.0%} of bfloat16's peak"
    )
    rates = {"anchor": anchor, "completions": completing, "decode": decode}
    for which, way, rows in (
        ("anchor", "ours, bf16" if fused else "diffusers, bf16", anchor_rows(config)),
        ("completions", _completing(fused, fp8), config.rollout.branch_batch),
    ):
        if found := measured_rate(card, way, sizes.tokens, rows, results):
            rates[which] = found
    return rates


def _completing(fused: bool, fp8: bool) -> str:
    """bench_flux_forward.py's name of the way completions run."""
    return "ours, rollout, FP8" if fp8 else "ours, rollout, bf16" if fused else "diffusers, bf16"


def _share(peak: float, way: str) -> Rate:
    share = SHARES[way]
    return Rate(share * peak, f"published: {share:.0%} of peak, {PUBLISHED[way]}")


def measured_rate(card: Card, way: str, tokens: int, rows: int, results: Path) -> Rate | None:
    """FLOP/s of a way that bench_flux_forward.py has timed on this card, at the number of tokens
    nearest, and of these at the batch nearest."""
    found: list[tuple[int, int, float, str]] = []
    for name, content in _results(card, "flux-forward", results).items():
        for case in content["cases"]:
            if way in case["variants"]:
                seconds = case["variants"][way]["seconds"]
                apart = abs(case["tokens"] - tokens), abs(case["batch"] - rows)
                found.append((*apart, case["flops"] / seconds, name))
    if not found:
        return None
    *_, value, name = min(found)
    return Rate(value, f"measured: {name}")


def measured_update(
    card: Card, preset: str, results: Path = RESULTS
) -> tuple[Mapping[str, int], Mapping[str, float], str] | None:
    """Peak bytes and seconds by the trainer's phases, and the file, where bench_flux_update.py has
    run this preset, unchanged, on this card."""
    for name, content in _results(card, "flux-update", results).items():
        for case in content["cases"]:
            if case["preset"] == preset and not case["overrides"]:
                return case["peak_bytes"], case["phases"], name
    return None


def _results(card: Card, kind: str, folder: Path) -> dict[str, Any]:
    """Results files of a kind, of FLUX's size on this card, by name."""
    found = {}
    for file in sorted(folder.glob(f"{kind}-*.json")):
        content = json.loads(file.read_text())
        machine = content["machine"]["name"]
        if content["kind"] == kind and content["size"] == "flux" and machine in card.devices:
            found[file.name] = content
    return found


def _step_seconds(
    config: Config, sizes: Sizes, card: Card, gpus: Gpus
) -> tuple[float | None, str]:
    """One step: bytes through the GPU's memory, and over the link where states are on the host."""
    if not card.bandwidth:
        return None, f"no rates are known of {card.name}"
    made = trained(config, sizes, gpus)
    item = 4 if config.model.lora.rank else dtype_of(config).itemsize
    resident = made.low_bits + made.moments
    moved = 2 * (item * made.count + resident) + made.gradients + made.all_factors
    seconds = moved / (BANDWIDTH_SHARE * card.bandwidth)
    basis = f"assumed: {BANDWIDTH_SHARE:.0%} of {card.bandwidth / 1e12:.3g} TB/s"
    # Streamed: both ways at once. Offloaded: away, and back.
    across = made.streamed if made.streamed else 2 * resident if config.optimizer.offload else 0
    if across:
        seconds += across / (LINK_SHARE * card.link)
        basis += f", {LINK_SHARE:.0%} of the link's {card.link / 1e9:.0f} GB/s"
    return seconds, basis
