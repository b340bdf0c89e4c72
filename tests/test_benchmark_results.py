"""The benchmarks' results files, and the README made of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import flux_forward  # noqa: E402
import flux_report  # noqa: E402
import goals  # noqa: E402
import measure  # noqa: E402
import plots  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402

MARKERS = [  # of each of the README's sections
    tuple(mark.format(name) for mark in ("<!-- {}:begin -->", "<!-- {}:end -->"))
    for name in ("bench", *flux_report.SECTIONS)
]
BEGIN, END = MARKERS[0]
EMPTY = "\n".join(mark for pair in MARKERS for mark in pair) + "\n"


@pytest.fixture(autouse=True, scope="module")
def small_machine() -> Iterator[None]:
    """A machine with a cache of 64 KiB, so that no test moves hundreds of megabytes."""
    buffers = torch.arange(2**12, dtype=torch.int32), torch.empty(2**12, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "cache_bytes", lambda device: 2**16)
        patch.setattr(measure, "copy_buffers", lambda device: buffers)
        yield


@pytest.fixture(scope="module")
def measured(small_machine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What run.py writes of two cases on a tiny shape."""
    path = tmp_path_factory.mktemp("measured") / "cpu.json"
    code = run.main([
        "--device", "cpu", "--shapes", "digits", "--only", "policy_loss", "--no-compile",
        "--rounds", "5", "--budget", "0.1", "--results", str(path),
    ])  # fmt: skip
    assert code == 0
    return path.read_text()


@pytest.fixture
def file(measured: str, tmp_path: Path) -> Path:
    path = tmp_path / "results" / "cpu-test.json"
    path.parent.mkdir()
    path.write_text(measured)
    return path


