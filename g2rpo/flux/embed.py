"""`g2rpo embed`: fills data.embeddings with the prompts' embeddings, ahead of training.

Training then needs neither the text encoders, 10 GB for FLUX.1-dev, nor the time to move them to
the GPU for every update. Only what is missing is embedded, so the command can be interrupted,
killed and repeated, and shards that have been damaged are made whole again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import Config
from ..data import prompts_of_run, read_evaluation_prompts, read_prompts
from ..errors import ConfigurationError
from ..metrics import clock, count, duration, size
from ..models import be_deterministic, choose_device
from ..policy import Conditions
from .files import resolve_folder
from .store import Maker, Shard
from .text import TextEncoders, embedding_widths, fingerprint
from .writer import StoreWriter, writing

SHARD_BYTES = 2**28  # of a whole shard, about: all that a kill can lose
LINE_SECONDS = 10.0  # between signs of life, where there is no terminal for a bar
DTYPE = torch.bfloat16  # as training embeds


def embed(config: Config, *, everything: bool = False) -> int:
    """Embed the prompts that a run of this configuration uses, or everything in data.prompts and
    data.evaluation_prompts.

    Returns an exit code: 0, or 130 after Ctrl-C. Raises ConfigurationError for keys that cannot be
    and when the disk is too small, TrainingError when it fills up all the same.
    """
    source, target = _keys(config)
    prompts = read_prompts(source, config.data.column)
    evaluation_prompts = read_evaluation_prompts(config, prompts)
    known = list(dict.fromkeys([*prompts, *evaluation_prompts]))
    if everything:
        wanted, files = known, [source]
        if config.data.evaluation_prompts is not None:
            files.append(config.data.evaluation_prompts)
        asked = f"All {count(len(known), 'prompt')} of {' and '.join(files)}"
    else:
        wanted = prompts_of_run(config, prompts, evaluation_prompts)
        updates = count(config.train.updates, "update")
        asked = (
            f"{len(wanted):,} of {count(len(known), 'prompt')} will be used by {updates} and the "
            "evaluations"
        )
    folder = resolve_folder(config.model.path, transformer_weights=False)  # 24 GB on the hub
    maker = Maker(
        config.data.max_sequence_length, embedding_widths(folder),
        str(DTYPE).removeprefix("torch."), fingerprint(folder),
    )  # fmt: skip
    with writing(target, maker, config.model.path) as store:
        try:
            return _fill(store, wanted, asked, config, folder)
        except KeyboardInterrupt:
            kept = len(store) - sum(len(shard.prompts) for shard in store.faults())
            print(
                f"Stopped; {count(kept, 'prompt')} in {target} are kept. The same command goes on "
                "from there"
            )
            return 130


def _keys(config: Config) -> tuple[str, str]:
    """data.prompts and data.embeddings. Raises ConfigurationError where a key names nothing."""
    config.data.validate()
    config.train.validate()
    if config.model.path == "digits":
        raise ConfigurationError(
            "model.path is 'digits', whose prompts need no embedding; expected a FLUX pipeline, as "
            "a folder or a hub id"
        )
    if config.data.prompts is None:
        raise ConfigurationError("data.prompts is null; expected the file of prompts to embed")
    if config.data.embeddings is None:
        raise ConfigurationError(
            "data.embeddings is null; expected the folder to fill, such as embeddings"
        )
    return config.data.prompts, config.data.embeddings


class Job(NamedTuple):
    """One shard's work."""

    prompts: Sequence[str]
    instead_of: Shard | None  # the shard that is not whole, if it is there to be replaced


def _fill(
    store: StoreWriter, wanted: Sequence[str], asked: str, config: Config, folder: Path
) -> int:
    faults = store.faults()
    for shard, fault in faults.items():
        again = count(len(shard.prompts), "prompt")
        print(f"{store.folder / shard.file} {fault}: its {again} are embedded again")
    lost = {prompt for shard in faults for prompt in shard.prompts}
    missing = store.missing(wanted)
    there = len(wanted) - len(missing) - len(lost.intersection(wanted))
    todo = len(missing) + len(lost)
    if not todo:
        print(f"{asked}; all are in {store.folder} already: nothing to embed")
        return 0
    one, free = store.maker.prompt_bytes, shutil.disk_usage(store.folder).free
    print(
        f"{asked}; {there:,} {'is' if there == 1 else 'are'} there already; {todo:,} x {size(one)} "
        f"= {size(todo * one)} to write into {store.folder} ({size(free)} free)", flush=True,
    )  # fmt: skip
    if todo * one > free:
        raise ConfigurationError(
            f"data.embeddings is {str(store.folder)!r}, on a disk with {size(free)} free; expected "
            f"the {size(todo * one)} that {count(todo, 'prompt')} take: make room, or name a "
            "folder on a larger disk"
        )
    rows = max(1, SHARD_BYTES // one)
    chunks = [missing[i : i + rows] for i in range(0, len(missing), rows)]
    jobs = [Job(shard.prompts, shard) for shard in faults] + [Job(chunk, None) for chunk in chunks]
    began = time.monotonic()
    encoders = _load(config, folder)
    if cut := encoders.too_long([prompt for job in jobs for prompt in job.prompts]):
        print(
            f"{len(cut):,} of them {'has' if len(cut) == 1 else 'have'} more than "
            f"{encoders.max_sequence_length} T5 tokens (data.max_sequence_length) and will be cut, "
            f"the first: {cut[0][:60]!r}", flush=True,
        )  # fmt: skip
    try:
        with encoders.on_device(), _progress(todo) as advance:
            for job in jobs:
                conditions = _encode(encoders, job.prompts, advance)
                if job.instead_of is None:
                    store.add(job.prompts, conditions)
                else:
                    store.replace(job.instead_of, conditions)
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"model.device is {config.model.device!r}, where the text encoders do not fit; "
            "expected more free memory, or --model.device cpu for this command. PyTorch says: "
            f"{error}"
        ) from error
    stored = sum(shard.bytes for shard in store.shards)
    print(
        f"Embedded {count(todo, 'prompt')} in {duration(time.monotonic() - began)}; "
        f"{store.folder} holds {count(len(store), 'prompt')}, {size(stored)} in "
        f"{count(len(store.shards), 'shard')}"
    )
    return 0


def _load(config: Config, folder: Path) -> TextEncoders:
    device = choose_device(config.model.device)
    if config.train.deterministic:  # as training sets it, or the same prompt has other bits there
        be_deterministic(device)
    print(f"Loading the text encoders of {config.model.path}", flush=True)
    return TextEncoders(folder, device, DTYPE, config.data.max_sequence_length)


def _encode(
    encoders: TextEncoders, prompts: Sequence[str], advance: Callable[[], None]
) -> Conditions:
    """In host memory, a prompt at a time."""
    rows = []
    for prompt in prompts:
        rows.append(encoders.encode([prompt]).to(torch.device("cpu")))
        advance()
    return Conditions(
        torch.cat([row.prompt_embeds for row in rows]),
        torch.cat([row.pooled_embeds for row in rows]),
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after every prompt: a bar on a terminal, plain lines elsewhere."""
    console = Console()
    if console.is_interactive:
        columns = (
            TextColumn("prompts"), BarColumn(), MofNCompleteColumn(),
            TextColumn("eta"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.advance(task)
        return
    began = last = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            pace = done / (now - began)
            eta = clock((total - done) / pace)
            print(f"{done:,}/{total:,} prompts  {pace:.3g} prompts/s  eta {eta}", flush=True)
            last = now

    yield advance
