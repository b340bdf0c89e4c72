"""From prompts to what FLUX is told of them: CLIP's pooled vector and T5's token embeddings.

`TextEncoders` gives the bits of diffusers' `FluxPipeline.encode_prompt`, for a prompt at a time:
what a prompt is embedded to never depends on the prompts beside it, so that an embedding that was
stored is the one that training would have computed itself.

The encoders, 10 GB for FLUX.1-dev, live in host memory and visit the device only to encode. Where
the files have their dtype they are mapped, not copied, into it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..policy import Conditions
from .files import component, read_json, weight_files
from .quiet import quiet

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

# The components, and what their config.json calls them.
CLIP, T5 = "text_encoder", "text_encoder_2"
MODEL_TYPES = {CLIP: "clip_text_model", T5: "t5"}
ENCODERS = (CLIP, T5, "tokenizer", "tokenizer_2")
ENDS = 2**16  # bytes at both ends of a file of weights that its fingerprint reads
# Files any one set of which is a vocabulary. Without one, transformers 5 makes a tokenizer that
# knows no word, and says nothing.
VOCABULARIES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}


class TextEncoders:
    """CLIP and T5 of a FLUX pipeline, with their tokenizers; in eval mode, without gradients.

    folder: the pipeline. device: where prompts are encoded and embeddings stay. dtype: of weights,
    arithmetic and embeddings. max_sequence_length: T5 tokens of every prompt: longer ones are cut
    (`too_long` says which), shorter ones padded, as FLUX was trained. CLIP reads the first 77.

    Raises ConfigurationError naming the file, when a component is missing, damaged or another's.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        max_sequence_length: int = 512,
    ) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        self.device, self.dtype = torch.device(device), dtype
        self.max_sequence_length = max_sequence_length
        self.widths = embedding_widths(folder)
        self.tokenizer = _load_tokenizer(CLIPTokenizer, folder, "tokenizer")
        self.tokenizer_2 = _load_tokenizer(T5TokenizerFast, folder, "tokenizer_2")
        self.text_encoder: CLIPTextModel = _load_encoder(CLIPTextModel, folder, CLIP, dtype)
        self.text_encoder_2: T5EncoderModel = _load_encoder(T5EncoderModel, folder, T5, dtype)
        for name, tokenizer, encoder in (
            ("tokenizer", self.tokenizer, self.text_encoder),
            ("tokenizer_2", self.tokenizer_2, self.text_encoder_2),
        ):
            words, rows = len(tokenizer), encoder.config.vocab_size
            if words > rows:
                raise ConfigurationError(
                    f"{folder / name} knows {words:,} tokens, its encoder only {rows:,}; expected "
                    "the two of one pipeline"
                )
        limit = self.text_encoder.config.max_position_embeddings
        self._clip_tokens = min(limit, self.tokenizer.model_max_length)
        self._visiting = False

    @property
    def prompt_bytes(self) -> int:
        """Bytes of one prompt's embeddings."""
        tokens, pooled = self.widths
        return (self.max_sequence_length * tokens + pooled) * self.dtype.itemsize

    def encode(self, prompts: Sequence[str]) -> Conditions:  # [n, T, D], [n, E] on the device
        """Embeddings of the prompts, bit for bit FluxPipeline.encode_prompt's of each alone.

        T is max_sequence_length, D and E are `widths`.
        """
        tokens, pooled = self.widths
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        out = Conditions(
            torch.empty(len(prompts), self.max_sequence_length, tokens, **options),
            torch.empty(len(prompts), pooled, **options),
        )
        with torch.no_grad(), self.on_device():
            for row, prompt in enumerate(prompts):
                ids = self._ids(self.tokenizer_2, prompt, self.max_sequence_length)
                out.prompt_embeds[row] = self.text_encoder_2(ids)[0][0]
                ids = self._ids(self.tokenizer, prompt, self._clip_tokens)
                out.pooled_embeds[row] = self.text_encoder(ids).pooler_output[0]
        return out

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Those that encode cuts: their T5 tokens are more than max_sequence_length."""
        if not prompts:
            return []
        # verbose: transformers would warn of what is counted here
        tokens = self.tokenizer_2(list(prompts), truncation=False, verbose=False).input_ids
        limit = self.max_sequence_length
        return [prompt for prompt, ids in zip(prompts, tokens) if len(ids) > limit]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keeps the encoders on the device for as long as it lasts, for many an `encode`.

        The weights in host memory stay where they are, so that nothing is copied back.
        """
        if self._visiting or self.device.type == "cpu":
            yield
            return
        encoders = (self.text_encoder, self.text_encoder_2)
        tensors = [t for encoder in encoders for t in (*encoder.parameters(), *encoder.buffers())]
        at_home = [tensor.data for tensor in tensors]
        self._visiting = True
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield
        finally:
            for tensor, data in zip(tensors, at_home):
                tensor.data = data
            self._visiting = False

    def _ids(self, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> Tensor:
        """[1, length] on the device; no attention mask: FLUX attends to the padding."""
        tokens = tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(self.device)


def embedding_widths(folder: Path) -> tuple[int, int]:
    """D of T5's token embeddings and E of CLIP's pooled one, from the configurations alone.

    Raises ConfigurationError naming the file that is missing, damaged or of another kind of model.
    """
    from transformers import CLIPTextConfig, T5Config

    configs = {}
    for name, expected in MODEL_TYPES.items():
        file = component(folder, name) / "config.json"
        configs[name] = read_json(file)
        kind = configs[name].get("model_type")
        if kind != expected:
            raise ConfigurationError(
                f"{file} is of a {kind!r}; expected {expected!r}, as in a FLUX pipeline"
            )
    return T5Config(**configs[T5]).d_model, CLIPTextConfig(**configs[CLIP]).hidden_size


def fingerprint(folder: Path, names: Sequence[str] = ENCODERS) -> dict[str, str]:
    """component -> SHA-256 that tells other encoders and tokenizers apart, in milliseconds.

    Of all files of a tokenizer and of an encoder's config.json; of its weights the name, the size,
    and the first and last 64 KiB: the header is among them, most of 10 GB is not.
    """
    return {name: _fingerprint(component(folder, name)) for name in names}


def _fingerprint(place: Path) -> str:
    weights, digest = [], hashlib.sha256()
    whole = sorted(p for p in place.iterdir() if p.is_file() and not p.name.startswith("."))
    if not place.name.startswith("tokenizer"):
        weights, whole = weight_files(place), [place / "config.json"]
    for file in (*whole, *weights):
        with file.open("rb") as opened:
            if file in weights:
                length = file.stat().st_size
                data = opened.read(ENDS)
                opened.seek(max(ENDS, length - ENDS))
                data += opened.read()
            else:
                data = opened.read()
                length = len(data)
        digest.update(f"{file.name}\0{length}\0".encode() + data)
    return digest.hexdigest()


def present(folder: Path) -> list[str]:
    """The encoders and tokenizers that are there; training from stored embeddings needs none."""
    return [
        name
        for name in ENCODERS
        if (folder / name).is_dir()
        and (name.startswith("tokenizer") or any((folder / name).glob("*.safetensors")))
    ]


def _load_tokenizer(cls: Any, folder: Path, name: str) -> PreTrainedTokenizerBase:
    place = component(folder, name)
    sets = VOCABULARIES[name]
    if not any(all((place / file).is_file() for file in files) for files in sets):
        expected = ", or ".join(" and ".join(files) for files in sets)
        raise ConfigurationError(
            f"{place} has no vocabulary; expected {expected}: copy or download {name} again"
        )
    try:
        return cls.from_pretrained(place, local_files_only=True)
    except Exception as error:  # damage shows in as many ways as there are readers; it is told
        raise _damaged(place, error) from error


def _load_encoder(cls: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    place = component(folder, name)
    weight_files(place)  # says which file is missing or cut short, and how to get it again
    try:
        with quiet("transformers"):  # not diffusers, which `g2rpo embed` never imports
            encoder, info = cls.from_pretrained(
                place, dtype=dtype, use_safetensors=True, local_files_only=True,
                ignore_mismatched_sizes=True, output_loading_info=True,  # refused below, by name
            )  # fmt: skip
    except Exception as error:  # as above
        raise _damaged(place, error) from error
    # transformers would go on with random weights in their place
    if lacking := sorted(info["missing_keys"]):
        raise ConfigurationError(
            f"{place} lacks {len(lacking)} of its weights, {lacking[0]!r} the first; copy or "
            f"download {name} again"
        )
    if other := sorted(info["mismatched_keys"]):
        key, found, expected = other[0]
        raise ConfigurationError(
            f"{place}: {key!r} has shape {tuple(found)}; its config.json says {tuple(expected)}: "
            f"copy or download {name} again"
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{place} holds {len(unused)} weights that a {cls.__name__} has no use for, "
            f"{unused[0]!r} the first", stacklevel=3,
        )  # fmt: skip
    module: nn.Module = encoder
    return module.eval().requires_grad_(False)


def _damaged(place: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{place} cannot be loaded ({type(error).__name__}: {error}); a file in it is damaged or "
        f"of another kind of model: copy or download {place.name} again"
    )
