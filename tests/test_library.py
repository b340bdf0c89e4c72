"""The choice of backends, and that importing the ops imports the ops and nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import pytest
import torch

import g2rpo_kernels as gk
from g2rpo_kernels import _library
from g2rpo_kernels.native import NATIVE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds is gone after it."""
    for op in _library._ops.values():
        monkeypatch.setattr(op, "implementations", dict(op.implementations))
    for name in ("_absent", "_probes", "_answers"):
        monkeypatch.setattr(_library, name, dict(getattr(_library, name)))
    monkeypatch.setattr(_library, "_warned", set(_library.PRIORITY))  # but for tests of warnings


def fake(op: str, backend: str, like: Callable | None = None) -> list[str]:
    """Add an implementation that notes its calls and then does what the reference does."""
    calls = []
    reference = like or _library._ops[op].implementations["reference"]

    def implementation(*arguments: object) -> object:
        calls.append(op)
        return reference(*arguments)

    _library.add_backend(op, backend, implementation)
    return calls


@pytest.fixture
def reference_only() -> None:
    """As this package is before any native or GPU backend is there."""
    for op in _library._ops.values():
        op.implementations = {"reference": op.implementations["reference"]}
    for name in ("cpu", "triton", "cuda"):
        _library._absent[name] = "not part of this build"
        _library._probes.pop(name, None)


def test_backends_says_what_is_there_and_why(reference_only: None) -> None:
    report = gk.backends()
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    reference = report["reference"]
    assert reference.available and set(reference.used_for) == {"cpu", "cuda"}
    assert "cpu > reference" in reference.reason and "cuda > triton > reference" in reference.reason
    for name in ("cpu", "triton", "cuda"):
        assert report[name] == gk.BackendStatus(False, (), "not part of this build")


def test_every_backend_that_is_not_there_says_why() -> None:
    for name, status in gk.backends().items():
        assert isinstance(status.reason, str) and status.reason, name
        assert status.available or not status.used_for


def test_an_added_backend_takes_its_device_and_no_other(reference_only: None) -> None:
    calls, unwanted = fake("step_mean", "cpu"), fake("step_mean", "triton")
    report = gk.backends()
    assert report["cpu"].available and report["cpu"].used_for == ("cpu",)
    assert report["triton"].available and report["triton"].used_for == ("cuda",)
    assert report["reference"] == gk.BackendStatus(True, (), "a faster backend is present")
    arguments = cases.inputs("step_mean", "primes")
    got = gk.step_mean(**arguments)
    assert calls == ["step_mean"] and unwanted == []
    with gk.use_backend("reference"):
        assert torch.equal(got, gk.step_mean(**arguments))
    assert calls == ["step_mean"]


def test_an_op_without_the_faster_backend_falls_to_the_next(reference_only: None) -> None:
    fake("step_mean", "cpu")
    arguments = cases.inputs("ode_step", "primes")
    with gk.use_backend("reference"):
        want = gk.ode_step(**arguments)
    assert torch.equal(gk.ode_step(**arguments), want)


def test_the_order_of_preference_on_gpus(reference_only: None) -> None:
    """Selection alone: no GPU is needed to see which implementation would be taken."""
    op = _library._ops["step_mean"]
    gpu = torch.device("cuda", 0)
    assert op.select(gpu) is op.implementations["reference"]
    fake("step_mean", "triton")
    assert op.select(gpu) is op.implementations["triton"]
    fake("step_mean", "cuda")
    assert op.select(gpu) is op.implementations["cuda"]
    assert op.select(gpu, wide=True) is op.implementations["reference"]
    for device in ("cpu", "mps", "xpu", "meta"):
        assert op.select(torch.device(device)) is op.implementations["reference"]
    assert gk.backends()["cuda"].used_for == ("cuda",) and not gk.backends()["triton"].used_for


def test_backends_are_handed_contiguous_tensors(reference_only: None) -> None:
    reference = _library._ops["step_mean"].implementations["reference"]
    seen = []

    def look(*arguments: torch.Tensor) -> torch.Tensor:
        seen.extend(x.is_contiguous() for x in arguments)
        return reference(*arguments)

    fake("step_mean", "cpu", like=look)
    velocity = torch.randn(4, 6, 5).transpose(1, 2)
    table = torch.randn(5, 4).T
    gk.step_mean(velocity, velocity, gk.StepCoefficients(table, "flow"))
    assert seen == [True, True, True]


def test_use_backend_nests_and_restores(reference_only: None) -> None:
    calls = fake("step_mean", "cpu")
    arguments = cases.inputs("step_mean", "one")

    def used() -> str:
        before = len(calls)
        gk.step_mean(**arguments)
        return "cpu" if len(calls) > before else "reference"

    assert used() == "cpu"
    with gk.use_backend("reference"):
        assert used() == "reference"
        assert gk.backends()["reference"].used_for and not gk.backends()["cpu"].used_for
        assert "use_backend('reference')" in gk.backends()["reference"].reason
        with gk.use_backend("cpu"):
            assert used() == "cpu"
        assert used() == "reference"
        with pytest.raises(KeyError), gk.use_backend("cpu"):
            raise KeyError
        assert used() == "reference"
    assert used() == "cpu"


