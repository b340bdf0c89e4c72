"""Registration: schema, fake, autograd and backend choice of one op, in one call.

An op is defined once with its PyTorch reference. Backends add implementations with the same
signature; which one runs is decided per device, by `PRIORITY`, inside the op. So a traced graph
holds the op itself and never a backend, and `use_backend` acts on compiled code too.

`Library.define/impl` is used and not `torch.library.custom_op`: an eager call of the latter costs
about three times as much, and these ops are called on tensors small enough to notice. For the same
reason `Operator.__call__` goes past torch's dispatcher where nothing listens to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from ._direct import direct_function, something_listens
from .native import NATIVE

LIBRARY = torch.library.Library("g2rpo", "DEF")

# Best first. A device type not listed here (mps, xpu, ...) runs the reference.
PRIORITY = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Why a backend has no implementations. A backend that loads removes its line.
_absent = {name: "not part of this build" for name in BACKENDS[1:]}
# What says whether a backend that has implementations can run on a device: None, or why not.
_probes: dict[str, Callable[[torch.device], str | None]] = {}
# What the probes answered. A GPU is asked at its first use, not when the package loads: asking
# creates a CUDA context, which costs memory and forbids fork.
_answers: dict[tuple[str, torch.device], str | None] = {}
_warned: set[str] = set()  # device types whose user knows that the reference serves them
# Process-wide and not thread-local: autograd runs backward ops on threads of its own.
_forced: str | None = None


@dataclass(frozen=True)
class BackendStatus:
    """What `backends()` says of one backend."""

    available: bool
    used_for: tuple[str, ...]  # device types whose ops run here, e.g. ("cpu",)
    reason: str  # why it is used, or why it is not there


class Operator:
    """One op: what its public function calls, and the implementations it chooses from."""

    def __init__(self, name: str, reference: Callable) -> None:
        self.name = name
        self.implementations = {"reference": reference}
        self.overload: torch._ops.OpOverload | None = None
        self.function: type[torch.autograd.Function] | None = None
        self.differentiable = 1  # of several outputs, this many from the first on
        self.strided: tuple[int, ...] = ()  # arguments that need not be contiguous

    @property
    def implementations(self) -> dict[str, Callable]:
        """By backend name. Whoever changes the dict itself calls `forget()`."""
        return self._implementations

    @implementations.setter
    def implementations(self, value: dict[str, Callable]) -> None:
        self._implementations = value
        self.forget()

    def forget(self) -> None:
        """Choose anew on every device at the next call."""
        self._chosen: dict[torch.device, Callable] = {}

    def __call__(self, *arguments):
        """The op through torch's dispatcher, or past it where that can make no difference.

        The dispatcher and the autograd that torch.library generates cost several times what a
        native op takes on a small tensor. They are needed while something listens to them, and for
        tensors that are a subclass, lazily negated, or on another kind of device.
        """
        if something_listens():
            return self.overload(*arguments)
        ready, needs_grad = True, False
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if x.is_neg() or not (x.is_cpu or x.is_cuda):
                    return self.overload(*arguments)
                ready = ready and x.is_contiguous() and x.dtype is not torch.float64
                needs_grad = needs_grad or x.requires_grad
            elif kind not in _NOT_TENSORS and isinstance(x, Tensor):
                return self.overload(*arguments)
        if needs_grad and self.function is not None and torch.is_grad_enabled():
            if not ready:  # rare, and not worth a second way
                return self.overload(*arguments)
            others: list[Tensor] = []
            outputs = self.function.apply(*arguments, others)
            if isinstance(outputs, tuple):
                return (*outputs, *others)
            return (outputs, *others) if others else outputs
        if not ready:
            return self.run(*arguments)
        return self.select(arguments[0].device)(*arguments)

    def run(self, *arguments):
        """On the chosen backend, which is handed contiguous tensors; what the dispatcher calls."""
        given, wide = [], False
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor):
                wide = wide or x.dtype is torch.float64
                given.append(x if i in self.strided and has_whole_rows(x) else x.contiguous())
            else:
                given.append(x)
        return self.select(given[0].device, wide)(*given)

    def select(self, device: torch.device, wide: bool = False) -> Callable:
        """The implementation for tensors on `device`; wide: with a float64 one among them.

        float64 is for checking gradients, and the reference backend's alone.
        """
        if _forced is not None:
            return self._forced_implementation(device, wide)
        if wide:
            return self.implementations["reference"]
        chosen = self._chosen.get(device)
        if chosen is None:
            chosen = self._chosen[device] = self._choose(device)
        return chosen

    def _choose(self, device: torch.device) -> Callable:
        for name in PRIORITY.get(device.type, ()):
            implementation = self.implementations.get(name)
            if implementation is not None and refusal(name, device) is None:
                if name == "reference" and device.type not in _warned and self._misses(device):
                    _say_the_reference_serves(device)
                return implementation
        return self.implementations["reference"]

    def _misses(self, device: torch.device) -> bool:
        """Whether a complete installation has something faster for this op on such a device."""
        return self.name in NATIVE or "triton" in PRIORITY[device.type]

    def _forced_implementation(self, device: torch.device, wide: bool) -> Callable:
        if _forced not in self.implementations:
            raise RuntimeError(
                f"use_backend({_forced!r}): op {self.name!r} has no such implementation; "
                f"it has {sorted(self.implementations)}"
            )
        reason = refusal(_forced, device)
        if reason is not None:
            raise RuntimeError(f"use_backend({_forced!r}) with tensors on {device}: {reason}")
        if wide and _forced != "reference":
            raise TypeError(
                f"use_backend({_forced!r}): op {self.name!r} was given a torch.float64 tensor; "
                "expected float32, bfloat16 or float16 (float64 is the reference backend's alone)"
            )
        return self.implementations[_forced]


_ops: dict[str, Operator] = {}
_NOT_TENSORS = frozenset({type(None), bool, int, float, list, tuple})


def define_op(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    differentiable: int = 1,
    strided: tuple[int, ...] = (),
) -> Operator:
    """Register `g2rpo::<schema>` and return it, ready to be called.

    schema: torch.library schema with its name, functional: "step(Tensor x, Tensor y) -> Tensor".
        The first argument is a tensor; its device chooses the backend.
    reference: plain PyTorch, any device, takes and returns what the schema says. Every backend is
        handed contiguous tensors, but for `strided`.
    fake: the same signature; shapes, dtypes and devices of the outputs only.
    backward, setup_context: as for `torch.library.register_autograd`. An op without them is not
        differentiable and its public function refuses inputs that require gradients.
    differentiable: of several outputs, this many from the first on carry gradients, and
        `backward(ctx, *grads)` is given as many, None for one that nothing reached. What the
        backward pass needs of the forward comes behind them.
    strided: positions of tensor arguments of which a backend may be handed a slice: see
        `has_whole_rows`. For wide tensors, whose copies would cost what the op saves.
    """
    name = schema.split("(", 1)[0].strip()
    if type(differentiable) is not int or differentiable < 1:
        raise ValueError(f"differentiable is {differentiable!r}; expected a number of outputs >= 1")
    op = _ops[name] = Operator(name, reference)
    op.differentiable, op.strided = differentiable, strided
    LIBRARY.define(schema)
    LIBRARY.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"g2rpo::{name}", fake, lib=LIBRARY)
    if backward is not None:

        def mark_and_setup(ctx, inputs, output):
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[differentiable:])
                ctx.set_materialize_grads(False)  # or torch would fill zeros for each of them
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        torch.library.register_autograd(
            f"g2rpo::{name}",
            lambda ctx, *grads: backward(ctx, *grads[:differentiable]),
            setup_context=mark_and_setup,
            lib=LIBRARY,
        )
        op.function = direct_function(op, backward, setup_context)
    op.overload = getattr(torch.ops.g2rpo, name).default
    return op


def has_whole_rows(x: Tensor) -> bool:
    """Whether x [B, D] or [B, L, D] is made of dense rows, at any distance from one another."""
    return x.ndim in (2, 3) and x.stride(-1) == 1 and min(x.stride()) > 0


def add_backend(op_name: str, backend: str, implementation: Callable) -> None:
    """Give one op one more implementation. `implementation` has the reference's signature."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {BACKENDS}")
    if op_name not in _ops:
        raise ValueError(f"op_name is {op_name!r}; expected one of {sorted(_ops)}")
    _ops[op_name].implementations[backend] = implementation
    _ops[op_name].forget()
    _absent.pop(backend, None)


