"""AdamW8bit on DTensors: any number of processes, on a CPU over gloo, gives the bits of one.

Four processes are started once; meshes of two and three are of the first of them.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_optim import BF16, F32, give_gradients, optimizer, parameters, values
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels.optim.parts import own_state

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)

WORLD = 4
SHAPES = {
    "uneven": (10, 256), "few": (2, 256), "conv": (6, 4, 8, 8), "wide": (5, 512),
    "equal": (12, 64), "long": (3072,), "bias": (512,), "odd": (7, 64), "short": (5,),
    "placed": (5, 256), "scalar": (),
}  # fmt: skip
REPLICATED = ("placed", "scalar")
# Rows of whole blocks; and by number of processes, shards that are equal and of whole blocks.
ROWS = {"uneven", "few", "conv", "wide"}
EQUAL = {2: {"long", "bias"}, 3: {"equal", "long"}, 4: {"long"}}
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "16": (BF16, {"master_bits": 16}),
    "24": (BF16, {"seed": 9}),
    "32": (BF16, {"master_bits": 32}),
    "float32": (F32, {}),
    "fp8": (BF16, {"codec": "fp8"}),
}
CLIP = 2e-3  # below the gradients' norm


def tensors_of(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": value
        for i, state in state_dict["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def whole(case: str, steps: int) -> tuple[dict[str, nn.Parameter], gk.AdamW8bit, list[float]]:
    """One process's parameters after some steps, the optimizer, and the norms of the gradients."""
    dtype, options = CASES[case]
    given, norms = parameters(dtype, SHAPES), []
    opt = optimizer(given, **options)
    for step in range(steps):
        give_gradients(given, step)
        norms.append(float(gk.total_grad_norm(given.values())))
        opt.step(grad_scale=CLIP / norms[-1])
    return given, opt, norms


# In the processes -------------------------------------------------------------------------------


class Mesh:
    """A mesh, DTensors on it made of each process's own slices, and runs on them."""

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.size = mesh, mesh.size()

    def placements(self, name: str) -> list:
        from torch.distributed.tensor import Replicate, Shard

        last = Replicate() if name in REPLICATED else Shard(0)
        return [*[Replicate()] * (self.mesh.ndim - 1), last]

    def own(self, x: Tensor, name: str = "") -> Tensor:
        """Rows as torch.chunk has them, of which the last processes may have none."""
        if name in REPLICATED:
            return x.clone()
        parts = x.chunk(self.mesh.size(-1))
        rank = self.mesh.get_local_rank(self.mesh.ndim - 1)
        return parts[rank].clone() if rank < len(parts) else x[:0].clone()

    def place(self, x: Tensor, name: str = "") -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            self.own(x.detach(), name), self.mesh, self.placements(name), run_check=False,
            shape=x.shape, stride=x.stride(),
        )  # fmt: skip

    def fresh(self, given: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(self.place(p, name)) for name, p in given.items()}

    def give(self, given: dict[str, nn.Parameter], dtype: torch.dtype, step: int) -> None:
        plain = parameters(dtype, SHAPES)
        give_gradients(plain, step)
        for name, p in given.items():
            p.grad = self.place(plain[name].grad, name)

    def steps(self, given: dict, opt: gk.AdamW8bit, case: str, norms: list, which: range) -> None:
        for step in which:
            self.give(given, CASES[case][0], step)
            norm = gk.total_grad_norm(given.values())
            assert norm.dtype is F32 and float(norm) == pytest.approx(norms[step], rel=1e-6)
            opt.step(grad_scale=CLIP / norms[step], zero_grad=step == 1)
            left = {bool(g.any()) for p in given.values() if len(g := p.grad.to_local().view(-1))}
            assert left == {step != 1}

    def assert_same(self, given: dict[str, nn.Parameter], opt: gk.AdamW8bit, saved: dict) -> None:
        """Values, and states as a state dict has them, are those of one process."""
        from torch.distributed.tensor import DTensor

        for name, p in given.items():
            assert torch.equal(p.detach().to_local(), self.own(saved["values"][name], name)), name
        sharded = ROWS | EQUAL[self.mesh.size(-1)]
        expected, found = tensors_of(saved["state"]), tensors_of(opt.state_dict())
        assert found.keys() == expected.keys()
        for key, value in found.items():
            name = list(SHAPES)[int(key.split(".")[0])]
            assert isinstance(value, DTensor) == (name in sharded), key
            assert value.dtype is expected[key].dtype and value.shape == expected[key].shape, key
            if isinstance(value, DTensor):
                assert torch.equal(value.to_local(), self.own(expected[key])), key
            else:
                assert torch.equal(value, expected[key]), key
        assert {s["step"] for s in opt.state.values()} == {saved["state"]["state"][0]["step"]}
        assert not any(isinstance(v, DTensor) for s in opt.state.values() for v in s.values())


