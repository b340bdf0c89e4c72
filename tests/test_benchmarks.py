"""The benchmarks' own machinery: that what they time, count and print is what they say it is."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import cases
import formulas
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import eager  # noqa: E402
import goals  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
from measure import Settings, prepared  # noqa: E402
from workloads import TASKS, Case, another_set, bytes_moved, cases_of, make_inputs  # noqa: E402

QUICK = Settings(rounds=5, budget=0.1, at_least=1e-5, compile=False)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a cache of 64 KiB, so that no test moves hundreds of megabytes."""
    buffers = torch.arange(2**12, dtype=torch.int32), torch.empty(2**12, dtype=torch.int32)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(measure, "copy_buffers", lambda device: buffers)


# Timing


def test_rounds_alternate_and_each_begins_with_the_next() -> None:
    order = []

    def block(name: str) -> timing.Block:
        return lambda: order.append(name) or float(len(order))

    seconds = timing.interleave({name: block(name) for name in "abc"}, rounds=4)
    assert "".join(order) == "abcbcacababc"
    assert seconds == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_budget_ends_the_rounds_but_not_before_the_fifth() -> None:
    now = iter(range(1000))
    blocks = {"a": lambda: 1.0}
    for budget, rounds in ((0, 5), (6.5, 8), (None, 21)):
        timed = timing.interleave(blocks, 21, budget, clock=lambda: float(next(now)))
        # the clock is read once at the start, and from the sixth round on before each round
        assert len(timed["a"]) == (rounds if budget != 6.5 else 5 + 6)


def test_ratios_are_taken_within_a_round() -> None:
    """A machine twice as slow from the third round on changes neither ratio."""
    slow = [10.0, 10.0, 20.0, 20.0, 20.0]
    found = timing.ratio(slow, [s / 4 for s in slow])
    assert found == {"median": 4.0, "low": 4.0, "high": 4.0}
    with pytest.raises(ValueError):
        timing.ratio(slow, slow[:-1])


def test_sets_and_calls() -> None:
    assert timing.sets_past_cache(10, 100) == 20
    assert timing.sets_past_cache(10**9, 100) == 1
    assert timing.sets_past_cache(1, 10**9) == timing.MAX_SETS
    assert timing.calls_for(lambda: 0.25, 1.0) == 4 and timing.calls_for(lambda: 9.0, 1.0) == 1


def test_wall_time_rotates_the_sets() -> None:
    seen = []
    variant = timing.Variant("x", seen.append)
    block = timing.wall_block(variant, sets=3, calls=4, synchronize=lambda: None)
    assert block() > 0 and block() > 0
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]


# What is timed

# At "primes", 3 anchors x 5 branches x 77 elements, in bytes, float32: velocity and latents 924
# each, a table 60, x_next or noise 4620, seeds 120, one float a branch 60.
BYTES = {
    Case("sde_step[seeds]", "primes"): 924 + 924 + 60 + 120 + 4620 + 60,
    Case("sde_step[noise]", "primes"): 924 + 924 + 60 + 4620 + 4620 + 60,
    Case("branch_log_prob", "primes"): 924 + 924 + 60 + 4620 + 60,
    # then reads dloss/dlog_prob and the four inputs again, writes the gradient
    Case("branch_log_prob", "primes", backward=True): 6588 + 60 + 924 + 924 + 60 + 4620 + 924,
    # reads two floats a branch, writes two; the loss and five statistics
    Case("policy_loss", "primes"): 924 + 924 + 60 + 4620 + 120 + 120 + 24,
    Case("policy_loss", "primes", backward=True): 6792 + 60 + 924 + 924 + 60 + 4620 + 4 + 924,
    Case("policy_loss", "primes", "mixed", True): 6792
    + 60
    + 924
    + 924
    + 60
    + 4620
    + 4
    + 924
    - 3 * 462,  # velocity twice and its gradient in two bytes an element
    Case("ode_step", "primes"): 924 + 924 + 24 + 924,
    Case("step_mean", "primes"): 924 + 924 + 60 + 924,
    Case("normal", "primes"): 120 + 4620,
    Case("group_advantages", "primes"): 4 * (2 * 3 * 15 * 5 + 15 * 5),
}


