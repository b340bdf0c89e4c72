"""The published scorers of the CLIP family, from the files they are published in.

What the files do not say stands here: activation, preprocessing and scale, as the authors' own
code has them. Loaders are called by `g2rpo.rewards.load.load`, which knows where files come from.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from ..flux.files import read_json
from ..flux.quiet import quiet
from .clip import BATCH, AestheticScorer, ClipScorer, read_head
from .clip_tokens import ClipTokens, has_vocabulary, open_clip_text
from .open_clip_weights import GELU, QUICK_GELU, load_open_clip
from .preprocess import Preprocess
from .tensors import AGAIN

if TYPE_CHECKING:
    from transformers import CLIPModel

HPS_FILE = "HPS_v2.1_compressed.pt"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
TOKENIZER = (
    "openai/clip-vit-large-patch14", ("tokenizer_config.json", "vocab.json", "merges.txt"),
)  # fmt: skip


def load_hps(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    mend: str = AGAIN,
    tokenizer: str | Path | None = None,
    batch_size: int = BATCH,
) -> ClipScorer:
    """HPS-v2.1 (arXiv 2306.09341): open_clip's ViT-H-14, whose activation is GELU; image . text.

    path: the file or its folder. hpsv2 shrinks the longer side and fills up with black.
    """
    file = _file(path, (HPS_FILE,), mend)
    model = load_open_clip(file, device, dtype, GELU, mend=mend)
    tokens = _tokens(path, tokenizer, model, open_clip_text)
    return ClipScorer(model, _preprocess(file, model, 224, "longest"), tokens, 1.0, batch_size)


def load_clip_score(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    mend: str = AGAIN,
    tokenizer: str | Path | None = None,
    batch_size: int = BATCH,
    size: int = 224,
) -> ClipScorer:
    """The cosine by DFN5B's ViT-H-14 (arXiv 2309.17425): quick-GELU, images squashed.

    path: open_clip's file, or a folder with it or with the model in transformers' format. size: of
    its images, which tells the two that are published apart.
    """
    folder = path if path.is_dir() else None
    if folder is not None and not any((folder / name).is_file() for name in OPEN_CLIP_FILES):
        model = load_folder(folder, device, dtype, mend)
    else:
        file = _file(path, OPEN_CLIP_FILES, mend)
        model = load_open_clip(file, device, dtype, QUICK_GELU, mend=mend)
    tokens = _tokens(path, tokenizer, model, open_clip_text)
    return ClipScorer(model, _preprocess(path, model, size, "squash"), tokens, 1.0, batch_size)


def load_pickscore(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    mend: str = AGAIN,
    tokenizer: str | Path | None = None,
    batch_size: int = BATCH,
) -> ClipScorer:
    """PickScore v1 (arXiv 2305.01569), a ViT-H-14 of transformers; logit_scale * cosine, about 20.

    path: its folder. Preprocessing and tokens are those of transformers' CLIPProcessor.
    """
    model = load_folder(path, device, dtype, mend)
    scale = model.logit_scale.float().exp().item()
    tokens = _tokens(path, tokenizer, model, str)
    preprocess = _preprocess(path, model, 224, "shortest", crop_down=True)
    return ClipScorer(model, preprocess, tokens, scale, batch_size)


def load_aesthetic(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    mend: str = AGAIN,
    batch_size: int = BATCH,
) -> AestheticScorer:
    """LAION's aesthetic predictor on the features of OpenAI's CLIP ViT-L/14.

    path: a folder with the head's file and CLIP-L in transformers' format.
    """
    file = _file(path, (HEAD_FILE,), mend)
    model = load_folder(file.parent, device, dtype, mend)
    head = read_head(file, model.config.projection_dim, mend)
    del model.text_model, model.text_projection  # a quarter of the weights; images alone are seen
    clip = ClipScorer(model, _preprocess(path, model, 224, "shortest"), None, 1.0, batch_size)
    return AestheticScorer(clip, head)


def load_folder(
    folder: Path, device: torch.device | str, dtype: torch.dtype, mend: str = AGAIN
) -> CLIPModel:
    """A CLIPModel of a folder in transformers' format, in eval mode, without gradients.

    Raises ConfigurationError naming the folder and what is wrong with it.
    """
    from transformers import CLIPModel

    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{folder} has no config.json of a CLIP; {mend}")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ConfigurationError(f"{folder / 'config.json'} is of a {kind!r}; expected 'clip'")
    try:
        with quiet("transformers"):
            model, info = CLIPModel.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )  # fmt: skip
    except Exception as error:  # damage shows in as many ways as there are readers; it is told
        first = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"{folder} cannot be loaded as a CLIP ({type(error).__name__}: {first}); a file is "
            f"missing, damaged, or holds more than tensors: {mend}"
        ) from error
    # transformers would go on with random weights in their place
    wrong = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise ConfigurationError(
            f"{folder} lacks {len(wrong)} weights of its config.json, or has them in other "
            f"shapes, {min(wrong)!r} the first: {mend}"
        )
    return model.to(device).eval().requires_grad_(False)


def tokenizer_command(folder: Path) -> str:
    """How to get CLIP's vocabulary into a folder."""
    repository, files = TOKENIZER
    return f"hf download {repository} {' '.join(files)} --local-dir {shlex.quote(str(folder))}"


def _file(path: Path, names: tuple[str, ...], mend: str) -> Path:
    """The path itself, or the one of these files that is in it."""
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ConfigurationError(f"{path} has no {' or '.join(names)}; {mend}")
    return found[0]


def _tokens(
    path: Path, tokenizer: str | Path | None, model: CLIPModel, clean: Callable[[str], str]
) -> ClipTokens:
    """Of the folder that is given, or of one beside the weights."""
    folder = path if path.is_dir() else path.parent
    places = [folder, folder / "tokenizer"] if tokenizer is None else [Path(tokenizer)]
    found = [place for place in places if has_vocabulary(place)]
    if not found:
        raise ConfigurationError(
            f"there is no vocabulary of CLIP in {' or '.join(map(str, places))}; give the folder "
            "`tokenizer` of a FLUX pipeline as tokenizer, or run "
            f"`{tokenizer_command(places[-1])}`"
        )
    text: Any = model.config.text_config
    return ClipTokens(found[0], text.vocab_size, text.max_position_embeddings, clean)


def _preprocess(
    path: Path, model: CLIPModel, size: int, resize: str, crop_down: bool = False
) -> Preprocess:
    found = model.config.vision_config.image_size
    if found != size:
        raise ConfigurationError(
            f"{path} is a CLIP of images of {found} x {found}; expected one of {size} x {size}"
        )
    return Preprocess(size, resize, crop_down)
