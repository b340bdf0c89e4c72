"""Inputs of adaln_modulate and its kin, and what they must agree with: for the tests of these ops.

Accuracy: the error against float64 is at most twice that of eager PyTorch in the inputs' dtypes.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Target, as_tuple
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels import _library, _load
from g2rpo_kernels.quantize_fp8 import Fp8Tensor

# These ops have no native code.
TARGETS = [
    t for t in cases.targets() if t.backend in _library._ops["adaln_modulate"].implementations
]
everywhere = pytest.mark.parametrize("target", TARGETS, ids=str, indirect=True)

SEQUENCES = ("x", "residual", "update")  # [B, L, D]
ARGUMENTS = {  # all of them differentiable
    "adaln_modulate": ("x", "shift", "scale"),
    "gated_residual": ("residual", "update", "gate"),
    "gated_residual_modulate": ("residual", "update", "gate", "shift", "scale"),
}
MODULATING = ("adaln_modulate", "gated_residual_modulate")
# One element; odd; more chunks of rows than are summed at a time; FLUX's width, past one chunk.
SHAPES = [(1, 1, 1), (3, 5, 37), (2, 300, 32), (2, 17, 3072)]
DTYPES = {  # of sequences and of modulations
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


def inputs(op: str, shape: tuple = (3, 5, 37), dtype: str = "float32", device: str = "cpu") -> dict:
    """Every modulation a chunk of one tensor, as AdaLayerNormZero makes them."""
    draw = cases.generator(op, shape)
    batch, _, width = shape
    sequences, modulations = DTYPES[dtype]
    parts = torch.randn(batch, 3 * width, generator=draw, dtype=torch.float64)
    parts = parts.to(device, modulations).chunk(3, dim=1)
    made = dict(zip(("gate", "shift", "scale"), parts, strict=True))
    for name in SEQUENCES:
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        made[name] = x.to(device, sequences)
    return {name: made[name] for name in ARGUMENTS[op]}


def plain(op: str, given: dict, eps: float = 1e-6) -> tuple[Tensor, ...]:
    """As diffusers' blocks have it, in whatever dtype the inputs are."""
    x, out = given.get("x"), ()
    if x is None:
        x = given["residual"] + given["gate"][:, None] * given["update"]
        x = x.to(given["residual"].dtype)
        out = (x,)
    if op in MODULATING:
        normal = F.layer_norm(x, x.shape[-1:], eps=eps)
        out += (normal * (1 + given["scale"][:, None]) + given["shift"][:, None],)
    return out


def call(op: str, given: dict, **options: object) -> tuple[Tensor, ...]:
    returned = getattr(gk, op)(**given, **options)
    return (returned,) if isinstance(returned, Fp8Tensor) else as_tuple(returned)


def assert_accurate(what: str, got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The interpreter cuts bfloat16 off instead of rounding it: a unit of the last place."""
    assert got.shape == exact.shape, what
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    cut = got.dtype is torch.bfloat16 and _load.interpreting()
    error = (got.double() - exact).abs().amax().item()
    allowed = 2 * (eager.to(got.dtype).double() - exact).abs().amax().item()
    allowed += ((2**-7 if cut else 0) + (5e-7 if got.dtype is not torch.float64 else 1e-12)) * scale
    assert error <= allowed, f"{what} errs by {error:.3g}, allowed {allowed:.3g}"


def assert_same(got: Tensor, want: Tensor, target: Target) -> None:
    """The same bits on a CPU; on a GPU two kernels may sum a row in two orders."""
    if target.device == "cpu":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want)


def skip_float64(target: Target, dtype: str) -> None:
    if dtype == "float64" and target.backend != "reference":
        pytest.skip("float64 is the reference backend's alone")


def grads(given: dict, function: Callable, used: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """Of every input, where the outputs at `used` get random gradients."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    out = [y for i, y in enumerate(function(leaves)) if i in used]
    draw = cases.generator("upstream")
    upstream = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in out]
    # Rounded as the op's outputs are, so that all are given the same numbers.
    dtype = next(iter(given.values())).dtype
    narrow = torch.bfloat16 if dtype is not torch.float16 else torch.float16
    torch.autograd.backward(out, [g.to(narrow).to(y) for g, y in zip(upstream, out, strict=True)])
    return {name: leaf.grad for name, leaf in leaves.items()}


def grads_of_ones(op: str, given: dict) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    out = call(op, leaves)
    torch.autograd.backward(out, [torch.ones_like(y) for y in out])
    return {name: leaf.grad for name, leaf in leaves.items()}


def raw_arguments(device: str) -> dict[str, list[tuple]]:
    """Argument tuples of torch.ops.g2rpo.<op>, with every optional tensor present and absent."""
    given = inputs("gated_residual_modulate", device=device)
    residual, update, gate, shift, scale = given.values()
    bf16, f32 = torch.bfloat16, torch.float32
    return {
        "adaln_modulate": [(residual, shift, scale, 1e-6)],
        "adaln_modulate_fp8": [(residual, shift, scale, 1e-6)],
        "adaln_modulate_backward": [
            (update, residual, scale, 1e-6, sums) for sums in (False, True)
        ],
        "gated_residual": [(residual, update, gate)],
        "gated_residual_backward": [(residual, gate, update, f32), (residual, gate, None, bf16)],
        "gated_residual_modulate": [(residual, update, gate, shift, scale, 1e-6)],
        "gated_residual_modulate_fp8": [(residual, update, gate, shift, scale, 1e-6)],
        "gated_residual_modulate_backward": [
            (update, residual, residual, gate, scale, update, 1e-6, True, f32),
            (update, None, residual, gate, scale, None, 1e-6, False, bf16),
        ],
    }
