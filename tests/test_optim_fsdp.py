"""AdamW8bit on what fully_shard makes of a module, and norms of gradients that are DTensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_optim import F32, give_gradients, parameters
from test_optim_sharded import SHAPES, Mesh, in_processes
from torch import Tensor, nn

import g2rpo_kernels as gk

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


def _norms(on: Mesh) -> None:
    """Of gradients some of which are everyone's own, and of those placed otherwise."""
    from torch.distributed.tensor import DTensor, Partial

    plain = parameters(F32, SHAPES)
    give_gradients(plain, 1)
    mixed = [nn.Parameter(torch.zeros(3)), *on.fresh(plain).values()]
    mixed[0].grad = torch.full((3,), 0.5)
    for p, name in zip(mixed[1:], plain, strict=True):
        p.grad = on.place(plain[name].grad, name)
    ones = torch.ones_like(mixed[0])
    ones.grad = mixed[0].grad
    expected = float(gk.total_grad_norm([ones, *plain.values()]))
    found = gk.total_grad_norm(mixed)
    assert type(found) is Tensor and float(found) == pytest.approx(expected, rel=1e-6)
    everyones = [torch.zeros(()) for _ in range(on.size)]
    dist.all_gather(everyones, found, group=on.mesh.get_group(0))
    assert all(torch.equal(found, other) for other in everyones)
    mixed[1].grad = DTensor.from_local(torch.zeros(10, 256), on.mesh, [Partial()])
    with pytest.raises(TypeError, match="placed as .*Partial.*expected Shard and Replicate only"):
        gk.total_grad_norm(mixed)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64)).bfloat16()


def _inputs(step: int, half: int | None = None) -> Tensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
    return x if half is None else x[4 * half : 4 * half + 4]


def _fully_sharded(on: Mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(_model(), mesh=on.mesh)
    opt = gk.AdamW8bit(model.named_parameters(), lr=1e-3)
    losses = []
    for step in range(4):
        loss = model(_inputs(step, on.mesh.get_local_rank())).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        total = loss.detach()
        dist.all_reduce(total, group=on.mesh.get_group())
        losses.append(total.item() / 2)
    assert sum(slot.gathered for slot in opt._current_slots()) == 2  # the biases
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
    from torch.distributed.device_mesh import init_device_mesh

    on = Mesh(init_device_mesh("cpu", (2,)))
    _norms(on)
    _fully_sharded(on)


def test_norms_and_losses_are_those_of_one_process(tmp_path: Path) -> None:
    in_processes(_work, 2, tmp_path)
