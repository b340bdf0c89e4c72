"""Three rewards to copy: a function, a class with weights, a judge with a question of its own.

    PYTHONPATH=examples g2rpo train flux-lora --data.prompts prompts.txt --rewards '[
      {"name": "rewards:colourful"},
      {"name": "rewards:Resembles", "dtype": "bfloat16", "offload": true,
       "options": {"example": "style.png", "tokenizer": "FLUX.1-dev/tokenizer"}},
      {"name": "rewards:Faithful", "path": "http://gpu-2:8000/v1", "heldout": true,
       "options": {"model": "Qwen/Qwen2.5-VL-7B-Instruct"}}]'

Images are [N, 3, H, W], float in [0, 1], on the GPU; what comes back is [N], higher is better, NaN
for an image that could not be scored.
"""

import numpy as np
import torch
from PIL import Image

from g2rpo.rewards.judge import Judge
from g2rpo.rewards.load import load


def colourful(images, prompts):
    """Colourfulness by Hasler and Süsstrunk (2003)."""
    red, green, blue = images.flatten(2).unbind(1)  # [N, H * W]
    opponent = torch.stack([red - green, (red + green) / 2 - blue])
    spread, mean = opponent.std(2).norm(dim=0), opponent.mean(2).norm(dim=0)
    return spread + 0.3 * mean


class Resembles:
    """How much an image is like an example, to CLIP. Made once, of `options`, and of `path` and
    `dtype` where the configuration has them; device is always given."""

    def __init__(self, device, example, path=None, dtype=torch.float32, tokenizer=None):
        self.clip = load("clip-score-224", path, device, dtype, tokenizer=tokenizer)
        with Image.open(example) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(2, 0)
        self.example = self.clip.encode_image(pixels[None] / 255)[0]  # [D]

    def __call__(self, images, prompts):
        return self.clip.encode_image(images) @ self.example

    def offload(self):
        """To host memory; the next score brings the weights back, as load's scorers do themselves.
        Only this makes `offload: true` possible."""
        self.clip.offload()


class Faithful:
    """Colourful counts only where a vision-language model sees what the prompt asks for. An answer
    that is neither yes nor no, or none at all, is NaN, which the product stays."""

    def __init__(self, device, path, model, **options):
        question = "Does the image show all of this, and as many of each? {prompt}\nYes or no?"
        self.judge = Judge(path, model, question, yes_or_no, **options)

    def __call__(self, images, prompts):
        return self.judge(images, prompts) * colourful(images, prompts)


def yes_or_no(answer):
    word = answer.strip().strip(".").lower()
    if word not in ("yes", "no"):
        raise ValueError(f"the answer is {answer!r}; expected yes or no")
    return float(word == "yes")
