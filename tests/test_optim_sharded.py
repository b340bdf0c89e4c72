"""AdamW8bit on DTensors: two processes on a CPU over gloo give the bits of one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_optim import give_gradients, optimizer, parameters, run, values
from torch import Tensor, nn

import g2rpo_kernels as gk

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)

# Rows of 64 elements: shards of 4 rows are a block of 256; "uneven" has 4 rows and 3.
SHAPES = {"even": (8, 64), "uneven": (7, 64), "whole": (5,), "bias": (512,)}
SAVED = "whole.pt"


def in_two_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    torch.multiprocessing.spawn(_process, (work, folder), nprocs=2)
    for rank in range(2):
        error = (folder / f"{rank}.txt").read_text()
        assert not error, f"rank {rank}: {error}"


def _process(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    error = ""
    try:
        work(rank, folder)
    except BaseException:
        error = traceback.format_exc()
    (folder / f"{rank}.txt").write_text(error)
    dist.destroy_process_group()


def _sharded(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def distributed(x: Tensor, name: str) -> Tensor:
        return distribute_tensor(x, mesh, [Replicate() if name == "whole" else Shard(0)])

    plain = parameters(shapes=SHAPES)
    given = {k: nn.Parameter(distributed(p.detach(), k)) for k, p in plain.items()}
    opt = optimizer(given, master_bits=16)
    for step in range(3):
        give_gradients(plain, step)
        for name, p in given.items():
            p.grad = distributed(plain[name].grad, name)
        opt.step(zero_grad=True)
    assert all(not p.grad.to_local().any() for p in given.values())
    saved = torch.load(folder / SAVED)
    for name, p in given.items():
        assert torch.equal(p.detach().full_tensor(), saved[name]), name

    # A NaN in one process's shard: both skip, and name it.
    if dist.get_rank() == 1:
        given["even"].grad.to_local()[0, 0] = torch.nan
    opt.step()
    assert (opt.skipped_steps, opt.last_non_finite) == (1, ["even"])

    again = optimizer(given, master_bits=16)
    again.load_state_dict(opt.state_dict())
    for name, p in given.items():
        p.grad = distributed(plain[name].grad, name)
    before = {name: p.detach().full_tensor() for name, p in given.items()}
    again.step()
    moved = {name: p.detach().full_tensor() for name, p in given.items()}
    with torch.no_grad():
        for name, p in given.items():
            p.copy_(distributed(before[name], name))
    opt.step()
    for name, p in given.items():
        assert torch.equal(p.detach().full_tensor(), moved[name]), name

    def refused(error: type, message: str, x: Tensor, placements: list) -> None:
        with pytest.raises(error, match=message):
            optimizer({"odd": nn.Parameter(distribute_tensor(x, mesh, placements))})

    refused(ValueError, "odd, a DTensor of shape .*multiples of 8", torch.zeros(6, 2), [Shard(0)])
    refused(ValueError, "odd is a DTensor placed as .*expected", torch.zeros(8, 8), [Shard(1)])
    given["even"].grad = distribute_tensor(plain["even"].grad, mesh, [Replicate()])
    with pytest.raises(TypeError, match="the gradient of even is .*placed as the parameter"):
        opt.step()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64)).bfloat16()


def _inputs(step: int, half: int | None = None) -> Tensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
    return x if half is None else x[4 * half : 4 * half + 4]


def _fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(_model())
    opt = gk.AdamW8bit(model.named_parameters(), lr=1e-3)
    losses = []
    for step in range(4):
        loss = model(_inputs(step, rank)).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    plain = _model()
    theirs = gk.AdamW8bit(plain.named_parameters(), lr=1e-3)
    for step in range(4):
        theirs.zero_grad()
        loss = plain(_inputs(step)).float().square().mean()
        loss.backward()
        theirs.step()
        assert losses[step] == pytest.approx(loss.item(), rel=2e-3)
    assert losses[3] < losses[0]


def _work(rank: int, folder: Path) -> None:
    _sharded(folder)
    _fully_sharded(rank)


def test_shards_have_the_bits_of_the_whole(tmp_path: Path) -> None:
    whole = parameters(shapes=SHAPES)
    run(whole, 3, master_bits=16)
    torch.save(values(whole), tmp_path / SAVED)
    in_two_processes(_work, tmp_path)
