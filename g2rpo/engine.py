"""How the completions' forwards are made: in what precision, and by which way.

99 % of an update's work is these forwards, and no log-probability depends on them. A fused
transformer runs them through `gk.FluxRollout`, which computes once what their rows share, in one
static shape that a CUDA graph can replay; another runs them as everything else, or compiled. A
float32 transformer may have a copy in bfloat16 that makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import g2rpo_kernels as gk

from .completions import CompletionBatch
from .config import Config
from .distributed.replica import Replica
from .errors import ConfigurationError
from .metrics import size
from .policy import Conditions, FluxPolicy

Predict = Callable[[Tensor, CompletionBatch], Tensor]  # latents [batch, *S] -> velocities


def plain_forward(policy: FluxPolicy, conditions: Conditions) -> Predict:
    """The forward that anchors and updates make."""
    return lambda latents, batch: policy.predict(latents, batch.sigmas, conditions[batch.prompts])


class CompletionEngine:
    """Makes the completions' forwards of one policy, and no others.

    policy: with the weights and adapters that are trained. sigmas: of the schedule, what
    `CompletionBatch.sigma_index` counts. on_message(text): what a person should know.

    replica: of a sharded transformer, which makes them then; None: the policy itself does.

    precision: a context manager within which the forwards are made.

    Raises ConfigurationError for a precision or engine that this device cannot do.
    """

    def __init__(
        self,
        config: Config,
        policy: FluxPolicy,
        sigmas: Tensor,  # float32 [T + 1] on the policy's device
        on_message: Callable[[str], None],
        replica: Replica | None = None,
    ) -> None:
        self.policy, self.sigmas, self._trained = policy, sigmas, policy.transformer
        self.precision: AbstractContextManager[Any] = nullcontext()
        self._replica, fp8 = replica, config.rollout.precision == "fp8"
        self._choose = config.rollout.precision is None  # else there is no doing without it
        self._given, self._say = policy, on_message
        if replica is not None:
            self.policy = replica.policy
        elif config.rollout.precision == "bfloat16":
            self.policy = _bfloat16_copy(policy)
        if fp8:
            weights = None if replica is None else replica.block
            self.precision = fp8_rollout(self.policy.transformer, policy.device, weights)
            self._release()  # now it is known that they fit
        self._rollout: gk.FluxRollout | None = None
        if config.model.fuse and not self.policy.sharded:
            mode = _mode(config.rollout.engine, policy.device)
            self._rollout = gk.FluxRollout(
                self.policy.transformer, policy.image_ids, policy.guidance, mode,
                lambda why: on_message(
                    f"The completions' forward cannot be captured in a CUDA graph ({why}): it runs "
                    "without from here on; rollout.engine 'eager' does not try"
                ),
            )  # fmt: skip
        elif config.rollout.engine == "compile":
            # The weights are its inputs: it is compiled once for all updates.
            compiled = torch.compile(self.policy.transformer, dynamic=False)
            self.policy = FluxPolicy(compiled, policy.image_ids, policy.guidance or 0.0)

    @contextmanager
    def of(self, conditions: Conditions) -> Iterator[Predict]:
        """Within the block, what it gives predicts velocities under these conditions, with the
        weights of now."""
        self._choose_once()
        self._refresh()
        replica, fp8 = self._replica, isinstance(self.precision, gk.Fp8Rollout)
        filled = nullcontext() if replica is None else replica.filled(all_weights=not fp8)
        try:
            with filled, self.precision:
                if (rollout := self._rollout) is None:
                    yield plain_forward(self.policy, conditions)
                    return
                with rollout.of(self.sigmas, conditions.prompt_embeds, conditions.pooled_embeds):
                    if replica is not None:
                        replica.drop_modulations()
                    yield lambda latents, batch: rollout(latents, batch.prompts, batch.sigma_index)
        finally:
            self._release()

    def _choose_once(self) -> None:
        """Whether the replica is used, at the first rollout: by then memory is as it will be."""
        if self._replica is None or not self._choose:
            return
        self._choose = False
        if not self._replica.fits():
            self._say(
                f"The weights' whole copy, {size(self._replica.nbytes)}, does not fit every GPU: "
                "completions gather the weights in every forward (distributed.gather auto)"
            )
            self.policy, self._replica, self._rollout = self._given, None, None

    @torch.no_grad()
    def _refresh(self) -> None:
        """The weights of now, in a copy's own precision."""
        if self._replica is None and self.policy.dtype != next(self._trained.parameters()).dtype:
            ours = self.policy.transformer.parameters()
            for mine, trained in zip(ours, self._trained.parameters(), strict=True):
                mine.copy_(trained)

    def _release(self) -> None:
        """FP8 copies live as long as completions: 8.6 GB of FLUX.1-dev, for which the update has
        no room, and whose weights it changes."""
        if isinstance(self.precision, gk.Fp8Rollout):
            self.precision.release()


def _bfloat16_copy(policy: FluxPolicy) -> FluxPolicy:
    """The policy with a transformer of its own in bfloat16, which stays in memory."""
    if policy.dtype != torch.float32:
        raise ConfigurationError(
            "rollout.precision is 'bfloat16', and so is the transformer; expected null, or "
            "model.dtype float32"
        )
    transformer = copy.deepcopy(policy.transformer).requires_grad_(False)
    # nn.Module's own: diffusers' warns of modules that FLUX does not have
    transformer = nn.Module.to(transformer, dtype=torch.bfloat16)
    return FluxPolicy(transformer, policy.image_ids, policy.guidance or 0.0)


def _mode(engine: str, device: torch.device) -> str:
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    if engine == "graph" and device.type != "cuda":
        raise ConfigurationError(
            f"rollout.engine is 'graph' and model.device {str(device)!r}; expected a CUDA GPU, or "
            "'auto', 'eager' or 'compile'"
        )
    return engine


def fp8_rollout(
    transformer: nn.Module,
    device: torch.device,
    weights: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
) -> gk.Fp8Rollout:
    """FP8 completions on a GPU that can, the same numbers emulated on a CPU. weights: as
    `gk.Fp8Rollout` takes it.

    Raises ConfigurationError on a GPU that cannot, where the emulation would only be slow, and
    where the copies of the weights do not fit.
    """
    try:
        return gk.Fp8Rollout(transformer, device.type == "cpu", weights)
    except torch.OutOfMemoryError as error:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        # Adapters are merged into the copies; modulations, which are norms' linears, have none.
        weights = sum(
            module.weight.numel()
            for block in blocks
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and "norm" not in name and "lora_" not in name
        )
        raise ConfigurationError(
            f"rollout.precision is 'fp8', whose copies of the weights need {size(weights)} on "
            f"{device} (a byte a weight of the blocks' token linears) beside what is there; "
            "expected more free memory, model.dtype bfloat16, model.lora.rank > 0 or "
            f"rollout.precision null. PyTorch says: {error}"
        ) from error
    except RuntimeError as error:
        raise ConfigurationError(
            f"rollout.precision is 'fp8'; expected null on this hardware: {error}"
        ) from error