def _same_bits(on: Mesh, case: str, saved: dict) -> tuple[dict, gk.AdamW8bit]:
    dtype, options = CASES[case]
    given = on.fresh(parameters(dtype, SHAPES))
    opt = optimizer(given, **options)
    on.steps(given, opt, case, saved[case, 5]["norms"], range(3))
    on.assert_same(given, opt, saved[case, 3])
    return given, opt


def _refusals(on: Mesh, given: dict, opt: gk.AdamW8bit, saved: dict) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if on.mesh.get_local_rank() == 1:  # a NaN in one process's shard: all skip, and name it
        given["uneven"].grad.to_local()[0, 0] = torch.nan
    opt.step()
    assert (opt.skipped_steps, opt.last_non_finite) == (1, ["uneven"])
    with pytest.raises(ValueError, match="odd is a DTensor placed as .*expected"):
        optimizer({"odd": nn.Parameter(DTensor.from_local(torch.zeros(8, 8), on.mesh, [Shard(1)]))})

    state = opt.state_dict()
    index = {name: i for i, name in enumerate(SHAPES)}
    changes = (
        ("uneven", state["state"][0]["exp_avg"].to_local(), r"exp_avg torch.uint8 \(.*\(10, 256\)"),
        ("uneven", DTensor.from_local(torch.zeros(10, 256, dtype=torch.uint8), on.mesh,
                                      [Replicate()]), "exp_avg placed as .*as the parameter"),
        ("odd", on.place(torch.zeros(7, 64, dtype=torch.uint8)), "exp_avg as a DTensor; expected"),
    )  # fmt: skip
    for name, value, message in changes:
        changed = {**state, "state": dict(state["state"])}
        changed["state"][index[name]] = {**state["state"][index[name]], "exp_avg": value}
        with pytest.raises(ValueError, match=f"the state of {name} has {message}"):
            opt.load_state_dict(changed)
    on.assert_same(given, opt, saved)  # what was refused has changed nothing

    given["uneven"].grad = DTensor.from_local(torch.zeros(10, 256, dtype=BF16), on.mesh)
    with pytest.raises(TypeError, match="the gradient of uneven is .*placed as the parameter"):
        opt.step()
    given["uneven"].grad = None
    given["uneven"].grad_factors = gk.GradientFactors(torch.ones(1, 10), torch.ones(1, 256))
    with pytest.raises(TypeError, match="the gradient of uneven is kept as factors; expected"):
        opt.step()


def _moved(on: Mesh, given: dict, opt: gk.AdamW8bit, case: str, saved: dict) -> None:
    """Copies, states loaded where they were saved, and states that were away, go on."""
    norms = saved[case, 5]["norms"]
    theirs = on.fresh(saved[case, 3]["values"])
    again = optimizer(theirs, **CASES[case][1])
    opt.offload()
    again.load_state_dict(opt.state_dict())
    opt.restore()
    with pytest.raises(ValueError, match="state 0 has exp_avg as a DTensor; expected ordinary"):
        gk.optim.to_bitsandbytes(opt.state_dict())
    copied = copy.deepcopy([given, opt])
    for some, one in ((theirs, again), copied, (given, opt)):
        on.steps(some, one, case, norms, range(3, 5))
        on.assert_same(some, one, saved[case, 5])


def _from_one(on: Mesh, case: str, saved: dict, folder: Path) -> None:
    """A state dict that one process saved, memory-mapped."""
    mapped = torch.load(folder / "one.pt", mmap=True)
    given = on.fresh(saved[case, 3]["values"])
    opt = optimizer(given, **CASES[case][1])
    slot, state = opt._current_slots()[0], mapped["state"][0]
    for key, value in own_state(slot, state, opt.param_groups[0]).items():
        if isinstance(value, Tensor):  # nothing was copied yet
            assert value.untyped_storage().data_ptr() == state[key].untyped_storage().data_ptr()
            assert len(value) == 10 // on.size
    opt.load_state_dict(mapped)
    on.steps(given, opt, case, saved[case, 5]["norms"], range(3, 5))
    on.assert_same(given, opt, saved[case, 5])


