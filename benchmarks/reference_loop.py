"""The training loop of Granular-GRPO as its publication describes it, re-created without this
package's ops and without what they share; what bench_reference.py times.

    batch 1       every forward has one image
    branches      each of the G branches of a position makes its own forward at x_k, whose velocity
                  its anchor has had
    completions   every branch goes through every granularity's path by itself, although paths
                  begin alike
    update        each branch's step is seen again by itself: a forward and a backward a branch, not
                  one a position for all its branches

so that an update of T steps, K positions and G branches has T + G * sum_k (1 + sum_g of the path's
length) evaluations before its gradients, 1,792 at T 16, K 8, G 12 and granularities {1, 2}, where
`g2rpo` makes 1,504; and G * K with gradients, where it makes K. The transformer is diffusers' own,
eager, float32 weights under bfloat16 autocast; steps and losses are those of eager.py; AdamW is
torch's, on float32. Written from that description: the authors' code is not copied or run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import eager
import torch
from torch import Tensor, nn

from g2rpo.policy import Conditions, Model
from g2rpo.schedule import completion_path, noise_schedule

ANCHOR, BRANCHES, COMPLETIONS = "anchor", "branches", "completions"
DECODE, UPDATE, OPTIMIZER = "decode", "update", "optimizer"
PHASES = (ANCHOR, BRANCHES, COMPLETIONS, DECODE, UPDATE, OPTIMIZER)


@dataclass(frozen=True)
class Shape:
    """What an update of one prompt draws, by the names of `rollout`'s configuration."""

    steps: int
    shift: float
    eta: float
    positions: tuple[int, ...]
    granularities: tuple[int, ...]
    group_size: int

    def asked(self) -> dict[str, int]:
        """By phase: forwards, images to decode, forwards with gradients, steps of the optimizer."""
        branches = self.group_size * len(self.positions)
        paths = sum(
            len(completion_path(k, g, self.steps))
            for k in self.positions for g in self.granularities
        )  # fmt: skip
        return {
            ANCHOR: self.steps, BRANCHES: branches, COMPLETIONS: self.group_size * paths,
            DECODE: branches * len(self.granularities), UPDATE: branches, OPTIMIZER: 1,
        }  # fmt: skip

    def evaluations(self) -> int:
        """Transformer evaluations before the gradients."""
        asked = self.asked()
        return sum(asked[name] for name in (ANCHOR, BRANCHES, COMPLETIONS))


@dataclass(frozen=True)
class Sample:
    """A branch's stochastic step, as its update sees it again; rows of one."""

    position: int
    latents: Tensor
    x_next: Tensor
    log_prob: Tensor


