"""What AdamW8bit refuses: it says which argument or parameter, what it is and what it wants."""

from __future__ import annotations

import math

import pytest
import torch
from test_optim import (
    BF16,
    F32,
    give_gradients,
    needs_grad_dtype,
    optimizer,
    parameters,
    values,
)
from torch import nn

import g2rpo_kernels as gk


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, r"lr is 0.0; expected a number > 0"),
        ({"lr": -1e-3}, r"lr is -0.001; expected"),
        ({"lr": math.nan}, r"lr is nan; expected"),
        ({"lr": "fast"}, r"lr is 'fast'; expected"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; expected a number in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] is -0.1"),
        ({"betas": 0.9}, r"betas is 0.9; expected two numbers"),
        ({"eps": 0.0}, r"eps is 0.0; expected a number >= 1e-37"),
        ({"eps": -1e-8}, r"eps is -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1; expected a number >= 0"),
        ({"weight_decay": math.inf}, r"weight_decay is inf"),
        ({"block_size": 96}, r"block_size is 96; expected one of \(64, 128, 256, 512, 1024\)"),
        ({"block_size": 2048}, r"block_size is 2048"),
        ({"master_bits": 8}, r"master_bits is 8; expected one of \(16, 24, 32\)"),
        ({"codec": "int8"}, r"codec is 'int8'; expected one of \('dynamic', 'fp8'\)"),
    ],
)
def test_numbers(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(parameters(), **options)
    with pytest.raises(ValueError, match="group 0: " + message):
        gk.AdamW8bit([{"params": list(parameters().items()), **options}])


def test_numbers_that_were_changed_later() -> None:
    given = parameters()
    opt = optimizer(given)
    give_gradients(given)
    before = values(given)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"group 0: lr is -1.0; expected a number >= 0"):
        opt.step()
    opt.param_groups[0]["lr"] = 1e-3
    for scale, error in ((-1.0, ValueError), ("half", TypeError), (True, TypeError)):
        with pytest.raises(error, match="grad_scale is"):
            opt.step(grad_scale=scale)
    with pytest.raises(TypeError, match="seed is 0.5; expected an int"):
        optimizer(given, seed=0.5)
    assert all(torch.equal(before[name], p) for name, p in given.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    tensors = {"fine": torch.zeros(3), "other": torch.zeros(3, dtype=dtype)}
    given = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    with pytest.raises(TypeError, match=f"other has dtype {dtype}; expected bfloat16 or float32"):
        optimizer(given)


def test_parameters_that_are_not_contiguous_or_given_twice() -> None:
    given = {"turned": nn.Parameter(torch.zeros(4, 6).T)}
    with pytest.raises(ValueError, match=r"turned has shape \(6, 4\) and strides \(1, 6\)"):
        optimizer(given)
    opt = optimizer(parameters())
    with pytest.raises(ValueError, match="turned has shape"):
        opt.add_param_group({"params": list(given.items())})
    assert len(opt.param_groups) == 1
    one = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate"):
        with pytest.raises(ValueError, match="given twice"):
            gk.AdamW8bit([one, one])


def test_gradients() -> None:
    given = parameters(F32, {"fine": (8,), "table": (8, 4)})
    opt = optimizer(given)
    give_gradients(given)
    before = values(given)
    given["table"].grad = given["table"].grad.to_sparse()
    with pytest.raises(TypeError, match="gradient of table has layout torch.sparse_coo"):
        opt.step()
    assert all(torch.equal(before[name], p) for name, p in given.items())
    assert not opt.state


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_gradients_of_other_dtypes(dtype: torch.dtype) -> None:
    given = parameters(F32, {"table": (8, 4)})
    given["table"].grad_dtype = None
    given["table"].grad = torch.zeros(8, 4, dtype=dtype)
    with pytest.raises(TypeError, match=f"gradient of table has dtype {dtype}; expected float32"):
        optimizer(given).step()


def test_a_dtype_that_changed() -> None:
    given = parameters(shapes={"a": (300,)})
    opt = optimizer(given)
    given["a"].data = given["a"].data.float()  # before there is a state: nothing is wrong with it
    give_gradients(given)
    opt.step()
    given["a"].grad = None
    given["a"].data = given["a"].data.to(BF16)
    give_gradients(given)
    with pytest.raises(
        ValueError, match="a has dtype torch.bfloat16; its optimizer state was made for float32"
    ):
        opt.step()


def test_states_that_someone_replaced() -> None:
    given = parameters(shapes={"a": (300,)})
    opt = optimizer(given)
    give_gradients(given)
    opt.step()
    state = opt.state[given["a"]]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"state of a has exp_avg torch.uint8 \(10,\); expected"):
        opt.step()
    state["exp_avg"] = kept.to("meta")
    with pytest.raises(ValueError, match="state of a has exp_avg on meta"):
        opt.step()
    state["exp_avg"] = kept.clone()
    opt.step()
    assert state["step"] == 2
