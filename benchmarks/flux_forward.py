"""The ways bench_flux_forward.py times: states of one transformer, and what one state costs."""

from __future__ import annotations

import argparse
import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo
import torch._inductor.config
from ceilings import BFLOAT16
from ceilings import FP8 as FP8_PRODUCTS
from flux_shapes import Size, flops, transformer_inputs
from measure import first_line
from timing import Block, Variant, event_block, interleave, quartiles, ratio, wall_block
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels.flux import blocks_of, is_fused

EAGER, COMPILED = "diffusers, bf16", "diffusers + torch.compile, bf16"
FUSED, FUSED_COMPILED = "ours, bf16", "ours + torch.compile, bf16"
# As completions run: through FluxRollout, on a GPU replayed from a CUDA graph.
ROLLOUT, FP8 = "ours, rollout, bf16", "ours, rollout, FP8"
TORCHAO = "torchao FP8 + torch.compile"
# Eager first, what is fused together: fewer moves of the weights.
WAYS = (EAGER, COMPILED, FUSED_COMPILED, FUSED, ROLLOUT, FP8)
MOST_PRODUCTS = {FP8: FP8_PRODUCTS, TORCHAO: FP8_PRODUCTS}  # whose peak a way is a share of
TOLERANCE = {FP8: 0.3, TORCHAO: 0.3}  # of the velocity, relative in norm: the same computation?
BF16_TOLERANCE = 0.1
COMPILE_SECONDS = {"flux": 120.0, "toy": 18.0}  # so that the toy's whole run stays below a minute


