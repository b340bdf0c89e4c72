"""What each choice of a configuration would find on this machine; for `g2rpo doctor`.

Each function returns rows (name, text). As in doctor.py, what cannot be imported is a row that says
why, and no error: the command is needed most where something is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .doctor_packages import PACKAGES, Found, first_line

Rows = list[tuple[str, str]]
FLUX = (1, 512, 24, 128)  # batch, tokens, heads and their width, of attention as it is tried
INSTALLED = {package.module: package.get for package in PACKAGES}


def told(rows: Callable[..., Rows], name: str, *given: object) -> Rows:
    """rows(*given), or a row that says what of this package or of its needs cannot be imported."""
    try:
        return rows(*given)
    except ImportError as error:
        return [(name, f"cannot be told: {first_line(error)}")]


def state(name: str, found: Mapping[str, Found]) -> str:
    """A package: its version, what breaks it, or how to get it."""
    what = found[name]
    if what.error:
        return f"{what.version}, BROKEN: {what.error}"
    return what.version if what.works else f"no: missing; {INSTALLED[name]}"


def attention(gpus: int) -> Rows:
    """model.attention: which run, and what `auto` would choose among or has chosen."""
    from .flux import attention as flux

    names = list(flux.BACKENDS)
    if not gpus:
        return [("auto", "native: on a CPU PyTorch itself decides"),
                ("others", f"{', '.join(names)} are for GPUs")]  # fmt: skip
    import diffusers  # noqa: F401  (what tries them needs it, and would call its absence a fault)
    import torch

    device = torch.device("cuda", 0)
    faults = {name: flux.try_backend(name, FLUX, torch.bfloat16, device) for name in names}
    there = [name for name in names if faults[name] is None]
    auto = f"measures {', '.join(there)}, once, and takes the fastest" if there else "none runs"
    rows = [("auto", auto), ("native", "PyTorch decides")]
    return rows + [(name, "runs" if why is None else f"no: {why}") for name, why in faults.items()]


def optimizers(found: Mapping[str, Found], gpus: int) -> Rows:
    """optimizer.name: which can be used here."""
    import torch

    from g2rpo_kernels.optim import native

    device = torch.device("cuda" if gpus else "cpu")
    try:
        steps = f"yes, on its backend {native.backend_for(device)}"
    except RuntimeError as error:  # of an extension that is there and does not run
        steps = f"no: {first_line(error)}"
    return [
        ("adamw", "yes, torch's fused AdamW"),
        ("adamw8bit", steps),
        ("adamw_streamed", "yes, states in host memory" if gpus else "yes; made for a GPU"),
        *((name, f"yes, {found[name].version}" if found[name].works else state(name, found))
          for name in ("bitsandbytes", "torchao")),
    ]  # fmt: skip


def rewards() -> Rows:
    """Published scorers: whose files are in the user's cache."""
    from .rewards.load import default_folder, missing, names

    rows = []
    for name in names():
        if name == "judge":
            rows.append((name, "a model behind an endpoint, which a run names; no files"))
            continue
        commands, folder = missing(name), default_folder(name)
        if not commands:
            rows.append((name, f"yes, in {folder}"))
            continue
        more = f"; and {len(commands) - 1} more" if len(commands) > 1 else ""
        rows.append((name, f"no: not in {folder}; {commands[0]}{more}"))
    return rows


def trackers(found: Mapping[str, Found]) -> Rows:
    """train.tracker; metrics.jsonl is written in any case."""
    return [(name, f"yes, {found[name].version}" if found[name].works else state(name, found))
            for name in ("tensorboard", "wandb", "trackio")]  # fmt: skip


def distributed(gpus: Sequence[str]) -> Rows:
    """What several processes would talk through."""
    import torch.distributed as dist

    if not dist.is_available():
        return [("torch.distributed", "no: this torch was built without it")]
    there = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    count = len(gpus)
    said = {
        "nccl": f"yes, between {count} GPUs" if count > 1 else
                "there, with one GPU and nobody to talk to" if count else "there, without a GPU",
        "gloo": "yes, between processes on CPUs",
    }  # fmt: skip
    rows = [(name, said[name] if ok else "no: torch was built without it")
            for name, ok in there.items()]  # fmt: skip
    return [*rows, ("GPUs", f"{count}: a process each" if count else "none")]


def sections(found: Mapping[str, Found], gpus: Sequence[str]) -> list[tuple[str, Rows]]:
    """Titles and rows, in the order in which they are shown. gpus: a line a GPU, of `doctor`."""
    return [
        ("attention, for model.attention", told(attention, "attention", len(gpus))),
        ("optimizers, for optimizer.name", told(optimizers, "optimizers", found, len(gpus))),
        ("published scorers, for rewards", told(rewards, "scorers")),
        ("trackers, for train.tracker", trackers(found)),
        ("several processes", told(distributed, "torch.distributed", gpus)),
    ]