@pytest.mark.parametrize("case", BYTES, ids=lambda case: case.id)
def test_bytes_moved(case: Case) -> None:
    assert bytes_moved(case) == BYTES[case]


def test_the_flux_case_moves_what_the_issue_counts() -> None:
    """15 MB: x_next of 12 branches of 2025 tokens x 64 channels twice, anchors thrice."""
    count = 2025 * 64 * 4
    assert math.isclose(bytes_moved(Case("policy_loss", "flux720", backward=True)),
                        count * (2 * 12 + 2 * 2 + 1), rel_tol=1e-3)  # fmt: skip


def test_every_task_is_timed_and_what_matters_comes_first() -> None:
    made = cases_of(["flux720"], ["float32"])
    assert {case.task for case in made} == set(TASKS)
    assert {case.task for case in made if case.backward} == {
        name for name, task in TASKS.items() if task.reference_with_gradient
    }
    assert made[0] == Case("policy_loss", "flux720", backward=True)
    mixed = cases_of(["flux720"], ["mixed"])
    assert len(mixed) == len(made) - 2  # normal and group_advantages have no such inputs
    assert all(shape in cases.SHAPES for shape in run.SHAPES["cuda"])


def test_another_set_has_the_same_values_elsewhere() -> None:
    first = make_inputs(Case("policy_loss", "primes"), "cpu")
    second = another_set(first)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name])
            assert value.data_ptr() != second[name].data_ptr(), name
    assert second["flat_x_next"].data_ptr() == second["x_next"].data_ptr()
    assert second["coefficients"].table.data_ptr() == second["table"].data_ptr()


@pytest.mark.parametrize("shape", ["primes", "image", "digits"])
@pytest.mark.parametrize("task", TASKS)
def test_eager_computes_what_the_formulas_say(task: str, shape: str) -> None:
    """In float64: the peers' score form is the affine step, for every row and branch."""
    if TASKS[task].random:
        task = "sde_step[noise]"  # the same function, its noise given
    given = make_inputs(Case(task, shape, "float64"), "cpu")
    way = TASKS[task].eager
    got = way.function(*(given[name] for name in way.arguments))
    names = {"sde_step": ("velocity", "latents", "coefficients", "noise")}.get(
        TASKS[task].op, TASKS[task].ours.arguments
    )
    formula = getattr(formulas, task.partition("[")[0])
    arguments = [given[name] for name in names]
    if task != "group_advantages":
        arguments = cases.at_dtype(dict(zip(names, arguments)), torch.float64)
        # sigmas come from the schedule, coefficients from a float32 table
        arguments["coefficients"] = exact(given)
        if task == "ode_step":
            del arguments["coefficients"]
        if task == "policy_loss":
            arguments["clip_range"] = given["clip_range"]
        want = formula(**arguments)
    else:
        want = formula(*arguments)
    want = cases.as_tuple(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-12)


def exact(given: dict) -> object:
    """The coefficients' formulas in float64, for the same step of every row."""
    from g2rpo_kernels.dynamics import DYNAMICS

    sigma, sigma_next, sigma_max = (given[n] for n in ("sigma", "sigma_next", "sigma_max"))
    eta = torch.full_like(sigma, 0.7)
    tilde = torch.where(sigma == 1, sigma_max, sigma)
    a, b, s = DYNAMICS["flow"](sigma, sigma_next, eta, tilde)
    table = torch.stack([a, b, s, 1 / (2 * s**2), -s.log() - 0.5 * math.log(2 * math.pi)], 1)
    return replace(given["coefficients"], table=table)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("case", [c for c in cases_of(["digits"], ["float32"])] + [
    Case("policy_loss", "digits", "mixed", True)
], ids=lambda case: case.id)  # fmt: skip
def test_every_way_agrees_and_is_timed(case: Case, device: str) -> None:
    with prepared(case, device, QUICK) as ready:
        assert ready.errors == {}
        row = ready.measure()
    assert row["ours"] in row["variants"] and row["variants"][row["ours"]]["over_ours"] == {
        "median": 1.0, "low": 1.0, "high": 1.0,
    }  # fmt: skip
    assert row["rounds"] >= timing.MIN_ROUNDS and row["bytes"] == bytes_moved(case)
    for entry in row["variants"].values():
        assert entry["gb_per_second"] == pytest.approx(row["bytes"] / entry["seconds"] / 1e9)
    json.dumps(row, allow_nan=False)


