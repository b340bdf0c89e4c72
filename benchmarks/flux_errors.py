"""How far each way's velocity is from the true one, and what FP8 adds to that at every sigma."""

from __future__ import annotations

import copy

import torch
from flux_forward import EAGER, FP8, FUSED, Forward, apart
from flux_shapes import SIZES, Size, new_transformer, transformer_inputs
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo.schedule import noise_schedule

STEPS, SHIFT = 16, 3.0  # of the schedule whose sigmas are looked at: the paper's


@torch.no_grad()
def errors(device: str) -> dict[str, dict[str, float]]:
    """Of each way's velocity at toy size, against float32 and against diffusers' bfloat16."""
    size = SIZES["toy"]
    model, given = new_transformer(size, device), transformer_inputs(size, 2, device)
    exact = copy.deepcopy(model).float()
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()}
    true, eager = exact(**wide)[0], model(**given)[0]
    gk.fuse_flux(model)
    found = {EAGER: eager, FUSED: model(**given)[0]}
    # What this hardware does not multiply is emulated: the same numbers.
    with gk.Fp8Rollout(model, emulate=True):
        found[FP8] = model(**given)[0]
    return {
        name: {"float32": apart(out, true), "eager": apart(out, eager)}
        for name, out in found.items()
    }


@torch.no_grad()
def sigma_errors(forward: Forward, size: Size, device: str) -> list[dict[str, float | None]]:
    """Of one image's velocity at each sigma of the schedule, relative in norm: ours in bfloat16 and
    in FP8 against diffusers' bfloat16, and FP8 against ours. Weights are random, and so are the
    latents (of unit variance, mixed with noise by sigma): it is arithmetic that is looked at.

    FP8's are None where there is no FP8.
    """
    sigmas = noise_schedule(STEPS, SHIFT)[:-1].tolist()
    given = transformer_inputs(size, 1, device)
    clean = given["hidden_states"].float()
    noise = transformer_inputs(size, 2, device)["hidden_states"][1:].float()
    names = (EAGER, FUSED, *((FP8,) if forward.fp8 is not None else ()))
    found: dict[str, list[Tensor]] = {}
    for name in names:  # a way at a time: fusing and unfusing moves the weights
        with forward.state(name):
            found[name] = []
            for sigma in sigmas:
                latents = ((1 - sigma) * clean + sigma * noise).to(torch.bfloat16)
                changed = {"hidden_states": latents, "timestep": torch.tensor([sigma]).to(device)}
                found[name].append(forward.model(**{**given, **changed})[0].cpu())
    rows = []
    for i, sigma in enumerate(sigmas):
        eager, fused = found[EAGER][i], found[FUSED][i]
        fp8 = found[FP8][i] if FP8 in found else None
        rows.append({
            "sigma": sigma, "ours": apart(fused, eager),
            "fp8": None if fp8 is None else apart(fp8, eager),
            "fp8_against_ours": None if fp8 is None else apart(fp8, fused),
        })  # fmt: skip
    return rows
