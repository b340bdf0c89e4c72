"""The G2RPO loop: roll out, score, form advantages, update.

One update, in order (arXiv 2510.01982):

    anchor       one deterministic run a prompt; x_k and v_k are kept at the SDE positions k
    branches     at each k one stochastic step fans out into G branches, old_log_prob with it
    completions  every branch to an image at every granularity, sharing what paths share
    rewards      decode, score; normalise over the G branches, sum over granularities and models
    update       one forward with gradients at each x_k, clipped policy loss over its G branches

The anchor's velocities come from the same forward on the same rows in the same batch as those of
the update, so under `stepping: accumulate` the importance ratio is exactly 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .completions import complete, plan_completions
from .config import Config
from .data import PromptSampler
from .errors import ConfigurationError
from .evaluation import evaluate_policy, mean_and_std, row_slices, score_latents
from .memory import peak_memory_bytes
from .objective import integrate_advantages, summarise_losses
from .policy import Conditions, Model
from .rewards import Reward
from .rollout import Branches, branch_out
from .schedule import evaluations_per_prompt, noise_schedule
from .seeds import anchor_seeds, branch_seeds

# Attributes of the trainer that a checkpoint keeps as they are.
STATE = ("updates", "evaluations", "skipped_updates", "seconds", "row")


class Interrupted(Exception):
    """An update was abandoned on request; weights and optimizer are as they were before it."""


class Trainer:
    """Changes the policy's weights, update by update; writes nothing to disk.

    config: validated. model: see `policy.Model`. rewards: at least one that is trained.
    on_phase(name), on_evaluations(rows): progress. should_stop(): asked between batches of the
    rollout; True abandons the update with `Interrupted`.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        rewards: Sequence[Reward],
        *,
        on_phase: Callable[[str], None] = lambda name: None,
        on_evaluations: Callable[[int], None] = lambda rows: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.model, self.policy = config, model, model.policy
        self.rewards = list(rewards)
        self.trained = [reward for reward in rewards if not reward.heldout]
        self.on_phase, self.on_evaluations, self.should_stop = on_phase, on_evaluations, should_stop
        rollout, train, device = config.rollout, config.train, self.policy.device
        schedule = noise_schedule(rollout.steps, rollout.shift)  # float64, on the host
        self.sigmas = schedule.float().to(device)
        self.positions = sorted(rollout.sde_positions)
        self.coefficients = gk.step_coefficients(  # a row a position
            schedule[self.positions], schedule[[k + 1 for k in self.positions]],
            rollout.eta, rollout.dynamics, sigma_max=float(schedule[1]),
        ).to(device)  # fmt: skip
        self.sampler = PromptSampler(model.prompts, train.prompts_per_update, train.seed)
        self.plan = plan_completions(
            schedule, self.positions, rollout.granularities, train.prompts_per_update,
            rollout.group_size, rollout.branch_batch, device,
        )  # fmt: skip
        self.parameters = [p for p in self.policy.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.lr,
            betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        # Transformer evaluations of one update, forwards with gradients included.
        self.evaluations_per_update = train.prompts_per_update * (
            len(self.positions)
            + evaluations_per_prompt(
                rollout.steps, self.positions, rollout.granularities, rollout.group_size
            )
        )
        self.updates = self.evaluations = self.skipped_updates = 0
        self.seconds = 0.0
        self.row: dict[str, Any] = {}  # metrics of the newest update
        self.midway = False  # weights and counters are not those of one complete update
        self._phases: dict[str, float] = {}

    def update(self) -> dict[str, Any]:
        """One update of the policy. Returns its metrics row.

        Raises Interrupted when asked to stop, TrainingError when every reward failed; either way
        weights and optimizer are untouched.
        """
        started, self._phases = time.perf_counter(), {}
        number = self.updates + 1
        prompt_ids = self.sampler.ids(number)
        prompts = [self.sampler.prompts[i] for i in prompt_ids]
        conditions = self.model.embed(prompts)
        with torch.no_grad():
            chunks, finished, anchors = self.roll_out(number, prompt_ids, conditions)
            with self._phase("rewards"):
                rewards, reward_row = self._score(finished, anchors, prompts)
                advantages = integrate_advantages(
                    rewards, self.config.rollout.group_size, [r.weight for r in self.trained]
                )
        with self._phase("update"):
            losses, norm = self._improve(chunks, conditions, advantages.values)
        self.midway = True
        self.updates = number
        self.evaluations += self.evaluations_per_update
        self.seconds += time.perf_counter() - started
        self.row = {
            "update": number,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "lr": self.config.optimizer.lr,
            **summarise_losses(losses),
            "grad_norm": norm,
            "advantage_std": advantages.std,
            "reward_groups": advantages.groups,
            "zero_spread_groups": advantages.zero_spread_groups,
            "failed_groups": advantages.failed_groups,
            "skipped_updates": self.skipped_updates,
            **reward_row,
            **{f"seconds/{name}": seconds for name, seconds in self._phases.items()},
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
        }
        self.midway = False
        return self.row

    def evaluate(self) -> tuple[dict[str, Any], Tensor, list[str]]:
        """The fixed evaluation: metrics keys, images [M, C, H, W] and their prompts.

        Evaluations made here are not training and are not counted.
        """
        self.on_phase("evaluation")
        started = time.perf_counter()
        samples, every = self.config.train.evaluation_samples, self.sampler.prompts
        prompts = [every[i % len(every)] for i in range(samples)]
        row, images = evaluate_policy(
            self.model, prompts, self.rewards, self.sigmas, self.config.rollout.branch_batch
        )
        return {**row, "seconds/evaluation": time.perf_counter() - started}, images, prompts

    def state_dict(self) -> dict[str, Any]:
        """All that an undisturbed run would go on with, the transformer's weights apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "prompts": self.sampler.prompts,
            **{name: getattr(self, name) for name in STATE},
        }

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Counterpart of `state_dict` and of the transformer's own; strict.

        Raises ConfigurationError for other prompts: their ids decide what every update draws.
        """
        if state["prompts"] != self.sampler.prompts:
            raise ConfigurationError(
                f"data.prompts is {self.config.data.prompts!r}, which holds "
                f"{len(self.sampler.prompts)} prompts; expected the {len(state['prompts'])} that "
                "the run was started with, in their order"
            )
        self.policy.transformer.load_state_dict(weights, strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])

    # The parts of an update ---------------------------------------------------------------------

    def _chunks(self, rows: int) -> list[slice]:
        """The rows of each forward of the anchor, and so of the update: at most branch_batch."""
        return row_slices(rows, self.config.rollout.branch_batch)

    @torch.no_grad()
    def roll_out(
        self, number: int, prompt_ids: Sequence[int], conditions: Conditions
    ) -> tuple[list[Branches], Tensor, Tensor]:  # chunks of prompts; [J, B * G, K, *S]; [B, *S]
        """Anchors and branches of update `number`, then the completions of both."""
        seed, device = self.config.train.seed, self.policy.device
        chunks = []
        for rows in self._chunks(len(prompt_ids)):
            with self._phase("anchor"):
                ids = prompt_ids[rows]
                noise = gk.normal(
                    anchor_seeds(seed, number, ids).to(device), self.model.latent_shape
                )
                seeds = branch_seeds(
                    seed, number, ids, self.positions, self.config.rollout.group_size
                ).to(device)
                chunks.append(
                    branch_out(
                        self.policy, noise, conditions[rows], self.sigmas,
                        self.positions, self.coefficients, seeds, self._progress,
                    )
                )  # fmt: skip
        with self._phase("completions"):
            x_next = torch.cat([chunk.x_next for chunk in chunks])
            anchors = torch.cat([chunk.anchors for chunk in chunks])
            finished, anchors = complete(
                self.policy, self.plan, x_next, anchors, conditions, self._progress
            )
        return chunks, finished, anchors

    def _score(
        self,
        finished: Tensor,  # [J, B * G, K, *S]
        anchors: Tensor,  # [B, *S]
        prompts: Sequence[str],  # B
    ) -> tuple[Tensor, dict[str, float]]:  # [R, J, B * G, K], metrics keys
        """Rewards of all finished branches, and of the anchors' own images beside them."""
        row: dict[str, float] = {}
        batch = self.config.rollout.branch_batch
        scores = score_latents(self.model, anchors, prompts, self.trained, batch)
        for reward, values in zip(self.trained, scores, strict=True):
            row[f"anchor/{reward.name}/mean"], _ = mean_and_std(values)
        shape = finished.shape[:3]
        per_prompt = shape[1] * shape[2] // len(prompts)
        captions = [p for p in prompts for _ in range(per_prompt)] * shape[0]
        rewards = score_latents(self.model, finished.flatten(0, 2), captions, self.trained, batch)
        for reward, values in zip(self.trained, rewards, strict=True):
            mean, std = mean_and_std(values)
            row[f"rollout/{reward.name}/mean"], row[f"rollout/{reward.name}/std"] = mean, std
        return rewards.view(-1, *shape), row

    def _improve(
        self, chunks: Sequence[Branches], conditions: Conditions, advantages: Tensor
    ) -> tuple[list[gk.PolicyLoss], float]:  # one a forward; mean gradient norm
        """The policy losses and the optimizer's step or steps."""
        per_position = self.config.objective.stepping == "per_position"
        losses, norms = [], []
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(len(self.positions)):
            for chunk, rows in zip(chunks, self._chunks(len(conditions)), strict=True):
                out = self._policy_loss(index, chunk, conditions[rows], advantages[rows, index])
                # From the mean over this chunk's rows to its share of the mean over all rows and,
                # when positions are accumulated, over positions.
                share = chunk.latents.shape[1] / len(conditions)
                (out.loss * (share if per_position else share / len(self.positions))).backward()
                losses.append(out._replace(loss=out.loss.detach()))
            if per_position:
                norms.append(self._step())
        if not per_position:
            norms.append(self._step())
        self.skipped_updates += not any(0 < norm < math.inf for norm in norms)
        return losses, sum(norms) / len(norms)

    def _policy_loss(
        self, index: int, chunk: Branches, conditions: Conditions, advantages: Tensor
    ) -> gk.PolicyLoss:
        """One forward with gradients at x_k: a row a prompt, not one a branch."""
        latents = chunk.latents[index]
        sigma = self.sigmas[self.positions[index]].expand(len(latents))
        velocity = self.policy.velocity(latents, sigma, conditions)
        self.on_evaluations(len(latents))
        return gk.policy_loss(
            velocity,
            latents,
            chunk.x_next[:, :, index],
            chunk.old_log_prob[index],
            advantages,
            gk.StepCoefficients(
                self.coefficients.table[index : index + 1], self.coefficients.dynamics
            ),
            clip_range=self.config.objective.clip_range,
            advantage_clip=self.config.objective.advantage_clip,
        )

    def _step(self) -> float:
        """Clip and step. A gradient that is zero or not finite moves nothing: it says nothing."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )
        value = float(norm)
        if 0 < value < math.inf:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters, self.config.optimizer.max_grad_norm, norm
            )
            self.midway = True
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _progress(self, rows: int) -> None:
        self.on_evaluations(rows)
        if self.should_stop():
            raise Interrupted

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.on_phase(name)
        started = time.perf_counter()
        yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - started
