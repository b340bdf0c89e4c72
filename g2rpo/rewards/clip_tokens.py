"""Prompts as CLIP's text tower reads them: open_clip's and transformers' tokens are the same ones.

One vocabulary serves all CLIPs here, that of OpenAI's ViT-L/14: a FLUX pipeline has it in its
folder `tokenizer`. A text ends in the end-of-text token, and its features are those at that place.
The tower looks back only, so what pads the rest changes nothing; it is 0, as in open_clip. Where
the end is, is known here from the length: transformers looks for its id, and open_clip for the
greatest, which are the same place.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # any one set of files
# ftfy's, which open_clip cleans prompts with: quotes are straightened, ligatures and characters of
# other widths are what they stand for.
QUOTES = {**dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"), **dict.fromkeys(
    range(0x201C, 0x2020), '"')}  # fmt: skip
WIDE = (range(0xFB00, 0xFB07), range(0xFF01, 0xFFF0))


class Tokens(NamedTuple):
    ids: Tensor  # [n, context] int64
    ends: Tensor  # [n] int64, where the end-of-text token stands
    cut: list[bool]  # which prompts were longer


def open_clip_text(prompt: str) -> str:
    """A prompt as open_clip cleans it before it reads it: HTML's entities, ftfy, white space.

    Of ftfy this is what changes the characters people type; broken encodings are not repaired.
    """
    text = html.unescape(html.unescape(prompt)).translate(QUOTES)
    text = "".join(
        unicodedata.normalize("NFKC", c) if any(ord(c) in wide for wide in WIDE) else c
        for c in text
    )
    return " ".join(text.split())


class ClipTokens:
    """Of a folder with CLIP's vocabulary.

    vocabulary: rows of the model's embedding, which the tokenizer has to know, no more and no less.
    context: tokens of a prompt. clean: applied to every prompt first.

    Raises ConfigurationError naming the folder.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: int,
        context: int,
        clean: Callable[[str], str] = str,
    ) -> None:
        from transformers import CLIPTokenizerFast

        if not has_vocabulary(folder):
            raise ConfigurationError(f"{folder} has no vocabulary; expected {_expected()}")
        try:
            self.tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # damage shows in as many ways as there are readers; it is told
            raise ConfigurationError(
                f"{folder} cannot be loaded as a tokenizer of CLIP ({type(error).__name__}: "
                f"{error}); copy or download it again"
            ) from error
        if len(self.tokenizer) != vocabulary:
            raise ConfigurationError(
                f"{folder} knows {len(self.tokenizer):,} tokens, the model {vocabulary:,}; "
                "expected the tokenizer it was trained with"
            )
        self.context, self.clean = context, clean

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """On the host. Longer prompts lose what comes before the end-of-text token."""
        cleaned = [self.clean(prompt) for prompt in prompts]
        # verbose: transformers would warn of what is counted here
        found = self.tokenizer(cleaned, truncation=False, verbose=False).input_ids
        ids = torch.zeros(len(prompts), self.context, dtype=torch.int64)
        for row, tokens in zip(ids, found):
            if len(tokens) > self.context:
                tokens = [*tokens[: self.context - 1], self.tokenizer.eos_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
        lengths = torch.tensor([len(tokens) for tokens in found], dtype=torch.int64)
        ends = lengths.clamp(max=self.context) - 1
        return Tokens(ids, ends, (lengths > self.context).tolist())


def has_vocabulary(folder: Path) -> bool:
    return any(all((folder / file).is_file() for file in files) for files in VOCABULARIES)


def _expected() -> str:
    return ", or ".join(" and ".join(files) for files in VOCABULARIES)
