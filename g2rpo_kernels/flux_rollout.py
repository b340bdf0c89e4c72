"""FluxRollout: the forward of a rollout, one shape again and again over a few prompts and sigmas.

    rollout = FluxRollout(fuse_flux(transformer), image_ids, guidance=3.5, mode="graph")
    with rollout.of(sigmas, prompt_embeds, pooled):          # for as long as the weights stay
        velocity = rollout(latents, prompts, sigma_index)    # [B, L, C], [B], [B]

What depends on the prompt alone (the text's embedding), on the sigma and the prompt alone (every
shift, scale and gate) or on nothing (the rotary table) is computed once, where a plain forward has
it anew for every row: the modulation linears are 3.23 of FLUX.1-dev's 11.9 billion parameters. The
single blocks hand one joint sequence on, where diffusers' split and concatenate it in each. With
mode "graph" the second forward is captured in a CUDA graph and the others replay it; its memory is
given back at the end of the block, for the update to use.

The velocity is as rounded as that of a plain forward, but its last bit may differ, since a matrix
product's may with the number of its rows: for completions, never where a log-probability is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaln_modulate import adaln_modulate
from .flux import blocks_of, fused_blocks
from .flux_blocks import norms_of

MODES = ("eager", "compile", "graph")


class _Known(NamedTuple):
    """What is computed once, for P prompts and S sigmas."""

    modulations: Tensor  # [P * S, W] every norm's, side by side
    text: Tensor  # [P, Lt, D] embedded
    rotary: tuple[Tensor, Tensor]  # cos, sin [Lt + L, Dh]
    sigmas: int


class FluxRollout:
    """Forwards without gradients of a fused FLUX transformer.

    transformer: as `fuse_flux` returned it, with adapters or without, inside an `Fp8Rollout` or
        not; not wrapped by FSDP. image_ids: [L, 3] position ids of the latent tokens.
    guidance: the distilled guidance scale, None for a transformer without guidance embeddings.
    mode: "eager"; "compile", by torch.compile, kept for later blocks; "graph", on a CUDA GPU.
    on_eager: told why, when a forward cannot be captured and the rollout goes on without; None:
        that is a RuntimeError.

    Raises ValueError for a transformer that is not fused, an unknown mode, or "graph" on another
    device than a CUDA GPU.
    """

    def __init__(
        self,
        transformer: nn.Module,
        image_ids: Tensor,
        guidance: float | None = None,
        mode: str = "eager",
        on_eager: Callable[[str], None] | None = None,
    ) -> None:
        fused_blocks(transformer)  # raises
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {MODES}")
        device = image_ids.device
        if mode == "graph" and device.type != "cuda":
            raise ValueError(f"mode is 'graph' on {device}; expected a CUDA GPU")
        self.transformer, self.image_ids, self.guidance = transformer, image_ids, guidance
        self.mode, self._on_eager = mode, on_eager
        self._compiled: Callable[..., Tensor] | None = None
        self._known: _Known | None = None
        self._replay: _Replay | None = None
        self._seen: torch.Size | None = None  # shape of the forward before

    @contextmanager
    def of(
        self,
        sigmas: Tensor,  # [S] float32, as `timestep` is given
        prompt_embeds: Tensor,  # [P, Lt, E]
        pooled: Tensor,  # [P, E2]
    ) -> Iterator[None]:
        """Within the block, calls are of these prompts and sigmas, and of the weights of now."""
        self._known = self._compute(sigmas, prompt_embeds, pooled)
        try:
            yield
        finally:
            self._known = self._replay = self._seen = None

    @torch.inference_mode()
    def __call__(
        self,
        latents: Tensor,  # [B, L, C]
        prompts: Tensor,  # int64 [B], rows of prompt_embeds
        sigma_index: Tensor,  # int64 [B], rows of sigmas
    ) -> Tensor:  # [B, L, C] in the transformer's dtype
        """The velocity, an inference tensor. With mode "graph" the next call overwrites it."""
        if self._known is None:
            raise RuntimeError("FluxRollout called outside of `with rollout.of(...)`")
        given = latents.to(self._dtype), prompts * self._known.sigmas + sigma_index, prompts
        if self.mode == "compile":
            if self._compiled is None:
                self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False)
            return self._compiled(self._known, *given)
        if self.mode == "graph":
            if self._replay is not None and self._replay.shape == latents.shape:
                return self._replay(*given)
            # The first of a shape runs as it is: kernels are compiled, libraries make their plans.
            if self._seen == latents.shape:
                return self._capture(given)
            self._seen = latents.shape
        return self._forward(self._known, *given)

    @property
    def _dtype(self) -> torch.dtype:
        return self.transformer.x_embedder.weight.dtype

    @torch.inference_mode()
    def _compute(self, sigmas: Tensor, prompt_embeds: Tensor, pooled: Tensor) -> _Known:
        model, count = self.transformer, len(sigmas)
        # As FluxTransformer2DModel.forward has it, a row a (prompt, sigma).
        timestep = sigmas.repeat(len(pooled)).to(self._dtype) * 1000
        given = (timestep,)
        if self.guidance is not None:
            given += (torch.full_like(timestep, self.guidance) * 1000,)
        pooled = pooled.repeat_interleave(count, dim=0).to(self._dtype)
        embedding = F.silu(model.time_text_embed(*given, pooled))
        norms = [norm for block in blocks_of(model) for norm in norms_of(block)]
        text = model.context_embedder(prompt_embeds.to(self._dtype))
        text_ids = self.image_ids.new_zeros(text.shape[1], 3)
        return _Known(
            torch.cat([norm.linear(embedding) for norm in [*norms, model.norm_out]], dim=1),
            text,
            model.pos_embed(torch.cat([text_ids, self.image_ids])),
            count,
        )

    def _forward(
        self, known: _Known, latents: Tensor, modulation_rows: Tensor, prompts: Tensor
    ) -> Tensor:
        model = self.transformer
        rows = known.modulations.index_select(0, modulation_rows)
        hidden = model.x_embedder(latents)
        text = known.text.index_select(0, prompts)
        width, length, at = hidden.shape[2], text.shape[1], 0

        def take(count: int) -> Tensor:  # the next `count` shifts, scales and gates
            nonlocal at
            at += count * width
            return rows[:, at - count * width : at]

        for block in model.transformer_blocks:
            text, hidden = block(hidden, text, (take(6), take(6)), known.rotary)
        joint = torch.cat([text, hidden], dim=1)
        for block in model.single_transformer_blocks:
            joint = block(joint, None, (take(3),), known.rotary)
        scale, shift = take(2).chunk(2, dim=1)
        eps = model.norm_out.norm.eps
        return model.proj_out(adaln_modulate(joint[:, length:], shift, scale, eps=eps))

    def _capture(self, given: tuple[Tensor, ...]) -> Tensor:
        """Capture the forward and replay it; where it cannot be captured, be eager from now on."""
        known = self._known
        try:
            self._replay = _Replay(lambda *buffers: self._forward(known, *buffers), given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self._on_eager is None:
                raise RuntimeError(f"the forward cannot be captured: {error}") from error
            self.mode = "eager"
            self._on_eager(str(error).strip().partition("\n")[0])
            return self._forward(known, *given)
        return self._replay(*given)


class _Replay:
    """One forward as a CUDA graph, reading from buffers of its own."""

    def __init__(self, forward: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
        self.shape = given[0].shape
        self._buffers = [x.clone() for x in given]
        self._output, self._graph = capture(lambda: forward(*self._buffers))

    def __call__(self, *given: Tensor) -> Tensor:
        for buffer, x in zip(self._buffers, given, strict=True):
            buffer.copy_(x)
        self._graph.replay()
        return self._output


def capture(forward: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """What `forward` will have computed after the graph's replay(), and the graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            output = forward()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream in force
    return output, graph
