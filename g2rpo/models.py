"""From the configuration's `model` group to a `policy.Model`: the rooms behind `model.path`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import digits
from .config import Config
from .data import read_prompts
from .errors import ConfigurationError
from .policy import Conditions, FluxPolicy, Model


class DigitsModel:
    """The embedded model of handwritten digits, pre-trained once and cached."""

    latent_shape = (16, 4)

    def __init__(
        self,
        device: torch.device,
        prompts: Sequence[str] = digits.PROMPTS,
        guidance: float = 3.5,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self._conditions = Conditions(*digits.embed_prompts(self.prompts)).to(device)
        self._index = {prompt: i for i, prompt in enumerate(self.prompts)}
        transformer = digits.pretrained_transformer(on_step=on_step).to(device).eval()
        self.policy = FluxPolicy(transformer, digits.token_ids(device)[1], guidance)

    def embed(self, prompts: Sequence[str]) -> Conditions:
        rows = torch.tensor([self._index[p] for p in prompts], device=self.policy.device)
        return self._conditions[rows]

    def decode(self, latents: Tensor) -> Tensor:
        return digits.unpack(latents)


def choose_device(name: str) -> torch.device:
    """model.device -> a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"model.device is {name!r}; expected a device that can be used: {error}"
        ) from error
    return device


def load_model(
    config: Config, on_step: Callable[[int, int, float], None] | None = None
) -> Model:
    """The model of a run. on_step(step, steps, loss): progress where it must first be trained."""
    prompts = digits.PROMPTS
    if config.data.prompts is not None:
        prompts = read_prompts(config.data.prompts)
    if config.model.path != "digits":
        raise ConfigurationError(f"model.path is {config.model.path!r}; expected 'digits'")
    if unknown := [prompt for prompt in prompts if prompt not in digits.PROMPTS]:
        raise ConfigurationError(
            f"data.prompts holds {unknown[0]!r}; the digits model expects {list(digits.PROMPTS)}"
        )
    device = choose_device(config.model.device)
    return DigitsModel(device, prompts, config.rollout.guidance, on_step)
