"""Fp8Rollout: FP8 copies of a fused transformer's token linears, for completions alone.

    fp8 = Fp8Rollout(fuse_flux(transformer))
    with fp8:                      # forwards in here run in FP8
        velocity = transformer(...)
    optimizer.step()
    fp8.refresh()                  # the copies follow the weights

Rowwise e4m3 of weights and activations, one scale a row each. Token linears are 8.6 of FLUX.1-dev's
11.9 billion parameters and nearly all of its work; embedders, modulation, norms, attention and the
output stay as they are. The copies take one byte a weight and four a row; `release()` gives them
back until the block is entered again.

An importance ratio must never see them: the anchor and the update run outside of the block. In it,
gradients are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .adaln_modulate import adaln_modulate
from .flux import fused_blocks
from .flux_blocks import EPS, attend, in_range, is_double, modulations
from .fp8_linear import fp8_linear, fp8_support
from .gated_residual import gated_residual, gated_residual_modulate
from .gelu_tanh import gelu_tanh, gelu_tanh_beside
from .quantize_fp8 import Fp8Tensor, quantize_fp8, refresh_fp8


class Fp8Weights:
    """Linears of one input as one FP8 matrix, and their biases, which stay the parameters' own."""

    def __init__(self, linears: list[nn.Module]) -> None:
        self.linears = linears
        self.whole: Fp8Tensor | None = None  # released
        self.parts: list[Fp8Tensor] = []

    def allocate(self) -> None:
        """Memory for the copies, where it has been released."""
        if self.whole is not None:
            return
        bases = [base_of(linear) for linear in self.linears]
        sizes, columns = [len(base.weight) for base in bases], bases[0].weight.shape[1]
        device = bases[0].weight.device
        self.whole = Fp8Tensor(
            torch.empty(sum(sizes), columns, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(sum(sizes), dtype=torch.float32, device=device),
        )
        halves = self.whole.values.split(sizes), self.whole.scales.split(sizes)
        self.parts = [Fp8Tensor(values, scales) for values, scales in zip(*halves)]

    def __call__(self, x: Fp8Tensor, dtype: torch.dtype, emulate: bool) -> Tensor:
        biases = [base_of(linear).bias for linear in self.linears]
        bias = None if biases[0] is None else torch.cat(biases)
        return fp8_linear(x, self.whole, bias, out_dtype=dtype, emulate=emulate)


class Fp8Rollout:
    """A context manager within which a fused transformer runs its token linears in FP8.

    transformer: as `fuse_flux` returned it; adapters are merged into the copies. emulate: compute
        the same numbers without FP8 hardware, slowly; for tests, and to see what FP8 would do.
    weights: of a block, a context manager within which its token linears have their weights, for a
        transformer that does not hold them all at once; None: they are there.

    Raises ValueError for a transformer that is not fused, RuntimeError where the hardware has no
    FP8 and emulate is False.
    """

    def __init__(
        self,
        transformer: nn.Module,
        emulate: bool = False,
        weights: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
    ) -> None:
        blocks = fused_blocks(transformer)
        device = next(transformer.parameters()).device
        support = fp8_support(device)
        if support.kind == "none" and not emulate:
            raise RuntimeError(
                f"{device} cannot multiply FP8 matrices ({support.reason}); expected hardware that "
                "can, or emulate=True, which is slow"
            )
        self.emulate = support.kind == "none"
        self._copies = [(block, _copies_of(block)) for block in blocks]
        self._weights = weights
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        wholes = [c.whole for _, copies in self._copies for c in copies.values()]
        return sum(w.values.nbytes + w.scales.nbytes for w in wholes if w is not None)

    def release(self) -> None:
        """Give the copies' memory back; they are made anew when the block is next entered."""
        for _, copies in self._copies:
            for copy in copies.values():
                copy.whole, copy.parts = None, []

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights anew, in place: to be called after every optimizer step."""
        try:
            if self._weights is None:
                _quantise([copies for _, copies in self._copies])
                return
            for block, copies in self._copies:
                with self._weights(block):
                    _quantise([copies])
        except BaseException:
            self.release()  # or half-made copies would be taken for whole ones
            raise

    def __enter__(self) -> Fp8Rollout:
        if not self.nbytes:
            self.refresh()
        for block, copies in self._copies:
            if block.__dict__.get("fp8") is not None:
                raise RuntimeError("transformer runs in FP8 already; expected to enter once")
            forward = double_forward_fp8 if is_double(block) else joint_forward_fp8
            # past nn.Module: this is nothing of its state
            block.__dict__["fp8"] = functools.partial(forward, copies, self.emulate)
        return self

    def __exit__(self, *exception: object) -> None:
        for block, _ in self._copies:
            block.__dict__.pop("fp8", None)


def _quantise(copies: Iterable[dict[str, Fp8Weights]]) -> None:
    """Of these blocks, in one launch a dtype."""
    weights, parts = [], []
    for copy in (copy for of_block in copies for copy in of_block.values()):
        copy.allocate()
        weights += [effective_weight(linear) for linear in copy.linears]
        parts += copy.parts
    refresh_fp8(weights, parts)


def _copies_of(block: nn.Module) -> dict[str, Fp8Weights]:
    attn = block.attn
    if not is_double(block):
        linears = {
            "qkv_mlp": [attn.to_q, attn.to_k, attn.to_v, block.proj_mlp],
            "out": [block.proj_out],
        }
    else:
        linears = {
            "qkv": [attn.to_q, attn.to_k, attn.to_v],
            "text_qkv": [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj],
            "out": [attn.to_out[0]],
            "text_out": [attn.to_add_out],
            "ff_in": [block.ff.net[0].proj],
            "ff_out": [block.ff.net[2]],
            "text_ff_in": [block.ff_context.net[0].proj],
            "text_ff_out": [block.ff_context.net[2]],
        }
    return {name: Fp8Weights(each) for name, each in linears.items()}


def base_of(linear: nn.Module) -> nn.Module:
    """The plain linear inside an adapter's."""
    return getattr(linear, "base_layer", linear)


def effective_weight(linear: nn.Module) -> Tensor:
    """The weight a linear multiplies with: its own, and what its active adapters add."""
    weight = base_of(linear).weight.detach()
    if linear is base_of(linear) or linear.disable_adapters or linear.merged:
        return weight
    total = weight.float()
    for name in linear.active_adapters:
        total = total + linear.get_delta_weight(name).float()
    return total.to(weight.dtype)


def double_forward_fp8(
    copies: dict[str, Fp8Weights],
    emulate: bool,
    block: nn.Module,
    hidden_states: Tensor,  # [B, Li, D]
    encoder_hidden_states: Tensor,  # [B, Lt, D]
    temb: Tensor | tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """`flux_blocks.double_forward` with every token linear in FP8."""
    _refuse_gradients(hidden_states)

    def linear(name: str, x: Fp8Tensor) -> Tensor:
        return copies[name](x, hidden_states.dtype, emulate)

    of_image, of_text = modulations(block, temb)
    shift, scale, gate, shift2, scale2, gate2 = of_image
    t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = of_text
    qkv = linear("qkv", adaln_modulate(hidden_states, shift, scale, eps=EPS, fp8=True))
    text = adaln_modulate(encoder_hidden_states, t_shift, t_scale, eps=EPS, fp8=True)
    text_qkv = linear("text_qkv", text)
    out = quantize_fp8(attend(block.attn, qkv, rotary, text_qkv))
    length = text_qkv.shape[1]

    update = linear("out", Fp8Tensor(out.values[:, length:], out.scales[:, length:]))
    hidden, x = gated_residual_modulate(
        hidden_states, update, gate, shift2, scale2, eps=EPS, fp8=True
    )
    hidden = gated_residual(
        hidden, linear("ff_out", gelu_tanh(linear("ff_in", x), fp8=True)), gate2
    )
    update = linear("text_out", Fp8Tensor(out.values[:, :length], out.scales[:, :length]))
    text_hidden, x = gated_residual_modulate(
        encoder_hidden_states, update, t_gate, t_shift2, t_scale2, eps=EPS, fp8=True
    )
    text_hidden = gated_residual(
        text_hidden, linear("text_ff_out", gelu_tanh(linear("text_ff_in", x), fp8=True)), t_gate2
    )
    return in_range(text_hidden), hidden


def joint_forward_fp8(
    copies: dict[str, Fp8Weights],
    emulate: bool,
    block: nn.Module,
    joint: Tensor,  # [B, L, D]
    temb: Tensor | tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:  # [B, L, D]
    """A single block's forward, text and image together, with every token linear in FP8."""
    _refuse_gradients(joint)
    dtype, width = joint.dtype, joint.shape[2]
    ((shift, scale, gate),) = modulations(block, temb)
    x = adaln_modulate(joint, shift, scale, eps=EPS, fp8=True)
    projected = copies["qkv_mlp"](x, dtype, emulate)
    qkv, mlp = projected.split([3 * width, projected.shape[2] - 3 * width], dim=2)
    out = gelu_tanh_beside(attend(block.attn, qkv, rotary), mlp, fp8=True)
    return in_range(gated_residual(joint, copies["out"](out, dtype, emulate), gate))


def _refuse_gradients(hidden_states: Tensor) -> None:
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise RuntimeError(
            "a forward with gradients inside an Fp8Rollout; expected torch.no_grad(), since "
            "training must not see FP8"
        )
