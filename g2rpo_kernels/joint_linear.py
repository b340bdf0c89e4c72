"""joint_linear: several linears of one input as one GEMM, each with its own parameters.

    y = [x W_1^T + b_1 | x W_2^T + b_2 | ...]

`share_storage` puts the weights side by side in memory, where one matrix of all of them can be read
without a copy; they stay parameters of their own, for optimizers, state dicts and adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def joint_linear(
    x: Tensor,  # [..., K]
    linears: Sequence[nn.Module],
) -> Tensor:  # [..., N_1 + N_2 + ...]
    """The outputs of the linears, beside one another.

    Plain nn.Linear in one GEMM; others (an adapter's) by their own forward each.

    Equivalent to:
        y = torch.cat([linear(x) for linear in linears], dim=-1)
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    if torch.compiler.is_compiling() or not _adjacent(weights):
        bias = None if biases[0] is None else torch.cat(biases)
        return F.linear(x, torch.cat(weights), bias)
    return _JointLinear.apply(x, len(linears), *weights, *(b for b in biases if b is not None))


def share_storage(linears: Sequence[nn.Module]) -> None:
    """Move the weights of plain linears side by side into one storage. Their values stay."""
    if any(type(linear) is not nn.Linear for linear in linears):
        return
    with torch.no_grad():
        whole = torch.cat([linear.weight for linear in linears])
    parts = whole.split([len(linear.weight) for linear in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part


def separate(linears: Sequence[nn.Module]) -> None:
    """The reverse of `share_storage`."""
    for linear in linears:
        if type(linear) is nn.Linear:
            linear.weight.data = linear.weight.data.clone()


def _adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether the weights are one matrix in memory."""
    first = weights[0]
    at = first.data_ptr()
    for weight in weights:
        same = weight.dtype == first.dtype and weight.device == first.device
        if not same or not weight.is_contiguous() or weight.data_ptr() != at:
            return False
        if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False  # neighbours by chance
        at += weight.nbytes
    return True


def _whole(weights: Sequence[Tensor]) -> Tensor:  # [N_1 + N_2 + ..., K], no copy
    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    return weights[0].detach().as_strided((rows, columns), (columns, 1))


class _JointLinear(torch.autograd.Function):
    """Autograd through one matrix whose parts are the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:count], parameters[count:]
        ctx.count = count
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, _whole(weights), torch.cat(biases) if biases else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        weights, biases = parameters[: ctx.count], parameters[ctx.count :]
        sizes = [len(weight) for weight in weights]
        rows = grad.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ _whole(weights)).view_as(x)
        grads: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[2 : 2 + ctx.count]):
            grads = list((rows.T @ x.flatten(0, -2)).split(sizes))
        if biases:
            grads += rows.sum(0).split(sizes)
        return grad_x, None, *grads
