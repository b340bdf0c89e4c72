"""Registration: schema, fake, autograd and backend choice of one op, in one call.

An op is defined once with its PyTorch reference. Backends add implementations with the same
signature; which one runs is decided per device type, by `PRIORITY`, inside the op. So a traced
graph holds the op itself and never a backend, and `use_backend` acts on compiled code too.

`Library.define/impl` is used and not `torch.library.custom_op`: an eager call of the latter costs
about three times as much, and these ops are called on tensors small enough to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

LIBRARY = torch.library.Library("g2rpo", "DEF")

# Best first. A device type not listed here (mps, xpu, ...) runs the reference.
PRIORITY = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
BACKENDS = ("reference", "cpu", "triton", "cuda")

# Why a backend has no implementations. A backend that loads removes its line.
_absent = {
    "cpu": "the native extension g2rpo_kernels._C is not part of this build",
    "triton": "no Triton kernels are part of this build",
    "cuda": "the native extension g2rpo_kernels._C is not part of this build",
}
# Process-wide and not thread-local: autograd runs backward ops on threads of its own.
_forced: str | None = None


@dataclass(frozen=True)
class BackendStatus:
    """What `backends()` says of one backend."""

    available: bool
    used_for: tuple[str, ...]  # device types whose ops run here, e.g. ("cpu",)
    reason: str  # why it is used, or why it is not there


@dataclass
class _Op:
    name: str
    implementations: dict[str, Callable] = field(default_factory=dict)

    def select(self, device_type: str) -> Callable:
        if _forced is not None:
            if _forced not in self.implementations:
                raise RuntimeError(
                    f"use_backend({_forced!r}): op {self.name!r} has no such implementation; "
                    f"it has {sorted(self.implementations)}"
                )
            return self.implementations[_forced]
        order = PRIORITY.get(device_type, ("reference",))  # ends with the one every op has
        return self.implementations[next(b for b in order if b in self.implementations)]


_ops: dict[str, _Op] = {}


def define_op(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> torch._ops.OpOverload:
    """Register `g2rpo::<schema>` and return it, ready to be called.

    schema: torch.library schema with its name, functional: "step(Tensor x, Tensor y) -> Tensor".
        The first argument is a tensor; its device chooses the backend.
    reference: plain PyTorch, any device, takes and returns what the schema says. Every backend is
        handed contiguous tensors.
    fake: the same signature; shapes, dtypes and devices of the outputs only.
    backward, setup_context: as for `torch.library.register_autograd`. An op without them is not
        differentiable and its public function refuses inputs that require gradients.
    """
    name = schema.split("(", 1)[0].strip()
    op = _ops[name] = _Op(name, {"reference": reference})

    def run(first: torch.Tensor, *rest):
        arguments = [
            x.contiguous() if isinstance(x, torch.Tensor) else x for x in (first, *rest)
        ]
        return op.select(first.device.type)(*arguments)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"g2rpo::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"g2rpo::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    return getattr(torch.ops.g2rpo, name).default


def add_backend(op_name: str, backend: str, implementation: Callable) -> None:
    """Give one op one more implementation. `implementation` has the reference's signature."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {BACKENDS}")
    if op_name not in _ops:
        raise ValueError(f"op_name is {op_name!r}; expected one of {sorted(_ops)}")
    _ops[op_name].implementations[backend] = implementation
    _absent.pop(backend, None)


def backends() -> dict[str, BackendStatus]:
    """Which backends this process has, which one each device type uses, and why.

    Returns a dict from backend name ("reference", "cpu", "triton", "cuda") to `BackendStatus`.
    """
    present = {name for op in _ops.values() for name in op.implementations}
    report = {}
    for name in BACKENDS:
        if _forced is not None:
            used_for = tuple(PRIORITY) if name == _forced else ()
            why = f"use_backend({_forced!r}) is in force"
        else:
            used_for = tuple(
                device
                for device, order in PRIORITY.items()
                if next(b for b in order if b in present) == name
            )
            why = "the first one present of " + "; ".join(
                f"{device}: {' > '.join(PRIORITY[device])}" for device in used_for
            )
        if name not in present:
            reason = _absent[name]
        elif used_for:
            reason = why
        else:
            reason = why if _forced is not None else "a faster backend is present"
        report[name] = BackendStatus(name in present, used_for, reason)
    return report


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the `with` block, in the whole process.

    name: "reference", "cpu", "triton" or "cuda".
    Raises ValueError for an unknown name and RuntimeError (with the reason) for one that is not
    available; an op without that backend raises RuntimeError when it is called.
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
