"""What the distributed path costs a run that has no one to share with.

    python benchmarks/distributed_overhead.py [--pairs 20] [--strategy replicate shard]
                                              [--train.prompts_per_update N ...]

Two trainers of the digits model in this process, one alone and one the only rank of a group that it
has joined, make the same updates in turn, each pair in another order than the one before. Printed
is the median of the pairs' ratios with a bootstrap interval of 95 %, of the clock and, where others
use the machine as well, of this process's time on a processor. Other arguments are keys of the
configuration. No file is written.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import socket
import statistics
import time
from collections.abc import Sequence

import _paths  # noqa: F401
import torch
from texts import table

from g2rpo.arguments import make_parser, named_config
from g2rpo.config import Config
from g2rpo.distributed import ALONE, Ranks, joined
from g2rpo.models import load_model
from g2rpo.rewards.build import make_rewards
from g2rpo.trainer import Trainer

STRATEGIES = ("replicate", "shard")
RESAMPLES = 2000


def become_the_only_rank() -> None:
    """Set what torchrun would set for a group of one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def make_trainer(config: Config, ranks: Ranks) -> Trainer:
    config = copy.deepcopy(config)
    return Trainer(config, load_model(config), make_rewards(config), ranks=ranks)


def seconds(trainer: Trainer) -> tuple[float, float]:
    """Of one update: by the clock, and of this process's threads on a processor."""
    began, busy = time.perf_counter(), time.process_time()
    trainer.update()
    return time.perf_counter() - began, time.process_time() - busy


@torch.no_grad()
def furthest(a: Trainer, b: Trainer) -> float:
    """The largest difference between weights of the two."""
    of = [
        {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in
         trainer.weights.parameters.items()}
        for trainer in (a, b)
    ]  # fmt: skip
    return max(float((of[0][name] - of[1][name]).abs().max()) for name in of[0])


def measure(config: Config, strategy: str, pairs: int, ranks: Ranks) -> tuple[list, list, float]:
    """`seconds` of the lone trainer's updates and of the other's, pair by pair, after one of each
    that is not counted; and how far apart their weights are in the end, at most."""
    config.distributed.strategy = strategy
    alone, other = make_trainer(config, ALONE), make_trainer(config, ranks)
    found: dict[Trainer, list[tuple[float, float]]] = {alone: [], other: []}
    for pair in range(-1, pairs):
        for trainer in (alone, other) if pair % 2 else (other, alone):
            took = seconds(trainer)
            if pair >= 0:
                found[trainer].append(took)
    return found[alone], found[other], furthest(alone, other)


def median_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the 2.5th and 97.5th percentile of those of resampled values."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return statistics.median(values), medians[RESAMPLES // 40], medians[-RESAMPLES // 40 - 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="updates of each that count")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    args, keys = parser.parse_known_args(arguments)
    if args.pairs < 1:
        parser.error(f"--pairs is {args.pairs}; expected at least 1")
    config, _ = named_config(make_parser("train"), ["digits", "--model.device", "cpu", *keys])
    config.validate()
    become_the_only_rank()
    rows = []
    with joined(config.distributed.timeout, "cpu") as ranks:
        for strategy in args.strategy:
            alone, other, apart = measure(config, strategy, args.pairs, ranks)
            for index, of in enumerate(("clock", "processor")):
                first, second = ([pair[index] for pair in found] for found in (alone, other))
                ratio, low, high = median_and_interval([b / a for a, b in zip(first, second)])
                rows.append({
                    "strategy": strategy,
                    "time": of,
                    "alone, s": f"{statistics.median(first):.3f}",
                    "one rank, s": f"{statistics.median(second):.3f}",
                    "median ratio": f"{ratio:.4f}",
                    "95 %": f"{low:.4f} to {high:.4f}",
                    "weights apart": f"{apart:.1e}",
                })  # fmt: skip
    print(
        f"{args.pairs} pairs of updates, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
