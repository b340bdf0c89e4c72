"""ImageReward v1.0: a reward of human preference (Xu et al., arXiv 2304.05977).

BLIP reads the prompt and looks at the image; its first token goes through five linear layers to one
number (github.com/THUDM/ImageReward, ImageReward/ImageReward.py). Here on transformers' BLIP, from
the published file.

The prompt is read with the image before it, so of the text only the tokens are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .blip_weights import fill, text_tower, vision_tower
from .on_device import OnDevice
from .preprocess import Preprocess, check
from .tensors import read_tensors

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BlipTextModel, BlipVisionModel

WEIGHTS, MED_CONFIG, VOCABULARY = "ImageReward.pt", "med_config.json", "vocab.txt"
SOURCES = {
    WEIGHTS: "THUDM/ImageReward",
    MED_CONFIG: "THUDM/ImageReward",
    VOCABULARY: "google-bert/bert-base-uncased",
}
ADDED = ("[DEC]", "[ENC]")  # BLIP's tokens, after the words of BERT
TOKENS = 35  # of a prompt, with the first and the last
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores of the training set
KEPT = 4096  # prompts whose tokens are kept
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pre-training


class ImageReward(OnDevice):
    """ImageReward(images, prompts) -> [N] float32: about standard normal, higher is better.

    Made by `load_imagereward`. batch_size: images of one forward. truncated_prompts: of how many
    prompts only the first 35 tokens were read; each distinct one is read once, as long as it
    is among the last 4096.
    """

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: Tokenizer,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size is {batch_size}; expected at least 1")
        super().__init__(vision, text, head)
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        self.batch_size = batch_size
        self.truncated_prompts = 0
        self._preprocess = Preprocess(vision.config.image_size)
        self._tokens: dict[str, tuple[int, ...]] = {}  # of at most KEPT prompts, the oldest first

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N, 3, H, W] floating in [0, 1], N prompts -> [N] float32 on the images' device.

        NaN for images that are not finite. Raises TypeError or ValueError for other arguments.
        """
        checked, finite = check(images, prompts)
        scores = images.new_full((len(images),), torch.nan, dtype=torch.float32)
        rows = finite.nonzero().flatten().tolist()
        if rows:
            self.come_back()
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            pixels = self._preprocess(checked[some].to(self.device))
            tokens = torch.tensor([self._read(prompts[row]) for row in some], device=self.device)
            scores[some] = self._score(pixels, tokens).to(scores.device)
        return scores

    def _score(self, pixels: Tensor, tokens: Tensor) -> Tensor:  # [n, 3, S, S], [n, 35] -> [n]
        seen = self.vision(pixel_values=pixels).last_hidden_state  # [n, patches + 1, width]
        pad = self.tokenizer.token_to_id("[PAD]")
        # no mask for the image: all of it is looked at
        read = self.text(
            input_ids=tokens, attention_mask=(tokens != pad).long(), encoder_hidden_states=seen
        )
        raw = self.head(read.last_hidden_state[:, 0].float()).squeeze(1)
        return (raw - MEAN) / STD

    def _read(self, prompt: str) -> tuple[int, ...]:
        """TOKENS token ids: [CLS], the prompt's or the first of them, [SEP], then [PAD]."""
        if prompt not in self._tokens:
            ids = self.tokenizer.encode(prompt).ids
            if len(ids) > TOKENS:
                self.truncated_prompts += 1
                ids = [*ids[: TOKENS - 1], ids[-1]]
            pad = self.tokenizer.token_to_id("[PAD]")
            while len(self._tokens) >= KEPT:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[prompt] = (*ids, *[pad] * (TOKENS - len(ids)))
        return self._tokens[prompt]


