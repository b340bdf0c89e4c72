"""Fills a folder of prompts' embeddings, shard by shard; store.py reads it and says what is in it.

A shard is written beside, synced and renamed, and named in index.json only then, which is replaced
in the same way: whenever writing is cut off, what index.json names is whole, and what it does not
name is removed when writing goes on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save

from ..errors import ConfigurationError, TrainingError
from ..lock import alone
from ..metrics import count, size, write_beside
from ..policy import Conditions
from .store import FORMAT, INDEX, NAMES, SHARD, EmbeddingStore, Maker, Shard, made_of, read_index

# As write_beside names them.
LEFTOVER = re.compile(r"\.(shard-\d{5,}\.safetensors|index\.json)\.tmp")


@contextmanager
def writing(folder: str | Path, maker: Maker, path: str) -> Iterator[StoreWriter]:
    """The store in a folder, to be written by this process alone: a new one, or what is there.

    What is there may have `faults`. What was left half-written is removed. path: of the encoders,
    as messages name them.

    Raises ConfigurationError when another process writes there, when others' files lie there, or
    when the embeddings there were made otherwise.
    """
    folder = Path(folder).expanduser()
    at = f"data.embeddings is {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ConfigurationError(
            f"{at}; expected a folder that can be made and written: {error}"
        ) from error
    with alone(folder, f"{at}, where another `g2rpo embed` is writing; expected one at a time"):
        yield _start(folder, maker, path)


def _start(folder: Path, maker: Maker, path: str) -> StoreWriter:
    at, store = f"data.embeddings is {str(folder)!r}", StoreWriter(folder, maker)
    if (folder / INDEX).is_file():
        there = StoreWriter(folder, *read_index(folder))
        if there.shards:  # one without any is free to become another
            there.compare(path, maker.max_sequence_length, maker.fingerprint)
            store = there
    elif others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        raise ConfigurationError(
            f"{at}, where there is {others[0]!r} and no {INDEX}; expected a new or empty folder, "
            "or one that `g2rpo embed` has filled"
        )
    named = {shard.file for shard in store.shards}
    try:
        for file in list(folder.iterdir()):
            unnamed = SHARD.fullmatch(file.name) and file.name not in named
            if unnamed or LEFTOVER.fullmatch(file.name):
                file.unlink()
        store.write_index(store.shards)  # first of all: without it, shards would be others' files
    except OSError as error:
        raise ConfigurationError(f"{at}; expected a folder that can be written: {error}") from error
    return store


class StoreWriter(EmbeddingStore):
    """An `EmbeddingStore` that can be added to; `writing` gives one."""

    def add(self, prompts: Sequence[str], conditions: Conditions) -> Shard:
        """Write a new shard, and return once it is on the disk and in the index.

        Raises TrainingError when the disk does not take it; all that was there stays valid.
        """
        last = max((int(shard.file[6:].partition(".")[0]) for shard in self.shards), default=-1)
        return self._write(f"shard-{last + 1:05d}.safetensors", prompts, conditions)

    def replace(self, shard: Shard, conditions: Conditions) -> Shard:
        """Write a shard that was not whole once more. Otherwise as `add`."""
        return self._write(shard.file, shard.prompts, conditions)

    def _write(self, file: str, prompts: Sequence[str], conditions: Conditions) -> Shard:
        tensors = {name: getattr(conditions, name).cpu().contiguous() for name in NAMES}
        data = save(tensors, metadata={"made_of": made_of(self.maker, prompts)})
        shard = Shard(file, len(data), tuple(prompts))
        before = {old.file: old for old in self.shards}
        shards = list((before | {file: shard}).values())
        try:
            write_beside(self.folder / file, data)
            self.write_index(shards)
        except OSError as error:
            for name in (f".{file}.tmp", f".{INDEX}.tmp", *({file} - before.keys())):
                (self.folder / name).unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise TrainingError(
                f"{self.folder} could not take a shard of {size(len(data))} ({size(free)} are "
                f"free): {error}. The {count(len(self), 'prompt')} there stay valid; make room, "
                "then run `g2rpo embed` again to go on"
            ) from error
        self.shards = shards
        self.take(shard)
        return shard

    def write_index(self, shards: Sequence[Shard]) -> None:
        listed = [{"file": s.file, "bytes": s.bytes, "prompts": s.prompts} for s in shards]
        content = {"format": FORMAT, **vars(self.maker), "shards": listed}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        write_beside(self.folder / INDEX, text.encode())
