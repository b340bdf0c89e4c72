"""Gradients of adaln_modulate and its kin, and what torch.library asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from cases import Target, as_tuple
from modulations import (
    ARGUMENTS,
    DTYPES,
    MODULATING,
    SEQUENCES,
    SHAPES,
    assert_accurate,
    assert_same,
    call,
    everywhere,
    grads,
    grads_of_ones,
    inputs,
    plain,
    raw_arguments,
    skip_float64,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import g2rpo_kernels as gk
from g2rpo_kernels import _library


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_gradients(op: str, shape: tuple, dtype: str, target: Target) -> None:
    skip_float64(target, dtype)
    given = inputs(op, shape, dtype, target.device)
    ours = grads(given, lambda leaves: call(op, leaves))
    exact = grads(cases.at_dtype(given, torch.float64), lambda leaves: plain(op, leaves))
    eager = grads(given, lambda leaves: plain(op, leaves))
    for name, got in ours.items():
        assert got.dtype == given[name].dtype
        assert_accurate(f"grad of {name}", got, exact[name], eager[name])


@everywhere
@pytest.mark.parametrize("used", [(0,), (1,)], ids=["hidden", "modulated"])
def test_gradient_of_one_of_two_outputs(used: tuple, target: Target) -> None:
    given = inputs("gated_residual_modulate", device=target.device)
    ours = grads(given, lambda leaves: call("gated_residual_modulate", leaves), used)
    wide = cases.at_dtype(given, torch.float64)
    exact = grads(wide, lambda leaves: plain("gated_residual_modulate", leaves), used)
    for name, got in ours.items():
        if exact[name] is None:
            assert used == (0,) and name in ("shift", "scale") and got is None
        else:
            torch.testing.assert_close(got.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_gradcheck(op: str) -> None:
    given = {name: x.requires_grad_() for name, x in inputs(op, (2, 3, 5), dtype="float64").items()}
    with gk.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *leaves: call(op, dict(zip(given, leaves, strict=True))), tuple(given.values())
        )


@everywhere
@pytest.mark.parametrize("op", ARGUMENTS)
def test_inputs_without_a_gradient(op: str, target: Target) -> None:
    """Every subset of two gives the gradients that all together have."""
    given = inputs(op, (2, 40, 32), device=target.device)
    together = grads(given, lambda leaves: call(op, leaves))
    for i, first in enumerate(given):
        for second in list(given)[i:]:
            some = {name: given[name] for name in (first, second)}
            ours = grads(some, lambda leaves: call(op, {**given, **leaves}))
            for name, got in ours.items():
                assert_same(got, together[name], target)


# ---- Company, layout, size ----


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@everywhere
@pytest.mark.parametrize("shape", [(3, 70, 37), (2, 17, 1030)], ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_bits_of_a_row_do_not_depend_on_its_company(
    op: str, shape: tuple, target: Target, two_threads: None
) -> None:
    given = inputs(op, shape, "bfloat16", target.device)
    results = call(op, given)
    upstream = {}

    def gradients(some: dict, sequence: slice) -> dict[str, Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in some.items()}
        out = call(op, leaves)
        for i, y in enumerate(out):
            upstream.setdefault(i, torch.randn_like(y))
        torch.autograd.backward(out, [upstream[i][sequence] for i in range(len(out))])
        return {name: leaf.grad for name, leaf in leaves.items()}

    whole = gradients(given, slice(None))
    for b in range(shape[0]):
        sequence = slice(b, b + 1)
        alone = {name: x[sequence] for name, x in given.items()}
        for got, want in zip(call(op, alone), results, strict=True):
            assert torch.equal(got, want[sequence])
        for name, got in gradients(alone, sequence).items():
            assert torch.equal(got, whole[name][sequence]), name
        row = slice(shape[1] - 2, shape[1] - 1)
        one = {name: x[:, row] if name in SEQUENCES else x for name, x in alone.items()}
        for got, want in zip(call(op, one), results, strict=True):
            assert torch.equal(got, want[sequence, row])


@everywhere
@pytest.mark.parametrize("op", ARGUMENTS)
def test_layout_of_the_inputs_changes_no_bit(op: str, target: Target) -> None:
    def transposed(x: Tensor) -> Tensor:
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)

    given = inputs(op, device=target.device)
    contiguous = {name: x.contiguous() for name, x in given.items()}
    changed = {name: transposed(x) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in changed.values())
    for other in (given, changed):
        for got, want in zip(call(op, other), call(op, contiguous), strict=True):
            assert torch.equal(got, want) and got.is_contiguous()
    for layout in (lambda x: x, transposed):
        leaves = {name: layout(x).detach().requires_grad_() for name, x in given.items()}
        out = call(op, leaves)
        torch.autograd.backward(out, [layout(torch.ones_like(y)) for y in out])
        for name, want in grads_of_ones(op, contiguous).items():
            assert torch.equal(leaves[name].grad, want), name


@everywhere
@pytest.mark.parametrize("op", [*ARGUMENTS, "adaln_modulate_backward", "gated_residual_backward"])
def test_backends_take_slices_of_modulations(op: str, target: Target) -> None:
    implementation = _library._ops[op].implementations[target.backend]
    for given in raw_arguments(target.device)[op]:
        sliced = [x for x in given if isinstance(x, Tensor) and not x.is_contiguous()]
        assert sliced and all(x.ndim == 2 for x in sliced)
        contiguous = (x.contiguous() if isinstance(x, Tensor) else x for x in given)
        results = as_tuple(implementation(*given)), as_tuple(implementation(*contiguous))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


@everywhere
@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32)], ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_rows(op: str, shape: tuple, target: Target) -> None:
    given = inputs(op, shape, device=target.device)
    assert all(y.shape == shape for y in call(op, given))
    for name, grad in grads_of_ones(op, given).items():
        assert grad.shape == given[name].shape and not grad.any()
    if op in MODULATING:
        quantised = call(op, given, fp8=True)[-1]
        assert quantised.values.shape == shape and quantised.scales.shape == shape[:2]


# ---- Autograd ----


@everywhere
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_update_is_kept_only_for_the_gate(trained: bool, target: Target) -> None:
    """Adapters leave the modulation as it is; then every update may be freed."""
    for op in ("gated_residual", "gated_residual_modulate"):
        given = inputs(op, device=target.device)
        leaves = {
            name: x.clone().requires_grad_(trained or name in SEQUENCES)
            for name, x in given.items()
        }
        update = leaves["update"]
        leaves["update"] = update * 2  # no leaf, which would be kept anyway
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.data_ptr()) or x, lambda x: x
        ):
            out = call(op, leaves)
        assert (leaves["update"].data_ptr() in kept) == trained
        torch.autograd.backward(out, [torch.ones_like(y) for y in out])
        assert update.grad is not None and (leaves["gate"].grad is not None) == trained


@everywhere
@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_gradient_has_no_gradient(op: str, target: Target) -> None:
    given = {name: x.requires_grad_() for name, x in inputs(op, device=target.device).items()}
    (gradient,) = torch.autograd.grad(
        call(op, given)[-1].square().sum(), given["scale" if "scale" in given else "gate"],
        create_graph=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=rf"{op} can be differentiated once"):
        gradient.sum().backward()


@everywhere
@pytest.mark.parametrize("op", raw_arguments("cpu"))
def test_opcheck(op: str, target: Target) -> None:
    """Schema, fake, autograd registration and AOT dispatch, static and dynamic."""
    overload = getattr(torch.ops.g2rpo, op).default
    for arguments in raw_arguments(target.device)[op]:
        torch.library.opcheck(overload, arguments)
        if op in ARGUMENTS:
            leaves = tuple(
                x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments
            )
            torch.library.opcheck(overload, leaves)


@everywhere
@pytest.mark.parametrize("op", raw_arguments("cpu"))
def test_fake_agrees_with_the_op_on_odd_inputs(op: str, target: Target) -> None:
    def half(x: object) -> object:
        return x.bfloat16() if isinstance(x, Tensor) and x.ndim == 3 else x

    def transposed(x: object) -> object:
        return x.mT.contiguous().mT if isinstance(x, Tensor) else x

    overload = getattr(torch.ops.g2rpo, op).default
    for arguments in raw_arguments(target.device)[op]:
        for given in (tuple(map(half, arguments)), tuple(map(transposed, arguments))):
            real = as_tuple(overload(*given))
            with FakeTensorMode() as mode:
                faked = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
                promised = as_tuple(overload(*faked))
            for got, want in zip(real, promised, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (
                    want.shape, want.dtype, want.stride()
                )  # fmt: skip


@everywhere
@pytest.mark.parametrize("op", ARGUMENTS)
def test_one_dynamic_graph_serves_every_size_with_the_same_bits(op: str, target: Target) -> None:
    torch._dynamo.reset()

    def surrounded(given: dict) -> tuple[Tensor, ...]:
        given = {name: x * 2 for name, x in given.items()}
        return tuple(y + 1 for y in call(op, given))

    compiled = torch.compile(surrounded, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(3, 5, 37), (4, 7, 48), (11, 6, 20)]:
            given = inputs(op, shape, device=target.device)
            for got, want in zip(
                compiled_pair(given, compiled), compiled_pair(given, surrounded), strict=True
            ):
                assert torch.equal(got, want)


def compiled_pair(given: dict, function: Callable) -> list[Tensor]:
    leaves = {name: x.detach().contiguous().requires_grad_() for name, x in given.items()}
    out = function(leaves)
    sum(y.square().sum() for y in out).backward()
    return [*out, *(leaf.grad for leaf in leaves.values())]


@everywhere
@pytest.mark.parametrize("op", MODULATING)
def test_fp8_compiles_too(op: str, target: Target) -> None:
    torch._dynamo.reset()
    given = inputs(op, device=target.device)

    def doubled(given: dict) -> tuple:
        quantised = call(op, given, fp8=True)[-1]
        return quantised.values, quantised.scales * 2

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(given), doubled(given), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
