"""What of the transformer is trained, and its files: all of it, or LoRA adapters on it.

Both know their trained parameters by name, write and read them in the layout other tools take
(`FluxTransformer2DModel.from_pretrained`, `pipe.load_lora_weights`), and can be the starting policy
again for as long as a KL divergence is computed. `MovingAverage` keeps a smoother copy of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import LoraConfig
from .distributed.shards import local, part_of
from .errors import ConfigurationError
from .flux.quiet import quiet


class TrainedWeights(Protocol):
    folder: str  # of a checkpoint, where `save` writes and `read` reads: transformer or lora
    parameters: dict[str, nn.Parameter]  # those that are trained
    sharded: bool  # whether they are DTensors

    def save(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        """Write the weights, or these values of them, as other tools read them."""

    def read(self, folder: Path) -> dict[str, Tensor]:
        """What `save` has written, by parameter, on the CPU."""

    def starting_policy(self) -> contextmanager[None]:
        """Within the block the transformer is what it was before training."""

    def reread(self) -> None:
        """Take over the transformer's parameters, which have been sharded since."""


class FullWeights:
    """Every parameter of the transformer.

    keep_start: keep a copy of the weights as they are now, in host memory, for `starting_policy`.
    """

    folder = "transformer"
    file = "diffusion_pytorch_model.safetensors"

    def __init__(self, transformer: nn.Module, keep_start: bool = False) -> None:
        self.transformer, self.sharded = transformer.requires_grad_(True), False
        self.parameters = dict(transformer.named_parameters())
        self._start = None
        if keep_start:
            self._start = {name: _host_copy(p) for name, p in self.parameters.items()}

    def reread(self) -> None:
        self.parameters, self.sharded = dict(self.transformer.named_parameters()), True
        if self._start is not None:
            self._start = {
                name: part_of(parameter, self._start[name]).clone()
                for name, parameter in self.parameters.items()
            }

    def save(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        if values is None:
            self.transformer.save_pretrained(folder, max_shard_size="1TB")  # one file
        else:
            self.transformer.save_config(folder)
            buffers = {n: b for n, b in self.transformer.state_dict().items() if n not in values}
            state = {**buffers, **values}
            tensors = {name: value.detach().contiguous() for name, value in state.items()}
            save_file(tensors, folder / self.file, metadata={"format": "pt"})

    def read(self, folder: Path) -> dict[str, Tensor]:
        return load_file(folder / self.file)

    @contextmanager
    def starting_policy(self) -> Iterator[None]:
        if self._start is None:
            raise RuntimeError("the starting weights were not kept; expected keep_start=True")
        with swapped(self.parameters, self._start):
            yield


class LoraWeights:
    """Low-rank adapters by PEFT; the transformer's own weights are frozen.

    The adapters are float32 whatever the transformer is: a step of Adam is lost in bfloat16.
    seed: of their initial values; the second factor of each begins at zero, so that the policy is
    at first the transformer's own.
    """

    folder = "lora"
    file = "pytorch_lora_weights.safetensors"

    def __init__(self, transformer: nn.Module, config: LoraConfig, seed: int = 0) -> None:
        import peft

        self.transformer, self.sharded = transformer.requires_grad_(False), False
        alpha = config.rank if config.alpha is None else config.alpha
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            try:
                transformer.add_adapter(
                    peft.LoraConfig(
                        r=config.rank, lora_alpha=alpha, target_modules=list(config.targets)
                    )
                )
            except ValueError as error:
                linears = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
                raise ConfigurationError(
                    f"model.lora.targets is {config.targets}; expected ends of names of linear "
                    f"layers of the transformer, such as {linears[len(linears) // 2]!r}: {error}"
                ) from error
        self.parameters = self._trained()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def _trained(self) -> dict[str, nn.Parameter]:
        named = self.transformer.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def reread(self) -> None:
        self.parameters, self.sharded = self._trained(), True

    def save(self, folder: Path, values: Mapping[str, Tensor] | None = None) -> None:
        from peft import get_peft_model_state_dict

        with quiet():
            from diffusers import FluxPipeline
        if values is None:
            values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        tensors = get_peft_model_state_dict(self.transformer, state_dict=dict(values))
        FluxPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=tensors,
            # Without it a loader takes alpha for the rank.
            transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
        )

    def read(self, folder: Path) -> dict[str, Tensor]:
        # PEFT's names in files leave out the adapter's own.
        names = {f"transformer.{name.replace('.default.', '.')}": name for name in self.parameters}
        found = load_file(folder / self.file)
        if found.keys() != names.keys():
            odd = sorted(found.keys() ^ names.keys())
            raise ConfigurationError(
                f"{folder / self.file} has {len(found)} adapters' weights; expected the "
                f"{len(names)} of model.lora, and {odd[0]!r} is in one of them alone"
            )
        return {names[key]: value for key, value in found.items()}

    @contextmanager
    def starting_policy(self) -> Iterator[None]:
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()


def make_weights(
    transformer: nn.Module, lora: LoraConfig, seed: int, keep_start: bool
) -> TrainedWeights:
    if lora.rank == 0:
        return FullWeights(transformer, keep_start)
    return LoraWeights(transformer, lora, seed)


def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of the same names; strict in names and shapes. Values of a
    parameter that is sharded are of the whole of it, or of this rank's part."""
    if values.keys() != parameters.keys():
        odd = sorted(values.keys() ^ parameters.keys())
        raise ConfigurationError(
            f"the weights hold {len(values)} tensors; expected {len(parameters)}, and {odd[0]!r} "
            "is in one of them alone"
        )
    for name, parameter in parameters.items():
        if values[name].shape not in (parameter.shape, local(parameter).shape):
            raise ConfigurationError(
                f"the weights' {name} has shape {tuple(values[name].shape)}; expected "
                f"{tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = values[name]
            whole = value.shape == parameter.shape
            local(parameter).copy_(part_of(parameter, value) if whole else value)


@contextmanager
def swapped(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Other values for the length of a block. The parameters' own wait in host memory."""
    kept = {name: _host_copy(parameter) for name, parameter in parameters.items()}
    try:
        assign(parameters, values)
        yield
    finally:
        assign(parameters, kept)


def _host_copy(value: Tensor) -> Tensor:
    return local(value.detach()).to("cpu", copy=True)


class MovingAverage:
    """Exponential moving average of the parameters: average += (1 - decay) * (weights - average).

    float32, since bfloat16 would round the small steps away, and in host memory beside a GPU. Of
    sharded parameters each rank averages its own part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: _host_copy(p).float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.parameters.items():
            value = local(parameter.detach()).to("cpu", torch.float32)
            self.values[name].lerp_(value, 1 - self.decay)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """values: whole."""
        parts = {n: part_of(p, values[n]) for n, p in self.parameters.items() if n in values}
        assign(self.values, {**values, **parts})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the transformer has the averaged weights."""
        with swapped(self.parameters, self.values):
            yield
