"""`g2rpo plan --gpus 8,16,64,512`: a row for each number of GPUs and way to share the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import Config
from ..optimizers import SHARDS
from . import Plan, make_plan
from .cards import Card
from .gpus import Gpus
from .model import sizes_of
from .text import seconds_of, unit_of, wide_console


@dataclass(frozen=True)
class Scaling:
    """Plans of the same prompts a GPU. why: how many, and how that comes from the preset's."""

    plans: tuple[Plan, ...]
    prompts: int
    why: str


def plan_scaling(
    config: Config, card: Card, name: str, gpus: Sequence[Gpus], only: bool = False
) -> Scaling:
    """One plan a number of GPUs and strategy; those that a number allows. only: of the strategy
    that the configuration names. Raises ConfigurationError for what cannot be planned."""
    given, first = config.train.prompts_per_update, gpus[0].count
    prompts = -(-given // first)
    rounded = "" if given % first == 0 else ", rounded up"
    why = (
        f"{prompts} prompt{'' if prompts == 1 else 's'} a GPU at every number of them: "
        f"train.prompts_per_update {given} over {first}{rounded}"
    )
    sizes, plans = sizes_of(config), []
    for each in gpus:
        for strategy, gradients in _ways(config, each, only):
            changed = copy.deepcopy(config)
            changed.train.prompts_per_update = prompts * each.count
            changed.distributed.strategy = strategy
            changed.distributed.gradients = gradients
            if strategy == "replicate":
                changed.distributed.gather = "auto"
            plan = make_plan(changed, card, name, gpus=each, sizes=sizes)
            plans.append(plan)
    return Scaling(tuple(plans), prompts, why)


def _ways(config: Config, gpus: Gpus, only: bool) -> list[tuple[str, str]]:
    """Strategy and distributed.gradients of each row. Hybrid in one node is shard."""
    asked = config.distributed
    if only or gpus.count == 1:
        return [(asked.strategy, asked.gradients)]
    ways = [("replicate", "whole")]
    if config.optimizer.name in SHARDS:
        each = (asked.gradients,) if asked.gradients == "sharded" else ("whole", "sharded")
        ways += [("shard", gradients) for gradients in each]
        if gpus.count > gpus.per_node and gpus.count % gpus.per_node == 0:
            ways += [("hybrid", gradients) for gradients in each]
    return ways


def scaling(
    config: Config, card: Card, name: str, gpus: Sequence[Gpus], rest: Sequence[str],
    price: float | None, as_json: bool,
) -> int:  # fmt: skip
    """Print it. rest: the arguments; a strategy among them is the only one. price: dollars a
    GPU-hour. 0 where any fits."""
    only = any(argument.startswith("--distributed.strategy") for argument in rest)
    found = plan_scaling(config, card, name, gpus, only)
    if as_json:
        print(json.dumps(json_of(found, card, name, price), indent=1))
    else:
        show(found, card, name, price)
    return 0 if any(plan.fits for plan in found.plans) else 1


def json_of(found: Scaling, card: Card, name: str, price: float | None) -> dict[str, Any]:
    """Bytes and seconds of one GPU; all of it estimated."""
    return {
        "preset": name,
        "gpu": {"name": card.name, "bytes": card.bytes, "usable": card.usable},
        "source": "estimated",
        "prompts_per_gpu": found.prompts,
        "prompts": found.why,
        "rows": [
            {
                "gpus": plan.gpus.count,
                "per_node": plan.gpus.per_node,
                "network": plan.gpus.network,
                "strategy": plan.config.distributed.strategy,
                "gather": plan.config.distributed.gather,
                "gradients": plan.config.distributed.gradients,
                "prompts_per_update": plan.gpus.count * found.prompts,
                "peak": plan.peak,
                "peak_phase": plan.peak_phase,
                "fits": plan.fits,
                "seconds_per_update": plan.seconds,
                "communication_bytes": sum(each.bytes for each in plan.traffic),
                "communication_seconds": plan.communication,
                "scaling_efficiency": plan.efficiency,
                "gpu_hours": plan.hours,
                "cost": None if None in (price, plan.hours) else price * plan.hours,
            }
            for plan in found.plans
        ],
    }


def show(
    found: Scaling, card: Card, name: str, price: float | None = None,
    console: Console | None = None,
) -> None:  # fmt: skip
    """Print the table. price: dollars a GPU-hour."""
    console = wide_console(console)
    gpus = found.plans[0].gpus
    console.print(Text(f"{name or 'This run'} on several {card.name} (estimated)", style="bold"))
    console.print(
        f"{found.why}.\nNodes of {gpus.per_node}; {gpus.network / 1e9:g} GB/s a GPU between them "
        "(--network); nothing that is sent is taken to hide behind work."
    )
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    largest = max(found.plans, key=lambda plan: plan.peak)
    unit, unit_name = unit_of(largest)
    cost = "GPU-hours" if price is None else f"at ${price:g}"
    for head in ("GPUs", "strategy", "gradients", f"peak, {unit_name}", "fits", "an update",
                 "sent, GB", "efficiency", cost):  # fmt: skip
        left = head in ("strategy", "gradients", "fits")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    last = 0
    for plan in found.plans:
        count, distributed = plan.gpus.count, plan.config.distributed
        fits = Text("yes", style="green") if plan.fits else Text("no", style="bold red")
        sharded = plan.gpus.sharded(plan.config)
        if last and count != last:
            table.add_section()
        table.add_row(
            f"{count:,}" if count != last else "",
            distributed.strategy if count > 1 else "one process",
            distributed.gradients if sharded else "",
            f"{plan.peak / unit:.1f}",
            fits,
            seconds_of(plan.seconds),
            f"{sum(each.bytes for each in plan.traffic) / 1e9:,.4g}",
            "–" if plan.efficiency is None else f"{plan.efficiency:.1%}",
            _cost(plan.hours, price),
        )
        last = count
    console.print(table)
    console.print()
    console.print(
        "Peak, seconds and what is sent are one GPU's. Efficiency: work over work and "
        "communication, with the same prompts a GPU. GPU-hours are all GPUs'.",
        style="dim",
    )


def _cost(hours: float | None, price: float | None) -> str:
    if hours is None:
        return "–"
    return f"{hours:,.0f}" if price is None else f"${price * hours:,.0f}"
