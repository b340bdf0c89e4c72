"""Scores of images by a CLIP: how near they are to their prompts, or to what people like.

`ClipScorer` is HPS-v2.1 (github.com/tgxs002/HPSv2, hpsv2/img_score.py: image . text), the CLIP
score (cosine, with DFN5B) and PickScore (github.com/yuvalkirstain/PickScore: logit_scale * cosine),
which differ in weights, preprocessing and scale. `AestheticScorer` is LAION's predictor
(github.com/christophschuhmann/improved-aesthetic-predictor), a small network on the features of
images alone. Images are never taken off the device, and texts are encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from .clip_tokens import ClipTokens
from .on_device import OnDevice
from .preprocess import Preprocess, check
from .tensors import AGAIN, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPModel

BATCH = 32  # images, or texts, of one forward
CACHED = 4096  # prompts whose features are kept, on the host: 16 MiB at 1024 features
# The linear layers of LAION's predictor, by their place among its dropouts, which do nothing here.
# Its published weights ("linearMSE") have no activation between them.
HEAD_LAYERS = (0, 2, 4, 6, 7)

class ClipScorer(OnDevice):
    """`scorer(images, prompts)` -> [N] float32: scale * cosine of an image and its prompt.

    model: transformers' CLIPModel, on its device, in its dtype (float32 or bfloat16; features are
    normalised and compared in float32). tokens: None where only images are encoded. batch_size:
    images of one forward; scores do not depend on it but in the last bits.

    truncated_prompts: how many of the prompts that were encoded had more tokens than the model
    reads, 77; each distinct one is encoded once, as long as it is among the last `cached`.
    """

    def __init__(
        self,
        model: CLIPModel,
        preprocess: Preprocess,
        tokens: ClipTokens | None,
        scale: float = 1.0,
        batch_size: int = BATCH,
        cached: int = CACHED,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("cached", cached)):
            if value < 1:
                raise ConfigurationError(f"{name} is {value}; expected at least 1")
        super().__init__(model)
        self.model, self.preprocess, self.tokens = model, preprocess, tokens
        self.scale, self.batch_size, self.cached = scale, batch_size, cached
        self.truncated_prompts = 0
        self._texts: OrderedDict[str, Tensor] = OrderedDict()  # [D] float32 on the host

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] on the images' device; NaN for an image with a pixel that is not finite.

        images: [N, 3, H, W] floating in [0, 1]. Raises TypeError or ValueError for others.
        """
        features = self._features(*check(images, prompts))
        scores = (features * self.encode_text(prompts)).sum(1) * self.scale
        return scores.to(images.device)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> [N, D] float32 of length 1, on the scorer's device.

        NaN for an image with a pixel that is not finite; errors as of a score.
        """
        return self._features(*check(images))

    def _features(self, images: Tensor, finite: Tensor) -> Tensor:
        self.come_back()
        rows = [torch.empty(0, self.model.config.projection_dim, device=self.device)]
        for part in images.split(self.batch_size) if len(images) else ():
            pixels = self.preprocess(part.to(self.device)).to(self.model.dtype)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            rows.append(F.normalize(self.model.visual_projection(pooled).float(), dim=-1))
        features = torch.cat(rows)
        return features.masked_fill_(~finite.to(self.device)[:, None], torch.nan)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """N prompts -> [N, D] float32 of length 1, on the scorer's device."""
        known = {prompt: self._texts[prompt] for prompt in prompts if prompt in self._texts}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            known.update(zip(part, self._encode_new(part)))
        for prompt in known:  # those just used become the last to leave
            self._texts[prompt] = known[prompt]
            self._texts.move_to_end(prompt)
        while len(self._texts) > self.cached:
            self._texts.popitem(last=False)
        if not prompts:
            return torch.empty(0, self.model.config.projection_dim, device=self.device)
        return torch.stack([known[prompt] for prompt in prompts]).to(self.device)

    def _encode_new(self, prompts: Sequence[str]) -> Tensor:  # [n, D] float32 on the host
        if self.tokens is None:
            raise ValueError("this scorer was made without a tokenizer; it encodes images alone")
        self.come_back()
        ids, ends, cut = self.tokens(prompts)
        hidden = self.model.text_model(input_ids=ids.to(self.device)).last_hidden_state
        pooled = hidden[torch.arange(len(ids)), ends.to(self.device)]
        self.truncated_prompts += sum(cut)
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()


class AestheticScorer(OnDevice):
    """`scorer(images, prompts)` -> [N] float32: how much people like an image, about 1 to 10.

    clip: of the model whose features the head was trained on, OpenAI's ViT-L/14. head: of
    `read_head`. The prompts are not looked at, and so none is ever truncated.
    """

    truncated_prompts = 0

    def __init__(self, clip: ClipScorer, head: nn.Module) -> None:
        super().__init__(clip.model, head)
        self.clip, self.head = clip, head.to(clip.device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N] on the images' device; as ClipScorer's, errors too."""
        checked = check(images, prompts)
        self.come_back()
        features = self.clip.to(self.device)._features(*checked)
        return self.head(features).squeeze(1).to(images.device)


def read_head(file: Path, features: int, mend: str = AGAIN) -> nn.Sequential:
    """LAION's predictor: five linear layers, or a single one, on [n, features] float32 -> [n, 1].

    Raises ConfigurationError naming the file, for other weights: one whose layers are elsewhere was
    trained with activations between them, of which the weights do not tell.
    """
    state = read_tensors(file, mend)
    linear = {"weight", "bias"}
    keys = [f"layers.{i}." for i in HEAD_LAYERS] if set(state) != linear else [""]
    if set(state) != {key + kind for key in keys for kind in linear}:
        raise ConfigurationError(
            f"{file} holds {', '.join(sorted(state)[:4])}, ...; expected layers.N.weight and "
            f"layers.N.bias for N in {HEAD_LAYERS}, or a single weight and bias"
        )
    shapes = [tuple(state[key + "weight"].shape) for key in keys]
    widths = [features, *(shape[0] for shape in shapes)]
    if [(out, into) for into, out in zip(widths, widths[1:])] != shapes or widths[-1] != 1:
        raise ConfigurationError(
            f"{file} has weights of shapes {shapes}; expected a chain from the {features} features "
            "of its CLIP to 1 score"
        )
    head = nn.Sequential(*(nn.Linear(into, out) for into, out in zip(widths, widths[1:])))
    for layer, key in zip(head, keys):
        layer.load_state_dict({kind: state[key + kind].float() for kind in linear})
    return head.eval().requires_grad_(False)
