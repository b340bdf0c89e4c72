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
from .rewards import scorers_of
from .speed import SOURCE, Phase
from .states import dtype_of, trained

WIDTH = 100


def show(plan: Plan, price: float | None = None, console: Console | None = None) -> None:
    """Print the plan. price: dollars a GPU-hour."""
    console = wide_console(console)
    config, sizes, card = plan.config, plan.sizes, plan.card
    height, width = sizes.pixels
    many = f"{plan.gpus.count:,} " if plan.gpus.count > 1 else ""
    console.print(Text(f"{plan.name or 'This run'} on {many}{card.name}", style="bold"))
    console.print(
        f"{sizes.source}: {sizes.parameters:,} parameters, {_what(config, plan)}\n"
        f"{height} x {width} pixels, {sizes.image} + {sizes.text} tokens; "
        f"{_prompts(plan)}; completed in batches of {config.rollout.branch_batch}"
    )
    if plan.gpus.count > 1:
        console.print(_shared(plan))
    console.print()
    console.print(_memory(plan))
    console.print()
    console.print(_verdict(plan))
    if plan.memory.host:
        rows = ", ".join(f"{name} {count / GIB:.1f}" for name, count in plan.memory.host)
        each = "each" if plan.gpus.count > 1 else "the"
        console.print(f"Host memory, GiB, beside {each} process: {rows}.", style="dim")
    if plan.switches:
        console.print()
        console.print(_switches(plan))
    console.print()
    console.print(_work(plan))
    console.print()
    if plan.traffic:
        console.print(_traffic(plan))
        console.print()
    console.print(_summary(plan, price))
    if any(phase.basis.startswith("published") for phase in plan.work.phases):
        console.print(f"Published: {SOURCE}.", style="dim")


def wide_console(console: Console | None = None) -> Console:
    """One of WIDTH columns, or of a narrower terminal's."""
    console = console or Console(highlight=False, soft_wrap=False)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


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
    of = " of one GPU" if plan.gpus.count > 1 else ""
    return f"an update{of}: {prompts} prompt{'' if prompts == 1 else 's'}, {images:,} images"


def _shared(plan: Plan) -> str:
    """What of it one GPU does, and how weights are shared."""
    gpus, distributed = plan.gpus, plan.config.distributed
    text = (
        f"{gpus.count * plan.work.prompts:,} prompts an update in all; what follows is of one GPU. "
        f"Strategy {distributed.strategy}"
    )
    if not gpus.sharded(plan.config):
        return f"{text}: all weights on each."
    gathers = "in every forward"
    if distributed.gather == "phase":
        gathers = "once a rollout, into a copy" + (" that fits" if plan.fits else "")
    return (
        f"{text}: 1/{gpus.parts(plan.config):,} of the weights\non each; completions gather them "
        f"{gathers} (distributed.gather {distributed.gather})."
    )


def _traffic(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("Sent by a GPU, an update (estimated)", no_wrap=True)
    for head in ("times", "GB", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("by")
    for each in plan.traffic:
        table.add_row(
            each.name, f"{each.times:,}", f"{each.bytes / 1e9:,.3g}", seconds_of(each.seconds),
            Text(each.basis, style="dim"),
        )  # fmt: skip
    return table


def _amount(count: float, unit: int) -> str:
    """Two decimals, and nothing for nothing."""
    return f"{count / unit:.2f}" if count >= 0.005 * unit else "·" if count else ""


def unit_of(plan: Plan) -> tuple[int, str]:
    return (GIB, "GiB") if plan.peak >= GIB / 2 else (GIB // 1024, "MiB")


def _memory(plan: Plan) -> Table:
    memory, usable = plan.memory, plan.card.usable
    unit, name = unit_of(plan)

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
    unit, unit_name = unit_of(plan)
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
            phase.name, count, _rate(phase), seconds_of(phase.seconds),
            Text(phase.basis, style="dim"),
        )  # fmt: skip
    return table


def _rate(phase: Phase) -> str:
    return f"{phase.flops / phase.seconds / 1e12:.0f}" if phase.flops and phase.seconds else ""


def seconds_of(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _summary(plan: Plan, price: float | None) -> Text:
    work, count = plan.work, plan.gpus.count
    text = Text()
    if count > 1 and plan.efficiency is not None:
        text.append(f"An update of all {count:,} takes {duration(plan.seconds)}")
        text.append(
            f", of which {duration(plan.communication)} is communication if nothing of it is "
            "hidden, as is assumed here: a predicted "
        )
        text.append(f"scaling efficiency of {plan.efficiency:.1%}", style="bold")
        text.append(" with the same prompts a GPU.\nOf one GPU: ")
    text.append(
        f"A forward is {work.forward / 1e12:.3g} TFLOP. An update: {work.evaluations:,} "
        f"evaluations, {work.flops / 1e15:,.3g} PFLOP"
    )
    if work.seconds is not None:
        text.append(f", {duration(work.seconds)}")
    text.append(f". All {work.updates:,}: {work.run_evaluations:,} evaluations")
    if plan.hours is None:
        text.append("." if plan.card.bf16 else ". For seconds, name a GPU: --gpu h100-80gb.")
        return text
    text.append(f"; with {work.evaluations_of_policy} evaluations of the policy ")
    hours = f"{plan.hours:,.0f}" if plan.hours >= 10 else f"{plan.hours:.2g}"
    text.append(f"{hours} GPU-hours{f' of all {count:,}' if count > 1 else ''}", style="bold")
    if price is not None:
        text.append(f", ${price * plan.hours:,.0f} at ${price:g} an hour", style="bold")
    text.append(" (estimated; loading, rewards and checkpoints apart).")
    return text
