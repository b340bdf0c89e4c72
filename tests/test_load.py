"""Finding the backends: what is there, what is not and why, and that a user is told of a fallback.

No GPU is needed: the extension, Triton and the probes' answers are stood in for.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch

import g2rpo_kernels as gk
from g2rpo_kernels import _library, _load
from g2rpo_kernels.optim import native as native_optim

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation with nothing but references, until the test loads something."""
    for op in _library._ops.values():
        reference = {"reference": op.implementations["reference"]}
        monkeypatch.setattr(op, "implementations", reference)
    monkeypatch.setattr(_library, "_absent", dict.fromkeys(_library.BACKENDS[1:], "not looked for"))
    for name in ("_probes", "_answers"):
        monkeypatch.setattr(_library, name, {})
    monkeypatch.setattr(_library, "_warned", set())
    monkeypatch.setattr(native_optim, "EXTENSIONS", {})


def extension(**gpu: object) -> SimpleNamespace:
    """Stands in for g2rpo_kernels._C; with keywords, for one built with CUDA."""
    names = ("probe", "archs")
    half = SimpleNamespace(**{name: None for name in _library._ops})
    module = SimpleNamespace(cpu=half)
    if gpu:
        assert set(gpu) == set(names)
        module.cuda = SimpleNamespace(**vars(half), **gpu)
    return module


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """load(module or exception, triton=True): as if `import g2rpo_kernels._C` gave that."""

    def loader(found: object, triton: bool = False, facts: dict | None = None) -> None:
        def import_module(name: str) -> object:
            if isinstance(found, Exception):
                raise found
            return found

        fake = SimpleNamespace(import_module=import_module)
        fake.util = SimpleNamespace(find_spec=lambda name: object() if triton else None)
        monkeypatch.setattr(_load, "importlib", fake)
        monkeypatch.setattr(_load, "build_facts", lambda: facts)
        _load.load_backends()

    return loader


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch describes an H100 that is there."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")


def chosen(device: torch.device) -> str:
    op = _library._ops["step_mean"]
    implementation = op.select(device)
    return next(name for name, each in op.implementations.items() if each is implementation)


def test_an_extension_that_was_not_built_says_so(load: Callable) -> None:
    missing = ModuleNotFoundError("No module", name="g2rpo_kernels._C")
    facts = {"left_out": [{"what": "the native extension", "why": "no C++17 compiler"}]}
    load(missing, facts=facts)
    for name in ("cpu", "cuda"):
        assert "no C++17 compiler" in gk.backends()[name].reason
    load(missing)
    assert "reinstall" in gk.backends()["cpu"].reason


def test_an_extension_that_does_not_load_warns_with_its_reason(load: Callable) -> None:
    with pytest.warns(RuntimeWarning, match=r"_C is there but does not load: undefined symbol: x"):
        load(ImportError("undefined symbol: x", name="g2rpo_kernels._C"))
    assert "undefined symbol: x" in gk.backends()["cpu"].reason
    assert gk.backends()["cuda"].reason == gk.backends()["cpu"].reason


def test_a_broken_extension_on_disk_warns_and_the_reference_serves(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "g2rpo_kernels", tmp_path / "g2rpo_kernels", ignore=shutil.ignore_patterns("_C*")
    )
    extension = tmp_path / "g2rpo_kernels" / f"_C{EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"\x7fELF, but no more of it")
    code = "import torch, g2rpo_kernels as gk\n"
    code += "print(gk.ode_step(torch.ones(1, 4), torch.zeros(1, 4), 1.0, 0.5).tolist())\n"
    code += "print(gk.backends()['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "[[-0.5, -0.5, -0.5, -0.5]]" in done.stdout
    assert "available=False" in done.stdout and "does not load" in done.stdout
    assert "RuntimeWarning: g2rpo_kernels: the native extension" in done.stderr
    assert "runs on its PyTorch reference on cpu" in done.stderr


def test_no_cuda_in_the_extension_leaves_gpus_to_triton(load: Callable, one_gpu: None) -> None:
    facts = {"left_out": [{"what": "CUDA kernels", "why": "nvcc was not found"}]}
    load(extension(), triton=True, facts=facts)
    assert chosen(GPU) == "triton" and chosen(torch.device("cpu")) == "cpu"
    report = gk.backends()
    assert report["triton"].used_for == ("cuda",)
    assert not report["cuda"].available
    assert "nvcc was not found" in report["cuda"].reason
    assert "G2RPO_BUILD=cuda" in report["cuda"].reason


