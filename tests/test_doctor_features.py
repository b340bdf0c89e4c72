"""g2rpo doctor: what a configuration's choices would find, and the short benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import g2rpo_kernels as gk
from g2rpo import cli, doctor, doctor_bench, doctor_features
from g2rpo.doctor import Found


def there(**found: Found) -> dict[str, Found]:
    """Every package but these at 1.2.3."""
    return {package.module: Found("1.2.3") for package in doctor.PACKAGES} | found


def test_which_optimizers_and_trackers_can_be_named() -> None:
    found = there(bitsandbytes=Found(), torchao=Found("9", "E: why"), wandb=Found())
    said = dict(doctor_features.optimizers(found, gpus=0))
    assert list(said) == ["adamw", "adamw8bit", "adamw_streamed", "bitsandbytes", "torchao"]
    served = "cpu" if gk.backends()["cpu"].available else "reference"
    assert said["adamw8bit"] == f"yes, on its backend {served}"
    assert said["bitsandbytes"] == "no: missing; pip install 'g2rpo[bnb]'"
    assert said["torchao"] == "9, BROKEN: E: why"
    assert dict(doctor_features.optimizers(there(), 0))["torchao"] == "yes, 1.2.3"
    assert doctor_features.trackers(found) == [
        ("tensorboard", "yes, 1.2.3"), ("wandb", "no: missing; pip install wandb"),
        ("trackio", "yes, 1.2.3"),
    ]  # fmt: skip


def test_which_attention_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from g2rpo.flux import attention

    said = dict(doctor_features.attention(0))
    assert said["auto"].startswith("native") and "cudnn" in said["others"]
    faults = {name: None if name in ("cudnn", "math") else f"no {name}" for name in
              attention.BACKENDS}  # fmt: skip
    tried = []

    def try_backend(name, sizes, dtype, device):
        tried.append((sizes[2:], dtype, device.type))
        return faults[name]

    monkeypatch.setattr(attention, "try_backend", try_backend)
    said = dict(doctor_features.attention(2))
    assert said["auto"] == "measures cudnn, math, once, and takes the fastest"
    assert said["cudnn"] == "runs" and said["flash-attn"] == "no: no flash-attn"
    assert set(tried) == {((24, 128), torch.bfloat16, "cuda")}
    faults |= dict.fromkeys(faults, "no")
    assert dict(doctor_features.attention(1))["auto"] == "none runs"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ((name, why),) = doctor_features.told(doctor_features.attention, "attention", 1)
    assert name == "attention" and why.startswith("cannot be told: ") and "diffusers" in why


def test_which_scorers_have_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from g2rpo.rewards import load

    monkeypatch.setattr(load, "default_folder", lambda name: tmp_path / name)
    said = dict(doctor_features.rewards())
    assert list(said) == load.names() and "no files" in said["judge"]
    hps = said["hps-v2.1"]
    assert hps.startswith(f"no: not in {tmp_path / 'hps-v2.1'}; hf download xswu/HPSv2")
    assert hps.endswith("; and 1 more")  # CLIP's vocabulary
    (tmp_path / "aesthetic").mkdir()
    for file in ("config.json", "model.safetensors", "sac+logos+ava1-l14-linearMSE.pth"):
        (tmp_path / "aesthetic" / file).touch()
    assert dict(doctor_features.rewards())["aesthetic"] == f"yes, in {tmp_path / 'aesthetic'}"


def test_what_processes_would_talk_through(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    said = dict(doctor_features.distributed(["A Card"] * 4))
    assert said["nccl"] == "yes, between 4 GPUs" and said["GPUs"] == "4: a process each"
    assert said["gloo"].startswith("no: ")
    assert "nobody" in dict(doctor_features.distributed(["A Card"]))["nccl"]
    assert dict(doctor_features.distributed([]))["GPUs"] == "none"
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert doctor_features.distributed([])[0][1].startswith("no: ")


# doctor --bench


def test_the_short_benchmark(capsys: pytest.CaptureFixture) -> None:
    assert doctor_bench.run("cpu", seconds=0.01, size="tiny") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["time", "rate", "torch", "eager", "times"]
    shown = {line[:32].strip(): line[32:].split() for line in lines}
    assert list(shown)[:2] == ["copy", "matrix product, bfloat16"] and len(shown) == 8
    assert shown["copy"][3] == "GB/s" and shown["attention, bfloat16"][3] == "TFLOP/s"
    for name in ("sde_step", "policy_loss, with its gradient", "AdamW8bit, 0.00819 M parameters"):
        assert len(shown[name]) == 5 and float(shown[name][-1].removesuffix("x")) > 0, name


def test_the_short_benchmark_compares_the_same() -> None:
    """Its eager step is the op's: the log-probability of the op's own branches, and the loss."""
    size = doctor_bench.SIZES["tiny"]
    branches, *row = size["latent"]
    velocity, latents = torch.randn(1, *row), torch.randn(1, *row)
    c = gk.step_coefficients(*doctor_bench.SIGMAS, doctor_bench.ETA)
    x_next, log_prob = gk.sde_step(velocity, latents, c, seeds=torch.arange(branches).view(1, -1))
    _, eager = doctor_bench.eager_step(velocity, latents, branches, x_next.flatten(0, 1))
    torch.testing.assert_close(eager, log_prob.flatten(), rtol=1e-4, atol=1e-4)
    line = doctor_bench.ops("cpu", size)[1]()
    (ours,), (theirs,) = line.ours(), line.eager()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_an_op_that_fails_is_told_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*given: object, **options: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gk, "policy_loss", broken)
    assert doctor_bench.run("cpu", seconds=0.001, size="tiny") == 1
    out = capsys.readouterr().out
    assert "policy_loss: not timed: RuntimeError: no kernel image" in out and "AdamW8bit" in out


def test_calls_take_turns_and_the_median_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(doctor_bench.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: list[float]):
        left = iter(seconds)

        def run() -> None:
            order.append(name)
            now[0] += next(left)

        return run

    # Two calls of each come first, to warm and to count; then rounds of one each.
    calls = [call("a", [9, 1, 1, 5, 2]), call("b", [9, 1, 4, 4, 4])]
    assert doctor_bench.median_seconds(calls, 0.0, lambda: None) == [2, 4]
    assert "".join(order) == "aabb" + "ab" * 3


def test_the_command_of_the_short_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(doctor_bench, "run", lambda device: asked.append(device) or 0)
    monkeypatch.setattr(doctor, "gpus", lambda: ([], "none"))
    assert cli.main(["doctor", "--bench"]) == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "gpus", lambda: (["A Card"], ""))
    assert cli.main(["doctor", "--bench"]) == 0 and asked == ["cpu", "cuda"]
    assert capsys.readouterr().out.startswith("A Card; torch ")
    assert cli.main(["doctor", "--bench", "now"]) == 2
    assert "expected --bench, --fp8 or nothing; got --bench now" in capsys.readouterr().err
