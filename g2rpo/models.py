"""From the configuration's `model` group to a `policy.Model`: the rooms behind `model.path`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import digits
from .config import Config
from .data import read_evaluation_prompts, read_prompts
from .errors import ConfigurationError
from .policy import Conditions, FluxPolicy, Model


class DigitsModel:
    """The embedded model of handwritten digits, pre-trained once and cached."""

    latent_shape = (16, 4)

    def __init__(
        self,
        device: torch.device,
        prompts: Sequence[str] = digits.PROMPTS,
        evaluation_prompts: Sequence[str] = digits.PROMPTS,
        guidance: float = 3.5,
        on_step: Callable[[int, int, float], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prompts, self.evaluation_prompts = list(prompts), list(evaluation_prompts)
        known = list(dict.fromkeys([*prompts, *evaluation_prompts]))
        self._conditions = Conditions(*digits.embed_prompts(known)).to(device)
        self._index = {prompt: i for i, prompt in enumerate(known)}
        transformer = digits.pretrained_transformer(on_step=on_step)
        # nn.Module's own: diffusers' warns of modules that FLUX does not have
        transformer = torch.nn.Module.to(transformer, device, dtype).eval()
        self.policy = FluxPolicy(transformer, digits.token_ids(device)[1], guidance)

    def embed(self, prompts: Sequence[str]) -> Conditions:
        rows = torch.tensor([self._index[p] for p in prompts], device=self.policy.device)
        return self._conditions[rows]

    def decode(self, latents: Tensor) -> Tensor:
        return digits.unpack(latents)

    def image_metrics(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return {
            "pairwise_distance": digits.pairwise_distance(images, prompts),
            "coverage": digits.coverage(images, prompts),
        }


def choose_device(name: str) -> torch.device:
    """model.device -> a device that is there; of several GPUs, where torchrun has started several
    processes here, that of this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigurationError(
                f"this is process {local + 1} of this machine (LOCAL_RANK {local}), which has "
                f"{count} GPUs; expected torchrun --nproc-per-node {count}"
            )
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"model.device is {name!r}; expected a device that can be used: {error}"
        ) from error
    return device


def be_deterministic(device: torch.device) -> None:
    """Have the GPU compute the same bits every time; what cannot is warned of by torch. CPUs do
    anyway. To be called before the first work on the GPU."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a write for every torch.empty
        torch.backends.cudnn.benchmark = False


def load_model(
    config: Config,
    on_step: Callable[[int, int, float], None] | None = None,
    on_message: Callable[[str], None] = print,
) -> Model:
    """The model of a run. on_step(step, steps, loss): progress where it must first be trained."""
    if config.model.path == "digits":
        return _load_digits(config, on_step)
    if "/" not in config.model.path and not Path(config.model.path).exists():
        raise ConfigurationError(
            f"model.path is {config.model.path!r}; expected 'digits', the folder of a FLUX "
            "pipeline, or a hub id such as black-forest-labs/FLUX.1-dev"
        )
    from .flux.model import load_flux

    return load_flux(config, on_message)


def _load_digits(config: Config, on_step: Callable[[int, int, float], None] | None) -> DigitsModel:
    for key, value, default in (
        ("model.transformer", config.model.transformer, None),
        ("model.attention", config.model.attention, "auto"),
        ("data.embeddings", config.data.embeddings, None),
        ("data.max_sequence_length", config.data.max_sequence_length, 512),
        ("rollout.height", config.rollout.height, None),
        ("rollout.width", config.rollout.width, None),
    ):
        if value != default:
            raise ConfigurationError(
                f"{key} is {value!r}; expected {default!r}, for the digits model has no use for it"
            )
    prompts = digits.PROMPTS
    if config.data.prompts is not None:
        prompts = read_prompts(config.data.prompts, config.data.column)
    evaluation_prompts = read_evaluation_prompts(config, prompts)
    for key, found in (("prompts", prompts), ("evaluation_prompts", evaluation_prompts)):
        if unknown := [prompt for prompt in found if prompt not in digits.PROMPTS]:
            raise ConfigurationError(
                f"data.{key} holds {unknown[0]!r}; the digits model expects {list(digits.PROMPTS)}"
            )
    device = choose_device(config.model.device)
    dtype = getattr(torch, config.model.dtype or "float32")
    return DigitsModel(
        device, prompts, evaluation_prompts, config.rollout.guidance, on_step, dtype
    )
