"""fuse_flux with FSDP and DistributedDataParallel: two processes on a CPU, over gloo."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_fuse_flux import inputs, new_flux, run, run_and_gradients
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import g2rpo_kernels as gk
from g2rpo_kernels import joint_linear as joint
from g2rpo_kernels.flux import blocks_of, fused_blocks, is_fused

RANKS = 2

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


def sharded(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def gathered(model: nn.Module, given: dict) -> dict[str, Tensor]:
    """As `run_and_gradients`, with the gradients of all ranks' shards."""
    model.zero_grad()
    out = run(model, given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    return {
        "output": out.detach(),
        **{name: p.grad.full_tensor() for name, p in model.named_parameters()},
    }


def assert_close(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name in true:
        difference = (found[name] - true[name]).norm() / true[name].norm()
        assert difference <= 1e-6, f"{name}: {difference}"


def refused(message: str, work: Callable, *arguments: object) -> None:
    with pytest.raises(ValueError, match=message):
        work(*arguments)


# What both ranks do. -----------------------------------------------------------------------------


def fused_then_sharded(rank: int) -> None:
    """Output and gradients of the whole model; the weights lie apart once FSDP has them."""
    whole = gk.fuse_flux(new_flux())
    given = inputs(whole)
    true = run_and_gradients(whole, given)
    model = sharded(gk.fuse_flux(new_flux()))
    block = model.transformer_blocks[0]
    assert isinstance(block, FSDPModule) and all(is_fused(each) for each in blocks_of(model))
    assert len(block.attn.to_q.weight.to_local()) == len(block.attn.to_q.weight) // RANKS
    for _ in range(2):
        assert_close(gathered(model, given), true)
    model.enable_gradient_checkpointing()
    assert_close(gathered(model, given), true)


def each_rank_its_own_rows(rank: int) -> None:
    """Gradients are the mean over the ranks; a step of an optimizer moves the shards."""
    given = [inputs(new_flux(), batch=1 + r) for r in range(RANKS)]
    whole = gk.fuse_flux(new_flux())
    each = [run_and_gradients(whole, one) for one in given]
    names = [name for name in each[0] if name != "output"]
    true = {name: sum(found[name] for found in each) / RANKS for name in names}
    model = sharded(gk.fuse_flux(new_flux()))
    found = gathered(model, given[rank])
    assert_close({"output": found.pop("output")}, {"output": each[rank]["output"]})
    assert_close(found, true)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter -= 1e-2 * true[name]
        assert_close({"": run(model, given[rank])}, {"": run(whole, given[rank])})


def no_copy_of_weights_is_kept(rank: int) -> None:
    """What waits for the backward pass is no larger than unfused, whose weights FSDP frees."""

    def kept(model: nn.Module) -> int:  # bytes of matrices, which activations [B, L, D] are not
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim == 2:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(model, inputs(model, batch=1, image=4))
        # By now FSDP has freed what it gathered, in place.
        found = sum(storage.nbytes() for storage in storages.values())
        out.sum().backward()
        return found

    assert kept(sharded(gk.fuse_flux(new_flux()))) <= kept(sharded(new_flux()))


def sharded_first_is_refused(rank: int) -> None:
    refused("transformer is sharded", gk.fuse_flux, sharded(new_flux()))
    refused("transformer is sharded", gk.fuse_flux, fully_shard(new_flux()))
    inner = new_flux()
    fully_shard(inner.single_transformer_blocks[1].proj_out)
    refused("transformer is sharded", gk.fuse_flux, inner)
    model = sharded(gk.fuse_flux(new_flux()))
    refused("transformer is sharded", gk.fuse_flux, model)
    refused("transformer is sharded", gk.unfuse_flux, model)
    refused("transformer is sharded; expected whole parameters", fused_blocks, model)
    run(model, inputs(model))  # which leaves the root's own parameters whole
    refused("transformer is sharded", gk.unfuse_flux, model)
    refused("transformer is not fused", fused_blocks, sharded(new_flux()))


def linears_sharded_by_themselves(rank: int) -> None:
    """They gather their weights in their own forward, which then is what runs."""
    linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    for parameter in linears.parameters():
        dist.broadcast(parameter.data, 0)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    true = joint.joint_linear(x, linears)
    for linear in linears:
        fully_shard(linear)
    joint.share_storage(linears)
    assert_close({"": joint.joint_linear(x, linears)}, {"": true})


def data_parallel(rank: int) -> None:
    given = [inputs(new_flux(), batch=1 + r) for r in range(RANKS)]
    whole = gk.fuse_flux(new_flux())
    each = [run_and_gradients(whole, one) for one in given]
    model = nn.parallel.DistributedDataParallel(gk.fuse_flux(new_flux(seed=rank)))
    found = run_and_gradients(model, given[rank])
    assert_close({"output": found.pop("output")}, {"output": each[rank]["output"]})
    for name, grad in found.items():
        mean = sum(one[name.removeprefix("module.")] for one in each) / RANKS
        assert_close({name: grad}, {name: mean})
    block = model.module.single_transformer_blocks[0]
    linears = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    assert joint._adjacent([linear.weight for linear in linears])


CASES = {
    work.__name__: work
    for work in (
        fused_then_sharded, each_rank_its_own_rows, no_copy_of_weights_is_kept,
        sharded_first_is_refused, linears_sharded_by_themselves, data_parallel,
    )
}  # fmt: skip


# Starting the ranks once for all of it takes most of the time. -----------------------------------


@contextmanager
def process_group(rank: int, folder: Path) -> Iterator[None]:
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:  # where the name of the machine cannot be resolved
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()
    dist.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=RANKS
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with process_group(rank, folder):
        for name, case in CASES.items():
            try:
                case(rank)
                text = "passed"
            except BaseException:  # to be shown by the test; the other rank may wait for this one
                (folder / f"{name}.{rank}").write_text(traceback.format_exc())
                raise
            (folder / f"{name}.{rank}").write_text(text)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where each rank has written what came of each case, and how the processes ended."""
    folder = tmp_path_factory.mktemp("ranks")
    try:
        torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    except torch.multiprocessing.ProcessRaisedException as error:
        return folder, str(error)
    return folder, ""


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name: str, ranks: tuple[Path, str]) -> None:
    folder, ended = ranks
    for rank in range(RANKS):
        file = folder / f"{name}.{rank}"
        assert file.is_file(), f"rank {rank} never came to it: {ended}"
        assert file.read_text() == "passed"
