"""Tensors of the files in which scorers are published, and nothing but tensors.

Most are pickles, which may hold any program. They are read by `torch.load(weights_only=True)`
alone, which runs none; one that needs more is refused, never trusted.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..flux.files import read_header

AGAIN = "download it again"


def read_tensors(file: Path, mend: str = AGAIN) -> dict[str, Tensor]:
    """name -> tensor, on the host, of a .safetensors file or a checkpoint of torch (any other).

    A checkpoint may keep them under `state_dict` or `model`; what stands beside that (an epoch, an
    optimizer) is left. Where the file is an archive, as since torch 1.6, it is mapped into memory
    and not read before use: copy what you keep. mend: what an error of a damaged file advises.

    Raises ConfigurationError naming the file: missing, damaged, with code, or without tensors.
    """
    if not file.is_file():
        raise ConfigurationError(f"{file} is no file; {mend}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        read_header(file)  # says what is wrong with the file, if something is
        return load_file(file)
    return _named_tensors(file, _unpickled(file, mend))


def _unpickled(file: Path, mend: str) -> Any:
    with file.open("rb") as opened:
        if opened.read(8) == b"version ":
            raise ConfigurationError(
                f"{file} is a pointer of git-lfs, not the file; run `git lfs pull` where it is"
            )
    try:
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
        )
    except pickle.UnpicklingError as error:
        text = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise ConfigurationError(
                f"{file} is a pickle that needs {found[1]} to be read, and so could run any code; "
                "it is refused. Expected a file of tensors alone: a .safetensors file, or a "
                "state_dict saved by torch.save"
            ) from error
        raise _damaged(file, error, mend) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if "TorchScript" in str(error):
            raise ConfigurationError(
                f"{file} is a TorchScript program, which is not run here; expected its tensors "
                "alone: a .safetensors file, or a state_dict saved by torch.save"
            ) from error
        raise _damaged(file, error, mend) from error


def _damaged(file: Path, error: Exception, mend: str) -> ConfigurationError:
    first = " ".join(str(error).split())[:200]
    return ConfigurationError(
        f"{file} cannot be read ({type(error).__name__}: {first}); it is damaged, was not "
        f"downloaded whole, or is another kind of file: {mend}"
    )


def _named_tensors(file: Path, content: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    named = (
        {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not named:
        raise ConfigurationError(
            f"{file} holds a {type(content).__name__} without tensors; expected a state_dict, by "
            "itself or under the key 'state_dict'"
        )
    return named
