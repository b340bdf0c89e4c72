"""A FLUX pipeline as the trainer's `Model`: its transformer is trained, its autoencoder draws.

    model = load_flux(config)

The transformer and the autoencoder are on the device. The text encoders are not loaded at all where
`g2rpo embed` has stored the embeddings (data.embeddings); otherwise at the first prompt, into host
memory, from where they visit the device. The scheduler is not used: the trainer has its own
schedule.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import prompts_of_run, read_evaluation_prompts, read_prompts
from ..errors import ConfigurationError, TrainingError
from ..metrics import count, duration, size
from ..models import choose_device
from ..policy import Conditions, FluxPolicy
from .attention import set_attention
from .files import component, resolve_folder, weight_files
from .images import ImageDecoder, latent_shape, position_ids, shrinkage
from .loading import check_weights_file, load_transformer, load_vae, weights_bytes
from .store import EmbeddingStore
from .text import CLIP, T5, TextEncoders, embedding_widths

SIDE = 720  # pixels, where rollout.height or rollout.width is null
SLOW_BYTES = 10**9  # to read: from here on it is said before it is done
CACHE_BYTES = 2**30  # of embeddings in host memory: 250 prompts of FLUX.1-dev

Embedder = Callable[[Sequence[str]], Conditions]


class FluxModel:
    """What `policy.Model` asks for, of a pipeline folder.

    policy: the transformer. decoder: the autoencoder. embedder: from prompts to embeddings on the
    policy's device, a row a prompt. folder: the pipeline's, on this machine.
    """

    def __init__(
        self,
        folder: Path,
        policy: FluxPolicy,
        decoder: ImageDecoder,
        embedder: Embedder,
        prompts: Sequence[str],
        evaluation_prompts: Sequence[str],
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.prompts, self.evaluation_prompts = list(prompts), list(evaluation_prompts)
        self.latent_shape = latent_shape(decoder.height, decoder.width, decoder.vae.config)
        self._decoder = decoder
        self._embedder = embedder

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """A row a prompt, on the device: always the same bits, whatever prompts are beside it."""
        return self._embedder(prompts)

    def decode(self, latents: Tensor) -> Tensor:  # [N, L, C] -> [N, 3, H, W] float32 in [0, 1]
        """The images of latents; see `ImageDecoder.decode`."""
        return self._decoder.decode(latents)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know beside the weights: how images are decoded by now."""
        return self._decoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._decoder.load_state_dict(state)


class CachedEncoders:
    """Embeds as it goes: text encoders that are loaded at the first prompt, and a cache of rows.

    The cache is in host memory, of so many bytes; the row that was asked for longest ago goes
    first.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoders],
        device: torch.device,
        limit: int = CACHE_BYTES,
        on_message: Callable[[str], None] = print,
    ) -> None:
        self._load, self._device, self._limit = load, device, limit
        self._on_message: Callable[[str], None] | None = on_message  # None: it has been said
        self._encoders: TextEncoders | None = None
        self._rows: OrderedDict[str, Conditions] = OrderedDict()  # [1, T, D], [1, E] on the host

    def __call__(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of the prompts, on the device.

        Raises TrainingError when the encoders do not fit beside what is there already.
        """
        absent = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        if absent:
            encoded = self._encode(absent)
            rows |= {prompt: _copy(encoded[i : i + 1]) for i, prompt in enumerate(absent)}
        for prompt, row in rows.items():
            self._rows[prompt] = row
            self._rows.move_to_end(prompt)
        while sum(map(_bytes, self._rows.values())) > self._limit:
            self._rows.popitem(last=False)
        wanted = [rows[prompt] for prompt in prompts]
        return Conditions(
            torch.cat([row.prompt_embeds for row in wanted]),
            torch.cat([row.pooled_embeds for row in wanted]),
        ).to(self._device)

    def _encode(self, prompts: Sequence[str]) -> Conditions:
        if self._encoders is None:
            self._encoders = self._load()
        cut = self._encoders.too_long(prompts)
        if cut and self._on_message is not None:
            self._on_message(
                f"Prompts of more than {self._encoders.max_sequence_length} T5 tokens "
                f"(data.max_sequence_length) are cut, the first: {cut[0][:60]!r}"
            )
            self._on_message = None
        try:
            return self._encoders.encode(prompts)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"the text encoders do not fit on {self._device} beside what is there; run `g2rpo "
                "embed` with the same arguments and --data.embeddings FOLDER, then train with that "
                f"folder. PyTorch says: {error}"
            ) from error


def _copy(row: Conditions) -> Conditions:
    """On the host, and of its own: a row of a large tensor would keep all of it."""
    host = torch.device("cpu")
    return Conditions(row.prompt_embeds.to(host, copy=True), row.pooled_embeds.to(host, copy=True))


def _bytes(row: Conditions) -> int:
    return row.prompt_embeds.nbytes + row.pooled_embeds.nbytes