class Late(BaseException):
    """torch.compile took longer than it may. No Exception, since it would catch that itself."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Late` inside the block when it lasts longer; whatever it waits for is left alone."""

    def ring(number: int, frame: object) -> None:
        raise Late(f"not compiled within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def apart(found: Tensor, true: Tensor) -> float:
    """Relative difference in norm; infinite if it is no number."""
    found, true = found.cpu().double(), true.cpu().double()
    away = ((found - true).norm() / true.norm()).item()
    return away if math.isfinite(away) else math.inf


class Forward:
    """One transformer in the states that are timed. size: of the images, may be changed between
    cases. peaks: TFLOP/s of matrix products by dtype, as `ceilings.peaks` has them."""

    def __init__(
        self, model: nn.Module, size: Size, device: str, options: argparse.Namespace,
        peaks: dict[str, float],
    ) -> None:  # fmt: skip
        self.model, self.size, self.device, self.options = model, size, device, options
        self.peaks = peaks
        self.weights = sum(p.nbytes for p in model.parameters())
        self.fp8, self.why_no_fp8 = None, ""
        self.compiled: dict[str, list[Callable]] = {}
        # Eager's by tokens and batch, what torchao's are compared with.
        self.velocities: dict[tuple[int, int], Tensor] = {}
        gk.fuse_flux(model)
        try:
            self.fp8 = gk.Fp8Rollout(model, emulate=device == "cpu")
        except Exception as error:  # whatever it is, it becomes this variant's row
            self.why_no_fp8 = f"{type(error).__name__}: {first_line(error)}"
        torch._inductor.config.compile_threads = 1  # else its processes start while we measure

    @contextmanager
    def state(self, name: str) -> Iterator[None]:
        """The model as this way has it."""
        blocks, fused = blocks_of(self.model), name not in (EAGER, COMPILED, TORCHAO)
        if is_fused(blocks[0]) is not fused:
            (gk.fuse_flux if fused else gk.unfuse_flux)(self.model)
        if name in (COMPILED, FUSED_COMPILED, TORCHAO):
            if name not in self.compiled:
                for block in blocks:
                    block.compile(fullgraph=True, dynamic=False)
                self.compiled[name] = [block._compiled_call_impl for block in blocks]
            for block, call in zip(blocks, self.compiled[name], strict=True):
                block._compiled_call_impl = call
        try:
            with self.fp8 if name == FP8 else nullcontext():
                yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    def variant(self, name: str, given: dict) -> Variant:
        if name in (ROLLOUT, FP8):
            return self.rollout_variant(name, given)

        @torch.no_grad()
        def run(i: int) -> Tensor:
            return self.model(**given)[0]

        return Variant(name, run, lambda: self.state(name), capturable=False)

    def rollout_variant(self, name: str, given: dict) -> Variant:
        sigmas, index = torch.unique(given["timestep"], return_inverse=True)
        prompts = torch.arange(len(index), device=index.device)
        rollouts: list[gk.FluxRollout] = []  # the one in force

        def run(i: int) -> Tensor:
            return rollouts[0](given["hidden_states"], prompts, index)

        @contextmanager
        def context() -> Iterator[None]:
            with self.state(name):
                mode = "graph" if self.device == "cuda" else "eager"
                guidance = float(given["guidance"][0])
                rollouts[:] = [gk.FluxRollout(self.model, given["img_ids"], guidance, mode)]
                known = given["encoder_hidden_states"], given["pooled_projections"]
                with rollouts[0].of(sigmas, *known):
                    if mode == "graph":
                        run(0), run(0)  # the second is captured
                    yield

        return Variant(name, run, context, capturable=False)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def try_out(self, variant: Variant, eager: Tensor | None, row: dict) -> Tensor | None:
        """The first call: its velocity, its memory, or why the variant is not timed."""
        compiling = variant.name in (COMPILED, FUSED_COMPILED, TORCHAO)
        seconds = self.options.compile_seconds or COMPILE_SECONDS[self.size.name]
        limit = at_most(seconds) if compiling else nullcontext()
        began, held = time.perf_counter(), None
        if self.device == "cuda" and variant.name in (ROLLOUT, FP8):
            held = torch.cuda.memory_allocated()  # a graph holds its memory from its capture on
            torch.cuda.reset_peak_memory_stats()
        try:
            with variant.context():
                with limit:
                    out = variant.run(0)
                self.synchronize()
                first = time.perf_counter() - began
                peak = self.peak(variant, held)
        except (Exception, Late) as error:  # whatever it is, it becomes this variant's row
            row["errors"][variant.name] = f"{type(error).__name__}: {first_line(error)}"
            self.synchronize()  # raises if the error has left the GPU unusable
            return None
        away = None
        if eager is not None or variant.name == EAGER:
            away = apart(out, out if eager is None else eager)
        if away is not None and away > TOLERANCE.get(variant.name, BF16_TOLERANCE):
            row["errors"][variant.name] = f"disagrees with eager by {away:.2g}"
            return None
        row["variants"][variant.name] = {
            "away_from_eager": away, "peak_bytes": peak, "first_call_seconds": first,
        }  # fmt: skip
        return out

    def peak(self, variant: Variant, held: int | None) -> int | None:
        """The weights, in FP8 their copies too, and what one forward adds at its highest.

        held: bytes allocated before the variant's context, where that is to be counted with it.
        """
        if self.device != "cuda":
            return None
        before = held
        if before is None:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        variant.run(0)
        torch.cuda.synchronize()
        weights = self.weights
        if variant.name == TORCHAO:  # its weights are not plain tensors: all but the inputs
            weights = before
        elif variant.name == FP8:
            weights += self.fp8.nbytes
        return weights + torch.cuda.max_memory_allocated() - before

    def block(self, variant: Variant) -> Block:
        """Seconds a call: wall time on a CPU, between two events on a GPU, host's gaps included."""
        if self.device == "cuda":
            return event_block(variant, 1, 0.0)
        return wall_block(variant, 1, 1, self.synchronize)

    def measure(
        self, batch: int, say: Callable[[str], None], ways: tuple[str, ...] = WAYS
    ) -> dict:
        """These ways (not torchao) at one batch, in alternating rounds."""
        self.forget()
        given = transformer_inputs(self.size, batch, self.device)
        row: dict = {"peaks": self.peaks, "variants": {}, "errors": {}}
        names = list(ways)
        if self.fp8 is None:
            row["errors"][FP8] = self.why_no_fp8
            names.remove(FP8)
        if self.options.no_compile:
            for name in [name for name in names if "compile" in name]:
                row["errors"][name] = "left out by --no-compile"
                names.remove(name)
        eager, timed = None, []
        for name in names:
            say(f"batch {batch}: {name}, first call")
            variant = self.variant(name, given)
            out = self.try_out(variant, eager, row)
            if out is not None:
                timed.append(variant)
                eager = out if name == EAGER else eager
            del out
        if eager is not None:
            self.velocities[self.size.tokens, batch] = eager.cpu()
        say(f"batch {batch}: rounds of {len(timed)} ways")
        seconds = interleave(
            {v.name: self.block(v) for v in timed}, self.options.rounds, self.options.budget
        )
        for name, times in seconds.items():
            row["variants"][name] |= self.figures(name, batch, times) | {
                "interleaved": True,
                "speedup": ratio(seconds[EAGER], times) if EAGER in seconds else None,
            }
        row["rounds"] = len(next(iter(seconds.values()), []))
        return row

    def figures(self, name: str, batch: int, times: list[float]) -> dict:
        low, middle, high = quartiles(times)
        peak = self.peaks.get(MOST_PRODUCTS.get(name, BFLOAT16))
        tflops = flops(self.size, batch) / middle / 1e12
        return {
            "seconds": middle, "low": low, "high": high,
            "tflops": tflops, "of_peak": tflops / peak if peak else None,
            "timer": "events" if self.device == "cuda" else "wall",
            "each_round": [float(f"{s:.4g}") for s in times],
        }  # fmt: skip

    def become_torchao(self) -> str | None:
        """Quantise the weights for good, those that our FP8 has too; why not, where it cannot."""
        try:
            from torchao.quantization import (
                Float8DynamicActivationFloat8WeightConfig,
                PerRow,
                quantize_,
            )
        except ImportError as error:
            return f"torchao is not installed or has no such scheme ({first_line(error)})"
        if self.options.no_compile:
            return "left out by --no-compile"
        self.fp8 = None
        self.forget()
        if is_fused(blocks_of(self.model)[0]):
            gk.unfuse_flux(self.model)

        def wanted(module: nn.Module, name: str) -> bool:
            in_block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
            return isinstance(module, nn.Linear) and in_block and ".norm" not in name

        try:
            config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
            quantize_(self.model, config, filter_fn=wanted)
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return None

    def measure_torchao(self, row: dict, say: Callable[[str], None]) -> None:
        """Beside the others' row, in rounds of its own."""
        self.forget()
        say(f"batch {row['batch']}: {TORCHAO}")
        variant = self.variant(TORCHAO, transformer_inputs(self.size, row["batch"], self.device))
        eager = self.velocities.get((self.size.tokens, row["batch"]))
        if self.try_out(variant, eager, row) is None:
            return
        seconds = interleave({TORCHAO: self.block(variant)}, self.options.rounds, 0)[TORCHAO]
        eager = row["variants"].get(EAGER)
        entry = row["variants"][TORCHAO]
        entry |= self.figures(TORCHAO, row["batch"], seconds)
        entry |= {"interleaved": False, "speedup": None}
        if eager:
            entry["speedup"] = {"median": eager["seconds"] / entry["seconds"]}

    def forget(self) -> None:
        """Compiled code and cached memory of the batch before."""
        self.compiled = {}
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
