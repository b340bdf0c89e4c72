"""`g2rpo plan`: whether a run fits a GPU, what to switch on where it does not, how long it takes.

    g2rpo plan PRESET|FILE.yaml --gpu NAME|SIZE [--price X] [--json] [--group.key value ...]

No GPU is needed and no weights. Every number is arithmetic on shapes and published rates, and says
so, unless benchmarks/results holds a measurement of that very card.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..arguments import make_parser, named_config, preset_names, take_options
from ..config import Config
from ..errors import ConfigurationError
from .cards import CARDS, Card, find_card
from .memory import UPDATE, Memory, dtype_of, plan_memory
from .model import Sizes, sizes_of
from .rewards import PARAMETERS, scorers_of
from .speed import Phase, Work, measured_update, plan_work

# Phases of the trainer, of which benchmarks/bench_flux_update.py measures the peak -> those here.
MEASURED = {"prompts": "embed", "anchor": "anchor", "completions": "completions",
            "rewards": "rewards"}  # fmt: skip
# And whose seconds it measures -> those here. The optimizer's are among the update's.
TIMED = {"anchor": "anchor", "completions": "completions", "rewards": "decode",
         "update": "forward, backward"}  # fmt: skip


@dataclass(frozen=True)
class Switch:
    """A change of the configuration, and the peak it would give, in bytes."""

    change: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What `g2rpo plan` says. measured: peak bytes by phase and the file they are from, or None."""

    name: str
    config: Config
    sizes: Sizes
    card: Card
    memory: Memory
    work: Work
    measured: tuple[dict[str, int], str] | None
    switches: tuple[Switch, ...]

    @property
    def peak(self) -> int:
        return max(self.measured[0].values()) if self.measured else self.memory.peak

    @property
    def peak_phase(self) -> str:
        if self.measured is None:
            return self.memory.peak_phase
        return max(self.measured[0], key=self.measured[0].__getitem__)

    @property
    def fits(self) -> bool:
        return self.peak <= self.card.usable


def make_plan(config: Config, card: Card, name: str = "", unchanged: bool = False) -> Plan:
    """The plan of a run on a card. unchanged: the configuration is the preset `name`'s own, so that
    a measurement of it counts. Raises ConfigurationError for what cannot be planned."""
    sizes = sizes_of(config)
    memory = plan_memory(config, sizes, card.multiprocessors)
    work = plan_work(config, sizes, card)
    measured = None
    if unchanged and (found := measured_update(card, name)):
        peaks, seconds, file = found
        # The trainer's update is backward and step: its peak is that of the larger of them.
        update = max(UPDATE, key=memory.totals.__getitem__)
        phases = {**MEASURED, "update": update}
        measured = {phases[p]: peak for p, peak in peaks.items() if p in phases}, file
        work = replace(work, phases=_timed(work.phases, seconds, file))
    plan = Plan(name, config, sizes, card, memory, work, measured, ())
    return plan if plan.fits else replace(plan, switches=_switches(config, sizes, card))


def _timed(phases: Sequence[Phase], seconds: dict[str, float], file: str) -> tuple[Phase, ...]:
    by_name = {TIMED[p]: value for p, value in seconds.items() if p in TIMED}
    basis = f"measured: {file}"
    if "forward, backward" in by_name:
        by_name["optimizer"] = 0.0
    return tuple(
        replace(p, seconds=by_name[p.name], basis=basis) if p.name in by_name else p
        for p in phases
    )


# What makes room --------------------------------------------------------------------------------


def _set(group: str, key: str, value: Any) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, group), key, value)


