"""What a forward of FLUX keeps for its backward, and what forward and backward need at their peak.

Counted in u, the bytes of one activation of all tokens at the model's width: B * L * D * itemsize,
15.6 MB a row for FLUX.1-dev at 720 x 720 in bfloat16. A double block splits its tokens into text
and image; both halves keep the same, so that its sums are in u too.

What autograd saves of a fused block (g2rpo_kernels/flux_blocks.py) whose weights are all trained:

    double block                                     single block
    adaln_modulate: its input               1 u      adaln_modulate: its input                  1 u
    q, k, v GEMM: its input                 1        q, k, v, MLP GEMM: its input               1
    qk_norm_rope: q, k, v before it         3        its output, of which qk_norm_rope
    attention: q, k, v and its output       4          keeps 3 and GELU 4                       7
    output GEMM: its input, a copy          1        attention: q, k, v and its output          4
    gated residual: its update and sum      2        output GEMM: attention beside GELU         5
    MLP's first GEMM: its input             1        gated residual: its update                 1
    GELU: its input                         4
    MLP's second GEMM: its input            4
    gated residual: its update              1
                                           22                                                  19

diffusers' own blocks also keep what each LayerNorm returns (2 u and 1 u) and both inputs of their
products with gates, but q, k and v only once: 21 u and 17 u, and what RMSNorm keeps of q and k. On
a GPU that is one kernel, which keeps its inputs (2 u); on a CPU it keeps two float32 tensors of
each.

With frozen weights linears keep nothing, but adapters (LoRA) a float32 copy of their input.

Beside these: attention's log-sum-exp (4 bytes a head and token), modulations (13 D and 4 D a row),
the ends of the model. With gradient checkpointing a block keeps its input, 1 u, and is run again in
the backward pass, so that one block's activations are there at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .model import Linear, Sizes, targeted

# Shares of activations that a linear's input is: for the inputs that several linears have in common
# the name of the first of them.
SHARED = {"attn.to_k": "attn.to_q", "attn.to_v": "attn.to_q", "proj_mlp": "attn.to_q",
          "attn.add_k_proj": "attn.add_q_proj", "attn.add_v_proj": "attn.add_q_proj"}  # fmt: skip


@dataclass(frozen=True)
class Activations:
    """Bytes of forwards and backwards of `rows` rows.

    itemsize: of the transformer's dtype. fused: model.fuse. checkpointing:
    model.gradient_checkpointing. targets, rank: of LoRA adapters; None: all weights are trained.
    gpu: whether RMSNorm is one kernel; matters where blocks are not fused.
    """

    sizes: Sizes
    rows: int
    itemsize: int
    fused: bool
    checkpointing: bool = False
    targets: Sequence[str] | None = None
    rank: int = 0
    gpu: bool = True

    @property
    def unit(self) -> int:
        """u: one activation of all tokens at the model's width."""
        return self.rows * self.sizes.tokens * self.sizes.width * self.itemsize

    @property
    def rotary(self) -> int:
        """cos and sin, float32 [L, Dh] each."""
        return 8 * self.sizes.tokens * self.sizes.head

    def saved(self) -> int:
        """What a forward with gradients has kept when it returns."""
        s = self.sizes
        if self.checkpointing:
            blocks = (s.doubles + s.singles) * self.unit
        else:
            blocks = s.doubles * self.block(double=True) + s.singles * self.block(double=False)
            blocks += self.rotary  # which checkpointing holds too, but not by autograd
        return round(blocks + self._ends())

    def block(self, double: bool) -> float:
        """What one block keeps, where it is not checkpointed."""
        s = self.sizes
        modulations = (13 if double else 4) * s.width * self.itemsize * self.rows
        statistics = 4 * s.heads * s.tokens * self.rows
        if self.targets is None:
            if self.fused:
                units = 22.0 if double else 19.0
            else:
                units = (21.0 if double else 17.0) + self._norms(4)
            return units * self.unit + modulations + statistics
        return self._frozen(double) * self.unit + modulations + statistics + self._adapters(double)

    def _norms(self, on_a_cpu: int) -> float:
        """u that RMSNorm keeps of q and k: themselves, or so many float32 tensors."""
        return 2.0 if self.gpu else on_a_cpu * 4 / self.itemsize

    def _frozen(self, double: bool) -> float:
        """u that a block of frozen weights keeps, adapters apart."""
        if not self.fused:  # inputs of LayerNorms (2 or 1), attention's 4, GELU's 4
            return (10.0 if double else 9.0) + self._norms(2)
        # The block's input, q, k and v before and after, attention's output, GELU's input, and in a
        # double block the sum in its middle; the input of a joint GEMM that no adapter divides.
        units = 13.0 if double else 12.0
        first = [each for each in self._linears(double) if _input(each) == "attn.to_q"]
        return units + (0.0 if any(map(self._adapted, first)) else 1.0)

    def _adapters(self, double: bool) -> float:
        """Bytes that a block's adapters keep: their input in float32, which bfloat16 makes anew
        for each and float32 shares, and their first factor's output."""
        seen: set[str] = set()
        found = 0.0
        for linear in filter(self._adapted, self._linears(double)):
            tokens = self.rows * self._tokens(linear, double)
            found += 4 * self.rank * tokens
            if self.itemsize == 2 or _input(linear) not in seen:
                found += 4 * linear.inputs * tokens
            seen.add(_input(linear))
        return found

    def _linears(self, double: bool) -> tuple[Linear, ...]:
        return self.sizes.double_linears if double else self.sizes.single_linears

    def _adapted(self, linear: Linear) -> bool:
        return targeted(linear.name, self.targets or ())

    def _tokens(self, linear: Linear, double: bool) -> int:
        if not double:
            return self.sizes.tokens
        of_text = "add" in linear.name or "context" in linear.name
        return self.sizes.text if of_text else self.sizes.image

    def _ends(self) -> float:
        """The inputs of both embedders, the last block's output, the last norm's two outputs."""
        s = self.sizes
        if self.targets is not None:
            return self.unit
        tokens = s.channels * s.image + s.text_width * s.text + 2 * s.width * s.image
        vectors = 9 * s.width + 512 + s.pooled  # of timestep, guidance and pooled text
        return self.unit + self.rows * self.itemsize * (tokens + vectors)

    def backward(self) -> int:
        """Peak of forward and backward, of activations and what is on its way between them.

        In the last single block, whose backward comes first, once its output GEMM has been
        differentiated: the gradients of the block's output, of the update and of the GEMM's input
        (1, 1, 5 u) and of its weight, and the block's activations less the update. With frozen
        weights a moment later, at GELU: 11 u. In a double block image and text follow one another,
        the larger with 1 and 4 u of its own. With checkpointing only one block's activations are
        there, and the inputs of it and those before it. Without, the backward begins with 4 u
        beside everything, which is more where weights are small.
        """
        s, full = self.sizes, self.targets is None
        share = max(s.image, s.text) / s.tokens
        single = (6 * self.unit + 5 * s.width**2 * self.itemsize) if full else 11 * self.unit
        double = (1 + (4 if full else 5) * share) * self.unit
        if full:
            double += 4 * s.width**2 * self.itemsize
        elif self.itemsize == 2 and not self.fused:
            double += 3.5 * self.unit  # diffusers' rotary embedding, in float32
        if not self.checkpointing:
            in_a_block = self.saved() - self._ends() + (single if s.singles else double)
            return round(max(self.saved() + 4 * self.unit, in_a_block))
        inputs = (s.doubles + s.singles) * self.unit
        peaks = [self.saved()]
        if s.singles:
            peaks.append(inputs + self.block(double=False) + single)
        if s.doubles:
            peaks.append(s.doubles * self.unit + self.block(double=True) + double)
        return round(max(peaks) + self.rotary)

    def forward(self, fp8: bool = False, rollout: bool = False) -> int:
        """Peak of a forward without gradients.

        It comes at a single block's output GEMM: the block's input, what it and the MLP's input
        are made from (7 u), attention's output, that beside GELU (5), the GEMM's output, and 1 u of
        the caller: 16 u. diffusers' blocks hold 17 at their rotary embedding, in float32, or 15.
        Adapters in bfloat16 make float32 of their input: it comes at the larger of a double block's
        MLPs, where 22 u of its tokens and 7 more are held (5 in diffusers' blocks). With fp8 the
        inputs of GEMMs are half as large and it comes at attention: 13.5 u. rollout:
        `gk.FluxRollout`, which reads a row's modulations.
        """
        s = self.sizes
        units = 16.0 if self.fused else 17.0 if self.itemsize == 2 else 15.0
        if fp8:  # adapters are merged into the copies
            units = 13.5
        elif self.targets is not None:
            units += 1.0 if self.fused else 0.0
            if self.itemsize == 2:
                share = max(s.image, s.text) / s.tokens
                units = max(units, 22 * share + (7 if self.fused else 5))
        modulations = 0
        if rollout:
            modulations = self.rows * modulation_row(s) * self.itemsize
        return round(units * self.unit + self.rotary + modulations)


def modulation_row(sizes: Sizes) -> int:
    """Shifts, scales and gates of all blocks and the last norm: elements of one row."""
    return (12 * sizes.doubles + 3 * sizes.singles + 2) * sizes.width


def _input(linear: Linear) -> str:
    return SHARED.get(linear.name, linear.name)
