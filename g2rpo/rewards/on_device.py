"""Where a scorer's weights are: on a device, or in host memory for as long as others need room."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ScorerT = TypeVar("ScorerT", bound="OnDevice")


class OnDevice:
    """Modules that live on a device, and may leave it between two phases of training."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self.device = next(modules[0].parameters()).device
        self._away = False

    def to(self: ScorerT, device: torch.device | str) -> ScorerT:
        """Score there from now on. Returns itself."""
        self.device, self._away = torch.device(device), True
        self.come_back()
        return self

    def offload(self: ScorerT) -> ScorerT:
        """Weights to host memory; the next score brings them back to the device. Returns itself."""
        for module in self._modules:
            module.to("cpu")
        self._away = self.device.type != "cpu"
        return self

    def come_back(self) -> None:
        """The modules to the device, where they are not: before every score."""
        if self._away:
            for module in self._modules:
                module.to(self.device)
            self._away = False
