"""How every kernel is launched, and how a launch is recorded instead.

The grid is one-dimensional (the other axes end at 65535); an empty one is not launched. Contraction
into fused multiply-adds is off, so that results have the bits that the kernels' text says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton

CHUNK = 512  # elements of a row that make one partial sum: 16 a lane of one warp
BLOCK = 512  # elements a program of the kernels without sums
PARTIALS = 32  # partial sums of a branch that are added at a time, one a lane
ENOUGH_PROGRAMS = 1024  # beyond this many, branches of a row are no longer spread over programs

OPTIONS = {"enable_fp_fusion": False}


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: triton.runtime.JITFunction
    arguments: tuple  # of the kernel, without its constants
    constants: dict[str, Any]
    options: dict[str, Any]  # of the compiler


_recorded: list[Launch] | None = None


def launch(
    kernel, programs: int, *arguments, num_warps: int, maxnreg: int | None = None, **constants
) -> None:
    """Run `programs` programs of a kernel on the device of its first argument, a tensor.

    maxnreg: registers a thread may use; without it the assembler may rather spill a few than give
    up an occupancy, which is worth nothing to a kernel of one program.
    """
    options = {"num_warps": num_warps, **OPTIONS}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, options))
    elif programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, **options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within, launches run nothing and are appended to the list. For compiling ahead of time."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def chunk_size(elements: int) -> int:
    """Of a row of N elements; of nothing else, since the order of its sum follows from it."""
    return min(CHUNK, triton.next_power_of_2(max(elements, 16)))


def branches_of(x: torch.Tensor, latents: torch.Tensor) -> int:
    """G of x [P, G, *S] beside latents [P, *S]; 1 where x has no branch axis."""
    return x.shape[1] if x.ndim > latents.ndim else 1


def row_elements(x: torch.Tensor) -> int:
    """N of x [P, *S]."""
    return math.prod(x.shape[1:])


def row_stride(x: torch.Tensor) -> int:
    """Numbers from one row of a contiguous x to the next; 0 where one row serves all."""
    return x.stride(0) if x.shape[0] > 1 else 0
