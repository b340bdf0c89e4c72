"""Trackers: where the metrics of a run go besides metrics.jsonl, which has them all in any case.

    tracker = make_tracker(config.train.tracker, run_dir, config, first_update)
    tracker.log(row)             # a row of metrics.jsonl
    tracker.image(path, update)  # the grid of samples of an evaluation
    tracker.finish()

A resumed run goes on in the same place, and the updates after its checkpoint, which are done again,
are logged again:

    tensorboard   RUN/tensorboard. purge_step hides what an earlier process logged of them.
    wandb         project g2rpo; the run's id is kept in RUN/tracker.json. wandb drops whatever is
                  logged at a step behind its own counter, so that counter is left to wandb and
                  `update` is the axis of every chart. An update done again has two points there,
                  of one value as long as train.deterministic holds. WANDB_MODE and its like act;
                  offline, wandb writes 32 KiB at a time, and a killed process loses the last.
    trackio       project g2rpo; it finds a run by its name alone, so the name, kept in
                  RUN/tracker.json, is the directory's and something random. Two points as above.

No tracker can end a run: the first error in one is said, and from then on it gets nothing more.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from .errors import ConfigurationError
from .metrics import Row, write_beside

if TYPE_CHECKING:
    from .config import Config

PROJECT = "g2rpo"
IDENTITIES = "tracker.json"  # in the run's directory: {"wandb": {"id": ...}, "trackio": {...}}
IMAGE = "samples"  # the key of the grids


class Backend(Protocol):
    """One tracker's own way of taking what a `Tracker` has made ready. It may raise anything."""

    def log(self, update: int, scalars: dict[str, float]) -> None: ...
    def image(self, path: Path, update: int) -> None: ...
    def finish(self) -> None: ...


class Tracker:
    """What a run calls. Without a backend it does nothing; no error of the backend leaves it.

    failed: the first error of the backend, which has been said through on_message and after which
    the backend is not called again; None as long as all went well.
    """

    def __init__(
        self, name: str | None, backend: Backend | None, on_message: Callable[[str], None] = print
    ) -> None:
        self.name, self.failed = name, None
        self._backend, self._on_message = backend, on_message

    def log(self, row: Row) -> None:
        """Sends the finite numbers of a metrics row, at the step row["update"].

        What is None or not finite is left out, for the tracker to show a gap and not a 0.
        """
        self._call("log", row["update"], _scalars(row))

    def image(self, path: Path, update: int) -> None:
        """Sends a PNG, under the key `samples`."""
        self._call("image", path, update)

    def finish(self) -> None:
        """Returns once the tracker says that it has everything. Nothing can be sent afterwards."""
        self._call("finish")
        self._backend = None

    def _call(self, method: str, *arguments: object) -> None:
        if self._backend is None:
            return
        try:
            getattr(self._backend, method)(*arguments)
        except Exception as error:  # the one place: a full disk or a dead network is no reason
            self._backend, self.failed = None, error  # to end a run of days
            self._on_message(
                f"train.tracker {self.name} failed and gets nothing more of this run, which goes "
                f"on; metrics.jsonl has everything: {type(error).__name__}: {error}"
            )


def make_tracker(
    name: str | None,
    run_dir: Path,
    config: Config,
    first_update: int,
    on_message: Callable[[str], None] = print,
) -> Tracker:
    """The tracker of a run, ready to log; name None: one that does nothing.

    run_dir: the run's directory, which exists. first_update: the first one that will be logged; 0
    in a new run, and in a resumed one whatever of it and beyond was logged before is superseded.
    Raises ConfigurationError naming train.tracker when it is not installed, or cannot start.
    """
    if name is None:
        return Tracker(None, None, on_message)
    if name not in BACKENDS:
        raise ConfigurationError(
            f"train.tracker is {name!r}; expected one of {sorted(BACKENDS)}, or null"
        )
    try:
        backend = BACKENDS[name](run_dir, config, first_update)
    except ConfigurationError:
        raise
    except Exception as error:  # before the first update: better said now than found missing later
        raise ConfigurationError(
            f"train.tracker is {name!r}, which does not start: {type(error).__name__}: {error}; "
            "expected it to be ready to log, or train.tracker null"
        ) from error
    return Tracker(name, backend, on_message)


