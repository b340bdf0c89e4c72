"""States of bitsandbytes' AdamW8bit and ours, against the package and against its layout."""

from __future__ import annotations

import copy

import pytest
import torch
from test_optim import BF16, F32, assert_same, give_gradients, optimizer, parameters, run, values
from torch import Tensor

from g2rpo_kernels import optim
from g2rpo_kernels.optim.arithmetic import dynamic_code

SHAPES = {
    "large": (70, 90), "small": (30, 10),  # "small" is float32 there
    "edge": (4096,), "rows": (10, 512),
}  # fmt: skip
NUMBERS = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def dynamic_map(signed: bool) -> Tensor:
    """As the paper and bitsandbytes.functional.create_dynamic_map make it, sorted."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@pytest.mark.parametrize("signed", [True, False])
def test_our_codes_are_the_places_in_their_map(signed: bool) -> None:
    torch.testing.assert_close(dynamic_code(signed).value, dynamic_map(signed), rtol=1e-6, atol=0)


def test_there_and_back() -> None:
    given = parameters(shapes=SHAPES)
    opt = run(given, 3, **NUMBERS)
    opt.param_groups[0]["initial_lr"] = 5.0  # a scheduler's
    saved = opt.state_dict()
    theirs = optim.to_bitsandbytes(saved)
    assert set(theirs["state"][0]) == {
        "step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"
    }  # fmt: skip
    assert theirs["state"][0]["state1"].shape == SHAPES["large"]
    assert theirs["state"][3]["absmax1"].shape == (20,)  # ours are [10, 2]
    assert set(theirs["state"][1]) == {"step", "state1", "state2"}
    assert theirs["state"][1]["state1"].dtype is F32
    assert theirs["state"][1]["state1"].shape == SHAPES["small"]
    group = theirs["param_groups"][0]
    assert {name: group[name] for name in NUMBERS} == NUMBERS and group["initial_lr"] == 5.0
    assert not {"master_bits", "codec", "block_size", "seed"} & group.keys()
    wrapped = copy.deepcopy(theirs)
    for state in wrapped["state"].values():  # as newer versions save it
        hidden = {name: state.pop(name) for name in list(state) if name != "step"}
        state["__bnb_optimizer_quant_state__"] = hidden
    for form in (theirs, wrapped):
        back = optim.from_bitsandbytes(form, opt)
        assert back["param_groups"] == saved["param_groups"]
        for i, state in back["state"].items():
            assert (state["step"], state["dtype"]) == (3, "bfloat16")
            assert not state["low_bits"].any() and state["low_bits"].dtype is torch.int8
            tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "low_bits"}
            if i != 1:
                assert_same(tensors, {name: saved["state"][i][name] for name in tensors})
                continue
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                one, other = (
                    dynamic_code(signed).value[some[name].flatten()[:256].int()]
                    * some[f"{name}_scale"][0]
                    for some in (state, saved["state"][i])
                )  # a block whose largest is negative has no code of -1: it shrinks by .7 %
                assert (one - other).abs().max() <= 0.01 * other.abs().max()
        opt.load_state_dict(back)


def test_what_cannot_be_exchanged() -> None:
    given = parameters(shapes=SHAPES)
    theirs = optim.to_bitsandbytes(run(given, 1).state_dict())
    for options, message in (({"codec": "fp8"}, "codec 'fp8'"), ({"block_size": 64}, "64")):
        opt = run(parameters(shapes=SHAPES), 1, **options)
        with pytest.raises(ValueError, match=f"group 0 .*{message}"):
            optim.to_bitsandbytes(opt.state_dict())
        with pytest.raises(ValueError, match=f"group 0 .*{message}"):
            optim.from_bitsandbytes(theirs, opt)
    opt = optimizer(given)
    with pytest.raises(ValueError, match=r"groups of \[4\] parameters; expected \[1\]"):
        optim.from_bitsandbytes(theirs, optimizer(parameters(shapes={"large": (70, 90)})))
    for change, message in (
        ({"qmap1": torch.linspace(-1, 1, 256)}, "state 0 has another qmap1"),
        ({"absmax2": None}, "state 0 has state2 torch.uint8 .*expected float32, or uint8 with"),
        ({"state1": torch.zeros(2, 70, 90)}, r"state1 of shape \(2, 70, 90\); expected \(70, 90\)"),
        ({"state2": None}, "state2 of shape none"),
    ):
        changed = copy.deepcopy(theirs)
        changed["state"][0] |= change
        with pytest.raises(ValueError, match=message):
            optim.from_bitsandbytes(changed, opt)


@pytest.mark.parametrize("towards", ["ours", "theirs"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_run_goes_on_with_the_other_optimizer(towards: str, dtype: torch.dtype) -> None:
    """Five steps with one, then five with each: what they move differs by roundings."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    mine, yours = (parameters(dtype, SHAPES) for _ in range(2))
    ours = optimizer(mine, **NUMBERS, master_bits=32)
    theirs = bnb.optim.AdamW8bit(yours.values(), **NUMBERS)
    first, second = ((theirs, yours), (ours, mine))[:: 1 if towards == "ours" else -1]
    for step in range(5):
        give_gradients(first[1], step)
        first[0].step()
    with torch.no_grad():
        for a, b in zip(second[1].values(), first[1].values()):
            a.copy_(b)
    if towards == "ours":
        ours.load_state_dict(optim.from_bitsandbytes(theirs.state_dict(), ours))
    else:
        theirs.load_state_dict(optim.to_bitsandbytes(ours.state_dict()))
        if dtype is BF16:  # it has no more than the weights themselves
            for state in ours.state.values():
                state["low_bits"].zero_()
    start = values(mine)
    for step in range(5, 10):
        for given, opt in (first[::-1], second[::-1]):
            give_gradients(given, step)
            opt.step()
        if step == 5:  # of the same moments: what differs is a rounding of the weight
            for name in SHAPES.keys() - ({"small"} if towards == "ours" else set()):
                one, other = (given[name].detach().float() for given in (mine, yours))
                allowed = 3e-7 if dtype is F32 else 0
                assert ((one - other).abs() <= allowed).float().mean() > 0.999, name
    moved, error = (
        torch.cat([(a.detach().float() - b[name].detach().float()).flatten()
                   for name, a in mine.items()]).norm()
        for b in (start, yours)
    )  # fmt: skip
    # bitsandbytes' CPU codes are not always the nearest, nor its bfloat16 weights what they mean.
    assert error <= 0.1 * moved
    for mine_, theirs_ in zip(ours.state.values(), theirs.state.values()):
        assert mine_["step"] == theirs_["step"] == 10


def test_bitsandbytes_own_map_is_ours() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes")
    for signed in (True, False):
        given = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(dynamic_code(signed).value, given, rtol=1e-5, atol=0)
