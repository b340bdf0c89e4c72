"""adaln_modulate, gated_residual and gated_residual_modulate: what they return, FP8 too."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Target
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
    grads_of_ones,
    inputs,
    plain,
    skip_float64,
)
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels.quantize_fp8 import Fp8Tensor, dequantize, quantize_fp8


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_accuracy_type_and_layout(op: str, shape: tuple, dtype: str, target: Target) -> None:
    skip_float64(target, dtype)
    given = inputs(op, shape, dtype, target.device)
    results = call(op, given)
    exact, eager = plain(op, cases.at_dtype(given, torch.float64)), plain(op, given)
    assert len(results) == len(exact)
    for i, (got, *wanted) in enumerate(zip(results, exact, eager, strict=True)):
        assert got.dtype == DTYPES[dtype][0] and got.is_contiguous()
        assert_accurate(f"output {i}", got, *wanted)


# ---- The two in one ----


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 3, 3072)], ids=str)
def test_one_pass_is_the_two_ops(shape: tuple, dtype: str, target: Target) -> None:
    given = inputs("gated_residual_modulate", shape, dtype, target.device)
    hidden, modulated = gk.gated_residual_modulate(**given)
    gated = {name: given[name] for name in ARGUMENTS["gated_residual"]}
    assert torch.equal(hidden, gk.gated_residual(**gated))
    of_stored = gk.adaln_modulate(hidden, given["shift"], given["scale"])
    assert_same(modulated, of_stored, target)


# ---- Extremes ----


@everywhere
@pytest.mark.parametrize("op", MODULATING)
def test_rows_far_from_zero(op: str, target: Target) -> None:
    """Deviations of 1 about 1e4 (1e3 for float32's bits): what LayerNorm loses in float32."""
    given = inputs(op, (2, 3, 3072), device=target.device)
    name = "x" if op == "adaln_modulate" else "residual"
    given[name] = given[name] + 1e4
    if "gate" in given:
        given["gate"] = torch.zeros_like(given["gate"])
    exact = plain(op, cases.at_dtype(given, torch.float64))[-1]
    torch.testing.assert_close(call(op, given)[-1].double(), exact, rtol=1e-5, atol=1e-5)


@everywhere
def test_constant_zero_and_large_rows(target: Target) -> None:
    """Constants normalise to 0, so that shift remains; eps is what keeps their 1 / std finite."""
    given = inputs("adaln_modulate", (1, 4, 3072), device=target.device)
    given["x"][0, 0], given["x"][0, 1], given["x"][0, 2] = 0.0, 0.1, -12345.678
    given["x"][0, 3] *= 1e4
    y = gk.adaln_modulate(**given)
    assert torch.equal(y[0, 0], given["shift"][0])
    for constant in (1, 2):
        torch.testing.assert_close(y[0, constant], given["shift"][0], rtol=0, atol=1e-5)
    exact = plain("adaln_modulate", cases.at_dtype(given, torch.float64))[0]
    torch.testing.assert_close(y[0, 3].double(), exact[0, 3], rtol=1e-5, atol=1e-5)
    eps = gk.adaln_modulate(**given, eps=4.0)
    exact = plain("adaln_modulate", cases.at_dtype(given, torch.float64), eps=4.0)[0]
    torch.testing.assert_close(eps.double(), exact, rtol=1e-5, atol=1e-5)
    for x in grads_of_ones("adaln_modulate", given).values():
        assert x.isfinite().all()


@everywhere
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", MODULATING)
def test_what_is_not_finite_spoils_its_row_and_no_other(
    op: str, bad: float, target: Target
) -> None:
    given = inputs(op, (2, 3, 37), device=target.device)
    given["x" if op == "adaln_modulate" else "update"][1, 2, 5] = bad
    spoiled = [[False] * 3, [False, False, True]]
    assert call(op, given)[-1].isnan().all(-1).tolist() == spoiled
    assert call(op, given)[-1].isnan().any(-1).tolist() == spoiled
    scales = call(op, given, fp8=True)[-1].scales
    assert scales.isnan().tolist() == spoiled
    found = grads_of_ones(op, given)
    for name in ("x", "residual"):
        if name in found:
            assert found[name].isnan().any(-1).tolist() == spoiled
    assert found["scale"].isnan().all(-1).tolist() == [False, True]


# ---- FP8 ----


@everywhere
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 3, 3072)], ids=str)
@pytest.mark.parametrize("op", MODULATING)
def test_fp8_is_what_quantize_fp8_makes_of_the_result(
    op: str, shape: tuple, dtype: str, target: Target
) -> None:
    given = inputs(op, shape, dtype, target.device)
    *hidden, quantised = call(op, given, fp8=True)
    assert isinstance(quantised, Fp8Tensor)
    assert quantised.values.dtype is torch.float8_e4m3fn and quantised.values.shape == shape
    assert quantised.scales.dtype is torch.float32 and quantised.scales.shape == shape[:2]
    exact = plain(op, cases.at_dtype(given, torch.float64))[-1]
    if hidden:
        assert torch.equal(hidden[0], call(op, given)[0])
        stored = {**given, "x": hidden[0]}
        exact = plain("adaln_modulate", cases.at_dtype(stored, torch.float64))[-1]
    # Of e4m3's three bits half a unit of the last place, 2^-9 / 2 of the scale below 2^-6 of it.
    allowed = exact.abs() * 2**-4 + quantised.scales[..., None].double() * 2**-10 + 1e-5
    assert ((dequantize(quantised, torch.float64) - exact).abs() <= allowed).all()
    torch.testing.assert_close(
        quantised.scales.double(), exact.abs().amax(-1) / 448, rtol=1e-5, atol=0
    )
    if dtype == "float32":
        want = quantize_fp8(call(op, given)[-1])
        assert_same(quantised.scales, want.scales, target)
        same = quantised.values.view(torch.uint8) == want.values.view(torch.uint8)
        assert same.all() if target.device == "cpu" else same.float().mean() > 0.999


