"""Measure one whole G2RPO update of FLUX's shape on one GPU: seconds and peak memory by phase.

    python benchmarks/bench_flux_update.py [--preset NAME] [--size flux|toy] [--updates 2]

The trainer itself, on a transformer and an autoencoder with random weights, embeddings at random
and a reward that costs nothing: no weights are needed, and no encoders. The preset is flux-dev-1gpu
unless named; --group.key value changes it. The first update compiles kernels and makes the
optimizer's states, so the last one is the figure. Beside it stands what `g2rpo plan` predicts.
"""

from __future__ import annotations

import argparse
import sys
import time

import _paths  # noqa: F401
import torch
from flux_results import FluxStore, heading
from flux_shapes import Size, add_arguments, chosen, new_transformer
from results import ResultsError
from texts import table, time_text
from torch import Tensor, nn

from g2rpo.arguments import make_parser, named_config
from g2rpo.config import Config
from g2rpo.errors import ConfigurationError
from g2rpo.flux.images import ImageDecoder, latent_shape, position_ids, shrinkage
from g2rpo.flux.miniature import VAE as SMALL_VAE
from g2rpo.metrics import size as bytes_text
from g2rpo.policy import Conditions, FluxPolicy
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer

KIND = "flux-update"
NEEDS = "that holds all of a preset's update"
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


def configure(name: str, size: Size, device: str, overrides: list[str]) -> Config:
    config, _ = named_config(make_parser(), [name, *overrides])
    config.model.device = device
    if size.name == "toy":
        config.rollout.branch_batch = min(config.rollout.branch_batch, 8)
        config.rollout.height = config.rollout.width = None
        config.train.prompts_per_update = min(config.train.prompts_per_update, 2)
    config.validate(training=False)
    return config


def measure(trainer: Trainer, watch: Watch, updates: int, until: float) -> dict:
    """Seconds and peak bytes of the last update that was made, by phase."""
    row: dict = {}
    made = 0
    while made < updates and (made == 0 or time.perf_counter() + row["seconds"] < until):
        watch.peaks, watch.rows = {}, 0
        started = time.perf_counter()
        found = trainer.update()
        watch.end()
        made += 1
        row = {
            "seconds": time.perf_counter() - started,
            "rows": watch.rows,
            "phases": {
                name.removeprefix("seconds/"): value
                for name, value in found.items() if name.startswith("seconds/")
            },
            "peak_bytes": dict(watch.peaks),
            "ratio_max": found.get("ratio_max"),
            "grad_norm": found.get("grad_norm"),
        }  # fmt: skip
    return {**row, "updates": made}


def lines(row: dict) -> list[dict[str, str]]:
    peaks = row["peak_bytes"]
    shown = [
        {"phase": name, "time": time_text(seconds),
         "peak memory": bytes_text(peaks[name]) if name in peaks else "–"}
        for name, seconds in row["phases"].items()
    ]  # fmt: skip
    whole = bytes_text(max(peaks.values())) if peaks else "–"
    total = {"phase": "whole update", "time": time_text(row["seconds"]), "peak memory": whole}
    return [*shown, total]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     epilog="--group.key value changes the preset.")  # fmt: skip
    parser.add_argument("--preset", default="flux-dev-1gpu")
    add_arguments(parser)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=540, help="begin no update that would "
                        "end after these")  # fmt: skip
    options, overrides = parser.parse_known_args(arguments)
    picked = chosen(options, "bench_flux_update", NEEDS)
    if picked is None:
        return 2
    size, device = picked
    until = time.perf_counter() + options.seconds
    try:
        config = configure(options.preset, size, device, overrides)
        store = FluxStore(KIND, size, device, options)
    except (ConfigurationError, ResultsError) as error:
        print(f"bench_flux_update: error: {error}", file=sys.stderr)
        return 2
    watch = Watch(device)
    watch.begin("weights")
    trainer = Trainer(
        config, RandomModel(size, config, device), [Reward("brightness", brightness)],
        on_phase=watch.begin, on_evaluations=watch.count, on_message=print,
    )  # fmt: skip
    row = measure(trainer, watch, options.updates, until)
    row |= {"case": f"update-{size.name}-{options.preset}", "preset": options.preset,
            "overrides": overrides, "variants": {}, "errors": {}}  # fmt: skip
    store.add(row)
    print(f"\n{heading(store.content)}\n\n{table(lines(row))}\n")
    print(f"{row['rows']:,} evaluations, ratio_max {row['ratio_max']}, update {row['updates']}")
    if store.stored:
        print(f"written to {store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
