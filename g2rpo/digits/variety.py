"""Whether a policy still draws all kinds of a digit. No reward sees either measure.

A policy that has found the one image its reward likes best scores well by every judge: only what is
said of a set of images shows that it draws nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from g2rpo.digits.scans import check_images, digits_of, load_scans

NEIGHBOURS = 5  # of a scan, the farthest of which is as near as an image must come to cover it


def _by_digit(images: Tensor, prompts: Sequence[str]) -> dict[int, Tensor]:  # [n, 64] float64
    """Finite images of each digit that is asked for."""
    check_images(images)
    digits = digits_of(prompts)
    if len(digits) != len(images):
        raise ValueError(
            f"prompts must hold one digit name per image: got {len(digits)} prompts for "
            f"{len(images)} images"
        )
    pixels = images.detach().cpu().double().flatten(1)
    finite = pixels.isfinite().all(1)
    return {int(d): pixels[finite & (digits == d)] for d in digits.unique()}


def pairwise_distance(images: Tensor, prompts: Sequence[str]) -> float:  # [N,1,8,8] in [0,1]
    """Root mean square pixel difference of two images of one prompt, mean over the pairs of a
    prompt and then over prompts. NaN if no prompt has two images."""
    found = []
    for pixels in _by_digit(images, prompts).values():
        if len(pixels) > 1:
            found.append(torch.pdist(pixels).mean() / pixels.shape[1] ** 0.5)
    return float(torch.stack(found).mean()) if found else float("nan")


def coverage(images: Tensor, prompts: Sequence[str]) -> float:  # [N,1,8,8] in [0,1]
    """Share of the "judge" half's scans of the asked digits that are covered (Naeem et al., arXiv
    2002.09797, eq. 4): with an image of the same digit as near as the scan's own fifth neighbour
    among them. In [0, 1], NaN without images; it grows with their number, so that only equal
    numbers compare."""
    scans, labels = load_scans("judge")
    scans = scans.double().flatten(1)
    covered = total = 0
    for digit, pixels in _by_digit(images, prompts).items():
        real = scans[labels == digit]
        radius = _distances(real, real).kthvalue(NEIGHBOURS + 1, dim=1).values  # the first: itself
        total += len(real)
        if len(pixels):
            covered += int((_distances(real, pixels).amin(1) <= radius).sum())
    return covered / total if total else float("nan")


def _distances(a: Tensor, b: Tensor) -> Tensor:  # [m, d], [n, d] -> [m, n]
    # the faster way by matrix products finds an image at some distance from itself
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
