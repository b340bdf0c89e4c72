"""AdamW8bit's states: their size, saved and loaded bit for bit, in host memory and back."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from cases import generator
from test_optim import (
    BF16,
    F32,
    SHAPES,
    assert_same,
    give_gradients,
    optimizer,
    parameters,
    run,
    values,
)
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels.optim.host import ALIGNMENT, HostMemory


def tensors_of(opt: gk.AdamW8bit) -> dict[str, Tensor]:
    return {
        f"{i} {key}": value.clone()
        for i, state in opt.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def steps(given: dict[str, nn.Parameter], opt: gk.AdamW8bit, which: range) -> None:
    for step in which:
        give_gradients(given, step)
        opt.step()


def test_weights_and_states_take_at_most_5_06_bytes_a_parameter_of_flux() -> None:
    width, text, head = 3072 // 4, 4096 // 4, 128  # a quarter of FLUX.1-dev's, one block of each
    hidden = 4 * width
    linears = {
        "x_embedder": (width, 64), "context_embedder": (width, text), "proj_out": (64, width),
        "norm_out": (2 * width, width), "time.1": (width, 256), "time.2": (width, width),
        **{f"double.{n}.modulation": (6 * width, width) for n in "ab"},
        **{f"double.{n}.{part}": (width, width) for n in "ab" for part in ("q", "k", "v", "out")},
        **{f"double.{n}.up": (hidden, width) for n in "ab"},
        **{f"double.{n}.down": (width, hidden) for n in "ab"},
        **{f"single.{part}": (width, width) for part in "qkv"},
        "single.modulation": (3 * width, width), "single.mlp": (hidden, width),
        "single.out": (width, width + hidden),
    }  # fmt: skip
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"norm.{i}": (head,) for i in range(6)}
    given = {name: nn.Parameter(torch.zeros(shape, dtype=BF16)) for name, shape in shapes.items()}
    opt = optimizer(given, master_bits=24)
    opt.init_state()
    held = [*given.values(), *(v for s in opt.state.values() for v in s.values())]
    size = sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))
    count = sum(p.numel() for p in given.values())
    assert count > 10e6
    assert 5 <= size / count <= 5.06


@pytest.mark.parametrize("options", [{"master_bits": 16, "seed": 5}, {"block_size": 64},
                                     {"master_bits": 32, "codec": "fp8"}])  # fmt: skip
def test_a_saved_optimizer_goes_on_bit_for_bit(options: dict, tmp_path) -> None:
    given = parameters() | {f"{n}32": p for n, p in parameters(F32).items()}
    opt = optimizer(given, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    steps(given, opt, range(2))
    schedule.step()
    torch.save([values(given), opt.state_dict()], tmp_path / "saved.pt")
    steps(given, opt, range(2, 4))
    again = parameters() | {f"{n}32": p for n, p in parameters(F32).items()}
    saved, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        for name, p in again.items():
            p.copy_(saved[name])
    other = optimizer(again, **{**options, "seed": 77})
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == pytest.approx(0.5e-4)
    steps(again, other, range(2, 4))
    assert_same(values(again), values(given))
    assert_same(tensors_of(other), tensors_of(opt))
    assert {k: v.dtype for k, v in tensors_of(other).items()} == {
        k: v.dtype for k, v in tensors_of(opt).items()
    }


def test_scales_are_rows_where_rows_are_blocks_and_may_be_loaded_flat() -> None:
    shapes = {"rows": (3, 512), "conv": (2, 4, 8, 8), "odd": (4, 100), "none": (0, 256)}
    opt = run(parameters(shapes=shapes))
    saved = opt.state_dict()
    found = [tuple(state["exp_avg_sq_scale"].shape) for state in saved["state"].values()]
    assert found == [(3, 2), (2, 1), (2,), (0, 1)]
    flat = copy.deepcopy(saved)
    for state in flat["state"].values():  # as they were once
        for key in ("exp_avg_scale", "exp_avg_sq_scale"):
            state[key] = state[key].flatten()
    other = optimizer(parameters(shapes=shapes))
    other.load_state_dict(flat)
    assert_same(tensors_of(other), tensors_of(opt))
    for wrong in (torch.zeros(5), torch.zeros(2, 3)):
        flat["state"][0]["exp_avg_scale"] = wrong
        with pytest.raises(ValueError, match=r"state of rows has exp_avg_scale .*expected .*3, 2"):
            other.load_state_dict(flat)


def test_what_is_loaded_is_copied_and_what_was_there_is_gone() -> None:
    given = parameters()
    opt, other = run(given), run(parameters())
    old = weakref.ref(other.state[other.param_groups[0]["params"][0]]["exp_avg"])
    saved = opt.state_dict()
    expected = tensors_of(opt)
    other.load_state_dict(saved)
    assert old() is None
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert_same(tensors_of(opt), expected)


def test_states_of_some_parameters_and_deepcopies() -> None:
    given = parameters()
    opt = optimizer(given)
    give_gradients(given)
    given["bias"].grad = None
    opt.step()
    other = optimizer(parameters())
    other.load_state_dict(opt.state_dict())
    assert len(other.state) == len(given) - 1
    opt.skipped_steps = 3
    both = copy.deepcopy([given, opt])
    assert both[1].skipped_steps == 3
    for some, one in ((given, opt), both):
        steps(some, one, range(1, 3))
    assert_same(values(both[0]), values(given))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 128}, "has block_size 256, this optimizer 128; expected the same"),
        ({"master_bits": 32}, "has master_bits 24, this optimizer 32"),
        ({"codec": "fp8"}, "has codec 'dynamic', this optimizer 'fp8'"),
    ],
)
def test_a_state_of_another_kind_is_refused(options: dict, message: str) -> None:
    given = parameters()
    saved = run(given).state_dict()
    other = run(parameters(), **options)
    expected = tensors_of(other)
    with pytest.raises(ValueError, match="group 0: the state dict " + message):
        other.load_state_dict(saved)
    assert_same(tensors_of(other), expected)


def test_a_state_of_other_parameters_is_refused() -> None:
    opt = run(parameters())
    saved = opt.state_dict()
    for other, message in (
        (parameters(F32), "weight has dtype torch.float32; its optimizer state was made for bfl"),
        (parameters(shapes=SHAPES | {"bias": (25,)}),
         r"state of bias has exp_avg torch.uint8 \(24,\); expected torch.uint8 \(25,\)"),
        (parameters(shapes={"weight": (24, 33)}), r"groups of \[5\] parameters; expected \[1\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            optimizer(other).load_state_dict(saved)
    lacking = copy.deepcopy(saved)
    del lacking["state"][1]["low_bits"]
    with pytest.raises(ValueError, match="the state of bias has .*; expected .*'low_bits'"):
        opt.load_state_dict(lacking)
    plain = torch.optim.AdamW(parameters().values())
    with pytest.raises(ValueError, match="has block_size None, this optimizer 256"):
        opt.load_state_dict(plain.state_dict())
    lacking = copy.deepcopy(saved)
    lacking["param_groups"][0]["lr"] = -1
    with pytest.raises(ValueError, match="the state dict's group 0: lr is -1"):
        opt.load_state_dict(lacking)


def test_hooks_of_loading_see_the_states() -> None:
    opt = run(parameters())
    other = optimizer(parameters())
    seen = []

    def hook(_, given: dict) -> dict:
        seen.append(len(given["state"]))
        return {**given, "state": {0: given["state"][0]}}

    other.register_load_state_dict_pre_hook(hook)
    other.load_state_dict(opt.state_dict())
    assert seen == [len(SHAPES)] and len(other.state) == 1


def test_parameters_that_a_wrapper_puts_in_the_groups() -> None:
    given, replaced = parameters(), parameters()
    opt = optimizer(given)
    opt.param_groups[0]["params"] = list(replaced.values())
    steps(replaced, opt, range(2))
    expected = parameters()
    run(expected, 2)
    assert_same(values(replaced), values(expected))


def test_step_is_refused_while_offloaded() -> None:
    given, expected = parameters(), parameters()
    opt = run(given, 2)
    run(expected, 3)
    before = tensors_of(opt)
    opt.offload()
    with pytest.raises(RuntimeError, match=r"in host memory; expected restore\(\) before step"):
        opt.step()
    with pytest.raises(RuntimeError, match="expected restore"):
        copy.deepcopy(opt)
    torch.save(opt.state_dict(), io.BytesIO())
    assert_same(tensors_of(opt), before)
    opt.restore()
    steps(given, opt, range(2, 3))
    assert_same(values(given), values(expected))
    opt.offload()
    opt.load_state_dict(opt.state_dict())  # which brings the states where they are stepped
    opt.step()


def test_host_memory_is_used_again() -> None:
    memory = HostMemory()
    shapes = {"codes": (1000,), "scale": (7,), "bits": (3, 5), "none": (0,)}
    dtypes = {"codes": torch.uint8, "scale": F32, "bits": torch.int16, "none": torch.uint8}

    def draw(key: int) -> dict[str, Tensor]:
        return {
            name: torch.randint(0, 99, shape, generator=generator(key, name)).to(dtypes[name])
            for name, shape in shapes.items()
        }

    places = []
    for key in range(2):
        held = memory.hold(draw(key))
        assert_same(held, draw(key))
        places.append({name: tensor.data_ptr() for name, tensor in held.items()})
    assert places[0] == places[1]
    assert all(held[name].data_ptr() % ALIGNMENT == places[0]["codes"] % ALIGNMENT
               for name in ("scale", "bits"))  # fmt: skip
    torch.save(held, io.BytesIO())  # a checkpoint of states that are in host memory
    shapes["scale"] = (9,)
    held = memory.hold(draw(2))
    assert_same(held, draw(2))
    assert held["codes"].data_ptr() == places[0]["codes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing leaves a CPU")
def test_offload_frees_the_gpus_memory_and_reuses_the_hosts() -> None:
    shapes = {"a": (1024, 1024), "b": (300,)}
    given, expected = (parameters(shapes=shapes, device="cuda") for _ in range(2))
    opt = run(given, 2)
    run(expected, 4)
    places = []
    for step in (2, 3):
        before = torch.cuda.memory_allocated()
        opt.offload()
        states = [v for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)]
        assert all(value.is_pinned() for value in states)
        assert before - torch.cuda.memory_allocated() >= 3 * 1024 * 1024
        places.append([value.data_ptr() for value in states])
        opt.restore()
        assert opt.state[given["a"]]["exp_avg"].is_cuda
        steps(given, opt, range(step, step + 1))
    assert places[0] == places[1]
    assert_same(values(given), values(expected))


def test_repr_has_numbers_and_not_seven_hundred_names() -> None:
    text = repr(optimizer(parameters(), lr=0.5))
    assert "group 0: 5 parameters, lr 0.5, betas (0.9, 0.999)" in text and "conv" not in text