def test_use_backend_reaches_the_backward_on_autograds_threads(reference_only: None) -> None:
    forward, backward = fake("branch_log_prob", "cpu"), fake("log_prob_backward", "cpu")
    arguments = cases.inputs("branch_log_prob", "primes")
    arguments["velocity"].requires_grad_()
    gk.branch_log_prob(**arguments).sum().backward()
    assert len(forward) == 1 and len(backward) == 1
    with gk.use_backend("reference"):
        gk.branch_log_prob(**arguments).sum().backward()
    assert len(forward) == 1 and len(backward) == 1


def test_use_backend_acts_on_compiled_code(reference_only: None) -> None:
    calls = fake("step_mean", "cpu")
    arguments = cases.inputs("step_mean", "primes")
    torch._dynamo.reset()
    compiled = torch.compile(lambda given: gk.step_mean(**given) + 1, backend="aot_eager")
    compiled(arguments)
    before = len(calls)
    compiled(arguments)
    assert len(calls) == before + 1
    with gk.use_backend("reference"):
        compiled(arguments)
    assert len(calls) == before + 1


def test_use_backend_refuses_what_it_does_not_know_or_have(reference_only: None) -> None:
    with pytest.raises(ValueError, match=r"name is 'numpy'; expected one of .*'reference'"):
        with gk.use_backend("numpy"):
            pass
    with pytest.raises(RuntimeError, match="'triton' is not available: not part of this build"):
        with gk.use_backend("triton"):
            pass
    assert gk.backends()["reference"].used_for  # neither left anything in force


def test_a_forced_backend_without_the_op_is_an_error(reference_only: None) -> None:
    fake("step_mean", "cpu")
    with gk.use_backend("cpu"):
        gk.step_mean(**cases.inputs("step_mean", "one"))
        with pytest.raises(
            RuntimeError, match=r"use_backend\('cpu'\): op 'ode_step' has no"
        ):
            gk.ode_step(**cases.inputs("ode_step", "one"))


def test_add_backend_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="backend is 'opencl'; expected one of"):
        _library.add_backend("step_mean", "opencl", print)
    with pytest.raises(ValueError, match="op_name is 'step_man'; expected one of .*'step_mean'"):
        _library.add_backend("step_man", "cpu", print)


def test_every_public_op_is_registered_with_torch() -> None:
    for name in _library._ops:
        assert hasattr(torch.ops.g2rpo, name)
        whole = name.removesuffix("_backward").removesuffix("_fp8")  # their callers' parts
        assert name == "log_prob_backward" or {name, whole} & set(gk.__all__)
    assert set(NATIVE) == {*cases.OPS, "log_prob_backward"} <= set(_library._ops)


def test_importing_the_ops_imports_torch_and_no_more() -> None:
    """What anyone's code pays for one op: nothing but torch and what torch itself imports."""
    code = "import sys, torch; before = set(sys.modules); import g2rpo_kernels; "
    code += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    extra = set(done.stdout.split()) - sys.stdlib_module_names - {"torch", "triton"}
    assert extra == {"g2rpo_kernels"}


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_forward_and_backward_warn_of_nothing(no_warnings: None) -> None:
    for op in cases.OPS:
        arguments = cases.inputs(op, "primes")
        for name in cases.OPS[op].differentiable:
            arguments[name].requires_grad_()
        results = cases.as_tuple(getattr(gk, op)(**arguments))
        if cases.OPS[op].differentiable:
            results[0].sum().backward()


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the ops of torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # noqa: ANN001
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def test_whoever_listens_to_the_dispatcher_sees_the_op() -> None:
    """A plain call goes past the dispatcher; a mode, the profiler and a subclass do not miss it."""
    arguments = cases.inputs("step_mean", "primes")
    want = gk.step_mean(**arguments)
    with Seen() as mode:
        assert torch.equal(gk.step_mean(**arguments), want)
    assert "g2rpo.step_mean.default" in mode.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gk.step_mean(**arguments)
    assert "g2rpo::step_mean" in {event.key for event in profile.key_averages()}

    called = []

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ANN001
            called.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    arguments["latents"] = arguments["latents"].as_subclass(Sub)
    got = gk.step_mean(**arguments)
    assert torch.equal(got.as_subclass(torch.Tensor), want)
    assert torch.ops.g2rpo.step_mean.default in called


def test_lazily_negated_tensors_are_negated() -> None:
    """Contiguous, of torch.Tensor's own type, and yet its memory holds the opposite."""
    arguments = cases.inputs("step_mean", "primes")
    want = gk.step_mean(**arguments)
    arguments["velocity"] = torch._neg_view(-arguments["velocity"])
    assert arguments["velocity"].is_neg() and arguments["velocity"].is_contiguous()
    assert torch.equal(gk.step_mean(**arguments), want)


def test_past_the_dispatcher_or_through_it_gradients_have_the_same_bits() -> None:
    for op in (name for name in cases.OPS if cases.OPS[name].differentiable):
        grads = []
        for mode in (None, Seen()):
            arguments = cases.inputs(op, "primes")
            for name in cases.OPS[op].differentiable:
                arguments[name].requires_grad_()
            with mode or warnings.catch_warnings():
                cases.as_tuple(getattr(gk, op)(**arguments))[0].square().sum().backward()
            grads.append([arguments[name].grad for name in cases.OPS[op].differentiable])
        assert f"g2rpo.{op}.default" in mode.names
        for direct, dispatched in zip(*grads, strict=True):
            assert torch.equal(direct, dispatched)