class ReferenceLoop:
    """An update of one prompt, a forward at a time: every method is a generator that does one of
    its phase's pieces of work and yields, so that its caller may time pieces and stop between them.

    model: its transformer is diffusers' own, not fused. autocast: forwards and decoding are made
    under bfloat16 autocast; else in the weights' dtype.
    """

    def __init__(self, model: Model, shape: Shape, autocast: bool) -> None:
        self.policy, self.model, self.shape = model.policy, model, shape
        self.device = self.policy.device
        self.autocast = autocast
        self.conditions: Conditions = model.embed(model.prompts[:1])
        self.sigmas = noise_schedule(shape.steps, shape.shift).float().to(self.device)
        self.noise = torch.randn(
            1, *model.latent_shape, generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        self.anchors: dict[int, Tensor] = {}  # x_k by position
        self.samples: list[Sample] = []
        self.finished: list[Tensor] = []  # x0-predictions, of one row

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """A velocity, float32 [1, *S]."""
        with self.precision():
            return self.policy.velocity(latents, sigma.view(1), self.conditions).float()

    def precision(self) -> AbstractContextManager:
        """One context a forward: autocast keeps its copies of the weights as long as it lasts."""
        if self.autocast:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def triple(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """eager.py's sigmas of a step: sigma, the next, what stands for sigma = 1."""
        return self.sigmas[k : k + 1], self.sigmas[k + 1 : k + 2], self.sigmas[1:2]

    @torch.no_grad()
    def rollout(self) -> Iterator[str]:
        """The anchor, then branch after branch with its completions. Yields the phase of the
        forward that has been made."""
        shape, x = self.shape, self.noise
        for i in range(shape.steps):
            if i in shape.positions:
                self.anchors[i] = x
            x = eager.ode_step(self.forward(x, self.sigmas[i]), x, *self.triple(i)[:2])
            yield ANCHOR
        for k in shape.positions:
            for _ in range(shape.group_size):
                velocity = self.forward(self.anchors[k], self.sigmas[k])
                x_next, log_prob = eager.sde_step_with_log_prob(
                    velocity, self.anchors[k], self.triple(k), 1, eta=shape.eta
                )
                self.samples.append(Sample(k, self.anchors[k], x_next, log_prob))
                yield BRANCHES
                for granularity in shape.granularities:
                    yield from self._complete(x_next, k, granularity)

    def _complete(self, x: Tensor, position: int, granularity: int) -> Iterator[str]:
        path = completion_path(position, granularity, self.shape.steps)
        for at, following in zip(path, [*path[1:], self.shape.steps], strict=True):
            velocity = self.forward(x, self.sigmas[at])
            # From the last sigma on to 0: the prediction of the image.
            x = eager.ode_step(velocity, x, self.sigmas[at : at + 1],
                               self.sigmas[following : following + 1])  # fmt: skip
            if at == path[-1]:
                self.finished.append(x)
            yield COMPLETIONS

    @torch.no_grad()
    def decode(self) -> Iterator[str]:
        """Images of the latents, one after the other, as often as an update has images: those that
        are there again, where the rollout was stopped."""
        for i in range(self.shape.asked()[DECODE]):
            with self.precision():
                self.model.decode(self.finished[i % len(self.finished)])
            yield DECODE

    def update(self, advantage: float = 1.0, clip_range: float = 1e-4) -> Iterator[str]:
        """Gradients of the clipped loss, a branch at a time, those that are there again as above;
        into the parameters' .grad."""
        for i in range(self.shape.asked()[UPDATE]):
            sample = self.samples[i % len(self.samples)]
            velocity = self.forward(sample.latents, self.sigmas[sample.position])
            _, log_prob = eager.sde_step_with_log_prob(
                velocity, sample.latents, self.triple(sample.position), 1,
                x_next=sample.x_next, eta=self.shape.eta,
            )  # fmt: skip
            loss = eager.clipped_loss(
                log_prob, sample.log_prob, log_prob.new_tensor([advantage]), clip_range
            )
            (loss / self.shape.asked()[UPDATE]).backward()
            yield UPDATE


def timed(
    pieces: Iterator[str], seconds: float, synchronize: Callable[[], None],
    enough: Callable[[], bool] = lambda: True, clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each piece, by phase, until there are no more, or until so many seconds are over
    and there is `enough`; one piece at least."""
    found: dict[str, list[float]] = {}
    synchronize()
    began = last = clock()
    for phase in pieces:
        synchronize()
        now = clock()
        found.setdefault(phase, []).append(now - last)
        if now - began > seconds and enough():
            break
        last = clock()
    return found


def phase_row(times: Sequence[float], asked: int) -> dict:
    """What is kept of a phase: pieces timed and asked for, seconds of one (the median, without the
    first where there are others, which sets things up) and of all."""
    steady = sorted(times[1:] or times)
    middle = steady[len(steady) // 2]
    whole = len(times) >= asked
    return {
        "asked": asked, "timed": len(times), "seconds_each": middle,
        "seconds": sum(times) if whole else asked * middle, "extrapolated": not whole,
    }  # fmt: skip


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """The end of an update: the gradient's norm brought to 1, one step, the gradients given up."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
