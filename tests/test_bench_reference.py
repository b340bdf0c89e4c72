"""The published loop, re-created: what it evaluates, that it computes what ours computes, and how
bench_reference.py times it and multiplies it up."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_flux_update  # noqa: E402
import bench_reference  # noqa: E402
import flux_results  # noqa: E402
import flux_update  # noqa: E402
import reference_loop  # noqa: E402
import reference_times  # noqa: E402
from adamw_steps import count, shapes  # noqa: E402
from flux_shapes import SIZES  # noqa: E402
from reference_loop import PHASES, ReferenceLoop, Shape  # noqa: E402
from results import ResultsError  # noqa: E402

import g2rpo_kernels as gk  # noqa: E402
from g2rpo.schedule import completion_path, evaluations_per_prompt, noise_schedule  # noqa: E402

TOY = SIZES["toy"]
QUICK = (
    "--rollout.sde_positions", "[0, 2]", "--rollout.granularities", "[1, 3]",
    "--rollout.group_size", "2", "--rollout.steps", "6", "--rollout.precision", "null",
)  # fmt: skip
# Anchor 6; branches 2 x 2; paths of position 0: 1 2 3 4 5 and 1 2 (then 5, arrived at), of
# position 2: 3 4 5 and 3 (then 4, arrived at).
SHAPE = Shape(6, 3.0, 0.7, (0, 2), (1, 3), 2)


def run(path: Path, *arguments: str) -> int:
    given = ["--size", "toy", "--device", "cpu", "--output", str(path), *arguments, *QUICK]
    return bench_reference.main(given)


def load(path: Path) -> dict:
    return flux_results.load(path, flux_results.REFERENCE)


@pytest.mark.parametrize("granularities", [(1,), (1, 2), (1, 2, 3)])
def test_evaluations_are_those_of_the_paths_without_sharing(granularities) -> None:
    shape = Shape(16, 3.0, 0.7, tuple(range(8)), granularities, 12)
    paths = sum(len(completion_path(k, g, 16)) for k in range(8) for g in granularities)
    assert shape.evaluations() == 16 + 12 * (8 + paths)
    assert shape.evaluations() > evaluations_per_prompt(16, range(8), granularities, 12)


def test_evaluations_of_the_paper_s_settings() -> None:
    shape = Shape(16, 3.0, 0.7, tuple(range(8)), (1, 2), 12)
    assert shape.evaluations() == 1792 and evaluations_per_prompt(16, range(8), [1, 2], 12) == 1504
    assert shape.asked() == {"anchor": 16, "branches": 96, "completions": 1680, "decode": 192,
                             "update": 96, "optimizer": 1}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> flux_update.RandomModel:
    config, _ = flux_update.configure(bench_flux_update.PRESET, TOY, "cpu", 1, list(QUICK))
    config.model.dtype = "float32"
    return flux_update.RandomModel(TOY, config, "cpu")


def test_the_loop_makes_the_forwards_that_it_counts(model, monkeypatch) -> None:
    loop = ReferenceLoop(model, SHAPE, autocast=False)
    rows, forward = [], model.policy.velocity

    def counted(latents, sigma, conditions):
        rows.append((len(latents), round(float(sigma), 6)))
        return forward(latents, sigma, conditions)

    monkeypatch.setattr(model.policy, "velocity", counted)
    phases = list(loop.rollout())
    asked = SHAPE.asked()
    assert {name: phases.count(name) for name in set(phases)} == {
        name: asked[name] for name in ("anchor", "branches", "completions")}  # fmt: skip
    assert len(rows) == SHAPE.evaluations() == 6 + 4 + 2 * (5 + 2 + 3 + 1)
    assert {count for count, _ in rows} == {1}
    assert len(loop.samples) == 4 and len(loop.finished) == 8
    sigmas = [round(float(s), 6) for s in noise_schedule(6, 3.0).float()]
    # After the anchor: x_0's own forward, its fine path, its coarse one, which begins again.
    path = [0, *completion_path(0, 1, 6), *completion_path(0, 3, 6)]
    assert [sigma for _, sigma in rows[6 : 6 + len(path)]] == [sigmas[i] for i in path]
    assert len(list(loop.decode())) == asked["decode"] == 8


def test_the_loop_computes_what_the_ops_compute(model) -> None:
    loop = ReferenceLoop(model, SHAPE, autocast=False)
    list(loop.rollout())
    sigmas = noise_schedule(6, 3.0)
    for sample in loop.samples:
        k = sample.position
        c = gk.step_coefficients(float(sigmas[k]), float(sigmas[k + 1]), 0.7,
                                 sigma_max=float(sigmas[1]))  # fmt: skip
        velocity = loop.forward(sample.latents, loop.sigmas[k]).detach()
        ours = gk.branch_log_prob(velocity, sample.latents, sample.x_next[:, None], c)
        torch.testing.assert_close(ours.flatten(), sample.log_prob, rtol=1e-3, atol=1e-4)
    # The finished latents are what an Euler run along the path says.
    x, path = loop.samples[0].x_next, completion_path(0, 3, 6)
    with torch.no_grad():
        for at, following in zip(path, [*path[1:], 6], strict=True):
            velocity = loop.forward(x, loop.sigmas[at])
            x = x + (loop.sigmas[following] - loop.sigmas[at]) * velocity
    torch.testing.assert_close(loop.finished[1], x)


def test_gradients_are_summed_over_the_branches(model) -> None:
    loop = ReferenceLoop(model, SHAPE, autocast=True)
    list(loop.rollout())
    transformer = model.policy.transformer.requires_grad_(True)
    transformer.zero_grad(set_to_none=True)
    assert len(list(loop.update())) == 4
    whole = transformer.proj_out.weight.grad.clone()
    assert whole.isfinite().all() and whole.abs().sum() > 0
    transformer.zero_grad(set_to_none=True)
    parts = loop.update()
    next(parts)
    assert not torch.allclose(transformer.proj_out.weight.grad, whole)
    transformer.zero_grad(set_to_none=True)
    transformer.requires_grad_(False)


def test_pieces_are_timed_until_the_seconds_are_over_and_there_is_enough() -> None:
    now = [0.0]

    def pieces():
        for i, name in enumerate("aabbb"):
            now[0] += i + 1
            yield name

    def timed(seconds: float, enough=lambda: True) -> dict:
        now[0] = 0.0
        return reference_loop.timed(pieces(), seconds, lambda: None, enough, lambda: now[0])

    assert timed(100.0) == {"a": [1.0, 2.0], "b": [3.0, 4.0, 5.0]}
    assert timed(2.5) == {"a": [1.0, 2.0]}
    assert timed(0.0, lambda: now[0] >= 6) == {"a": [1.0, 2.0], "b": [3.0]}
    row = reference_loop.phase_row([9.0, 2.0, 3.0, 4.0], asked=10)
    assert row == {"asked": 10, "timed": 4, "seconds_each": 3.0, "seconds": 30.0,
                   "extrapolated": True}  # fmt: skip
    assert reference_loop.phase_row([9.0, 2.0], 2)["seconds"] == 11.0
    assert reference_loop.phase_row([9.0, 2.0], 2)["extrapolated"] is False


def test_weights_are_of_the_widest_dtype_that_fits() -> None:
    elements, wide = 11_901_408_320, "float32 weights, bfloat16 autocast"
    of = reference_times.dtypes
    assert of(elements, 79e9) == {"rollout": wide, "update": "bfloat16"}  # an H100
    assert of(elements, 141e9) == {"rollout": wide, "update": wide}
    assert of(elements, 50e9) == {"rollout": "bfloat16", "update": None}
    assert of(elements, 24e9) == {"rollout": None, "update": None}
    assert of(10**6, reference_times.free_bytes("cpu")) == {"rollout": wide, "update": wide}


def test_toy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "reference.json"
    assert run(path, "--seconds", "60") == 0
    said = capsys.readouterr().out
    (row,) = load(path)["cases"]
    assert list(row["phases"]) == list(PHASES) and row["errors"] == {}
    asked = SHAPE.asked()
    for name in PHASES[:-1]:
        each = row["phases"][name]
        assert each["timed"] == each["asked"] == asked[name] and not each["extrapolated"], name
    assert row["extrapolated"] is False and row["evaluations"] == SHAPE.evaluations()
    assert row["ours_evaluations"] == evaluations_per_prompt(6, [0, 2], [1, 3], 2)
    assert row["seconds"] == pytest.approx(sum(p["seconds"] for p in row["phases"].values()))
    assert row["ours"]["from"] == "this run" and row["ours"]["rows"] > 0
    assert row["ratio"]["update"] == pytest.approx(row["seconds"] / row["ours"]["seconds"])
    assert "TOY SIZE" in said and "extrapolated" not in said and "float32 weights" in said
    # What is there is kept.
    assert run(path, "--seconds", "60", "--resume") == 0 and load(path)["cases"] == [row]
    assert "anchor       6 of 6 timed" not in capsys.readouterr().out


def test_what_is_cut_short_is_multiplied_up_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With no seconds at all it stops at the first image that is finished."""
    ours = tmp_path / "flux-update-toy.json"
    bench_flux_update.main(["--size", "toy", "--device", "cpu", "--output", str(ours), "--updates",
                            "1", *QUICK])  # fmt: skip
    (update,) = flux_results.load(ours, flux_results.UPDATE)["cases"]
    path = tmp_path / "reference.json"
    assert run(path, "--seconds", "0", "--ours", str(ours)) == 0
    (row,) = load(path)["cases"]
    completions = row["phases"]["completions"]
    assert row["extrapolated"] and completions["extrapolated"]
    assert completions["timed"] == len(completion_path(0, 1, 6)) < completions["asked"]
    assert completions["seconds"] == pytest.approx(
        completions["seconds_each"] * completions["asked"])  # fmt: skip
    assert row["phases"]["update"]["timed"] == 1 and row["phases"]["update"]["asked"] == 4
    assert row["ours"]["from"] == "flux-update-toy.json"
    assert row["ours"]["seconds"] == update["seconds"]
    assert row["ratio"]["rollout"] > 0 and not math.isinf(row["ratio"]["update"])
    said = capsys.readouterr().out
    assert "extrapolated from the pieces timed" in said and "5 of" in said

    content = json.loads(ours.read_text())
    for change, why in (
        ({"size": "flux"}, "is of size 'flux', not of 'toy'"),
        ({"machine": {"name": "Another"}}, "is of Another, not of this machine"),
        ({"kind": "flux-forward"}, "has no kind 'flux-update'"),
    ):
        ours.write_text(json.dumps(content | change))
        assert run(path, "--ours", str(ours)) == 2
        assert why in capsys.readouterr().err
    ours.write_text(json.dumps(content | {"cases": []}))  # then it is measured here
    store = type("Store", (), {"content": content})()
    assert reference_times.ours_of(ours, [], store) is None


