"""The GPUs that `g2rpo plan` knows: memory, peak rates, bandwidths."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigurationError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU: memory as torch reports it, dense rates without sparsity by its maker's data sheet
    (products of 16 and 8 bits summed in float32). 0: unknown, or none."""

    name: str
    bytes: float
    devices: tuple[str, ...] = ()  # how torch.cuda.get_device_name begins
    bf16: float = 0.0  # FLOP/s
    fp8: float = 0.0
    fp32: float = 0.0
    bandwidth: float = 0.0  # B/s
    link: float = 0.0  # B/s to the host, one way
    multiprocessors: int = 132
    nvlink: float = 0.0  # B/s to the node's other GPUs, one way; 0: over the link to the host

    @property
    def reserve(self) -> float:
        """Left for the CUDA context and libraries (0.75 GiB), and fragmentation (3 %)."""
        return 0.75 * GIB + 0.03 * self.bytes

    @property
    def usable(self) -> float:
        return max(self.bytes - self.reserve, 0.0)


def _card(name: str, gib: float, device: str, bf16: float, fp8: float, fp32: float,
          bandwidth: float, link: float, multiprocessors: int, nvlink: float) -> Card:  # fmt: skip
    return Card(name, gib * GIB, (device,), bf16 * 1e12, fp8 * 1e12, fp32 * 1e12,
                bandwidth * 1e12, link * 1e9, multiprocessors, nvlink * 1e9)  # fmt: skip


#                 GiB    device                        bf16    fp8  fp32  TB/s GB/s  SMs  NVLink
CARDS = {card.name: card for card in (
    _card("h100-80gb", 79.1, "NVIDIA H100 80GB HBM3", 989.4, 1978.9, 66.9, 3.35, 64, 132, 450),
    _card("h200", 139.7, "NVIDIA H200", 989.4, 1978.9, 66.9, 4.8, 64, 132, 450),
    _card("b200", 178.3, "NVIDIA B200", 2250, 4500, 75, 7.7, 64, 148, 900),
    _card("a100-80gb", 79.1, "NVIDIA A100-SXM4-80GB", 311.9, 0, 19.5, 2.04, 32, 108, 300),
    _card("a100-40gb", 39.4, "NVIDIA A100-SXM4-40GB", 311.9, 0, 19.5, 1.555, 32, 108, 300),
    _card("l40s", 44.4, "NVIDIA L40S", 362, 733, 91.6, 0.864, 32, 142, 0),
    _card("rtx-4090", 23.5, "NVIDIA GeForce RTX 4090", 165.2, 330.3, 82.6, 1.008, 32, 128, 0),
    _card("rtx-5090", 31.3, "NVIDIA GeForce RTX 5090", 209.5, 419, 104.8, 1.792, 64, 170, 0),
)}  # fmt: skip


def find_card(name: str) -> Card:
    """--gpu -> a known card, or one of which no more than the memory is known: 80GB, 79.1GiB.

    Both are powers of 1024, as cards' own names are. Raises ConfigurationError for anything else.
    """
    if card := CARDS.get(name.lower()):
        return card
    text = name.lower().removesuffix("ib").removesuffix("b")
    try:
        gib = float(text.removesuffix("g")) if text.endswith("g") else 0.0
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise ConfigurationError(
            f"--gpu is {name!r}; expected one of {', '.join(CARDS)}, or a memory size such as 80GB"
        )
    return Card(name, gib * GIB)