def _save(on: Mesh, given: dict, opt: gk.AdamW8bit, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    tensors = tensors_of(opt.state_dict()) | {name: p.detach() for name, p in given.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder / "saved"), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=on.mesh.get_group())


def _load(on: Mesh | None, case: str, saved: dict, folder: Path) -> tuple[dict, gk.AdamW8bit]:
    import torch.distributed.checkpoint as dcp

    dtype, options = CASES[case]
    given = parameters(dtype, SHAPES) if on is None else on.fresh(parameters(dtype, SHAPES))
    opt = optimizer(given, **options)
    opt.init_state()
    state = opt.state_dict()
    tensors = tensors_of(state) | {name: p.detach() for name, p in given.items()}
    reader = dcp.HuggingFaceStorageReader(str(folder / "saved"))
    group = None if on is None else on.mesh.get_group()
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=on is None)
    for one in state["state"].values():
        one["step"] = 3
    opt.load_state_dict(state)
    return given, opt


def _work(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    saved = torch.load(folder / "whole.pt")
    sizes = range(2, WORLD + 1)
    meshes = {n: Mesh(DeviceMesh("cpu", list(range(n)), mesh_dim_names=("fsdp",))) for n in sizes}
    both = Mesh(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("copies", "fsdp")))
    for size, on in meshes.items():
        if rank >= size:
            continue
        for case in CASES:
            given, opt = _same_bits(on, case, saved)
            if size == 3 and case == "32":
                _save(on, given, opt, folder)
                _moved(on, given, opt, case, saved)
        if size == 2:
            _refusals(on, given, opt, saved[case, 3])
            _from_one(on, "24", saved, folder)
    _same_bits(both, "24", saved)
    dist.barrier()
    for on in (meshes[2], meshes[4]):
        if rank >= on.size:
            continue
        given, opt = _load(on, "32", saved, folder)
        on.assert_same(given, opt, saved["32", 3])
        on.steps(given, opt, "32", saved["32", 5]["norms"], range(3, 5))
        on.assert_same(given, opt, saved["32", 5])
    if rank == 3:
        given, opt = _load(None, "32", saved, folder)
        for step in (3, 4):
            give_gradients(given, step)
            opt.step(grad_scale=CLIP / saved["32", 5]["norms"][step])
        expected = saved["32", 5]
        found = values(given) | tensors_of(opt.state_dict())
        for name, value in (expected["values"] | tensors_of(expected["state"])).items():
            assert torch.equal(found[name], value), name


# Started ----------------------------------------------------------------------------------------


def in_processes(work: Callable[[int, Path], None], count: int, folder: Path) -> None:
    """Run work(rank, folder) in `count` processes; what any of them raises fails the test."""
    failed = ""
    try:
        torch.multiprocessing.spawn(_process, (work, count, folder), nprocs=count)
    except torch.multiprocessing.ProcessExitedException as error:
        failed = str(error)
    for path in sorted(folder.glob("*.error")):
        failed += f"\n{path.name}: {path.read_text()}"
    assert not failed, failed


def _process(rank: int, work: Callable[[int, Path], None], count: int, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    try:
        work(rank, folder)
    except BaseException:
        (folder / f"rank {rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # the others may wait for this one, and are ended when it is
    dist.destroy_process_group()


def test_any_number_of_processes_has_the_bits_of_one(tmp_path: Path) -> None:
    saved: dict[tuple[str, int], dict[str, Any]] = {}
    for case in CASES:
        for steps in (3, 5):
            given, opt, norms = whole(case, steps)
            saved[case, steps] = {
                "values": values(given), "state": opt.state_dict(), "norms": norms
            }  # fmt: skip
    torch.save(saved, tmp_path / "whole.pt")
    torch.save(saved["24", 3]["state"], tmp_path / "one.pt")
    assert min(saved["24", 5]["norms"]) > CLIP
    in_processes(_work, WORLD, tmp_path)
