"""A folder of prompts' embeddings: filled once by `g2rpo embed` (see writer.py), read by every run.

    embeddings/
        index.json                what made them, and which prompts lie in which shard
        shard-00000.safetensors   prompt_embeds [n, T, D] and pooled_embeds [n, E]
        ...

Opening it looks at every shard's size and header, reading takes the rows asked for and no others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ConfigurationError
from ..metrics import count
from ..policy import Conditions
from .text import fingerprint, present

FORMAT = 1
INDEX = "index.json"
SHARD = re.compile(r"shard-\d{5,}\.safetensors")
NAMES = ("prompt_embeds", "pooled_embeds")
DTYPES = {"bfloat16": "BF16", "float32": "F32"}  # torch's name -> safetensors'


@dataclass(frozen=True)
class Maker:
    """What embeddings depend on besides the prompt. All that lie in one store have the same."""

    max_sequence_length: int  # T
    widths: tuple[int, int]  # D and E
    dtype: str  # a key of DTYPES
    fingerprint: dict[str, str]  # of the encoders: component -> SHA-256

    @property
    def prompt_bytes(self) -> int:
        """Bytes of one prompt's embeddings."""
        tokens, pooled = self.widths
        size: int = getattr(torch, self.dtype).itemsize
        return (self.max_sequence_length * tokens + pooled) * size


@dataclass(frozen=True)
class Shard:
    file: str
    bytes: int
    prompts: tuple[str, ...]


