"""How gradients of two ranks become one, and the whole copy that makes their completions."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from ranks import Started
from test_distributed import EIGHT_BIT, SHARD, config_of, make_trainer
from tiny import TinyModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import g2rpo_kernels as gk
from g2rpo.config import DistributedConfig
from g2rpo.distributed import ALONE, Ranks, layout
from g2rpo.distributed.replica import Replica
from g2rpo.distributed.shards import whole_values
from g2rpo_kernels import joint_linear
from g2rpo_kernels.gradient_factors import GradientFactors


def drawn(rank: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Other numbers on each rank, and all of them known to all."""
    generator = torch.Generator().manual_seed(1000 * rank + seed)
    return torch.randn(shape, generator=generator).to(dtype)


class Reductions(TorchDispatchMode):
    """Within it, the dtypes of what is reduced and scattered, whatever PyTorch calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::_reduce_scatter_base_"):
            self.dtypes.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


# What both ranks do. ----------------------------------------------------------------------------


def sums_in_buckets(ranks: Ranks) -> None:
    """float32 whatever the gradients are in, BUCKET elements at most at once; rounded once."""
    sizes, bucket, sum_ = (7, 250, 33, 100, 5), layout.BUCKET, ranks.sum_
    seen: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
        without = nn.Parameter(torch.zeros(3))
        for i, parameter in enumerate(parameters):
            parameter.grad = drawn(ranks.rank, sizes[i], seed=i, dtype=dtype)
        layout.BUCKET, ranks.sum_ = 100, lambda flat: (seen.append(flat), sum_(flat))
        try:
            layout.Replicated(ranks).reduce([*parameters[:2], without, *parameters[2:]])
        finally:
            layout.BUCKET = bucket
            del ranks.sum_
        assert [len(flat) for flat in seen] == [7, 100, 100, 50 + 33, 100, 5]
        assert all(flat.dtype == torch.float32 for flat in seen)
        assert without.grad is None
        for i, parameter in enumerate(parameters):
            each = [drawn(r, sizes[i], seed=i, dtype=dtype).float() for r in range(ranks.count)]
            assert torch.equal(parameter.grad, sum(each).to(dtype))
        seen.clear()


def gathers_factors(ranks: Ranks) -> None:
    """Where the rows of all ranks are fewer than the gradient's elements."""
    for rows, kept in ((4, True), (15, True), (16, False)):  # 2 * 16 * (64 + 64) == 64 * 64
        parameter = nn.Parameter(torch.zeros(64, 64))
        every = [[drawn(r, rows, 64, seed=s) for s in (rows, rows + 1)] for r in (0, 1)]
        parameter.grad_factors = GradientFactors(*every[ranks.rank])
        layout.Replicated(ranks).reduce([parameter])
        dense = sum(grad.T @ inputs for grad, inputs in every)
        norm = float(gk.total_grad_norm([parameter]))
        assert norm == pytest.approx(float(dense.norm()), rel=1e-6)
        assert hasattr(parameter, "grad_factors") == kept and (parameter.grad is None) == kept
        found = parameter.grad_factors.dense() if kept else parameter.grad
        torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-5)


def loss_of(model: TinyModel, rank: int) -> Tensor:
    conditions = model.embed(model.prompts[2 * rank : 2 * rank + 2])
    latents = drawn(rank, 2, *model.latent_shape)
    velocity = model.policy.velocity(latents, torch.tensor([0.7, 0.3]), conditions)
    return (velocity.float() * drawn(rank, *velocity.shape, seed=1)).sum()


def fsdp_sums(ranks: Ranks) -> None:
    """The sum of the ranks' gradients, made in float32; no mean."""
    for dtype in (torch.float32, torch.bfloat16):
        models = [TinyModel() for _ in range(3)]
        for model in models:
            model.policy.transformer = nn.Module.to(model.policy.transformer, dtype)
            model.policy.dtype = dtype
        for rank, model in enumerate(models[:2]):
            loss_of(model, rank).backward()
        each = [dict(model.policy.transformer.named_parameters()) for model in models[:2]]
        ours = models[2]
        config = DistributedConfig(strategy="shard")
        laid = layout.Sharded(ours.policy.transformer, config, ranks)
        laid.before_backward(last=True)
        with Reductions() as seen:
            loss_of(ours, ranks.rank).backward()
        assert seen.dtypes == [torch.float32] * 3  # of two blocks and the root
        for name, parameter in ours.policy.transformer.named_parameters():
            assert isinstance(parameter.grad, DTensor) and parameter.grad.dtype == dtype
            true, found = sum(one[name].grad.float() for one in each), parameter.grad.full_tensor()
            if "time_text_embed" in name:  # all blocks' add up in it, in another order under FSDP
                error = (found.float() - true).norm() / true.norm()
                assert error < (1e-6 if dtype == torch.float32 else 0.02), name
            else:
                assert torch.equal(found, true.to(dtype)), name