def test_what_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reference.json"
    monkeypatch.setattr(reference_times, "dtypes", lambda *_: {"rollout": None, "update": None})
    assert run(path, "--seconds", "0") == 3
    (left,) = load(path)["left_out"]
    assert left["why"].startswith("the weights do not fit in bfloat16; expected a GPU")
    wide = "float32 weights, bfloat16 autocast"
    monkeypatch.setattr(reference_times, "dtypes", lambda *_: {"rollout": wide, "update": None})
    assert run(path, "--seconds", "0") == 0  # there is a ratio of the rollout
    (row,) = load(path)["cases"]
    assert row["seconds"] is None and set(row["ratio"]) == {"rollout"}
    assert "do not fit" in row["errors"]["update"] and "optimizer" in row["phases"]
    assert bench_reference.cells(row)[-1]["reference"] == "–"


def test_a_part_of_the_optimizer_s_parameters_is_multiplied_up(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = 24 * count(shapes(TOY, 1, 1)) / 0.9
    monkeypatch.setattr(reference_times, "free_bytes", lambda device: fewest + 10)
    row = reference_times.step_row(TOY, "cpu", 0.0)
    part = count(shapes(TOY, 1, 1)) / count(shapes(TOY, 2, 2))
    assert row["of_elements"] == part < 1 and row["extrapolated"] and row["asked"] == 1
    monkeypatch.setattr(reference_times, "timed", lambda *_: {"optimizer": [9.0, 3.0]})
    row = reference_times.step_row(TOY, "cpu", 0.0)
    assert row["seconds"] == row["seconds_each"] == pytest.approx(3.0 / part)
    monkeypatch.setattr(reference_times, "free_bytes", lambda device: fewest - 10)
    with pytest.raises(ResultsError, match="not even one double block"):
        reference_times.step_row(TOY, "cpu", 0.0)
