"""Everything one does with FLUX.1-dev, on a miniature of it: python examples/flux_miniature.py

Writes a pipeline folder of half a megabyte with random weights, laid out as the hub serves the real
one, then embeds prompts, trains, goes on with the run and samples, with the commands that the real
folder takes; at the end the checkpoint goes through the inference code of the paper's authors. The
pictures are noise. What is shown is that every step works, on any machine, in about a minute.

    python examples/flux_miniature.py [FOLDER]      (a temporary folder, if none is named)
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

PROMPTS = """\
a golden retriever leaping on green grass
a lighthouse in a storm, oil on canvas
a bowl of ripe strawberries on a blue table
two old friends playing chess in the park
"""
# Of the run, as one would write it for the real folder; sizes are the miniature's.
RUN = """\
model:
  path: flux-miniature
  lora: {rank: 4, alpha: 8}
data:
  prompts: prompts.txt
  embeddings: embeddings
rollout:
  height: 64
  width: 64
  steps: 8
  sde_positions: [0, 1, 2, 3]
  group_size: 8
rewards:
  - name: flux_miniature:warmth
optimizer:
  lr: 2.0e-2
train:
  updates: 3
  prompts_per_update: 2
  save_every: 1
  evaluate_every: 3
  evaluation_samples: 8
"""


def warmth(images, prompts):  # [N, 3, H, W] in [0, 1] -> [N]
    """A reward that needs no weights: red against blue."""
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


def g2rpo(*arguments: str) -> None:
    """Show the command, and run it as a process of its own."""
    print(f"\n$ {shlex.join(['g2rpo', *arguments])}", flush=True)
    here = str(Path(__file__).parent)  # where rewards are found by name
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "g2rpo", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def infer_as_the_authors_do(checkpoint: str) -> None:
    """Their scripts/inference/infer.py: the transformer from the checkpoint, the rest from FLUX."""
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer = FluxTransformer2DModel.from_pretrained(
        checkpoint, use_safetensors=True, torch_dtype=torch.bfloat16
    ).to(device)
    pipe = FluxPipeline.from_pretrained(
        "flux-miniature", transformer=None, torch_dtype=torch.bfloat16
    ).to(device)
    pipe.transformer = transformer
    image = pipe(
        "a golden retriever leaping on green grass", guidance_scale=3.5, height=64, width=64,
        num_inference_steps=50, max_sequence_length=512,
    ).images[0]  # fmt: skip
    image.save("authors.png")


def load_strictly(checkpoint: str) -> None:
    """The other way to use a checkpoint: over the weights of the pipeline, key by key."""
    import torch
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    pipe = FluxPipeline.from_pretrained("flux-miniature", torch_dtype=torch.bfloat16)
    file = f"{checkpoint}/diffusion_pytorch_model.safetensors"
    pipe.transformer.load_state_dict(load_file(file), strict=True)


def main(folder: Path) -> None:
    from g2rpo.flux.miniature import write_miniature
    from g2rpo.flux.quiet import quiet

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    print(f"Writing flux-miniature, prompts.txt and run.yaml into {folder}")
    write_miniature("flux-miniature")
    Path("prompts.txt").write_text(PROMPTS)
    Path("run.yaml").write_text(RUN)

    g2rpo("embed", "run.yaml")
    g2rpo("train", "run.yaml", "--train.output", "runs/lora")
    g2rpo("train", "--resume", "runs/lora", "--train.updates", "4")
    g2rpo("sample", "runs/lora", "--prompt", "a lighthouse at night", "--height", "64",
          "--width", "64", "--steps", "8")  # fmt: skip

    print("\nNow all weights instead of adapters, and no stored embeddings:")
    g2rpo("train", "run.yaml", "--train.output", "runs/full", "--model.lora.rank", "0",
          "--model.dtype", "float32", "--data.embeddings", "null", "--optimizer.lr", "3e-2",
          "--train.updates", "6", "--train.ema", "0.5", "--objective.kl", "0.01")  # fmt: skip
    g2rpo("sample", "runs/full", "--ema", "--prompt", "a lighthouse at night", "--height", "64",
          "--width", "64", "--steps", "8")  # fmt: skip

    checkpoint = "runs/full/checkpoints/step-000006/transformer"
    print(f"\nThe authors' inference code on {checkpoint}:")
    # (of torch_dtype, as they write it: diffusers before 0.36 knows no other name)
    warnings.simplefilter("ignore", FutureWarning)
    with quiet():
        infer_as_the_authors_do(checkpoint)
        load_strictly(checkpoint)
    print(f"  authors.png, 50 steps, and a strict load of every key: both work. All is in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="g2rpo-")).resolve())
