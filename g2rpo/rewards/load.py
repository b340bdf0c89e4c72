"""The scorers that are published, by name: their files, where those come from, what reads them.

    scorer = load("hps-v2.1", "HPS_v2.1_compressed.pt", "cuda", tokenizer="FLUX.1-dev/tokenizer")
    scores = scorer(images, prompts)

Nothing is downloaded here: what is missing is an error with the command that gets it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from . import RewardFunction, import_reward


@dataclass(frozen=True)
class Published:
    """A scorer's loader, and the files it reads."""

    loader: str  # "module:function", called with path, device, dtype, mend and the options
    repository: str  # on the Hugging Face hub
    files: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bool = False  # CLIP's vocabulary is needed too, and not in the repository
    others: tuple[tuple[str, str], ...] = ()  # file and URL, of what is not on the hub

    def commands(self, folder: Path) -> list[str]:
        """What downloads everything into a folder, a shell command each."""
        into = shlex.quote(str(folder))
        lines = [f"hf download {self.repository} {' '.join(self.files)} --local-dir {into}"]
        for name, url in self.others:
            lines.append(f"curl -L --create-dirs -o {shlex.quote(str(folder / name))} {url}")
        if self.tokenizer:
            from .clip_published import tokenizer_command

            lines.append(tokenizer_command(folder / "tokenizer"))
        return lines


_CLIP = "g2rpo.rewards.clip_published"
PUBLISHED: dict[str, Published] = {
    "hps-v2.1": Published(
        f"{_CLIP}:load_hps", "xswu/HPSv2", ("HPS_v2.1_compressed.pt",), tokenizer=True
    ),
    "clip-score-224": Published(
        f"{_CLIP}:load_clip_score", "apple/DFN5B-CLIP-ViT-H-14", ("open_clip_pytorch_model.bin",),
        {"size": 224}, tokenizer=True,
    ),
    "clip-score-378": Published(
        f"{_CLIP}:load_clip_score", "apple/DFN5B-CLIP-ViT-H-14-378",
        ("open_clip_pytorch_model.bin",), {"size": 378}, tokenizer=True,
    ),
    "pickscore": Published(
        f"{_CLIP}:load_pickscore", "yuvalkirstain/PickScore_v1",
        ("config.json", "model.safetensors"), tokenizer=True,
    ),
    "aesthetic": Published(
        f"{_CLIP}:load_aesthetic", "openai/clip-vit-large-patch14",
        ("config.json", "model.safetensors"),
        others=((
            "sac+logos+ava1-l14-linearMSE.pth",
            "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        ),),
    ),
}  # fmt: skip
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")  # of a path that is a file, not a folder
# These say themselves what they lack.
OTHERS = {
    "imagereward": "g2rpo.rewards.imagereward:load_imagereward",
    "judge": "g2rpo.rewards.judge:Judge",
}


def names() -> list[str]:
    """Of all scorers that `load` knows."""
    return [*PUBLISHED, *OTHERS]


def default_folder(name: str) -> Path:
    """Where a scorer's files are looked for without a path: in the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("g2rpo")) / "rewards" / name


def load(
    name: str,
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> RewardFunction:
    """The scorer of that name: a callable (images [N, 3, H, W], prompts) -> [N] float32.

    path: the file of its weights, or the folder of its files; None: `default_folder(name)`; of a
    judge, which is served elsewhere, its endpoint. dtype: of the weights and of arithmetic; scores
    are float32. options: the loader's own, such as tokenizer (a folder with CLIP's vocabulary,
    where it is not beside the weights) and batch_size, or a judge's model.

    Raises ConfigurationError: for an unknown name with the list of names, for files that are
    missing with the command that downloads them, for others naming the file.
    """
    if name not in names():
        raise ConfigurationError(f"scorer is {name!r}; expected one of {', '.join(names())}")
    if name == "judge":
        if path is None or "model" not in options:
            raise ConfigurationError(
                f"path is {path!r} and model is {options.get('model')!r}; expected a judge's "
                "endpoint, as http://host:8000/v1, and the model's name there"
            )
        return import_reward(OTHERS[name])(str(path), **options)
    place = default_folder(name) if path is None else Path(path).expanduser()
    if name in OTHERS:
        return import_reward(OTHERS[name])(place, device, dtype, **options)
    published = PUBLISHED[name]
    folder = place.parent if place.suffix in WEIGHTS else place
    mend = "run `" + " && ".join(published.commands(folder)) + "`"
    if not place.exists():
        raise ConfigurationError(f"the files of {name} are not at {place}; {mend}")
    loader = import_reward(published.loader)
    return loader(place, device, dtype, mend=mend, **{**published.options, **options})
