"""`g2rpo plan`: whether a run fits a GPU, what to switch on where it does not, how long it takes.

    g2rpo plan PRESET|FILE.yaml --gpu NAME|SIZE [--gpus N[,N...]] [--per-node N] [--network GB/S]
        [--strategy NAME] [--price X] [--json] [--group.key value ...]

No GPU is needed and no weights. Every number is arithmetic on shapes and published rates, and says
so, unless benchmarks/results holds a measurement of that very card. With --gpus it is what one of
so many does, needs and sends to the others; with several numbers a row for each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..arguments import make_parser, named_config, preset_names, take_options
from ..config import Config
from ..errors import ConfigurationError
from .cards import Card, find_card
from .communication import Traffic, evaluation_seconds, traffic_of
from .gpus import ONE, Gpus, share_of
from .memory import UPDATE, Memory
from .model import Sizes, sizes_of
from .options import VALUED, gpus_of, with_strategy
from .rewards import scorers_of
from .speed import Phase, Work, measured_update, plan_work
from .switches import Switch, decided, switches_of

# Phases of the trainer, of which benchmarks/bench_flux_update.py measures the peak -> those here.
MEASURED = {"prompts": "embed", "anchor": "anchor", "completions": "completions",
            "rewards": "rewards"}  # fmt: skip
# And whose seconds it measures -> those here. The optimizer's are among the update's.
TIMED = {"anchor": "anchor", "completions": "completions", "rewards": "decode",
         "update": "forward, backward"}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What `g2rpo plan` says, of one GPU. measured: peak bytes by phase and the file they are from,
    or None. config: of several, what this one does; traffic: what they send one another, with the
    seconds of it in an evaluation of the policy."""

    name: str
    config: Config
    sizes: Sizes
    card: Card
    memory: Memory
    work: Work
    measured: tuple[dict[str, int], str] | None
    switches: tuple[Switch, ...]
    gpus: Gpus = ONE
    traffic: tuple[Traffic, ...] = ()
    evaluation_traffic: float | None = 0.0

    @property
    def communication(self) -> float | None:
        """Seconds of an update; None where rates are unknown."""
        known = [each.seconds for each in self.traffic]
        return None if None in known else sum(known)

    @property
    def seconds(self) -> float | None:
        """Of an update: work and communication, of which nothing is taken to hide the other."""
        alone, sent = self.work.seconds, self.communication
        return None if alone is None or sent is None else alone + sent

    @property
    def efficiency(self) -> float | None:
        """Share of an update's seconds that is work, from 0 to 1: what more GPUs with the same
        prompts each leave of their speed."""
        return self.work.seconds / self.seconds if self.seconds else None

    @property
    def hours(self) -> float | None:
        """GPU-hours of the run, of all GPUs."""
        work, evaluations = self.work, self.evaluation_traffic
        if work.hours is None or self.seconds is None or evaluations is None:
            return None
        sent = work.updates * (self.communication or 0.0)
        sent += work.evaluations_of_policy * evaluations
        return self.gpus.count * (work.hours + sent / 3600)

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


def make_plan(
    config: Config, card: Card, name: str = "", unchanged: bool = False, gpus: Gpus = ONE,
    sizes: Sizes | None = None,
) -> Plan:  # fmt: skip
    """The plan of a run on a card, or on several of it. unchanged: the configuration is the preset
    `name`'s own, so that a measurement of it counts. sizes: of its model, where they are known.
    Raises ConfigurationError for what cannot be planned."""
    share = share_of(config, gpus)
    sizes = sizes or sizes_of(config)
    config, memory = decided(share, sizes, card, gpus)
    work = plan_work(config, sizes, card, gpus=gpus)
    measured = None
    if unchanged and (found := measured_update(card, name)):
        peaks, seconds, file = found
        # The trainer's update is backward and step: its peak is that of the larger of them.
        update = max(UPDATE, key=memory.totals.__getitem__)
        phases = {**MEASURED, "update": update}
        measured = {phases[p]: peak for p, peak in peaks.items() if p in phases}, file
        work = replace(work, phases=_timed(work.phases, seconds, file))
    plan = Plan(name, config, sizes, card, memory, work, measured, (), gpus)
    if gpus.count > 1:
        plan = replace(
            plan, traffic=traffic_of(config, sizes, card, gpus),
            evaluation_traffic=evaluation_seconds(config, sizes, card, gpus),
        )  # fmt: skip
    return plan if plan.fits else replace(plan, switches=switches_of(share, sizes, card, gpus))


def _timed(phases: Sequence[Phase], seconds: dict[str, float], file: str) -> tuple[Phase, ...]:
    by_name = {TIMED[p]: value for p, value in seconds.items() if p in TIMED}
    basis = f"measured: {file}"
    if "forward, backward" in by_name:
        by_name["optimizer"] = 0.0
    return tuple(
        replace(p, seconds=by_name[p.name], basis=basis) if p.name in by_name else p
        for p in phases
    )


# The command ------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """0 where it fits (of several numbers of GPUs, any), 1 where not. Raises ConfigurationError on
    wrong input."""
    options, rest = take_options(arguments, flags=["--json"], valued=VALUED)
    rest = with_strategy(rest, options["--strategy"])
    config, name = named_config(make_parser("plan"), rest)
    if options["--gpu"] is None:
        raise ConfigurationError(f"--gpu is not given; expected {VALUED['--gpu']}")
    card, (gpus, price) = find_card(options["--gpu"]), gpus_of(options)
    config.validate(training=False)
    if config.rollout.sampling != "singular":
        raise ConfigurationError(
            f"rollout.sampling is {config.rollout.sampling!r}; expected 'singular', the one way to "
            "draw whose memory and time are counted here"
        )
    if len(gpus) > 1:
        from .scaling import scaling

        return scaling(config, card, name, gpus, rest, price, bool(options["--json"]))
    unchanged = len(rest) == 1 and name in preset_names() and gpus[0].count == 1
    plan = make_plan(config, card, name, unchanged, gpus[0])
    if options["--json"]:
        print(json.dumps(as_json(plan, price), indent=1))
    else:
        from .text import show

        show(plan, price)
    return 0 if plan.fits else 1


def as_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The same as is shown. Bytes, seconds, FLOPs; "measured" or "estimated" beside them. Of
    several GPUs `memory` and `work` are one's, `gpus` has what they do together, and GPU-hours and
    cost are of all."""
    memory, work, hours = plan.memory, plan.work, plan.hours
    spread = {"gpus": _spread(plan)} if plan.gpus.count > 1 else {}
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
            "gpu_hours": hours,
            "cost": None if price is None or hours is None else price * hours,
        },
        **spread,
    }  # fmt: skip


def _spread(plan: Plan) -> dict[str, Any]:
    gpus, distributed = plan.gpus, plan.config.distributed
    return {
        "source": "estimated",
        "count": gpus.count,
        "per_node": gpus.per_node,
        "network": gpus.network,
        "strategy": distributed.strategy,
        "gather": distributed.gather if gpus.sharded(plan.config) else None,
        "gradients": distributed.gradients if gpus.sharded(plan.config) else None,
        "prompts_per_update": gpus.count * plan.work.prompts,
        "evaluations_per_update": gpus.count * plan.work.evaluations,
        "traffic": [asdict(each) for each in plan.traffic],
        "communication_bytes": sum(each.bytes for each in plan.traffic),
        "communication_seconds": plan.communication,
        "seconds_per_update": plan.seconds,
        "scaling_efficiency": plan.efficiency,
        "hidden": "nothing: communication is taken to wait for work, and work for it",
    }
