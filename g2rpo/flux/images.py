"""Between FLUX's latent tokens and images.

The autoencoder shrinks an image by 8 to latents of 16 channels; FLUX then packs squares of 2 x 2 of
them into tokens of 64 channels and tells the transformer each token's row and column. An image of
720 x 720 pixels is 45 * 45 = 2025 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, TrainingError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BATCH = 4  # images decoded at once, at most


def pack(latents: Tensor) -> Tensor:  # [N, C, h, w] -> [N, h/2 * w/2, 4C]
    """Squares of 2 x 2 latents, row by row, as tokens. h and w are even."""
    n, channels, height, width = latents.shape
    squares = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:  # -> [N, C, height, width]
    """The reverse of `pack`: tokens [N, height/2 * width/2, 4C]; height, width: of the latents."""
    n, _, channels = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, height, width)


def position_ids(
    height: int,  # of the latents
    width: int,
    device: torch.device | None = None,
) -> Tensor:  # [height/2 * width/2, 3] float32: 0, row, column
    """Where each token is in the image, for the transformer's rotary embeddings."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] = torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=device)[None, :]
    return ids.flatten(0, 1)


def shrinkage(vae_config: Mapping[str, Any]) -> int:
    """Pixels of one latent's side: 8 for FLUX."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def latent_shape(height: int, width: int, vae_config: Mapping[str, Any]) -> tuple[int, int]:
    """(L, C) of the latent tokens of an image of height x width pixels.

    Raises ConfigurationError unless both are multiples of a token's side, 16 pixels for FLUX.
    """
    side = 2 * shrinkage(vae_config)
    for name, value in (("height", height), ("width", width)):
        if value < side or value % side:
            low = max(value // side * side, side)
            raise ConfigurationError(
                f"rollout.{name} is {value}; expected a multiple of {side} pixels, such as {low} "
                f"or {low + side}"
            )
    return (height // side) * (width // side), 4 * vae_config["latent_channels"]


class ImageDecoder:
    """Latent tokens to images, by the autoencoder, with the memory there is.

    Images are decoded four at a time, whatever memory is free, so that the same latents give the
    same images. Where that is too much for the device, all of a call is decoded anew in batches of
    half the size; where one image is too much, in overlapping tiles. It stays at what worked;
    on_message is told of each such change, and a checkpoint keeps it as `state_dict`.

    vae: diffusers' AutoencoderKL on the device, in its dtype. height, width: of the images in
    pixels.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        height: int,
        width: int,
        device: torch.device,
        on_message: Callable[[str], None] = print,
    ) -> None:
        self.vae = vae
        self.height, self.width = height, width
        self.device = device
        self.batch = BATCH
        self.tiled = False
        self._on_message = on_message
        self._shape = latent_shape(height, width, vae.config)
        self._latent_size = height // shrinkage(vae.config), width // shrinkage(vae.config)

    @property
    def tile(self) -> int:
        """Side of a tile in pixels: the largest power of 2 less than the image's longer side."""
        return 2 ** ((max(self.height, self.width) - 1).bit_length() - 1)

    def decode(self, latents: Tensor) -> Tensor:  # [N, L, C] -> [N, 3, H, W] float32 in [0, 1]
        """The images, on the device, without gradient; NaN where latents are not finite.

        The same bits as FluxPipeline's output_type="pt" where the latents have the VAE's dtype.
        Raises TrainingError when not even one image fits into memory, in tiles.
        """
        if tuple(latents.shape[1:]) != self._shape:
            raise ValueError(
                f"latents have the shape {list(latents.shape)}; expected [N, {self._shape[0]}, "
                f"{self._shape[1]}]"
            )
        while True:
            try:
                # From the start again: an image depends on the batch it is in, if only by rounding,
                # and a call's images shall not depend on where in it memory ran out.
                parts = [self._decode_batch(part) for part in latents.split(self.batch)]
                return torch.cat(parts)
            except torch.OutOfMemoryError as error:
                short = str(error)
            # Past the handler: the error holds the tensors of the frames it came through.
            self._make_smaller(len(latents), short)

    @torch.no_grad()
    def _decode_batch(self, tokens: Tensor) -> Tensor:
        config = self.vae.config
        latents = unpack(tokens.to(self.device), *self._latent_size)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        images = (images * 0.5 + 0.5).clamp(0, 1).float()
        finite = latents.isfinite().flatten(1).all(dim=1)[:, None, None, None]
        return images.where(finite, torch.nan)  # all of the image, whatever tile it came through

    def _make_smaller(self, images: int, error: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tried = min(self.batch, images)
        size = f"{self.height} x {self.width} pixels"
        if tried > 1:
            self.batch = tried // 2
            self._on_message(
                f"Decoding {tried} images of {size} at once takes more memory than there is; from "
                f"now on {self.batch} at once."
            )
        # (diffusers' tiles overlap by a quarter, which must be a whole number of latents)
        elif not self.tiled and self.tile >= 4 * shrinkage(self.vae.config):
            self.batch = 1
            self._set_tiled(True)
            self._on_message(
                f"Decoding one image of {size} takes more memory than there is; from now on in "
                f"tiles of {self.tile} pixels, which may show faintly."
            )
        else:
            raise TrainingError(
                f"images of rollout.height x rollout.width, {size}, cannot be decoded: a single one"
                f"{' in tiles' if self.tiled else ''} takes more memory than there is; expected "
                f"smaller images, or less beside them on {self.device}. PyTorch says: {error}"
            )

    def _set_tiled(self, tiled: bool) -> None:
        self.tiled = tiled
        if not tiled:
            self.vae.disable_tiling()
            return
        self.vae.enable_tiling()
        # diffusers' own tiles are as large as the images FLUX was trained on: nothing to divide
        self.vae.tile_sample_min_size = self.tile
        self.vae.tile_latent_min_size = self.tile // shrinkage(self.vae.config)

    def state_dict(self) -> dict[str, Any]:
        """How it decodes by now: {"batch": images at once, "tiled": whether in tiles}."""
        return {"batch": self.batch, "tiled": self.tiled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Decode as another decoder did when it gave `state`."""
        batch, tiled = state["batch"], state["tiled"]
        if not (isinstance(batch, int) and 1 <= batch <= BATCH and isinstance(tiled, bool)):
            raise ValueError(f"state is {dict(state)!r}; expected batch, 1 to {BATCH}, and tiled")
        self.batch = batch
        self._set_tiled(tiled)
