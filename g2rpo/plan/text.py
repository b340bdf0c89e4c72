"""What `g2rpo plan` shows: one screen of tables."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import Config
from ..metrics import duration
from ..plan import Plan
from .cards import GIB
from .memory import dtype_of, trained
from .rewards import scorers_of
from .speed import SOURCE, Phase

WIDTH = 100


def show(plan: Plan, price: float | None = None, console: Console | None = None) -> None:
    """Print the plan. price: dollars a GPU-hour."""
    console = console or Console(highlight=False, soft_wrap=False)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    config, sizes, card = plan.config, plan.sizes, plan.card
    height, width = sizes.pixels
    console.print(Text(f"{plan.name or 'This run'} on {card.name}", style="bold"))
    console.print(
        f"{sizes.source}: {sizes.parameters:,} parameters, {_what(config, plan)}\n"
        f"{height} x {width} pixels, {sizes.image} + {sizes.text} tokens; an update: "
        f"{_prompts(plan)}; completed in batches of {config.rollout.branch_batch}"
    )
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_verdict(plan))
    if plan.memory.host:
        rows = ", ".join(f"{name} {count / GIB:.1f}" for name, count in plan.memory.host)
        console.print(f"Host memory, GiB, beside the process: {rows}.", style="dim")
    if plan.switches:
        console.print()
        console.print(_switches(plan))
    console.print()
    console.print(_work(plan))
    console.print()
    console.print(_summary(plan, price))
    if any(phase.basis.startswith("published") for phase in plan.work.phases):
        console.print(f"Published: {SOURCE}.", style="dim")


def _what(config: Config, plan: Plan) -> str:
    made = trained(config, plan.sizes)
    dtype = str(dtype_of(config)).removeprefix("torch.")
    optimizer = config.optimizer.name
    if optimizer == "adamw8bit" and made.low_bits:
        optimizer += f", {config.optimizer.master_bits}-bit master"
    if config.optimizer.offload:
        optimizer += ", offloaded"
    how = "all trained"
    if rank := config.model.lora.rank:
        how = f"adapters of rank {rank} trained ({made.count:,})"
    return f"{how}; {dtype}, {optimizer}"


def _prompts(plan: Plan) -> str:
    rollout, prompts = plan.config.rollout, plan.work.prompts
    images = prompts * rollout.group_size * len(rollout.sde_positions) * len(rollout.granularities)
    return f"{prompts} prompt{'' if prompts == 1 else 's'}, {images:,} images"


def _amount(count: float, unit: int) -> str:
    """Two decimals, and nothing for nothing."""
    return f"{count / unit:.2f}" if count >= 0.005 * unit else "·" if count else ""


def _unit(plan: Plan) -> tuple[int, str]:
    return (GIB, "GiB") if plan.peak >= GIB / 2 else (GIB // 1024, "MiB")


def _memory(plan: Plan) -> Table:
    memory, usable = plan.memory, plan.card.usable
    unit, name = _unit(plan)

    def total(count: int, peak: bool) -> Text:
        colour = "red" if count > usable else "green" if peak else ""
        return Text(_amount(count, unit), style=f"bold {colour}" if colour else "")

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"GPU memory, {name} (estimated)", no_wrap=True)
    for phase in memory.phases:
        table.add_column(phase, justify="right", no_wrap=True)
    for row in memory.rows:
        table.add_row(row.name, *(_amount(row.bytes.get(p, 0), unit) for p in memory.phases))
    table.add_section()
    totals = memory.totals
    sums = (total(totals[p], p == memory.peak_phase) for p in memory.phases)
    table.add_row("all of these", *sums)
    if plan.measured is not None:
        peaks, _ = plan.measured
        table.add_row("measured", *(
            total(peaks[p], p == plan.peak_phase) if p in peaks else Text("")
            for p in memory.phases
        ))  # fmt: skip
    return table


def _verdict(plan: Plan) -> Text:
    card, apart = plan.card, abs(plan.card.usable - plan.peak) / GIB
    unit, unit_name = _unit(plan)
    kind = f"measured, {plan.measured[1]}" if plan.measured else "estimated"
    word, colour = ("fits", "green") if plan.fits else ("does not fit", "red")
    text = Text()
    text.append(f"It {word}", style=f"bold {colour}")
    text.append(
        f": {plan.peak / unit:.2f} {unit_name} at most, in {plan.peak_phase} ({kind}), {apart:.2f} "
        f"GiB {'below' if plan.fits else 'above'} the {card.usable / GIB:.2f} there are: "
        f"{card.bytes / GIB:.1f} less {card.reserve / GIB:.1f} for the CUDA context and "
        "fragmentation."
    )
    if unknown := scorers_of(plan.config).unknown:
        text.append(f" What {', '.join(unknown)} may need is not counted.")
    return text


def _switches(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("What makes room")
    table.add_column("peak, GiB", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for switch in sorted(plan.switches, key=lambda s: s.peak, reverse=True):
        fits = Text("fits", style="green") if switch.fits else Text("not enough", style="dim")
        table.add_row(switch.change, f"{switch.peak / GIB:.2f}", fits)
    return table


def _work(plan: Plan) -> Table:
    work = plan.work
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("One update (estimated)" if plan.measured is None else "One update",
                     no_wrap=True)  # fmt: skip
    flop, name = (1e15, "PFLOP") if work.flops >= 1e14 else (1e12, "TFLOP")
    table.add_column(name, justify="right", no_wrap=True)
    table.add_column("TFLOP/s", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("by")
    for phase in work.phases:
        count = f"{phase.flops / flop:,.3g}" if phase.flops else ""
        table.add_row(
            phase.name, count, _rate(phase), _time(phase.seconds), Text(phase.basis, style="dim")
        )
    return table


def _rate(phase: Phase) -> str:
    return f"{phase.flops / phase.seconds / 1e12:.0f}" if phase.flops and phase.seconds else ""


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _summary(plan: Plan, price: float | None) -> Text:
    work = plan.work
    text = Text()
    text.append(
        f"A forward is {work.forward / 1e12:.3g} TFLOP. An update: {work.evaluations:,} "
        f"evaluations, {work.flops / 1e15:,.3g} PFLOP"
    )
    if work.seconds is not None:
        text.append(f", {duration(work.seconds)}")
    text.append(f". All {work.updates:,}: {work.run_evaluations:,} evaluations")
    if work.hours is None:
        text.append("." if plan.card.bf16 else ". For seconds, name a GPU: --gpu h100-80gb.")
        return text
    text.append(f"; with {work.evaluations_of_policy} evaluations of the policy ")
    hours = f"{work.hours:,.0f}" if work.hours >= 10 else f"{work.hours:.2g}"
    text.append(f"{hours} GPU-hours", style="bold")
    if price is not None:
        text.append(f", ${price * work.hours:,.0f} at ${price:g} an hour", style="bold")
    text.append(" (estimated; loading, rewards and checkpoints apart).")
    return text
