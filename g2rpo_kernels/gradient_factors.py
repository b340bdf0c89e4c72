"""Weight gradients of linears that see one vector a sample, kept as factors until the step.

    dW = dY^T X        dY [R, out], X [R, in], R the rows seen since the last step

Such a gradient has rank R at most, and R is small where the input is a vector an image. The
modulation linears of FLUX.1-dev hold 3.23 of its 11.9 billion parameters: 6.0 GiB of bfloat16
gradients whole, 2.5 MiB a row as factors. Their norm needs no dense gradient either:

    ||dW||^2 = tr(dY dY^T X X^T) = sum(G_dY * G_X)        G = Gram matrices, [R, R]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GradientFactors:
    """What backward leaves of a linear's weight gradient, in `weight.grad_factors`.

    The gradient is grad_output^T @ inputs, of grad_output [R, out] and inputs [R, in]. Rows are
    kept in the dtype they were computed in, as copies: what becomes of the tensors afterwards
    changes nothing.
    """

    def __init__(self, grad_output: Tensor, inputs: Tensor) -> None:
        self._pairs = [(_copy(grad_output), _copy(inputs))]

    def append(self, grad_output: Tensor, inputs: Tensor) -> None:
        """Add rows of another backward."""
        self._pairs.append((_copy(grad_output), _copy(inputs)))

    @property
    def rows(self) -> int:
        return sum(len(grad) for grad, _ in self._pairs)

    @property
    def numel(self) -> int:
        """Elements that the factors hold, R * (out + in)."""
        return sum(grad.numel() + inputs.numel() for grad, inputs in self._pairs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """grad_output [R, out] and inputs [R, in], each one contiguous tensor."""
        if len(self._pairs) > 1:
            self._pairs = [tuple(torch.cat(part) for part in zip(*self._pairs, strict=True))]
        return self._pairs[0]

    def squared_norm(self) -> Tensor:
        """Sum of squares of the dense gradient: float64 [], on the rows' device.

        The terms of the trace may be of either sign and cancel, so it is float64 throughout, for
        which the rows are few enough.
        """
        grad, inputs = (part.double() for part in self.factors())
        # Rounding may leave a zero slightly negative; a NaN stays one.
        return ((grad @ grad.T) * (inputs @ inputs.T)).sum().clamp(min=0)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [out, in]
        """The gradient itself: one matrix product, in `dtype` or the rows' if that is wider."""
        grad, inputs = self.factors()
        wide = torch.promote_types(grad.dtype, dtype)
        return (grad.to(wide).T @ inputs.to(wide)).to(dtype)

    def gather(self, all_rows: Callable[[Tensor], Tensor]) -> None:
        """Take over the rows of other processes, whose gradients then add up to this one.

        all_rows: from this process's [R, n] to those of all, in the same order everywhere.
        """
        self._pairs = [tuple(all_rows(part) for part in self.factors())]

    def scale_(self, factor: float | Tensor) -> GradientFactors:
        """Multiply the gradient, by its grad_output rows, rounded in their dtype."""
        for grad, _ in self._pairs:
            grad.mul_(factor)
        return self


def factor_gradients(linears: Iterable[nn.Module]) -> None:
    """Let the linears' backward keep weight gradients as factors, in place.

    linears: nn.Linear whose input is one vector a sample, [..., in]; leading dimensions are rows.
    From here on backward leaves `weight.grad_factors`, a GradientFactors, and no `weight.grad`;
    gradients of input and bias are as ever, the forward's bits those of F.linear. Who takes a step
    must know the factors (`AdamW8bit` does), clear them together with `.grad` (its `zero_grad`;
    nn.Module's does not) and reduce them himself over processes. Hooks on the weight never run.

    Where R rows of factors would be no smaller than the dense gradient, R * (in + out) >= in * out,
    they become `weight.grad`, in the weight's dtype, and so do all further ones, as wherever
    `weight.grad` was there first. Both are there at once only if something else has added its own
    dense gradient since; `total_grad_norm` then adds the factors to it.

    Raises TypeError for a module that is not exactly an nn.Linear on a plain nn.Parameter: one
    that is factored already, an adapter's, a quantised or sharded one. Then none is changed.
    """
    linears = list(linears)
    for index, linear in enumerate(linears):
        if type(linear) is not nn.Linear:
            raise TypeError(f"linears[{index}] is a {_name(linear)}; expected exactly an nn.Linear")
        if type(linear.weight) is not nn.Parameter:
            raise TypeError(
                f"linears[{index}] has a weight of type {_name(linear.weight)}; expected a plain "
                "nn.Parameter"
            )
    for linear in linears:
        linear.__class__ = FactoredLinear