def reduces_once_or_after_every_backward(ranks: Ranks) -> None:
    """Of three groups of parameters: two blocks and the root."""
    for gradients, backwards in (("whole", 1), ("sharded", 3 * 2)):
        trainer = make_trainer(config_of({**SHARD, "distributed.gradients": gradients}), ranks)
        trainer.sampling.update_batch = 1  # two chunks of each of the three positions
        with Reductions() as seen:
            row = trainer.update()
        assert len(seen.dtypes) == 3 * backwards, gradients
        assert row["ratio_max"] == row["ratio_mean"] == 1.0


def held(replica: Replica) -> int:
    """Bytes of its storages."""
    parameters = replica.policy.transformer.parameters()
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in parameters}
    return sum(storage.nbytes() for storage in storages.values())


def is_there(parameter: Tensor) -> bool:
    return parameter.untyped_storage().nbytes() > 0


def fills_a_replica(ranks: Ranks) -> None:
    """For as long as completions last: all of it, or one block's token linears at a time."""
    trainer = make_trainer(config_of({**SHARD, "model.fuse": True}), ranks)
    engine = trainer.sampling.engine
    replica = engine._replica
    ours = replica.policy.transformer
    named = dict(ours.named_parameters())
    assert held(replica) == 0
    for _ in range(2):  # the second time with what an update has made of the weights
        true = dict(whole_values(trainer.weights.parameters, None, keep=True))
        with replica.filled(all_weights=True):
            assert held(replica) == replica.nbytes == sum(value.nbytes for value in true.values())
            assert all(torch.equal(value, named[name]) for name, value in true.items())
            assert not any(parameter.requires_grad for parameter in named.values())
            for block in ours.single_transformer_blocks:
                linears = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
                assert joint_linear._adjacent([linear.weight for linear in linears])
            modulations = [n for n in named if "norm" in n and n.endswith("linear.weight")]
            replica.drop_modulations()
            assert len(modulations) == 4
            assert held(replica) == replica.nbytes - sum(named[n].nbytes for n in modulations)
            assert not any(is_there(named[name]) for name in modulations)
        assert held(replica) == 0
        trainer.update()
        assert held(replica) == 0
    with contextlib.suppress(ZeroDivisionError), replica.filled(all_weights=True):
        raise ZeroDivisionError
    assert held(replica) == 0


def fills_one_block_at_a_time(ranks: Ranks) -> None:
    settings = {**SHARD, "model.fuse": True, "rollout.precision": "fp8"}
    trainer = make_trainer(config_of(settings), ranks)
    replica = trainer.sampling.engine._replica
    ours = replica.policy.transformer
    blocks = [*ours.transformer_blocks, *ours.single_transformer_blocks]
    of_tokens = {
        block: [m.weight for name, m in block.named_modules()
                if isinstance(m, nn.Linear) and "norm" not in name]
        for block in blocks
    }  # fmt: skip
    true = dict(whole_values(trainer.weights.parameters, None, keep=True))
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    with replica.filled(all_weights=False):
        others = held(replica)
        assert 0 < others == replica.nbytes - sum(w.nbytes for b in blocks for w in of_tokens[b])
        for block in blocks:
            with replica.block(block):
                assert held(replica) == others + sum(w.nbytes for w in of_tokens[block])
                for weight in of_tokens[block]:
                    assert torch.equal(weight, true[names[id(weight)]])
            assert held(replica) == others
    assert held(replica) == 0


def keeps_factors_in_a_run(ranks: Ranks) -> None:
    """adamw8bit, replicated: the modulations' gradients are rows of both ranks until the step."""
    trainer = make_trainer(config_of(EIGHT_BIT), ranks)
    optimizer, seen = trainer.improver.optimizer, []
    step = optimizer.step

    def spy(**given: float) -> object:
        for name, parameter in trainer.weights.parameters.items():
            if hasattr(parameter, "grad_factors"):
                seen.append((name, len(parameter.grad_factors.factors()[0])))
        return step(**given)

    optimizer.step = spy
    trainer.update()
    # Of two prompts a rank and three positions each.
    assert seen and {rows for _, rows in seen} == {2 * 2 * 3}
    assert {name for name, _ in seen} <= {n for n in trainer.weights.parameters if "norm" in n}


CASES = {
    case.__name__: case
    for case in (
        sums_in_buckets, gathers_factors, fsdp_sums, reduces_once_or_after_every_backward,
        fills_a_replica, fills_one_block_at_a_time, keeps_factors_in_a_run,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder: Path = tmp_path_factory.mktemp("layout")
    return Started(2, CASES, folder).wait()


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name: str, started: Started) -> None:
    assert started.results(name) == [None, None]


def test_one_process_alone_reduces_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = given = torch.ones(3)
    layout.Replicated(ALONE).reduce([parameter])
    assert parameter.grad is given and torch.equal(given, torch.ones(3))