def _bfloat16(optimizer: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.model.dtype, config.optimizer.name = "bfloat16", optimizer

    return change


def _lora(config: Config) -> None:
    config.model.lora.rank = 64


def _rest(config: Config) -> None:
    for reward in config.rewards:
        reward.offload |= reward.name in PARAMETERS and reward.name != "judge"


def _changes(config: Config) -> list[tuple[str, Callable[[Config], None]]]:
    """What could be changed of this configuration, as one types it, the mildest first."""
    model, rollout, optimizer = config.model, config.rollout, config.optimizer
    full = not model.lora.rank
    found: list[tuple[str, Callable[[Config], None]]] = []
    if optimizer.name == "adamw8bit" and not optimizer.offload:
        found.append(("--optimizer.offload true", _set("optimizer", "offload", True)))
    if scorers_of(config).staying:
        found.append(("--rewards with offload: true", _rest))
    if not model.gradient_checkpointing:
        found.append(
            ("--model.gradient_checkpointing true", _set("model", "gradient_checkpointing", True))
        )
    if model.path != "digits" and config.data.embeddings is None:
        found.append(
            ("--data.embeddings FOLDER (g2rpo embed)", _set("data", "embeddings", "FOLDER"))
        )
    if not model.fuse:
        found.append(("--model.fuse true", _set("model", "fuse", True)))
    if rollout.precision == "fp8":
        found.append(("--rollout.precision null", _set("rollout", "precision", None)))
    batch = rollout.branch_batch
    for rows in dict.fromkeys((batch // 2, batch // 4, 1)):
        if 1 <= rows < batch:
            found.append((f"--rollout.branch_batch {rows}", _set("rollout", "branch_batch", rows)))
    if full and dtype_of(config).itemsize == 4:  # bfloat16 alone would lose small steps
        for name in ("adamw8bit", "adamw_streamed"):
            change = f"--model.dtype bfloat16 --optimizer.name {name}"
            found.append((change, _bfloat16(name)))
    elif full and optimizer.name != "adamw8bit":
        found.append(("--optimizer.name adamw8bit", _set("optimizer", "name", "adamw8bit")))
    if full:
        found.append(("--model.lora.rank 64", _lora))
    return found


def _switches(config: Config, sizes: Sizes, card: Card) -> tuple[Switch, ...]:
    """Each change that lowers the peak, planned anew with it; and those that do it together."""

    def peak(changed: Config) -> int:
        return plan_memory(changed, sizes, card.multiprocessors).peak

    def after(change: Callable[[Config], None], start: Config) -> Config:
        changed = copy.deepcopy(start)
        change(changed)
        return changed

    now = peak(config)
    each = [(name, peak(after(change, config))) for name, change in _changes(config)]
    switches = [Switch(name, p, p <= card.usable) for name, p in each if p < now]
    if any(switch.fits and "lora" not in switch.change for switch in switches):
        return tuple(switches)
    # None alone: the one that helps most, and so on from there.
    names: list[str] = []
    while now > card.usable:
        options = [(peak(after(change, config)), name, after(change, config))
                   for name, change in _changes(config) if "lora" not in name]  # fmt: skip
        if not options or min(options, key=lambda o: o[0])[0] >= now:
            break
        now, name, config = min(options, key=lambda o: o[0])
        key = name.partition(" ")[0]
        names = [*(n for n in names if n.partition(" ")[0] != key), name]
    if len(names) > 1:
        switches.append(Switch(" ".join(names), now, now <= card.usable))
    return tuple(switches)


# The command ------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """0 where it fits, 1 where it does not. Raises ConfigurationError on wrong input."""
    options, rest = take_options(
        arguments, flags=["--json"],
        valued={"--gpu": f"one of {', '.join(CARDS)}, or a memory size such as 80GB",
                "--price": "dollars a GPU-hour"},
    )  # fmt: skip
    config, name = named_config(make_parser("plan"), rest)
    if options["--gpu"] is None:
        raise ConfigurationError(
            f"--gpu is not given; expected one of {', '.join(CARDS)}, or a memory size such as 80GB"
        )
    card = find_card(options["--gpu"])
    price = _price(options["--price"])
    config.validate(training=False)
    if config.rollout.sampling != "singular":
        raise ConfigurationError(
            f"rollout.sampling is {config.rollout.sampling!r}; expected 'singular', the one way to "
            "draw whose memory and time are counted here"
        )
    plan = make_plan(config, card, name, unchanged=len(rest) == 1 and name in preset_names())
    if options["--json"]:
        print(json.dumps(as_json(plan, price), indent=1))
    else:
        from .text import show

        show(plan, price)
    return 0 if plan.fits else 1


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e6:
        raise ConfigurationError(f"--price is {text!r}; expected dollars a GPU-hour, such as 2.50")
    return price


def as_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The same as is shown. Bytes, seconds, FLOPs; "measured" or "estimated" beside them."""
    memory, work = plan.memory, plan.work
    return {
        "preset": plan.name,
        "model": {"source": plan.sizes.source, "parameters": plan.sizes.parameters},
        "gpu": {"name": plan.card.name, "bytes": plan.card.bytes, "usable": plan.card.usable},
        "memory": {
            "source": "estimated",
            "rows": {row.name: dict(row.bytes) for row in memory.rows},
            "totals": memory.totals,
            "host": dict(memory.host),
            "rewards_not_counted": list(scorers_of(plan.config).unknown),
            "measured": None if plan.measured is None
            else {"peaks": plan.measured[0], "file": plan.measured[1]},
        },
        "peak": plan.peak,
        "peak_phase": plan.peak_phase,
        "fits": plan.fits,
        "switches": [asdict(switch) for switch in plan.switches],
        "work": {
            "flops_per_forward": work.forward,
            "flops_per_update": work.flops,
            "evaluations_per_update": work.evaluations,
            "evaluations": work.run_evaluations,
            "prompts_per_update": work.prompts,
            "phases": [asdict(phase) for phase in work.phases],
            "seconds_per_update": work.seconds,
            "gpu_hours": work.hours,
            "cost": None if price is None or work.hours is None else price * work.hours,
        },
    }  # fmt: skip