def _scalars(row: Row) -> dict[str, float]:
    """The finite numbers of a row but its update; true and false are 1 and 0, text is no number."""
    return {
        key: int(value) if isinstance(value, numbers.Integral) else float(value)
        for key, value in row.items()
        if key != "update" and isinstance(value, numbers.Real) and math.isfinite(value)
    }


class TensorBoard:
    def __init__(self, run_dir: Path, config: Config, first_update: int) -> None:
        _import("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_update)
        resolved = json.dumps(asdict(config), indent=2, ensure_ascii=False)
        text = "".join(f"    {line}\n" for line in resolved.splitlines())  # Markdown's code block
        self._writer.add_text("config", text, first_update)
        self._writer.flush()

    def log(self, update: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(key, value, update)
        # Written by a thread: only a flush makes its errors ours, and a kill cost no more than this
        self._writer.flush()

    def image(self, path: Path, update: int) -> None:
        import numpy
        from PIL import Image

        with Image.open(path) as picture:
            pixels = numpy.asarray(picture.convert("RGB"))  # [H, W, 3]
        self._writer.add_image(IMAGE, pixels, update, dataformats="HWC")
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, run_dir: Path, config: Config, first_update: int) -> None:
        self._wandb = _import("wandb", "wandb", needs="init")
        self._run = self._wandb.init(
            project=PROJECT,
            id=_identity(run_dir, "wandb", "id", secrets.token_hex(8)),
            resume="allow",
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=asdict(config),
            # capturing the console would take stdout from the display; at the end of a run
            # the curves have been drawn elsewhere
            settings=self._wandb.Settings(console="off", quiet=True),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def log(self, update: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, "update": update})

    def image(self, path: Path, update: int) -> None:
        self._run.log({IMAGE: self._wandb.Image(str(path)), "update": update})

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, run_dir: Path, config: Config, first_update: int) -> None:
        self._trackio = _import("trackio", "trackio", needs="init")
        name = f"{run_dir.resolve().name}-{secrets.token_hex(4)}"
        self._run = self._trackio.init(
            project=PROJECT,
            name=_identity(run_dir, "trackio", "name", name),
            resume="allow",
            config=asdict(config),
            embed=False,
        )

    def log(self, update: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=update)

    def image(self, path: Path, update: int) -> None:
        self._run.log({IMAGE: self._trackio.Image(str(path))}, step=update)

    def finish(self) -> None:
        self._trackio.finish()  # the run's own would be called once more as Python exits


BACKENDS: dict[str, Callable[[Path, Config, int], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _import(tracker: str, module: str, needs: str | None = None) -> ModuleType:
    """needs: a name in it, since a folder ./wandb, where that keeps its files, imports as well."""
    try:
        found = importlib.import_module(module)
        if needs is not None and not hasattr(found, needs):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"train.tracker is {tracker!r}, which is not installed ({error}); get it with: "
            f"pip install {tracker}"
        ) from error
    return found


def _identity(run_dir: Path, tracker: str, key: str, new: str) -> str:
    """What the tracker knows this run by: as tracker.json has it, or else `new`, now kept there."""
    path = run_dir / IDENTITIES
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if tracker in known:
            identity = known[tracker][key]
            if isinstance(identity, str) and identity:
                return identity
            raise ValueError(f"{tracker}.{key} is {identity!r}")
        known |= {tracker: {key: new}}
    except (ValueError, TypeError, KeyError) as error:  # TypeError, KeyError: JSON of another form
        raise ConfigurationError(
            f"{path} is damaged ({type(error).__name__}: {error}); expected "
            f'{{"{tracker}": {{"{key}": "..."}}}}; without the file, {tracker} gets a run anew'
        ) from error
    write_beside(path, json.dumps(known, indent=1).encode())
    return new
