"""What the kernels are held to. A kernel that does not beat `torch.compile` is removed.

Each goal looks at one number of one case and gives it back, or None where it was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from measure import COMPILED_EAGER, COMPILED_REFERENCE, EAGER

RANDN = "torch.randn, then ours"


@dataclass(frozen=True)
class Goal:
    device: str
    case: str
    what: str
    least: float
    measured: Callable[[dict], float | None]


def over(*names: str) -> Callable[[dict], float | None]:
    """How many times ours is faster than the fastest of these."""

    def measured(row: dict) -> float | None:
        found = [row["variants"][n]["over_ours"]["median"] for n in names if n in row["variants"]]
        return min(found) if found and row["ours"] else None

    return measured


def copy_fraction(row: dict) -> float | None:
    return row["variants"][row["ours"]]["copy_fraction"] if row["ours"] else None


COMPILED = over(COMPILED_EAGER, COMPILED_REFERENCE)
STEP, GIVEN = "sde_step[seeds]-forward", "sde_step[noise]-forward"
LOSS = "policy_loss-forward+backward"

GOALS = (
    Goal("cpu", f"{STEP}-flux720-float32", "x eager", 3, over(EAGER)),
    Goal("cpu", f"{STEP}-flux720-float32", "x the best torch.compile", 1, COMPILED),
    Goal("cpu", f"{LOSS}-flux720-float32", "x eager", 6, over(EAGER)),
    Goal("cpu", f"{LOSS}-flux720-float32", "x the best torch.compile", 1, COMPILED),
    Goal("cuda", f"{LOSS}-flux720x64-float32", "of the copy bandwidth", 0.8, copy_fraction),
    Goal("cuda", f"{GIVEN}-flux720x64-float32", "of the copy bandwidth", 0.8, copy_fraction),
    Goal("cuda", f"{LOSS}-flux720-float32", "x eager", 5, over(EAGER)),
    Goal("cuda", f"{LOSS}-flux720-float32", "x the best torch.compile", 1.3, COMPILED),
    Goal("cuda", f"{GIVEN}-flux720-float32", "x eager", 5, over(EAGER)),
    Goal("cuda", f"{GIVEN}-flux720-float32", "x the best torch.compile", 1.3, COMPILED),
    Goal("cuda", f"{STEP}-flux720-float32", "x torch.randn, then the step", 2, over(RANDN)),
    Goal("cuda", f"{STEP}-flux720x64-float32", "x torch.randn, then the step", 2, over(RANDN)),
    Goal("cuda", "group_advantages-forward-flux720x8-float32", "launch or fewer", -1,
         lambda row: -row["variants"][row["ours"]]["launches"]
         if row["ours"] and row["variants"][row["ours"]]["launches"] else None),
)  # fmt: skip

# Microseconds of one call on tiny tensors, at most.
CALLS = {"cpu": {"forward": 12.0, "forward+backward": 60.0}}


def verdicts(content: dict) -> list[str]:
    """A line a goal of this device."""
    rows = {row["case"]: row for row in content["cases"]}
    lines = []
    for goal in GOALS:
        if goal.device != content["device"]:
            continue
        value = goal.measured(rows[goal.case]) if goal.case in rows else None
        text = "not measured"
        if value is not None:
            verdict = "reached" if value >= goal.least else "MISSED"
            text = f"{verdict}: {abs(value):.2f} {goal.what}, goal {abs(goal.least):g}"
        lines.append(f"{goal.case:44} {text}")
    for direction, most in CALLS.get(content["device"], {}).items():
        times = content["calls"].get("microseconds", {})
        found = {name: t for name, t in times.items() if name.split()[1] == direction}
        if found:
            worst = max(found, key=found.get)
            verdict = "reached" if found[worst] <= most else "MISSED"
            kept = sum(t <= most for t in found.values())
            lines.append(
                f"{'tiny call, ' + direction:44} {verdict}: {found[worst]:.1f} us at most "
                f"({worst.split()[0]}), goal {most:g}: {kept} of {len(found)} within"
            )
    return lines
