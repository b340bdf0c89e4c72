"""The digits policy: a FLUX of 311,684 parameters, pre-trained on the scans by flow matching.

G²RPO starts from a model that already draws, so the first run pre-trains one (seconds on two cores)
and keeps it in the user's cache folder; later runs load it. Pre-training stops early on purpose:
it should draw the asked digit most of the time and leave reinforcement learning room to improve.
"""

from __future__ import annotations  # FluxTransformer2DModel is named in hints, imported when used

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from g2rpo.digits.scans import LATENT_SHAPE, PROMPTS, embed_prompts, load_scans, pack

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

ARCHITECTURE = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}

# Everything else that decides what pre-training arrives at, apart from the arguments of `pretrain`.
# Raise "version" when the code changes the result: no cached model of before is used then.
RECIPE = {
    "version": 1,
    "lr": 3e-3,
    "warmup_fraction": 0.1,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "shift": 3.0,
}

CACHE_VARIABLE = "G2RPO_CACHE"


@contextlib.contextmanager
def _own_rng(seed: int) -> Iterator[None]:
    """Seed the CPU generator for a block and put it back afterwards; no GPU generator is touched
    (torch.manual_seed would seed those too)."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run a block on one CPU thread. A model this small gains at most 1.7x from a second core,
    loses 10x where that core is busy, and on one thread its bits do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def new_transformer(seed: int) -> FluxTransformer2DModel:
    """An untrained digits transformer, float32 on the CPU, its initial weights decided by seed.

    The caller's global random state is left as it was.
    """
    from diffusers import FluxTransformer2DModel  # seconds to import

    with _own_rng(seed):
        return FluxTransformer2DModel(**ARCHITECTURE)


def token_ids(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:  # [1,3], [16,3]
    """(txt_ids, img_ids), float32: zeros for the one text token; (0, row, column) for the rest."""
    image_ids = torch.zeros(LATENT_SHAPE[0], 3, device=device)
    index = torch.arange(LATENT_SHAPE[0], device=device)
    image_ids[:, 1], image_ids[:, 2] = index // 4, index % 4
    return torch.zeros(1, 3, device=device), image_ids


@_one_thread()
def pretrain(
    transformer: FluxTransformer2DModel,
    *,
    steps: int = 250,
    batch_size: int = 128,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train transformer in place by flow matching on all 1,797 scans, each with its own name.

    A step draws scans x0 and noise, mixes x_sigma = (1 - sigma)*x0 + sigma*noise at logit-normal
    sigmas shifted towards noise, and regresses the velocity noise - x0. AdamW; the learning rate
    rises linearly, then falls along a cosine to zero at the last step. All randomness comes from a
    generator of its own: the result depends on (transformer, steps, batch_size, seed) alone. Runs
    on one CPU thread.

    Args:
        on_step: called after each step as on_step(step, steps, loss), step in 1..steps; the loss is
            the batch's mean squared velocity error.
    Raises:
        ValueError: steps or batch_size below 1.
        RuntimeError: a gradient is not finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = next(transformer.parameters()).device
    text_ids, image_ids = token_ids(device)
    scans, labels = load_scans()
    latents = pack(scans)
    prompt_embeds, pooled = embed_prompts(PROMPTS)

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    for step in range(1, steps + 1):
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randn(batch_size, generator=generator).sigmoid()
        sigma = RECIPE["shift"] * t / (1 + (RECIPE["shift"] - 1) * t)
        x_sigma = torch.lerp(x0, noise, sigma[:, None, None])
        velocity = transformer(
            hidden_states=x_sigma.to(device),
            timestep=sigma.to(device),
            encoder_hidden_states=prompt_embeds[labels[index]].to(device),
            pooled_projections=pooled[labels[index]].to(device),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(velocity, (noise - x0).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            transformer.parameters(), RECIPE["max_grad_norm"], error_if_nonfinite=True
        )
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if on_step is not None:
            on_step(step, steps, loss.item())


def _lr_factor(step: int, steps: int) -> float:
    """Fraction of the peak learning rate at step (counted from 0) of steps."""
    warmup = max(1, round(steps * RECIPE["warmup_fraction"]))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / max(1, steps - warmup)))


def pretrained_transformer(
    cache_dir: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    *,
    steps: int = 250,
    batch_size: int = 128,
    seed: int = 0,
) -> FluxTransformer2DModel:
    """The pre-trained digits transformer, float32 on the CPU: from the cache, else trained now.

    Entries are folders in diffusers' layout, named by a hash of everything that determines the
    weights, except the CPU and the versions of torch and diffusers, which move their last bits. The
    weights always come from the saved files, so the run that trains and the runs that load agree
    bit for bit. An entry that is incomplete or damaged is reported (warnings.warn) and rebuilt.

    Args:
        cache_dir: folder of entries; default: the environment variable G2RPO_CACHE if set, else
            the user's cache folder (`platformdirs.user_cache_dir("g2rpo")`).
        on_step: progress of the pre-training, as in `pretrain`; not called when the cache serves.
        steps, batch_size, seed: as in `pretrain`; seed also decides the initial weights.
    Raises:
        ValueError: steps or batch_size below 1.
        OSError: the cache folder cannot be written.
    """
    from diffusers import FluxTransformer2DModel  # seconds to import
    from filelock import FileLock  # these two are wanted only here; torch depends on filelock
    from platformdirs import user_cache_dir

    if cache_dir is None:
        cache_dir = os.environ.get(CACHE_VARIABLE) or user_cache_dir("g2rpo")
    settings = {"steps": steps, "batch_size": batch_size, "seed": seed}
    recipe = json.dumps({**RECIPE, **settings, "architecture": ARCHITECTURE}, sort_keys=True)
    entry = Path(cache_dir) / f"digits-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"

    # A sound entry is never moved, so reading one needs no lock (nor a folder that can be written).
    if _damage(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            damage = _damage(entry)  # again: another run may have built it while this one waited
            if damage and entry.exists():
                warnings.warn(f"cached digits model {entry} is rebuilt: {damage}", stacklevel=2)
            if damage:
                transformer = new_transformer(seed)
                pretrain(transformer, **settings, on_step=on_step)
                _install(transformer, entry)
    # low_cpu_mem_usage wants accelerate; without it the model is initialised before it is loaded.
    with _own_rng(seed):
        return FluxTransformer2DModel.from_pretrained(entry, low_cpu_mem_usage=False)


# A cache entry: config.json, the weights, and the SHA-256 of both, by which damage is noticed (a
# flipped bit in the weights would otherwise load without complaint).
CONTENTS = ("config.json", "diffusion_pytorch_model.safetensors")
CHECKSUMS = "SHA256SUMS"


def _checksums(entry: Path) -> str:  # what `sha256sum` prints
    digests = {name: hashlib.sha256((entry / name).read_bytes()).hexdigest() for name in CONTENTS}
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _damage(entry: Path) -> str | None:
    """What keeps a cache entry from being loaded, or None when it is sound."""
    for name in (*CONTENTS, CHECKSUMS):
        if not (entry / name).is_file():
            return f"{name} is missing"
    if (entry / CHECKSUMS).read_bytes() != _checksums(entry).encode():
        return f"its files do not match {CHECKSUMS}"
    return None


def _install(transformer: FluxTransformer2DModel, entry: Path) -> None:
    """Save transformer beside entry, then rename; called under the entry's lock."""
    beside = Path(f"{entry}.new")
    damaged = Path(f"{entry}.damaged")
    for leftover in (beside, damaged):  # of a run that was killed right here
        if leftover.exists():
            shutil.rmtree(leftover)
    transformer.save_pretrained(beside)
    (beside / CHECKSUMS).write_text(_checksums(beside), newline="\n")
    if entry.exists():  # a folder cannot be renamed onto one that is not empty
        entry.rename(damaged)
    beside.rename(entry)
    if damaged.exists():
        shutil.rmtree(damaged)