def set_probe(backend: str, probe: Callable[[torch.device], str | None]) -> None:
    """Have `probe` say whether the backend can run on a device: None, or why not. Asked once."""
    _probes[backend] = probe
    for key in [key for key in _answers if key[0] == backend]:
        del _answers[key]
    for op in _ops.values():
        op.forget()


def refusal(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`, or None."""
    probe = _probes.get(backend)
    if probe is None:
        return None
    key = backend, device
    if key not in _answers:
        _answers[key] = probe(device)
    return _answers[key]


def _say_the_reference_serves(device: torch.device) -> None:
    _warned.add(device.type)
    reasons = [
        f"{name}: {_absent.get(name) or refusal(name, device) or 'not made for this op'}"
        for name in PRIORITY[device.type]
        if name != "reference"
    ]
    warnings.warn(
        f"g2rpo_kernels runs on its PyTorch reference on {device}, which is slow; "
        + "; ".join(reasons) + ". g2rpo_kernels.backends() and `g2rpo doctor` say more.",
        RuntimeWarning,
        stacklevel=4,
    )  # fmt: skip


def _here(device_type: str) -> torch.device:
    """A device of this type: for a GPU the current one, which may not be there."""
    if device_type != "cuda":
        return torch.device(device_type)
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def backends() -> dict[str, BackendStatus]:
    """Which backends this process has, which one each device type uses, and why.

    Returns a dict from backend name ("reference", "cpu", "triton", "cuda") to `BackendStatus`.
    Asks the current GPU whether kernels run on it, if there is one.
    """
    present = {name for op in _ops.values() for name in op.implementations}
    devices = {name: _here(name) for name in PRIORITY}
    runs = {
        name: tuple(d for d in PRIORITY if name in present and refusal(name, devices[d]) is None)
        for name in BACKENDS
    }
    report = {}
    for name in BACKENDS:
        if _forced is not None:
            used_for = runs[name] if name == _forced else ()
            why = f"use_backend({_forced!r}) is in force"
        else:
            used_for = tuple(
                device
                for device, order in PRIORITY.items()
                if next(b for b in order if device in runs[b]) == name
            )
            why = "the first one present of " + "; ".join(
                f"{device}: {' > '.join(PRIORITY[device])}" for device in used_for
            )
        if name not in present:
            reason = _absent[name]
        elif not runs[name]:
            reason = next(refusal(name, devices[d]) for d in PRIORITY if name in PRIORITY[d])
        elif used_for or _forced is not None:
            reason = why
        else:
            reason = "a faster backend is present"
        report[name] = BackendStatus(bool(runs[name]), used_for, reason)
    return report


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the `with` block, in the whole process.

    name: "reference", "cpu", "triton" or "cuda".
    Raises ValueError for an unknown name and RuntimeError (with the reason) for one that is not
    available. An op without that backend, or whose tensors are on a device that it cannot run on,
    raises RuntimeError when it is called; float64 tensors raise TypeError on any but "reference".
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}; expected one of {BACKENDS}")
    status = backends()[name]
    if not status.available:
        raise RuntimeError(f"backend {name!r} is not available: {status.reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
