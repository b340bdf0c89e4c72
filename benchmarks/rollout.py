"""Rollout speed: transformer evaluations per second of G2RPO's rollout on the digits model.

    python benchmarks/rollout.py [--rounds 7] [--json benchmarks/results/rollout-cpu.json]

Compared with a plain Euler loop over diffusers' model, written as one would without this package,
at the best of several batch sizes. Rounds of all variants are interleaved and medians compared, so
a machine that slows down slows all of them. The rollout includes everything an update needs before
its rewards: anchors, branches with log-probabilities, and completions; padding is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch

from g2rpo import digits
from g2rpo.arguments import find_preset, make_parser, parse_config
from g2rpo.models import load_model
from g2rpo.trainer import Trainer

PLAIN_BATCHES = (48, 96, 192, 384)
ROLLOUT_BATCHES = (48, 96, 128, 192, 384)


@torch.no_grad()
def plain_loop(transformer, batch: int, steps: int = 16) -> tuple[int, float]:
    """The loop of diffusers' pipelines, one sigma for all rows. Returns evaluations, seconds."""
    text_ids, image_ids = digits.token_ids()
    prompt_embeds, pooled_embeds = digits.embed_prompts(
        [digits.PROMPTS[i % 10] for i in range(batch)]
    )
    t = torch.linspace(1, 0, steps + 1)
    sigmas = 3 * t / (1 + 2 * t)
    x = torch.randn(batch, 16, 4)
    started = time.perf_counter()
    for i in range(steps):
        v = transformer(
            hidden_states=x,
            timestep=sigmas[i].expand(batch),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return batch * steps, time.perf_counter() - started


@torch.no_grad()
def rollout(trainer: Trainer) -> tuple[int, float]:
    """Anchors, branches and completions of one update. Returns evaluations, seconds."""
    started = time.perf_counter()
    ids = trainer.sampler.ids(1)
    conditions = trainer.model.embed([trainer.sampler.prompts[i] for i in ids])
    trainer.roll_out(1, ids, conditions)
    seconds = time.perf_counter() - started
    return trainer.evaluations_per_update - len(ids) * len(trainer.positions), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    variants = {}
    config = parse_config(make_parser(), ["--config", str(find_preset("digits"))])
    model = load_model(config)
    untouched = digits.pretrained_transformer()
    for batch in PLAIN_BATCHES:
        variants[f"plain loop, batch {batch}"] = lambda batch=batch: plain_loop(untouched, batch)
    for batch in ROLLOUT_BATCHES:
        config.rollout.branch_batch = batch
        trainer = Trainer(config, model, [])
        variants[f"rollout, branch_batch {batch}"] = lambda trainer=trainer: rollout(trainer)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(arguments.rounds + 1):
        for name, run in variants.items():
            evaluations, seconds = run()
            if index:  # the first round warms up
                rates[name].append(evaluations / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best_plain = max(v for name, v in medians.items() if name.startswith("plain"))
    for name, value in medians.items():
        times = value / best_plain
        print(f"{name:32} {value:9,.0f} evaluations/s   {times:5.2f} x best plain loop")
    if arguments.json:
        report = {
            "evaluations_per_second": rates,
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
