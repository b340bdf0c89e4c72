"""The scorers that are published, by name: their files, where those come from, what reads them.

    scorer = load("hps-v2.1", "HPS_v2.1_compressed.pt", "cuda", tokenizer="FLUX.1-dev/tokenizer")
    scores = scorer(images, prompts)

Nothing is downloaded here: what is missing is an error with the command that gets it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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
    instead: tuple[tuple[str, ...], ...] = ()  # sets of files that serve as well as `files`
    whole: bool = False  # a path may be the one file of weights

    def commands(self, folder: Path) -> list[str]:
        """What downloads everything into a folder, a shell command each."""
        lines = [self._from_hub(folder), *(self._from_url(folder, *other) for other in self.others)]
        if self.tokenizer:
            lines.append(self._vocabulary(folder / "tokenizer"))
        return lines

    def missing(self, place: Path, tokenizer: Path | None, vocabulary: bool) -> list[str]:
        """Those among them that are needed. tokenizer: the folder of the vocabulary, None: beside
        the weights; vocabulary: whether there has to be one."""
        folder = folder_of(place)
        named = folder != place  # the file itself is named: it is that one which is read
        if named and self.whole:
            there = place.is_file()
        else:
            sets = (self.files, *self.instead)
            there = any(all(any(folder.glob(file)) for file in files) for files in sets)
        lines = [] if there else [self._from_hub(folder)]
        for name, url in self.others:
            if not (place if named and not self.whole else folder / name).is_file():
                lines.append(self._from_url(folder, name, url))
        if vocabulary and self.tokenizer and not has_vocabulary_at(tokenizer or folder):
            lines.append(self._vocabulary(tokenizer or folder / "tokenizer"))
        return lines

    def _from_hub(self, folder: Path) -> str:
        return hub_command(self.repository, self.files, folder)

    def _from_url(self, folder: Path, name: str, url: str) -> str:
        return f"curl -L --create-dirs -o {shlex.quote(str(folder / name))} {url}"

    def _vocabulary(self, folder: Path) -> str:
        from .clip_published import tokenizer_command

        return tokenizer_command(folder)


_CLIP = "g2rpo.rewards.clip_published"
_TRANSFORMERS = (("config.json", "*.safetensors"), ("config.json", "*.bin"))  # shards too
_DFN = (("open_clip_model.safetensors",), *_TRANSFORMERS)
PUBLISHED: dict[str, Published] = {
    "hps-v2.1": Published(
        f"{_CLIP}:load_hps", "xswu/HPSv2", ("HPS_v2.1_compressed.pt",), tokenizer=True, whole=True
    ),
    "clip-score-224": Published(
        f"{_CLIP}:load_clip_score", "apple/DFN5B-CLIP-ViT-H-14", ("open_clip_pytorch_model.bin",),
        {"size": 224}, tokenizer=True, instead=_DFN, whole=True,
    ),
    "clip-score-378": Published(
        f"{_CLIP}:load_clip_score", "apple/DFN5B-CLIP-ViT-H-14-378",
        ("open_clip_pytorch_model.bin",), {"size": 378}, tokenizer=True, instead=_DFN, whole=True,
    ),
    "pickscore": Published(
        f"{_CLIP}:load_pickscore", "yuvalkirstain/PickScore_v1",
        ("config.json", "model.safetensors"), tokenizer=True, instead=_TRANSFORMERS,
    ),
    "aesthetic": Published(
        f"{_CLIP}:load_aesthetic", "openai/clip-vit-large-patch14",
        ("config.json", "model.safetensors"), instead=_TRANSFORMERS,
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


def place_of(name: str, path: str | Path | None = None) -> Path:
    """Where `load` of these looks for a scorer's files."""
    return default_folder(name) if path is None else Path(path).expanduser()


def folder_of(place: Path) -> Path:
    """The folder of a scorer's files, of which `place` may be one."""
    return place.parent if place.suffix in WEIGHTS else place


def has_vocabulary_at(folder: Path) -> bool:
    """Whether CLIP's vocabulary is in a folder or in `tokenizer` in it, beside the weights."""
    from .clip_tokens import has_vocabulary

    return has_vocabulary(folder) or has_vocabulary(folder / "tokenizer")


def hub_command(repository: str, files: Sequence[str], folder: Path) -> str:
    into = shlex.quote(str(folder))
    return f"hf download {repository} {' '.join(files)} --local-dir {into}"


def missing(
    name: str,
    path: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vocabulary: bool = True,
) -> list[str]:
    """Shell commands that download what `load` of these would not find; none where all is there.

    Files are looked for, not into. vocabulary: False where CLIP's will be had from elsewhere.
    """
    place = place_of(name, path)
    given = None if tokenizer is None else Path(tokenizer).expanduser()
    if name in PUBLISHED:
        return PUBLISHED[name].missing(place, given, vocabulary)
    if name == "imagereward":
        return _missing_of_imagereward(place, given)
    return []  # a judge has no files


def _missing_of_imagereward(place: Path, tokenizer: Path | None) -> list[str]:
    from .imagereward import SOURCES, VOCABULARY, WEIGHTS

    folder = place if place.is_dir() or not place.suffix else place.parent
    files = {name: folder / name for name in SOURCES}
    if folder != place:
        files[WEIGHTS] = place
    if tokenizer is not None:
        files[VOCABULARY] = tokenizer / VOCABULARY
    lines = []
    for repository in dict.fromkeys(SOURCES.values()):
        for into in dict.fromkeys(files[name].parent for name in SOURCES):
            lacking = [
                name for name, file in files.items()
                if SOURCES[name] == repository and file.parent == into and not file.is_file()
            ]  # fmt: skip
            if lacking:
                lines.append(hub_command(repository, lacking, into))
    return lines


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
    place = place_of(name, path)
    if name in OTHERS:
        return import_reward(OTHERS[name])(place, device, dtype, **options)
    published = PUBLISHED[name]
    mend = "run `" + " && ".join(published.commands(folder_of(place))) + "`"
    if not place.exists():
        raise ConfigurationError(f"the files of {name} are not at {place}; {mend}")
    loader = import_reward(published.loader)
    return loader(place, device, dtype, mend=mend, **{**published.options, **options})
