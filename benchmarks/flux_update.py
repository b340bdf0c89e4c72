"""What bench_flux_update.py measures: the trainer on random weights, and its prediction."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
from flux_shapes import Size, new_transformer
from torch import Tensor, nn

from g2rpo.arguments import make_parser, named_config
from g2rpo.config import Config
from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.flux.images import ImageDecoder, latent_shape, position_ids, shrinkage
from g2rpo.flux.miniature import VAE as SMALL_VAE
from g2rpo.plan import make_plan
from g2rpo.plan.cards import CARDS, Card
from g2rpo.policy import Conditions, FluxPolicy
from g2rpo.rewards import Reward
from g2rpo.schedule import evaluations_per_prompt
from g2rpo.trainer import Trainer

# FLUX.1-dev's vae/config.json.
VAE = {
    **SMALL_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip


class RandomModel:
    """A `policy.Model` of FLUX's shape (or the toy's) whose weights and embeddings are random."""

    def __init__(self, size: Size, config: Config, device: str) -> None:
        from diffusers import AutoencoderKL

        small = size.name == "toy"
        dtype = getattr(torch, config.model.dtype or "bfloat16")
        # A latent has a quarter of a token's channels.
        shape = {**(SMALL_VAE if small else VAE), "latent_channels": size.channels // 4}
        with torch.device(device):
            vae = AutoencoderKL(**shape).eval().requires_grad_(False)
        nn.Module.to(vae, dtype)  # diffusers' own warns, whatever the model
        side = 2 * shrinkage(vae.config) * size.side
        height, width = config.rollout.height or side, config.rollout.width or side
        transformer = nn.Module.to(new_transformer(size, device), dtype)
        self.embedding = size.text, size.text_width, size.pooled
        self.latent_shape = latent_shape(height, width, vae.config)
        latents = height // shrinkage(vae.config), width // shrinkage(vae.config)
        ids = position_ids(*latents, torch.device(device))
        self.policy = FluxPolicy(transformer, ids, config.rollout.guidance)
        self.prompts = [f"prompt {i}" for i in range(config.train.prompts_per_update)]
        self.evaluation_prompts = self.prompts
        self.decoder = ImageDecoder(vae, height, width, torch.device(device))

    def embed(self, prompts: list[str]) -> Conditions:
        tokens, width, pooled = self.embedding
        generator = torch.Generator().manual_seed(3)
        rows = [self.prompts.index(prompt) for prompt in prompts]
        embeds = torch.randn(len(self.prompts), tokens, width, generator=generator)[rows]
        vectors = torch.randn(len(self.prompts), pooled, generator=generator)[rows]
        return Conditions(embeds.bfloat16(), vectors.bfloat16()).to(self.policy.device)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


class Watch:
    """Peak memory by phase, on a GPU; says each phase as it begins."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.peaks: dict[str, int] = {}
        self.name = ""
        self.rows, self.began = 0, time.perf_counter()

    def begin(self, name: str) -> None:
        self.end()
        self.name = name
        print(f"{time.perf_counter() - self.began:6.0f} s  {name}", flush=True)

    def end(self) -> None:
        if self.gpu and self.name:
            peak = torch.cuda.max_memory_allocated()
            self.peaks[self.name] = max(self.peaks.get(self.name, 0), peak)
            torch.cuda.reset_peak_memory_stats()
        self.name = ""

    def count(self, rows: int) -> None:
        self.rows += rows


# A run -----------------------------------------------------------------------------------------


def configure(
    name: str, size: Size, device: str, prompts: int, overrides: list[str]
) -> tuple[Config, list[str]]:
    """The preset's configuration with so many prompts an update, and all that was changed of it, as
    one types it. Raises ConfigurationError for a preset that trains no FLUX."""
    parser = make_parser()
    preset, _ = named_config(parser, [name])
    if preset.model.path == "digits":
        raise ConfigurationError(
            f"--preset is {name!r}, which trains the digits; expected one of FLUX, such as "
            "flux-dev-1gpu"
        )
    if prompts != preset.train.prompts_per_update:
        overrides = ["--train.prompts_per_update", str(prompts), *overrides]
    config, _ = named_config(parser, [name, *overrides])
    config.model.device = device
    config.rewards = []  # it has its own, without weights
    if size.name == "toy":
        config.rollout.branch_batch = min(config.rollout.branch_batch, 8)
        config.rollout.height = config.rollout.width = None
    config.validate(training=False)
    return config, overrides