def test_the_reference_that_is_compiled_agrees_too() -> None:
    """What torch.compile gets, run as it is: the closed-form gradient is autograd's."""
    for case in cases_of(["primes"], ["float32"]):
        task, given = TASKS[case.task], make_inputs(case, "cpu")
        way = task.reference_with_gradient if case.backward else task.reference
        if case.backward:
            given["velocity"] = given["velocity"].requires_grad_()
            given["velocity_plain"] = given["velocity"].detach()
        got = measure.caller(way, way.function, [given], case.backward)(0)
        want = measure.caller(task.eager, task.eager.function, [given], case.backward)(0)
        got, want = measure.as_outputs(got), measure.as_outputs(want)
        if not task.random:
            assert measure.disagreement(got, want, False) < 1e-4, case.id


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("ode_step", "primes")
    way = TASKS["ode_step"].ours
    for broken, why in (
        (lambda v, x, s, t: (x + v,), "disagrees with eager by"),
        (lambda v, x, s, t: (x * float("nan"),), "disagrees with eager by inf"),
        (lambda v, x, s, t: 1 // 0, "ZeroDivisionError"),
    ):
        monkeypatch.setitem(TASKS, "ode_step", replace(TASKS["ode_step"],
                            ours=replace(way, function=broken)))  # fmt: skip
        with prepared(case, "cpu", QUICK) as ready:
            row = ready.measure()
        assert row["ours"] is None and list(row["variants"]) == [measure.EAGER]
        assert all(why in row["errors"][name] for name in row["errors"]) and row["errors"]


def test_goals_are_judged_by_the_measured_ratio() -> None:
    def row(median: float) -> dict:
        return {"case": "sde_step[seeds]-forward-flux720-float32", "ours": "ours (cpu)",
                "variants": {"eager": {"over_ours": {"median": median}}}}  # fmt: skip

    for median, verdict in ((3.2, "reached: 3.20 x eager"), (2.9, "MISSED: 2.90 x eager")):
        content = {"device": "cpu", "cases": [row(median)],
                   "calls": {"microseconds": {"normal forward": 5.0}}}  # fmt: skip
        text = "\n".join(goals.verdicts(content))
        assert verdict in text and "not measured" in text
        assert "reached: 5.0 us at most (normal), goal 12" in text


def test_eager_advantages_are_a_loop_over_prompts() -> None:
    rewards = torch.tensor([[[[1.0], [3.0], [2.0], [6.0]]]])
    got = eager.group_advantages(rewards, 2, [2.0])
    half = 2 * 0.5**0.5
    torch.testing.assert_close(got, torch.tensor([[-half], [half], [-half], [half]]))


# The GPU's timers, with stand-ins where there is no GPU


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors in GPU clothes: what is left to test is the bookkeeping around the timers."""
    for module in (measure, timing):
        monkeypatch.setattr(module, "synchronizer", lambda device: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "count_launches", lambda variant: 2)
    monkeypatch.setattr(measure, "event_block", lambda variant, sets, at_least: lambda: 3e-3)

    def device_block(variant: timing.Variant, sets: int, at_least: float) -> timing.Block:
        if variant.name == "ours (reference)":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: 1e-3 if variant.name == measure.COPY else 2e-3

    monkeypatch.setattr(measure, "device_block", device_block)


def test_device_time_beside_wall_time(pretended_gpu: None) -> None:
    with prepared(Case("ode_step", "primes"), "cpu", QUICK) as ready:
        ready.device = "cuda"
        row = ready.measure()
    entries = row["variants"]
    assert entries["eager"]["timer"] == "graph" and entries["eager"]["seconds"] == 2e-3
    assert 0 < entries["eager"]["wall_seconds"] < 1e-3 and entries["eager"]["launches"] == 2
    reference = entries["ours (reference)"]
    assert reference["seconds"] == 3e-3 and reference["timer"] == (
        "events, since no graph was captured: operation not permitted when stream is capturing"
    )
    # 2796 B in 2 ms over 2 * 16 KiB in 1 ms
    assert entries["eager"]["copy_fraction"] == pytest.approx(2796 / 2 / 2**15)
