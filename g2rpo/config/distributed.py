"""How several processes share a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import expect, finite


@dataclass
class DistributedConfig:
    """How the processes that torchrun starts share a run; one process alone has no use for it."""

    strategy: Literal["replicate", "shard", "hybrid"] = "replicate"
    """replicate: each process has the whole model. shard: each has a part of its weights, gradients
    and optimizer states (FSDP2). hybrid: parts of it within a node, replicas across nodes."""
    gather: Literal["auto", "phase", "forward"] = "auto"
    """shard and hybrid: when completions gather the weights: once a rollout into a whole copy (with
    rollout.precision fp8 a copy in FP8), or in every forward; auto: once where the memory is
    there."""
    gradients: Literal["whole", "sharded"] = "whole"
    """shard and hybrid: whole: a process keeps float32 gradients of all weights, which are reduced
    once a step. sharded: they are reduced after every backward, and the parts kept."""
    timeout: float = 1800.0
    """Seconds that processes wait for one another, after which the run ends."""

    def validate(self) -> None:
        timeout = self.timeout
        expect("distributed.timeout", timeout, timeout > 0 and finite(timeout), "> 0")
        for key, value, default in (
            ("gather", self.gather, "auto"), ("gradients", self.gradients, "whole"),
        ):  # fmt: skip
            ok = self.strategy != "replicate" or value == default
            expected = f"{default!r}, or distributed.strategy 'shard' or 'hybrid' with it"
            expect(f"distributed.{key}", value, ok, expected)