def evaluations(config: Config) -> int:
    """Of a prompt's rollout: transformer evaluations before the update's own."""
    of = config.rollout
    return evaluations_per_prompt(of.steps, of.sde_positions, of.granularities, of.group_size)


class Run:
    """A trainer that has begun no update; what it says is shown and kept."""

    def __init__(self, config: Config, size: Size, device: str, watch: Watch) -> None:
        self.watch, self.messages = watch, []
        watch.begin("weights")
        self.trainer = Trainer(
            config, RandomModel(size, config, device), [Reward("brightness", brightness)],
            on_phase=watch.begin, on_evaluations=watch.count, on_message=self.say,
        )  # fmt: skip

    def say(self, text: str) -> None:
        self.messages.append(text)
        print(text, flush=True)

    def updates(self, most: int, until: float) -> Iterator[dict]:
        """Seconds and peak bytes of one update after the other, by phase; no update is begun that
        would end after `until`. Raises TrainingError where memory runs out for good (the message
        has the phase) and where an update is skipped, which is no whole one."""
        watch, trainer, seconds = self.watch, self.trainer, 0.0
        for number in range(1, most + 1):
            if number > 1 and time.perf_counter() + seconds > until:
                return
            watch.end()  # of what came before
            watch.peaks, watch.rows = {}, 0
            started = time.perf_counter()
            found = trainer.update()
            watch.end()
            seconds = time.perf_counter() - started
            if trainer.skipped_updates:
                raise TrainingError(f"update {number} was skipped; {' '.join(self.messages)}")
            yield {
                "updates": number,
                "seconds": seconds,
                "rows": watch.rows,
                "phases": {
                    name.removeprefix("seconds/"): value
                    for name, value in found.items() if name.startswith("seconds/")
                },
                "peak_bytes": dict(watch.peaks),
                # Smaller than the preset's where memory ran out; the messages say so.
                "batches": {
                    "anchor": trainer.sampling.update_batch,
                    "branch": trainer.sampling.branch_batch,
                },
                "ratio_max": found.get("ratio_max"),
                "grad_norm": found.get("grad_norm"),
                "messages": list(self.messages),
            }  # fmt: skip


# Its prediction --------------------------------------------------------------------------------


def this_card() -> Card:
    """As `g2rpo plan` knows it, or with no more than its memory."""
    found = torch.cuda.get_device_properties(0)
    known = (card for card in CARDS.values() if found.name in card.devices)
    return next(known, None) or Card(
        found.name, found.total_memory, multiprocessors=found.multi_processor_count
    )


def predict(config: Config, card: Card) -> dict:
    """What `g2rpo plan` says of an update of FLUX.1-dev's shape, by the trainer's phases: bytes at
    the peak, and seconds, None where it knows no rates of the card.

    Prompts count as embedded already, since there are no text encoders here.
    """
    config = copy.deepcopy(config)
    config.data.embeddings = "embeddings"
    plan = make_plan(config, card)
    totals, work = plan.memory.totals, plan.work
    seconds = {phase.name: phase.seconds for phase in work.phases}
    learning = [seconds["forward, backward"], seconds["optimizer"]]
    return {
        "peak_bytes": {
            "anchor": totals["anchor"], "completions": totals["completions"],
            "rewards": totals["rewards"], "update": max(totals["backward"], totals["step"]),
        },
        "seconds": {
            "anchor": seconds["anchor"], "completions": seconds["completions"],
            "rewards": seconds["decode"],
            "update": None if None in learning else sum(learning),
        },
        "peak": plan.memory.peak, "whole": work.seconds,
        "basis": {phase.name: phase.basis for phase in work.phases},
    }  # fmt: skip