@everywhere
@pytest.mark.parametrize("width", [32, 37])
def test_fp8_of_a_row_of_zeros(width: int, target: Target) -> None:
    """A constant row, and a modulation that leaves nothing of any row."""
    given = inputs("adaln_modulate", (2, 2, width), device=target.device)
    given["x"][0, 1] = 7.0
    given["shift"] = torch.zeros_like(given["shift"])
    given["scale"][1] = -1.0
    values, scales = gk.adaln_modulate(**given, fp8=True)
    assert scales[0, 0] < 1 and values[0, 0].float().abs().max() == 448
    assert scales[0, 1] == 1 and not values[0, 1].float().any()
    assert (scales[1] == 1).all() and not values[1].float().any()


# ---- Wrong input ----


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


MISTAKES: list[tuple[str, dict, type[Exception], tuple[str, ...]]] = []
for op, names in ARGUMENTS.items():
    first = names[0]
    MISTAKES += [
        (op, {first: 1.0}, TypeError, (first, "float", "torch.Tensor")),
        (op, {first: ones(3, 5, 37, dtype=torch.int32)}, TypeError, (first, "torch.int32")),
        (op, {first: ones(15, 37)}, ValueError, (first, "(15, 37)", "[B, L, D]")),
        (op, {first: ones(3, 5, 0)}, ValueError, (first, "(3, 5, 0)", "one element a row")),
    ]
    for name in names:
        if name == "update":
            MISTAKES += [
                (op, {name: ones(3, 1, 37)}, ValueError, (name, "(3, 1, 37)", "(3, 5, 37)")),
                (op, {name: None}, TypeError, (name, "NoneType", "torch.Tensor")),
            ]
        elif name not in SEQUENCES:
            MISTAKES += [
                (op, {name: ones(3, 1, 37)}, ValueError, (name, "(3, 1, 37)", "(3, 37)", first)),
                (op, {name: ones(1, 37)}, ValueError, (name, "(1, 37)", "(3, 37)")),
                (op, {name: ones(3, 38)}, ValueError, (name, "(3, 38)", "(3, 37)")),
                (op, {name: 0.5}, TypeError, (name, "float", "torch.Tensor")),
                (op, {name: ones(3, 37, dtype=torch.int64)}, TypeError, (name, "torch.int64")),
                (op, {name: ones(3, 37, device="meta")}, ValueError,
                 (name, "meta", f"cpu, the device of {first}")),
            ]  # fmt: skip
    if op in MODULATING:
        MISTAKES += [
            (op, {"eps": -1e-6}, ValueError, ("eps", "-1e-06", "a number >= 0")),
            (op, {"eps": float("nan")}, ValueError, ("eps", "nan", "a number >= 0")),
            (op, {"eps": "1e-6"}, TypeError, ("eps", "'1e-6'", "a number")),
        ]
        for name in names:
            shape = (3, 5, 37) if name in SEQUENCES else (3, 37)
            MISTAKES.append(
                (op, {name: ones(*shape, requires_grad=True), "fp8": True}, ValueError,
                 (name, "requires a gradient", op, "fp8=False"))
            )  # fmt: skip


@pytest.mark.parametrize(
    ("op", "changes", "error", "says"),
    MISTAKES,
    ids=[f"{op}-{'-'.join(changes)}-{says[1]}" for op, changes, _, says in MISTAKES],
)
def test_mistake(op: str, changes: dict, error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        getattr(gk, op)(**{**inputs(op), **changes})
    missing = [part for part in says if part not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"


@everywhere
@pytest.mark.parametrize("op", MODULATING)
def test_fp8_takes_parameters_where_autograd_does_not_look(op: str, target: Target) -> None:
    given = {name: x.requires_grad_() for name, x in inputs(op, device=target.device).items()}
    with torch.no_grad():
        assert isinstance(call(op, given, fp8=True)[-1], Fp8Tensor)