def unfactor_gradients(linears: Iterable[nn.Module]) -> None:
    """Undo `factor_gradients`, in place; factors that are there become dense gradients.

    Raises TypeError for a module that is not factored. Then none is changed.
    """
    linears = list(linears)
    for index, linear in enumerate(linears):
        if type(linear) is not FactoredLinear:
            raise TypeError(
                f"linears[{index}] is a {_name(linear)}; expected what factor_gradients was given"
            )
    for linear in linears:
        _fold(linear.weight)
        linear.__class__ = nn.Linear


@torch.no_grad()
def total_grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, `.grad` and `.grad_factors`: float32 [], no host sync.

    On the device of the first gradient; 0 on the CPU where there is none. As
    torch.nn.utils.get_total_norm, but gradients of 16 bits have float32 norms.

    Of DTensors it is the norm of the whole gradients, the same on all processes of their meshes,
    which all take part: a collective a mesh dimension that gradients are sharded along. A DTensor
    has a gradient on all processes of its mesh or on none. Raises TypeError for one that is a sum
    yet to be made (Partial).
    """
    plain, distributed, squares = [], [], []
    for parameter in parameters:
        factors = getattr(parameter, "grad_factors", None)
        if factors is not None and parameter.grad is not None:  # something added its own since
            _fold(parameter)
        elif factors is not None:
            squares.append(factors.squared_norm())
        if (grad := parameter.grad) is not None:
            (distributed if is_dtensor(grad) else plain).append(grad)
    squares += _squares_over_meshes(distributed)
    norms = _norms(plain) + [square.sqrt() for square in squares]
    if not norms:
        return torch.zeros(())
    first = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms])).float()


def is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(x, module.DTensor)


def _norms(grads: Iterable[Tensor]) -> list[Tensor]:
    """L2 norms [], float32 or wider, in the order of devices and dtypes."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    norms: list[Tensor] = []
    for (_, dtype), some in groups.items():
        norms += torch._foreach_norm(some, 2.0, dtype=torch.promote_types(dtype, torch.float32))
    return norms


def _squares_over_meshes(grads: Iterable[Any]) -> list[Tensor]:
    """Sums of squares of whole DTensors, float64 []: one a mesh and set of sharded dimensions."""
    shards: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for grad in grads:
        if any(placement.is_partial() for placement in grad.placements):
            raise TypeError(
                f"a gradient is a DTensor placed as {grad.placements}; expected Shard and "
                "Replicate only"
            )
        dims = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
        shards.setdefault((grad.device_mesh, dims), []).append(grad.to_local())
    squares = []
    for (mesh, dims), parts in shards.items():
        square = torch.stack([norm.double() for norm in _norms(parts)]).square().sum()
        for dim in dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return squares


class FactoredLinear(nn.Linear):
    """nn.Linear after `factor_gradients`; pickles and copies as such."""

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return F.linear(input, self.weight, self.bias)
        return _factored(input, self.weight, self.bias)


def _factored(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))  # as F.linear will, but kept as it saw it
    return _FactoredLinear.apply(x, weight, bias)


# The gradient goes past autograd, into weight.grad_factors. This is torch.compiler.disable, which
# would import all of torch._dynamo here.
_factored._torchdynamo_disable = True


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Checkpointing gives back an alias of what was saved, which is not the parameter.
        ctx.parameter = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        if ctx.needs_input_grad[1]:
            _add(ctx.parameter, rows, x.reshape(-1, x.shape[-1]))
        return grad_x, None, grad_bias


def _add(weight: nn.Parameter, grad_output: Tensor, inputs: Tensor) -> None:
    """Leave rows of factors on the weight, or in its gradient where that is no larger."""
    factors = getattr(weight, "grad_factors", None)
    if factors is None:
        factors = weight.grad_factors = GradientFactors(grad_output, inputs)
    else:
        factors.append(grad_output, inputs)
    if weight.grad is not None or factors.numel >= weight.numel():
        _fold(weight)


def _fold(weight: Tensor) -> None:
    """Factors, where there are some, into the dense gradient."""
    factors = getattr(weight, "grad_factors", None)
    if factors is None:
        return
    del weight.grad_factors
    dense = factors.dense(weight.dtype)
    weight.grad = dense if weight.grad is None else weight.grad.add_(dense)


def _copy(rows: Tensor) -> Tensor:
    return rows.detach().clone(memory_format=torch.contiguous_format)


def _name(value: object) -> str:
    return type(value).__name__
