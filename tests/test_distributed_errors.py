"""What several ranks cannot do is refused, by the key, its value and what was expected."""

from __future__ import annotations

import pytest
import torch
from ranks import VARIABLES
from test_distributed import config_of
from tiny import TinyModel, brightness
from torch import nn

from g2rpo.config import DistributedConfig
from g2rpo.distributed import ALONE, Ranks, joined, launched
from g2rpo.distributed.layout import Sharded
from g2rpo.errors import ConfigurationError
from g2rpo.optimizers import make_optimizer
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer


def test_prompts_that_ranks_cannot_share() -> None:
    config = config_of({"train.prompts_per_update": 4})
    message = "train.prompts_per_update is 4; expected a multiple of the 3 ranks"
    with pytest.raises(ConfigurationError, match=message):
        Trainer(config, TinyModel(), [Reward("brightness", brightness)], ranks=Ranks(0, 3))


def test_nodes_of_unequal_size() -> None:
    message = r"distributed.strategy is 'hybrid' with 3 ranks, 2 on this node; expected as many on"
    with pytest.raises(ConfigurationError, match=message):
        Sharded(
            TinyModel().policy.transformer, DistributedConfig(strategy="hybrid"), Ranks(0, 3, 2)
        )


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao", "adamw_streamed"])
def test_optimizers_that_take_whole_parameters(name: str) -> None:
    config = config_of({"optimizer.name": name, "distributed.strategy": "shard"})
    message = f"optimizer.name is '{name}' with sharded weights; expected 'adamw' or 'adamw8bit'"
    with pytest.raises(ConfigurationError, match=message):
        make_optimizer(config.optimizer, {"w": nn.Parameter(torch.zeros(4))}, 0, sharded=True)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_of_what_torchrun_sets(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    with joined(1.0, "cpu") as ranks:
        assert ranks is ALONE
    for name in {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - {missing}:
        monkeypatch.setenv(name, "1")
    assert launched()
    message = f"RANK and WORLD_SIZE are set and {missing} are not; expected all that torchrun sets"
    with pytest.raises(ConfigurationError, match=message):
        with joined(1.0, "cpu"):
            pass


FORWARD = {"distributed.strategy": "shard", "distributed.gather": "forward"}
COPY = "expected a copy of the weights for it: distributed.gather 'auto' or 'phase'"
REFUSED = [
    ({**FORWARD, "model.fuse": True, "rollout.precision": "fp8"},
     f"rollout.precision is 'fp8'; {COPY}"),
    ({**FORWARD, "rollout.precision": "bfloat16"}, f"rollout.precision is 'bfloat16'; {COPY}"),
    ({**FORWARD, "model.fuse": True, "rollout.engine": "graph"},
     f"rollout.engine is 'graph'; {COPY}"),
    ({**FORWARD, "rollout.engine": "compile"}, f"rollout.engine is 'compile'; {COPY}"),
    ({"distributed.gather": "phase"}, "distributed.gather is 'phase'; expected 'auto', or "
     "distributed.strategy 'shard' or 'hybrid' with it"),
    ({"distributed.gradients": "sharded"}, "distributed.gradients is 'sharded'; expected 'whole'"),
    ({"distributed.timeout": 0.0}, "distributed.timeout is 0.0; expected > 0"),
    ({"distributed.timeout": float("inf")}, "distributed.timeout is inf; expected > 0"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", REFUSED)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config_of(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_settings_that_do(engine: str) -> None:
    config_of({**FORWARD, "rollout.engine": engine})
    config_of({"distributed.strategy": "hybrid", "distributed.gradients": "sharded"})