def test_a_gpu_without_code_in_the_binary_says_which_it_has(load: Callable, one_gpu: None) -> None:
    reason = "no kernel image is available for execution on the device"
    load(extension(probe=lambda device: reason, archs="80,100"), triton=True)
    assert chosen(GPU) == "triton"
    why = gk.backends()["cuda"].reason
    for part in ("NVIDIA H100", "9.0", reason, "80,100", "G2RPO_CUDA_ARCHS=90"):
        assert part in why
    with pytest.raises(RuntimeError, match="'cuda' is not available: no kernel runs on NVIDIA H1"):
        with gk.use_backend("cuda"):
            pass


def test_a_working_gpu_is_asked_once_and_used(load: Callable, one_gpu: None) -> None:
    asked = []
    load(extension(probe=lambda device: asked.append(device), archs="90"), triton=True)
    assert asked == []  # not when the package loads: that would create a CUDA context
    assert [chosen(GPU) for _ in range(3)] == ["cuda"] * 3
    assert asked == [0]
    assert chosen(torch.device("cuda", 1)) == "cuda" and asked == [0, 1]
    report = gk.backends()
    assert report["cuda"].used_for == ("cuda",)
    assert report["triton"] == gk.BackendStatus(True, (), "a faster backend is present")


def test_without_a_gpu_nothing_is_probed(load: Callable) -> None:
    def probe(device: int) -> None:
        raise AssertionError("a machine without a GPU was asked to launch a kernel")

    load(extension(probe=probe, archs="90"), triton=True)
    assert not gk.backends()["cuda"].available and gk.backends()["cuda"].reason


def test_the_user_is_told_once_that_the_reference_serves(load: Callable, one_gpu: None) -> None:
    load(extension())
    with pytest.warns(RuntimeWarning) as told:
        assert chosen(GPU) == "reference"
        assert chosen(GPU) == "reference"
    (message,) = (str(warning.message) for warning in told)
    assert "on its PyTorch reference on cuda:0" in message
    assert "built without CUDA" in message and "triton is not installed" in message


def test_a_backend_that_serves_is_no_reason_to_warn(load: Callable) -> None:
    load(extension())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(torch.device("cpu")) == "cpu"
        assert chosen(torch.device("meta")) == "reference"  # nothing faster exists for it


def test_a_forced_backend_refuses_tensors_elsewhere(load: Callable, one_gpu: None) -> None:
    load(extension(probe=lambda device: None, archs="90"))
    op = _library._ops["step_mean"]
    with gk.use_backend("cpu"):
        with pytest.raises(RuntimeError, match=r"'cpu'\) with tensors on cuda:0: it runs on CPUs"):
            op.select(GPU)
    with gk.use_backend("cuda"):
        with pytest.raises(RuntimeError, match=r"'cuda'\) with tensors on cpu: it runs on NVIDIA"):
            op.select(torch.device("cpu"))


def test_a_forced_backend_refuses_float64(load: Callable) -> None:
    load(extension())
    with gk.use_backend("cpu"):
        with pytest.raises(TypeError, match=r"'step_mean' was given a torch.float64 tensor; exp"):
            gk.step_mean(**cases.inputs("step_mean", "primes", "float64"))
    got = gk.step_mean(**cases.inputs("step_mean", "primes", "float64"))  # not forced: reference
    assert got.dtype == torch.float64


def test_tensors_on_different_devices_are_refused() -> None:
    arguments = cases.inputs("policy_loss", "primes")
    for name in ("latents", "x_next", "old_log_prob", "advantages"):
        wrong = {**arguments, name: arguments[name].to("meta")}
        with pytest.raises(ValueError, match=f"{name} is on meta; expected cpu"):
            gk.policy_loss(**wrong)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64])
def test_unsupported_dtypes_are_refused(dtype: torch.dtype) -> None:
    arguments = cases.inputs("step_mean", "primes")
    arguments["velocity"] = arguments["velocity"].to(dtype)
    with pytest.raises(TypeError, match=f"velocity has dtype {dtype}; expected float32, bfloat16"):
        gk.step_mean(**arguments)


def test_more_reward_models_than_a_launch_holds_are_refused(
    load: Callable, one_gpu: None
) -> None:
    module = extension(probe=lambda device: None, archs="90")
    module.cuda.most_models = 64
    load(module)
    launcher = _library._ops["group_advantages"].implementations["cuda"]
    with pytest.raises(ValueError, match="weights has 65 numbers; the cuda backend takes at most"):
        launcher(torch.zeros(65, 1, 4, 1), 2, [1.0] * 65, 1e-8)
