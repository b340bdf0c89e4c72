"""Rollout speed: transformer evaluations per second of G2RPO's rollout on the digits model.

    python benchmarks/rollout.py [--rounds 7] [--json benchmarks/results/rollout-cpu.json]

Compared with a plain Euler loop over diffusers' model, written as one would without this package,
at the same batch size and at the best of several. The rollout as it is, and with its completions
compiled, in bfloat16, or both (rollout.engine, rollout.precision). Rounds of all variants are
interleaved and medians compared, so a machine that slows down slows all of them. The rollout
includes everything an update needs before its rewards: anchors, branches with log-probabilities,
and completions; padding is not counted.
"""

from __future__ import annotations

import argparse
import copy
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

PLAIN_BATCHES = (48, 96, 128, 192, 384)
ROLLOUT_BATCHES = (48, 96, 128, 192, 384)
WAYS = {  # of completions
    "as it is": {},
    "compiled": {"engine": "compile"},
    "bfloat16": {"precision": "bfloat16"},
    "compiled, bfloat16": {"engine": "compile", "precision": "bfloat16"},
}
WAYS_BATCHES = (128, 384)


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
    return trainer.evaluations_per_update - len(ids) * len(trainer.sampling.positions(1)), seconds


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
    batches = {name: int(name.rpartition(" ")[2]) for name in variants}
    for batch in ROLLOUT_BATCHES:
        for way, values in WAYS.items():
            if values and batch not in WAYS_BATCHES:
                continue
            ours = copy.deepcopy(config)
            ours.rollout.branch_batch = batch
            for key, value in values.items():
                setattr(ours.rollout, key, value)
            ours.validate()
            trainer = Trainer(ours, model, [])
            name = f"rollout, branch_batch {batch}, {way}"
            variants[name] = lambda trainer=trainer: rollout(trainer)
            batches[name] = batch
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(arguments.rounds + 1):
        for name, run in variants.items():
            evaluations, seconds = run()
            if index:  # the first round warms up
                rates[name].append(evaluations / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    plain = {batches[name]: v for name, v in medians.items() if name.startswith("plain")}
    print(f"{torch.get_num_threads()} threads; evaluations a second, and times the plain loop's at")
    print(f"{'':48} {'':9} {'its batch':>10} {'its best':>10}")
    for name, value in medians.items():
        same, best = value / plain[batches[name]], value / max(plain.values())
        print(f"{name:48} {value:9,.0f} {same:9.2f}x {best:9.2f}x")
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