def load_imagereward(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
) -> ImageReward:
    """ImageReward from a folder with ImageReward.pt, med_config.json and vocab.txt.

    path: the folder, or the file of weights in it, under any name (.safetensors too). dtype: of
    BLIP's weights and arithmetic; the last layers are float32. tokenizer: the folder with
    bert-base-uncased's vocab.txt, if another. batch_size: images of
    one forward.

    Raises ConfigurationError naming the file that is missing (with the command that downloads it),
    damaged, with code in it, or not ImageReward's.
    """
    path = Path(path).expanduser()
    weights = path / WEIGHTS if path.is_dir() or not path.suffix else path
    folder = weights.parent
    words = (Path(tokenizer).expanduser() if tokenizer is not None else folder) / VOCABULARY
    med_config = folder / MED_CONFIG
    for file in (weights, med_config, words):
        if not file.is_file():
            raise ConfigurationError(
                f"{file} is missing; expected ImageReward's. Run `{_download(file)}`"
            )
    tensors = read_tensors(weights, f"run `{_download(weights)} --force-download`")
    name = str(weights)
    if not any(key.startswith("blip.") for key in tensors):
        raise ConfigurationError(
            f"{name} is not ImageReward's: it has {next(iter(tensors))!r} and {len(tensors) - 1} "
            "other tensors; expected blip.visual_encoder.*, blip.text_encoder.* and mlp.layers.*"
        )
    blip = {
        key.removeprefix("blip."): value
        for key, value in tensors.items()
        if key.startswith("blip.") and not key.startswith(UNUSED)
    }
    vision = vision_tower(blip, name, dtype)
    text = text_tower(blip, med_config, name, dtype)
    if text.config.encoder_hidden_size != vision.config.hidden_size:
        raise ConfigurationError(
            f"{name}: its text tower looks at {text.config.encoder_hidden_size} channels, its "
            f"vision tower has {vision.config.hidden_size}; expected as many"
        )
    head = _head(tensors, text.config.hidden_size, name)
    reader = _tokenizer(words, text.config.vocab_size)
    return ImageReward(vision, text, head, reader, batch_size).to(device)


def _head(tensors: Mapping[str, Tensor], width: int, name: str) -> nn.Sequential:
    """The linear layers one after the other: there is nothing between them but dropout."""
    found: dict[int, Tensor] = {}
    for key, value in tensors.items():
        if (match := re.fullmatch(r"mlp\.layers\.(\d+)\.weight", key)) and value.ndim == 2:
            found[int(match[1])] = value
    numbers = sorted(found)
    sizes = [width, *(found[number].shape[0] for number in numbers)]
    if not numbers or sizes[-1] != 1:
        raise ConfigurationError(
            f"{name}: mlp.layers leads from {' to '.join(map(str, sizes))}; expected linear layers "
            f"from {width} to 1"
        )
    with torch.device("meta"):
        head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))
    places = {
        f"{place}.{part}": f"mlp.layers.{number}.{part}"
        for place, number in enumerate(numbers)
        for part in ("weight", "bias")
        if f"mlp.layers.{number}.{part}" in tensors
    }
    return fill(head, tensors, places, name, torch.float32)


def _tokenizer(words: Path, vocabulary: int) -> Tokenizer:
    """bert-base-uncased's, with BLIP's two tokens."""
    from tokenizers import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(words), lowercase=True)
    except Exception as error:  # of no class of its own
        raise ConfigurationError(
            f"{words} cannot be read as a vocabulary of BERT ({error}); run `{_download(words)} "
            "--force-download`"
        ) from error
    tokenizer.add_special_tokens(list(ADDED))
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigurationError(
            f"{words} has {tokenizer.get_vocab_size():,} tokens with {' and '.join(ADDED)}, the "
            f"model {vocabulary:,}; expected bert-base-uncased's: run `{_download(words)}`"
        )
    return tokenizer


def _download(file: Path) -> str:
    name = file.name if file.name in SOURCES else WEIGHTS
    return f"hf download {SOURCES[name]} {name} --local-dir {file.parent}"
