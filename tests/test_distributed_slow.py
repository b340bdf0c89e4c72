"""What takes four ranks, or a model large enough to weigh: `make test-slow`."""

from __future__ import annotations

import gc
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from ranks import Started
from test_distributed import EIGHT_BIT, SHARD, assert_as_alone, config_of, run
from tiny import TinyModel, brightness
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from g2rpo.distributed import Ranks
from g2rpo.distributed.shards import local
from g2rpo.policy import FluxPolicy
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RANKS = 4
HYBRID = {"distributed.strategy": "hybrid"}
VARIANTS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "shard": SHARD,
    "hybrid": HYBRID,
    "hybrid, sharded": {**HYBRID, "distributed.gradients": "sharded", "train.ema": 0.9},
    "hybrid, forward": {**HYBRID, "distributed.gather": "forward"},
    "hybrid, adamw8bit": {**HYBRID, **EIGHT_BIT},
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Started, Started]:
    folder = tmp_path_factory.mktemp("four")
    cases = {name: partial(run, settings) for name, settings in VARIANTS.items()}
    alone = Started(0, cases, folder / "alone").wait()
    return alone, Started(RANKS, cases, folder / "four", per_node=2).wait()


@pytest.mark.parametrize("name", VARIANTS)
def test_four_ranks_on_two_nodes_learn_what_one_does(name, started) -> None:
    (alone,), ranks = (each.results(name) for each in started)
    assert_as_alone(name, alone, ranks)
    assert all(row["ratio_max"] == row["ratio_mean"] == 1.0 for row in ranks[0]["rows"])


# Memory. ----------------------------------------------------------------------------------------

MEMORY = {
    "adamw, float32": SHARD,
    "adamw8bit, bfloat16": {**SHARD, **EIGHT_BIT},
}
ROLLOUT = {
    "rollout.steps": 3, "rollout.sde_positions": [0, 1], "rollout.granularities": [1],
    "rollout.group_size": 2,
}  # fmt: skip


class LargeModel(TinyModel):
    """FLUX's architecture, 200 million parameters of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=8, attention_head_dim=64,
            num_attention_heads=16, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=False, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
        transformer = nn.Module.to(transformer.eval(), dtype)
        self.policy = FluxPolicy(transformer, self.policy.image_ids)


def nbytes(values: list[Tensor]) -> int:
    """Of this rank's parts."""
    return sum(local(value).nbytes for value in values)


def waiting_gradients() -> int:
    """Bytes of the whole gradients that FSDP keeps until they are reduced: beside bfloat16
    parameters, in float32 ones' own place."""
    kept = [each for each in gc.get_objects() if type(each).__name__ == "FSDPParam"]
    assert kept
    gathered = [getattr(each, "_unsharded_param", None) for each in kept]
    gradients = [each.unsharded_accumulated_grad for each in kept]
    gradients += [parameter.grad for parameter in gathered if parameter is not None]
    return sum(local(gradient).nbytes for gradient in gradients if gradient is not None)


def weigh(settings: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Bytes on this rank at the first step: before its last backward, at the step, after it."""
    config = config_of({**ROLLOUT, **settings})
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    trainer = Trainer(config, LargeModel(dtype), [Reward("brightness", brightness)], ranks=ranks)
    parameters, found = list(trainer.weights.parameters.values()), {}
    optimizer, layout = trainer.improver.optimizer, trainer.layout
    step, before_backward = optimizer.step, layout.before_backward

    def at_backward(last: bool) -> None:
        if last:
            found["waiting"] = waiting_gradients()
        before_backward(last)

    def at_step(**given: float) -> object:
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        found["parameters"] = nbytes([parameter.detach() for parameter in parameters])
        found["gradients"] = nbytes([parameter.grad for parameter in parameters])
        found["waiting at the step"] = waiting_gradients()
        return step(**given)

    layout.before_backward, optimizer.step = at_backward, at_step
    row = trainer.update()
    assert row["ratio_max"] == row["ratio_mean"] == 1.0 and row["grad_norm"] > 0
    states = optimizer.state_dict()["state"].values()
    found["states"] = nbytes([v for s in states for v in s.values() if isinstance(v, Tensor)])
    found["elements"] = sum(parameter.numel() for parameter in parameters)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def available() -> float:
    """GB of memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


@pytest.mark.skipif(
    not Path("/proc/meminfo").is_file() or available() < 16, reason="16 GB of memory free"
)
@pytest.mark.parametrize("gradients", ["whole", "sharded"])
@pytest.mark.parametrize("name", MEMORY)
def test_four_ranks_hold_a_quarter_each(name, gradients, tmp_path) -> None:
    """Of parameters, gradients after their reduction and optimizer states."""
    settings = {**MEMORY[name], "distributed.gradients": gradients}
    (one,), four = (
        Started(count, {"weigh": partial(weigh, settings)}, tmp_path / str(count))
        .wait(600).results("weigh")
        for count in (1, RANKS)
    )  # fmt: skip
    kinds = ("parameters", "gradients", "states")
    print(f"\n{name}, gradients {gradients}: {one['elements'] / 1e6:.1f} M parameters; MB:")
    for label, found in (("one rank", one), *((f"rank {r} of 4", f) for r, f in enumerate(four))):
        held = ", ".join(f"{kind} {found[kind] / 1e6:.1f}" for kind in kinds)
        print(f"  {label}: {held}; before the reduction {found['waiting'] / 1e6:.1f}; the process "
              f"at its peak {found['peak'] / 1e6:.0f}")  # fmt: skip
    whole = sum(one[kind] for kind in kinds)
    for found in four:
        ratio = sum(found[kind] for kind in kinds) / (whole / RANKS)
        print(f"  {ratio:.4f} of a quarter")
        assert found["elements"] == one["elements"] > 190e6
        assert 0.9 < ratio < 1.1
        # All weights', in float32, wait for the last backward; or none.
        waiting = 4 * one["elements"] if gradients == "whole" else 0
        assert found["waiting"] == pytest.approx(waiting, rel=1e-3)
        assert found["waiting at the step"] == 0