def load_flux(config: Config, on_message: Callable[[str], None] = print) -> FluxModel:
    """The model of a run on FLUX, from the configuration's model, data and rollout groups.

    on_message: told what was loaded, and whenever images are decoded otherwise for want of memory.
    What is small is checked first. Raises ConfigurationError naming the key or the file.
    """
    device = choose_device(config.model.device)
    dtype = getattr(torch, config.model.dtype or "bfloat16")
    if config.data.prompts is None:
        raise ConfigurationError(
            "data.prompts is null; expected a file of prompts, since FLUX comes with none"
        )
    prompts = read_prompts(config.data.prompts, config.data.column)
    evaluation_prompts = read_evaluation_prompts(config, prompts)
    stored = config.data.embeddings is not None
    weights = None
    if config.model.transformer is not None:
        weights = check_weights_file(Path(config.model.transformer).expanduser())
    folder = resolve_folder(
        config.model.path, transformer_weights=weights is None, text_encoder_weights=not stored
    )
    if stored:
        used = prompts_of_run(config, prompts, evaluation_prompts)
        embedder, widths = _stored(config, folder, used, device)
    else:
        embedder, widths = _cached(config, folder, device, on_message)
    import diffusers  # noqa: F401  (seconds, which are not the loading's)

    started = time.monotonic()
    try:
        vae = load_vae(folder, dtype, device)
        height, width = config.rollout.height or SIDE, config.rollout.width or SIDE
        shape = latent_shape(height, width, vae.config)
        files = [weights] if weights else weight_files(component(folder, "transformer"))
        if (total := weights_bytes(files)) >= SLOW_BYTES:
            on_message(f"Reading the transformer of {weights or config.model.path}, {size(total)}")
        transformer = load_transformer(folder, weights, dtype, device)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"model.device is {str(device)!r}, where {config.model.path} in {_name(dtype)} does "
            f"not fit; expected more free memory. PyTorch says: {error}"
        ) from error
    _check_widths(folder, transformer, shape[1], widths)
    embeddings = f"embeddings from {config.data.embeddings}" if stored else "embeds as it goes"
    on_message(
        f"{config.model.path}: transformer {_size(transformer)} and autoencoder "
        f"{_size(vae)} in {_name(dtype)} on {device}, loaded in "
        f"{duration(time.monotonic() - started)}; {embeddings}"
    )
    side = shrinkage(vae.config)
    tokens = shape[0] + config.data.max_sequence_length
    # Kept in the run's config.yaml: what a resumed run uses must be the same.
    config.model.attention = set_attention(
        transformer, config.model.attention, config.rollout.branch_batch, tokens, on_message
    )
    ids = position_ids(height // side, width // side, device)
    policy = FluxPolicy(transformer, ids, config.rollout.guidance)
    decoder = ImageDecoder(vae, height, width, device, on_message)
    return FluxModel(folder, policy, decoder, embedder, prompts, evaluation_prompts)


def _check_widths(
    folder: Path, transformer: nn.Module, channels: int, widths: tuple[int, int]
) -> None:
    """What the transformer is given must be as wide as it expects."""
    for key, value, giver in (
        ("in_channels", channels, "4 times the latent_channels of its vae"),
        ("joint_attention_dim", widths[0], "the width of T5's embeddings"),
        ("pooled_projection_dim", widths[1], "the width of CLIP's embedding"),
    ):
        if transformer.config[key] != value:
            raise ConfigurationError(
                f"{folder / 'transformer' / 'config.json'} has {key} {transformer.config[key]}; "
                f"expected {value}, {giver}: are these the components of one FLUX pipeline, "
                "without a further image as input?"
            )


def _stored(
    config: Config, folder: Path, used: Sequence[str], device: torch.device
) -> tuple[Embedder, tuple[int, int]]:
    """Embeddings from the folder that `g2rpo embed` filled, with all that this run will use."""
    place = str(config.data.embeddings)
    store = EmbeddingStore.open(place)
    store.check(folder, config.data.max_sequence_length)
    if missing := store.missing(used):
        raise ConfigurationError(
            f"data.embeddings is {place!r}, which lacks {count(len(missing), 'prompt')} that this "
            f"run will use, the first {missing[0]!r}; run `g2rpo embed` with the same arguments"
        )
    return lambda wanted: store.read(wanted, device), store.maker.widths


def _cached(
    config: Config, folder: Path, device: torch.device, on_message: Callable[[str], None]
) -> tuple[Embedder, tuple[int, int]]:
    """Embeddings as it goes. In bfloat16 whatever the transformer is in, as the stored ones."""
    for name in (CLIP, T5):  # they are loaded when all else is: what is missing is told now
        weight_files(component(folder, name))
    length = config.data.max_sequence_length

    def load() -> TextEncoders:
        return TextEncoders(folder, device, max_sequence_length=length)

    return CachedEncoders(load, device, on_message=on_message), embedding_widths(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(module: nn.Module) -> str:
    return size(sum(parameter.nbytes for parameter in module.parameters()))