def test_a_run_writes_what_report_reads(file: Path, tmp_path: Path, capsys) -> None:
    content = results.load(file)
    assert [row["case"] for row in content["cases"]] == [
        "policy_loss-forward+backward-digits-float32", "policy_loss-forward-digits-float32",
    ]  # fmt: skip
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    assert content["calls"]["microseconds"]["policy_loss forward+backward"] > 0
    assert "not measured" in "\n".join(goals.verdicts(content)) and not list(
        file.parent.glob("*.new")
    )

    (file.parent / "other.json").write_text("{}")
    readme = tmp_path / "README.md"
    others = EMPTY.replace(f"{BEGIN}\n{END}\n", "")
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n{others}")
    arguments = ["--results", str(file.parent), "--readme", str(readme), "--docs", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert report.main([*arguments, "--check"]) == 0
    assert report.main(arguments) == 0 and readme.read_text() == once
    assert once.startswith("# Title\n") and f"{END}\n\nrest\n{MARKERS[1][0]}\n" in once
    assert "Not yet measured on a GPU" in once and "| `policy_loss` | fwd + bwd |" in once
    assert "4 × 12 × 16 × 4" in once and "old" not in once
    assert "left alone: other.json (of another kind)" in capsys.readouterr().out
    for name in (report.plot_name(content), report.roofline_name(content)):
        assert (tmp_path / name).stat().st_size > 10_000 and f"docs/{name})" in once
        (tmp_path / name).rename(tmp_path / "away")
        assert report.main([*arguments, "--check"]) == 1  # the README would show nothing there
        (tmp_path / "away").rename(tmp_path / name)


def test_a_gpu_file_takes_the_place_of_not_yet_measured(file: Path) -> None:
    content = results.load(file)
    gpu = json.loads(json.dumps(content))
    gpu["device"] = "cuda"
    gpu["machine"] = {"name": "A Card", "driver": "1.2", "host": content["machine"]}
    gpu["versions"] |= {"cuda": "13.0", "triton": "3.6.0"}
    for row in gpu["cases"]:
        for entry in row["variants"].values():
            entry |= {"timer": "graph", "launches": 3}
    text = report.block([gpu, content])
    assert "Not yet measured" not in text and text.index("A Card") < text.index("threads")
    assert "3 → 3" in text and "bench-a-card.png" in text and "CUDA graph" in text


def on_a_card(content: dict) -> dict:
    """Flow ops as a GPU would have them."""
    gpu = json.loads(json.dumps(content))
    gpu |= {"device": "cuda", "machine": {"name": "A Card", "driver": "1.2"}}
    gpu["versions"] |= {"cuda": "13.0", "triton": "3.6.0"}
    return gpu


FORWARD = {
    "device": "cuda", "machine": {"name": "A Card"},
    "cases": [{
        "batch": 4, "tokens": 4608, "variants": {
            name: {"speedup": {"median": times}, "of_peak": share}
            for name, times, share in (
                (flux_forward.EAGER, 1.0, 0.4), (flux_forward.COMPILED, 1.25, 0.5),
                (flux_forward.FUSED, 1.5, 0.6), (flux_forward.ROLLOUT, 1.75, 0.7),
                (flux_forward.FP8, 2.5, None),
            )
        },
    }],
}  # fmt: skip
BLOCKS = {
    "device": "cuda", "machine": {"name": "A Card"},
    "cases": [
        {"task": "gelu_tanh", "backward": True, "shape": "12 × 9", "ours": "ours (triton)",
         "variants": {"eager": {"over_ours": {"median": 3.0}, "copy_fraction": 0.3},
                      "torch.compile": {"over_ours": {"median": 1.5}, "copy_fraction": 0.6},
                      "ours (triton)": {"over_ours": {"median": 1.0}, "copy_fraction": 0.9}}},
        {"task": "quantize_fp8", "backward": False, "shape": "12 × 9", "ours": None,
         "variants": {}},
    ],
}  # fmt: skip


def test_pictures_show_what_the_files_hold(file: Path, tmp_path: Path) -> None:
    gpu = on_a_card(results.load(file))
    for row in gpu["cases"]:
        row["variants"]["compiled eager"] = {"over_ours": {"median": 2.0}}
        row["variants"]["compiled reference"] = {"over_ours": {"median": 4.0}}
    found = {"flow-ops": [gpu], "flux-blocks": [BLOCKS],
             "flux-forward": [FORWARD | {"machine": {"name": "Another"}}, FORWARD]}  # fmt: skip
    others = report.beside(gpu, found)
    assert others == {"flux-blocks": BLOCKS, "flux-forward": FORWARD}
    flow, _, block, forward = plots.rows_of(gpu, others)
    entries = gpu["cases"][0]["variants"]
    eager = entries["eager"]["over_ours"]["median"]
    # The best torch.compile: twice as long as ours.
    assert flow.speeds == {plots.OURS: eager, plots.COMPILE: pytest.approx(eager / 2)}
    ours = entries[gpu["cases"][0]["ours"]]
    assert flow.shares == {plots.COPY: 100 * ours["copy_fraction"]} and not flow.block
    assert block.speeds == {plots.OURS: 3.0, plots.COMPILE: 2.0} and block.block
    assert block.shares == {plots.COPY: 90.0} and block.name == "gelu_tanh fwd+bwd\n12 × 9"
    assert forward.speeds == {plots.COMPILE: 1.25, plots.OURS: 1.75, plots.OURS_FP8: 2.5}
    assert forward.shares == {"bfloat16": 70.0} and "4 × 4608 tokens" in forward.name
    said = plots.title(gpu)
    for text in ("A Card, driver 1.2", torch.__version__, "CUDA 13.0", gpu["date"]):
        assert text in said
    assert gpu["commit"] is None or f"commit {gpu['commit']}" in said
    pictures = tmp_path / "speed.png", tmp_path / "roofline.png"
    plots.plot(gpu, others, *pictures)
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width == 2000 and 400 < image.height < 2500
    for row in gpu["cases"]:
        row["ours"] = None
    with pytest.raises(ValueError, match="speed.png: expected a case with both eager and ours"):
        plots.plot(gpu, {}, *pictures)


@pytest.mark.parametrize("mark", [begin for begin, _ in MARKERS])
@pytest.mark.parametrize("spoil", [
    lambda mark: "", lambda mark: f"{mark}\n{mark}",
    lambda mark: f"{mark.replace('begin', 'end')}\n{mark}",
])  # fmt: skip
def test_a_readme_without_its_markers_is_refused(spoil, mark: str, tmp_path: Path, capsys) -> None:
    end = mark.replace("begin", "end")
    readme = EMPTY.replace(f"{mark}\n{end}", spoil(mark))
    (tmp_path / "README.md").write_text(readme)
    assert report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert f"expected one line {mark}" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme


@pytest.mark.parametrize("spoil, message", [
    (lambda text: text[: len(text) // 2], "is not JSON"),
    (lambda text: text.replace('"date"', '"day"'), "it lacks date"),
    (lambda text: text.replace('"bytes": ', '"size": '), "lacks bytes"),
    (lambda text: text.replace('"copy_fraction"', '"share"'), "lacks copy_fraction"),
    (lambda text: text.replace('"device": "cpu"', '"device": "tpu"'), "device 'tpu'"),
])  # fmt: skip
def test_a_spoiled_file_is_refused(spoil, message: str, file: Path, capsys) -> None:
    file.write_text(spoil(file.read_text()))
    with pytest.raises(results.ResultsError, match=message):
        results.load(file)
    readme = file.parent / "README.md"
    readme.write_text(EMPTY)
    assert report.main(["--results", str(file.parent), "--readme", str(readme)]) == 2
    assert file.name in capsys.readouterr().err


def test_a_run_cut_short_keeps_what_it_had(file: Path) -> None:
    store = results.Store(file, "cpu", resume=True)
    store.begin("a case that ends the process")
    again = results.Store(file, "cpu", resume=True)
    assert again.known("a case that ends the process") and not again.known("another")
    assert again.known("policy_loss-forward-digits-float32")
    assert "running" not in again.content and len(again.content["cases"]) == 2
    with pytest.raises(results.ResultsError, match="not of 'cuda'"):
        results.Store(file, "cuda", resume=True)


def test_a_limit_leaves_cases_out_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert run.main(["--device", "cpu", "--shapes", "primes", "--only", "ode_step", "--limit", "-1",
                     "--no-compile", "--rounds", "5", "--results", str(path)]) == 0  # fmt: skip
    content = results.load(path)
    assert content["cases"] == [] and "--limit" in content["left_out"][0]["why"]
    with pytest.raises(results.ResultsError, match="hold no case"):
        report.markdown(content)
    assert report.load_folder(tmp_path)["flow-ops"] == []


@pytest.mark.parametrize("arguments", [["--shapes", "flux9"], ["--dtypes", "float64"],
                                       ["--only", "no such case"]])  # fmt: skip
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path, capsys) -> None:
    try:
        code = run.main(["--device", "cpu", *arguments, "--results", str(tmp_path / "x.json")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and arguments[1] in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
