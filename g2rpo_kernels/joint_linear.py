"""joint_linear: several linears of one input as one GEMM, each with its own parameters.

    y = [x W_1^T + b_1 | x W_2^T + b_2 | ...]

`share_storage` puts the weights side by side in memory, where one matrix of all of them can be read
without a copy; they stay parameters of their own, for optimizers, state dicts and adapters. Weights
that lie apart are put together anew where the matrix is needed, and never kept for the backward
pass: under FSDP a kept copy would be the whole model's, which sharding is there to avoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._direct import _transforms
from ._library import LIBRARY


def joint_linear(
    x: Tensor,  # [..., K]
    linears: Sequence[nn.Module],
) -> Tensor:  # [..., N_1 + N_2 + ...]
    """The outputs of the linears, beside one another.

    Plain nn.Linear, all with a bias or all without, in one GEMM; others by their own forward each:
    an adapter's, one with hooks, one whose weight is a DTensor or quantised. So is everything under
    autocast and torch.func, which know torch's own ops alone. Differentiable once.

    Equivalent to:
        y = torch.cat([linear(x) for linear in linears], dim=-1)
    """
    tracing = torch.compiler.is_compiling()
    if (
        not all(map(_is_plain, linears))
        or _autocasts(x)
        or (not tracing and _transforms() is not None)
    ):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    # linear.weight asks nn.Module's __getattr__, which takes as long as all the rest here.
    weights = [linear._parameters["weight"] for linear in linears]
    biases = [linear._parameters["bias"] for linear in linears]
    biases = [bias for bias in biases if bias is not None]
    if len(biases) not in (0, len(weights)):
        return torch.cat([linear(x) for linear in linears], dim=-1)
    if tracing:
        return torch.ops.g2rpo.joint_linear(x, weights, biases)
    return _JointLinear.apply(x, len(weights), *weights, *biases)


def share_storage(linears: Sequence[nn.Module]) -> None:
    """Move the weights of plain linears side by side into one storage. Their values stay.

    Nothing moves if one of them is not plain or they differ in dtype or device.
    """
    if not all(map(_is_plain, linears)):
        return
    if len({(linear.weight.dtype, linear.weight.device) for linear in linears}) > 1:
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


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # which knows no meta


def _is_plain(linear: nn.Module) -> bool:
    """Whether its forward is F.linear and nothing else: its class', on a weight in memory."""
    return (
        type(linear) is nn.Linear
        and type(linear._parameters["weight"]) is nn.Parameter
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and not linear._backward_pre_hooks
        and not linear._backward_hooks
        and "forward" not in linear.__dict__  # as accelerate's hooks replace it
    )


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


def _whole(weights: Sequence[Tensor]) -> Tensor:  # [N_1 + N_2 + ..., K]
    """One matrix of the weights [N_i, K], a copy only where they lie apart."""
    if not _adjacent(weights):
        return torch.cat(tuple(weights))
    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    return weights[0].detach().as_strided((rows, columns), (columns, 1))


# Each of the following: x [..., K], weights [N_i, K], biases [N_i] or none at all, grad [..., N].


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return F.linear(x, _whole(weights), torch.cat(tuple(biases)) if biases else None)


def _input_gradient(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:  # [..., K]
    rows = grad.reshape(-1, grad.shape[-1])
    return (rows @ _whole(weights)).view(*grad.shape[:-1], weights[0].shape[1])


def _parameter_gradients(
    grad: Tensor, x: Tensor, sizes: list[int], of_weights: bool, of_biases: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    rows = grad.reshape(-1, grad.shape[-1])
    weights: list[Tensor | None] = [None] * len(sizes)
    biases: list[Tensor | None] = [None] * len(sizes)
    if of_weights:
        weights = list((rows.T @ x.reshape(-1, x.shape[-1])).split(sizes))
    if of_biases:
        biases = list(rows.sum(0).split(sizes))
    return weights, biases


class _JointLinear(torch.autograd.Function):
    """Eager: autograd through one matrix whose parts are the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> Tensor:
        weights = parameters[:count]
        ctx.save_for_backward(x, *weights)
        return _forward(x, weights, parameters[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        sizes, needed = [len(weight) for weight in weights], ctx.needs_input_grad[2:]
        grad_x = _input_gradient(grad, weights) if ctx.needs_input_grad[0] else None
        of_weights, of_biases = _parameter_gradients(
            grad, x, sizes, any(needed[: len(sizes)]), any(needed[len(sizes) :])
        )
        return grad_x, None, *of_weights, *of_biases[: len(needed) - len(sizes)]


# Traced: whether the weights are adjacent cannot be seen while torch.compile traces, where they
# have no address. The graph holds these ops, which look when they run.


def _forward_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _input_gradient_fake(grad: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weights[0].shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weights, biases = inputs
    ctx.biases = len(biases)
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list, list]:
    x, *weights = ctx.saved_tensors
    of_x, of_weights, of_biases = ctx.needs_input_grad
    grad_x = torch.ops.g2rpo.joint_linear_input_gradient(grad, weights) if of_x else None
    sizes = [weight.shape[0] for weight in weights]
    grads = _parameter_gradients(grad, x, sizes, any(of_weights), any(of_biases))
    return grad_x, grads[0], grads[1][: ctx.biases]


# Not by define_op: these have one implementation, torch's own GEMM, on every device.
LIBRARY.define("joint_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")
LIBRARY.define("joint_linear_input_gradient(Tensor grad, Tensor[] weights) -> Tensor")
LIBRARY.impl("joint_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("joint_linear_input_gradient", _input_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("g2rpo::joint_linear", _forward_fake, lib=LIBRARY)
torch.library.register_fake(
    "g2rpo::joint_linear_input_gradient", _input_gradient_fake, lib=LIBRARY
)
torch.library.register_autograd(
    "g2rpo::joint_linear", _backward, setup_context=_setup_context, lib=LIBRARY
)
