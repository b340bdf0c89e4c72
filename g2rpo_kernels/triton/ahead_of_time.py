"""Compiling every kernel without a GPU: for the tests and for `benchmarks/kernel_report.py`.

Each op's file ends with `examples(given)`, which calls its launchers so that every variant of its
kernels is launched. Here those launches are recorded instead of run, on tensors without memory, and
compiled for an architecture as Triton would at a first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ._launch import Launch, recording

HERE = Path(__file__)
MODULES = tuple(
    import_module(f"{__package__}.{path.stem}")
    for path in sorted(HERE.parent.glob("[!_]*.py"))
    if path != HERE
)  # the ops' files
ARCHES = (80, 90, 100)  # compute capabilities: A100, H100, B200
DTYPES = (torch.float32, torch.bfloat16)
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Given(NamedTuple):
    """Tensors on the meta device for the `examples` of an op."""

    rows: Tensor  # [P, *S], of the dtype in question
    branches: Tensor  # float32 [P, G, *S]
    table: Tensor  # float32 [P, 5]
    numbers: Tensor  # float32 [P, G]
    seeds: Tensor  # int64 [P, G]


def given(dtype: torch.dtype, shape: tuple[int, ...] = (2025, 64)) -> Given:
    rows, branches = 8, 12

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    return Given(
        empty(rows, *shape, dtype=dtype), empty(rows, branches, *shape), empty(rows, 5),
        empty(rows, branches), empty(rows, branches, dtype=torch.int64),
    )  # fmt: skip


def launches(
    dtypes: tuple[torch.dtype, ...] = DTYPES, shape: tuple[int, ...] = (2025, 64)
) -> Iterator[tuple[str, Launch]]:
    """(dtype, launch) of every variant of every kernel; one that dtypes share comes once."""
    seen = set()
    for dtype in dtypes:
        for module in MODULES:
            with recording() as recorded:
                module.examples(given(dtype, shape))
            for launch in recorded:
                key = launch.kernel.__name__, repr(specialisation(launch))
                if key not in seen:
                    seen.add(key)
                    yield str(dtype).removeprefix("torch."), launch


def specialisation(launch: Launch) -> tuple[dict, dict, dict]:
    """Types by name, constants and attributes by position, as Triton derives them from a call."""
    types, constants, attributes = {}, {}, {}
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments)) | launch.constants
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        divisible = False
        if parameter.is_constexpr or value is None:
            types[name], constants[i,] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], divisible = "*" + _NAMES[value.dtype], True
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and specialised:
            types[name], constants[i,] = "constexpr", value
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = specialised and value % 16 == 0
        if divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """The kernel of one launch for compute capability `arch`; `.asm["cubin"]` and `.asm["ptx"]`."""
    types, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def variant(launch: Launch) -> str:
    """What tells two launches of one kernel apart: optional arguments not there, sizes."""
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments))
    words = [f"no {name}" for name, value in arguments.items() if value is None]
    words += [f"{name}={n}" for name, n in launch.constants.items() if isinstance(n, int)]
    if "WEIGHTS" in launch.constants:
        words.append(f"R={len(launch.constants['WEIGHTS'])}")
    return " ".join(words)
