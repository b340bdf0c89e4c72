"""The GPUs of a run, one process each as torchrun starts them, and what of the run each does."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ..config import Config
from ..errors import ConfigurationError
from ..optimizers import SHARDS

MOST = 100_000
PER_NODE = 8
NETWORK = 50e9  # B/s a GPU between nodes, one way: an InfiniBand adapter of 400 Gb/s each, assumed


@dataclass(frozen=True)
class Gpus:
    """How many, how many of them in a node, and what each sends to other nodes, bytes a second."""

    count: int = 1
    per_node: int = PER_NODE
    network: float = NETWORK

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    def sharded(self, config: Config) -> bool:
        """Whether a rank holds a part of the weights; one GPU holds all, whatever is asked for."""
        return self.count > 1 and config.distributed.strategy != "replicate"

    def parts(self, config: Config) -> int:
        """Of how many parts of weights, gradients and states a rank holds one."""
        if not self.sharded(config):
            return 1
        hybrid = config.distributed.strategy == "hybrid"
        return min(self.count, self.per_node) if hybrid else self.count


ONE = Gpus()


def share_of(config: Config, gpus: Gpus) -> Config:
    """A rank's part of a run: its prompts and images of an evaluation; the rest is everyone's.

    Raises ConfigurationError for a run that cannot be spread over so many.
    """
    if gpus.count == 1:
        return config
    train, strategy, optimizer = config.train, config.distributed.strategy, config.optimizer.name
    if train.prompts_per_update % gpus.count:
        raise ConfigurationError(
            f"train.prompts_per_update is {train.prompts_per_update}; expected a multiple of "
            f"{gpus.count}, the number of GPUs (--gpus), each of which has as many prompts"
        )
    if strategy == "hybrid" and gpus.count > gpus.per_node and gpus.count % gpus.per_node:
        raise ConfigurationError(
            f"--gpus is {gpus.count}, with distributed.strategy 'hybrid'; expected a multiple of "
            f"--per-node {gpus.per_node}, so that all nodes have as many"
        )
    if gpus.sharded(config) and optimizer not in SHARDS:
        raise ConfigurationError(
            f"optimizer.name is {optimizer!r}, with distributed.strategy {strategy!r}; expected "
            f"one that steps parts of parameters: {' or '.join(map(repr, SHARDS))}"
        )
    own = copy.deepcopy(config)
    own.train.prompts_per_update = train.prompts_per_update // gpus.count
    own.train.evaluation_samples = -(-train.evaluation_samples // gpus.count)
    return own