@dataclass
class EmbeddingStore:
    """Reads a folder of embeddings, in any order of prompts."""

    folder: Path
    maker: Maker
    shards: list[Shard] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place: dict[str, tuple[Shard, int]] = {}  # prompt -> its shard, its row there
        for shard in self.shards:
            self.take(shard)

    def take(self, shard: Shard) -> None:
        self.place.update((prompt, (shard, row)) for row, prompt in enumerate(shard.prompts))

    @classmethod
    def open(cls, folder: str | Path) -> EmbeddingStore:
        """To read. Raises ConfigurationError when there is none or when a shard is not whole."""
        folder = Path(folder).expanduser()
        if not (folder / INDEX).is_file():
            raise ConfigurationError(
                f"data.embeddings is {str(folder)!r}, where there is no {INDEX}; expected a folder "
                "that `g2rpo embed` has filled"
            )
        store = cls(folder, *read_index(folder))
        for shard, fault in store.faults().items():
            store._refuse(shard, fault)
        return store

    def __len__(self) -> int:
        return len(self.place)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self.place

    @property
    def max_sequence_length(self) -> int:
        return self.maker.max_sequence_length

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.maker.fingerprint

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those that are not there, each once, in their order."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.place]

    def check(self, folder: Path, max_sequence_length: int) -> None:
        """Raises ConfigurationError unless made as the pipeline in `folder` would make them.

        Encoders that are not there, since training does without them, are not compared.
        """
        self.compare(str(folder), max_sequence_length, fingerprint(folder, present(folder)))

    def compare(self, path: str, max_sequence_length: int, found: dict[str, str]) -> None:
        """The same against a fingerprint, or some components' part of it; path: of the encoders."""
        at, mend = f"data.embeddings is {str(self.folder)!r}", "give the new ones another folder"
        if max_sequence_length != self.max_sequence_length:
            raise ConfigurationError(
                f"{at}, made with max_sequence_length {self.max_sequence_length}; "
                f"data.max_sequence_length is {max_sequence_length}: expected the same, or {mend}"
            )
        other = [name for name, digest in found.items() if self.fingerprint.get(name) != digest]
        if other:
            raise ConfigurationError(
                f"{at}, made with other text encoders than those of {path}: {', '.join(other)} "
                f"differ; expected the same files, or {mend}"
            )

    def read(self, prompts: Sequence[str], device: torch.device) -> Conditions:
        """Rows in the order of the prompts, on the device; of the shards only these are read.

        Raises ConfigurationError for prompts that are not there and for shards that are not whole.
        """
        if absent := self.missing(prompts):
            raise ConfigurationError(
                f"data.embeddings is {str(self.folder)!r}, which lacks "
                f"{count(len(absent), 'prompt')} of this run, the first {absent[0][:60]!r}; run "
                "`g2rpo embed` with the same arguments"
            )
        tokens, pooled = self.maker.widths
        dtype = getattr(torch, self.maker.dtype)
        out = Conditions(
            torch.empty(len(prompts), self.max_sequence_length, tokens, dtype=dtype),
            torch.empty(len(prompts), pooled, dtype=dtype),
        )
        wanted: dict[Shard, list[tuple[int, int]]] = {}  # shard -> rows of out and of the shard
        for i, prompt in enumerate(prompts):
            shard, row = self.place[prompt]
            wanted.setdefault(shard, []).append((i, row))
        for shard, rows in wanted.items():
            if fault := self._fault(shard):
                self._refuse(shard, fault)
            with safe_open(self.folder / shard.file, framework="pt") as file:
                for name in NAMES:
                    stored = file.get_slice(name)
                    for i, row in rows:
                        getattr(out, name)[i : i + 1] = stored[row : row + 1]
        return out.to(device)

    # Whether shards are whole -------------------------------------------------------------------

    def faults(self) -> dict[Shard, str]:
        """Shards that are not what the index says, by their size and header, and what is wrong."""
        return {shard: fault for shard in self.shards if (fault := self._fault(shard))}

    def _fault(self, shard: Shard) -> str | None:
        try:
            size = (self.folder / shard.file).stat().st_size
            if size != shard.bytes:
                return f"has {size:,} bytes; expected {shard.bytes:,}"
            with safe_open(self.folder / shard.file, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in NAMES}
                found = {n: (s.get_dtype(), *s.get_shape()) for n, s in slices.items()}
                metadata = file.metadata() or {}
        except FileNotFoundError:
            return "is missing"
        except (OSError, SafetensorError) as error:
            return f"cannot be read ({error})"
        (tokens, pooled), rows = self.maker.widths, len(shard.prompts)
        dtype = DTYPES[self.maker.dtype]
        shapes = ((dtype, rows, self.max_sequence_length, tokens), (dtype, rows, pooled))
        expected = dict(zip(NAMES, shapes))
        if found != expected:
            return f"holds {found}; expected {expected}"
        if metadata.get("made_of") != made_of(self.maker, shard.prompts):
            return "holds embeddings of other prompts, or by other encoders"
        return None

    def _refuse(self, shard: Shard, fault: str) -> NoReturn:
        raise ConfigurationError(
            f"{self.folder / shard.file} {fault}; remove it and run `g2rpo embed` again, which "
            f"embeds its {count(len(shard.prompts), 'prompt')} once more"
        )


def made_of(maker: Maker, prompts: Sequence[str]) -> str:
    """Ties a shard to the index that names it: a shard of another store does not pass for it."""
    text = json.dumps([maker.max_sequence_length, maker.fingerprint, list(prompts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_index(folder: Path) -> tuple[Maker, list[Shard]]:
    file = folder / INDEX
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}; this version reads {FORMAT}")
        tokens, pooled = map(int, content["widths"])
        maker = Maker(
            int(content["max_sequence_length"]), (tokens, pooled), content["dtype"],
            dict(content["fingerprint"]),
        )  # fmt: skip
        shards = [Shard(s["file"], int(s["bytes"]), tuple(s["prompts"])) for s in content["shards"]]
        if wrong := [s.file for s in shards if not SHARD.fullmatch(s.file)]:
            raise ValueError(f"it names the file {wrong[0]!r}")
        if maker.dtype not in DTYPES:
            raise ValueError(f"its dtype is {maker.dtype!r}; expected one of {list(DTYPES)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{file} cannot be used ({type(error).__name__}: {error}); remove {folder} and run "
            "`g2rpo embed` again"
        ) from error
    return maker, shards
