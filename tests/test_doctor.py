"""g2rpo doctor: what it says where things are there, are missing, and are there but broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import g2rpo_kernels as gk
from g2rpo import cli, doctor
from g2rpo.doctor import Found, Package

ROOT = Path(__file__).resolve().parent.parent
TOML = Package("tomllib" if sys.version_info >= (3, 11) else "json", "x", "y", "pytest")


def fail(name: str) -> None:
    raise OSError(f"{name}: undefined symbol\nsecond line")


def test_a_package_is_imported_and_not_only_found() -> None:
    assert doctor.probe(Package("no_such_package", "x", "y")) == Found()
    found = doctor.probe(TOML)
    assert found.works and found.version == pytest.__version__
    broken = doctor.probe(TOML, fail)
    assert not broken.works and broken.version
    assert broken.error == f"OSError: {TOML.module}: undefined symbol"
    lazy = doctor.probe(Package("json", "x", "y", uses="no_such_name"))
    assert not lazy.works and "no_such_name" in lazy.error
    assert lazy.version == "of unknown version"


def test_what_training_needs_is_among_the_packages() -> None:
    assert set(cli.TRAIN_EXTRA) <= {package.module for package in doctor.PACKAGES}


def test_build_facts(tmp_path: Path) -> None:
    assert "G2RPO_BUILD" in doctor.build_facts(tmp_path)[0][1]
    facts = {
        "build": "auto", "cpu": True, "openmp": True, "cuda": True, "cuda_archs": [80, 90, 120],
        "compiler": "GNU 12.2.0", "nvcc": "13.0", "left_out": [],
    }  # fmt: skip
    (tmp_path / "_build.json").write_text(json.dumps(facts))
    assert doctor.build_facts(tmp_path) == [
        ("compiler", "GNU 12.2.0, with OpenMP"),
        ("cuda code for", "compute capability 8.0, 9.0, 12.0 (nvcc 13.0)"),
    ]
    nothing = {"cpu": False, "cuda": False, "left_out": [{"what": "all", "why": "no compiler"}]}
    (tmp_path / "_build.json").write_text(json.dumps(nothing))
    assert doctor.build_facts(tmp_path)[0] == ("without all", "no compiler")
    facts |= {"cuda": False, "openmp": False, "left_out": [{"what": "cuda", "why": "no nvcc"}]}
    (tmp_path / "_build.json").write_text(json.dumps(facts))
    rows = dict(doctor.build_facts(tmp_path))
    assert rows["compiler"].endswith("without OpenMP") and rows["without cuda"] == "no nvcc"
    assert "cuda code for" not in rows and "G2RPO_BUILD=auto" in rows["to rebuild"]


def test_cpu_model(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    assert doctor.cpu_model(tmp_path / "cpuinfo") == "A CPU @ 2 GHz"
    assert doctor.cpu_model(tmp_path / "nowhere")


def test_vector_variant_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    native = SimpleNamespace(cpu=SimpleNamespace(variant=lambda: "avx2"))
    for extension, expected in (
        (native, ("avx2", "")),
        (SimpleNamespace(), (None, "the native extension has no CPU part")),
    ):
        monkeypatch.setitem(sys.modules, "g2rpo_kernels._C", extension)
        assert doctor.vector_variant() == expected
    monkeypatch.setitem(sys.modules, "g2rpo_kernels._C", None)  # what an import then raises for
    variant, why = doctor.vector_variant()
    assert variant is None and "g2rpo_kernels._C" in why


def test_tools_that_are_not_there_or_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.run("no-such-tool-of-g2rpo")[0] == ""
    code = "import sys; sys.exit('no devices were found')"
    assert doctor.run(sys.executable, "-c", code) == ("", "no devices were found")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert doctor.driver()[0] == "" and "nvidia-smi" in doctor.driver()[1]
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!{sys.executable}\nprint('Cuda compilation tools, release 12.8, V12.8.93')")
    nvcc.chmod(0o755)
    assert doctor.toolkit() == (f"{nvcc}, release 12.8", "")
    nvcc.write_text(f"#!{sys.executable}\nprint('something else')")
    assert doctor.toolkit() == ("", f"{nvcc} does not say its release: something else")


def test_no_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    lines, why = doctor.gpus()
    assert lines == [] and torch.__version__ in why


def test_how_fp8_multiplies_on_each_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    answers = [
        gk.Fp8Support("rowwise", "torch takes a scale a row"),
        gk.Fp8Support("tensorwise", "torch takes no scale a row: why"),
        gk.Fp8Support("none", "its compute capability is 8.0"),
        RuntimeError("CUDA error: this one is broken\nmore"),
    ]

    def support(device: str) -> gk.Fp8Support:
        answer = answers[int(device.removeprefix("cuda:"))]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(gk, "fp8_support", support)
    rows = doctor.fp8_products(4)
    assert [name for name, _ in rows] == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]
    kinds = ["rowwise", "tensorwise", "none", "none"]
    reasons = [answer.reason for answer in answers[:3]]
    reasons.append("RuntimeError: CUDA error: this one is broken")
    for (_, text), kind, reason in zip(rows, kinds, reasons, strict=True):
        assert text.startswith(kind) and text.endswith(f": {reason}")
    fast(monkeypatch)
    monkeypatch.setattr(doctor, "gpus", lambda: (["A Card", "Another"], ""))
    monkeypatch.setattr(doctor, "try_ops", lambda device: "")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    title = out.index("\nFP8 products, for rollout.precision 'fp8'\n")
    assert title < out.index("  GPU 0  rowwise") < out.index("  GPU 1  tensorwise")


def test_fp8_without_a_gpu_is_emulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(doctor, "gpus", lambda: ([], "none"))
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert re.search(r"^  CPU  emulated, exactly and slowly: .* for tests$", out, re.M)


def test_ops_are_tried_and_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.try_ops("cpu") == ""

    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gk, "policy_loss", broken)
    assert doctor.try_ops("cpu") == "RuntimeError: no kernel image"


def test_conclusions_name_what_is_missing() -> None:
    found = {package.module: Found("1.0") for package in doctor.PACKAGES}
    absent = {name: gk.BackendStatus(False, (), f"no {name}") for name in ("cpu", "triton", "cuda")}
    said = dict(doctor.conclusions(found, {"cpu": ""}, absent, gpu=False))
    assert said["the ops"] == "cpu: work" and said["native CPU ops"] == "no: no cpu"
    assert said["g2rpo train digits"] == "yes" and said["fused GPU ops"] == "no: no GPU"
    found |= {"diffusers": Found(), "sklearn": Found("1.0", "ImportError: x")}
    there = absent | {"triton": gk.BackendStatus(True, ("cuda",), "")}
    said = dict(doctor.conclusions(found, {"cpu": "", "cuda": "E: y"}, there, gpu=True))
    assert said["the ops"] == "cpu: work; cuda: E: y"
    assert said["fused GPU ops"] == "yes, triton"
    assert said["g2rpo train digits"].startswith("no: diffusers, sklearn missing or broken; pip")


def fast(monkeypatch: pytest.MonkeyPatch, **found: Found) -> None:
    """Without the seconds that importing every package takes."""
    monkeypatch.setattr(doctor, "probe", lambda p: found.get(p.module, Found("1.2.3")))


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    fast(monkeypatch, peft=Found(), rich=Found("9", "E: why"), torchvision=Found("0.1", "E: ops"))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for title in (
        "versions", "processor", "GPUs", "backends of the ops", "attention, for model.attention",
        "optimizers, for optimizer.name", "published scorers, for rewards",
        "trackers, for train.tracker", "several processes", "what works now",
    ):  # fmt: skip
        assert f"\n{title}\n" in out
    for name, status in gk.backends().items():
        assert re.search(rf"^  {name} +{'available' if status.available else 'absent'}", out, re.M)
    assert "missing; pip install 'g2rpo[train]'  (training: LoRA)" in out
    assert "9, BROKEN: E: why" in out
    assert "Warning: torchvision 0.1" in out and "E: ops" in out
    assert "no: peft, rich missing or broken" in " ".join(out.split())


def test_exit_code_when_the_ops_do_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(doctor, "try_ops", lambda device: "RuntimeError: it broke")
    assert doctor.main() == 1
    assert "cpu: RuntimeError: it broke" in capsys.readouterr().out


def test_help_arguments_and_unknown_commands(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", "--help"]) == 0 and "usage" in capsys.readouterr().out
    assert cli.main(["doctor", "now"]) == 2 and "got now" in capsys.readouterr().err
    assert cli.main(["heal"]) == 2
    assert capsys.readouterr().err == (
        "g2rpo: error: unknown command 'heal'; expected one of train, embed, plan, sample, "
        "evaluate, compare, doctor\n"
    )
    assert cli.main(["--help"]) == 0 and "doctor" in capsys.readouterr().out


def test_it_runs_where_nothing_but_torch_can_be_imported() -> None:
    """Every package it looks for hidden but torch's own: it says so and does not fail."""
    hidden = [p.module for p in (*doctor.PACKAGES, doctor.TORCHVISION) if p.module != "numpy"]
    code = (
        "import sys, importlib.util as u\n"
        f"hidden = {hidden!r}\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in hidden: raise ModuleNotFoundError(f'{name} hidden', name=name)\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from g2rpo import cli\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "missing; pip install 'g2rpo[train]'" in done.stdout
    assert "cpu: work" in done.stdout and "no: accelerate, anyio, diffusers" in done.stdout
