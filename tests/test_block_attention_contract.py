"""What qk_norm_rope keeps beside its numbers: layouts, bits, a place in graphs, helpful errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import Target
from test_block_attention import TENSORS, Sizes, call, gradients, make, target, upstream_of
from torch import Tensor

from g2rpo_kernels import _library

__all__ = ["target"]  # the fixture


def transposed(x: Tensor) -> Tensor:
    """The same numbers, two dimensions stored in the opposite order."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def layouts(x: Tensor) -> list[Tensor]:
    """The same numbers: in a wider row, in a longer sequence, apart, and transposed."""
    wide = torch.full((*x.shape[:-1], 7 * x.shape[-1] // 3 + 16), torch.nan).to(x)
    wide[..., 16 : 16 + x.shape[-1]] = x
    found = [wide[..., 16 : 16 + x.shape[-1]]]
    if x.ndim == 3:
        longer = torch.cat([torch.full_like(x, torch.nan), x], 1)
        found += [longer[:, x.shape[1] :], transposed(x)]
    apart = torch.full((*x.shape, 2), torch.nan).to(x)
    apart[..., 0] = x
    return [*found, apart[..., 0]]


def test_layout_of_the_inputs_changes_no_bit(target: Target) -> None:
    given = {**make(Sizes(2, 2, 3, 2, 16), device=target.device), "upstream": torch.float32}
    want = call(given)
    for name in (*TENSORS, "cos", "sin"):
        for x in layouts(given[name]):
            assert torch.equal(x, given[name]) and (x.ndim == 1 or not x.is_contiguous())
            got = call({**given, name: x})
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["qkv", "text_qkv"])
def test_layout_changes_no_bit_of_a_gradient(name: str, target: Target) -> None:
    """The input's, and that of what comes from attention."""
    given = {**make(Sizes(2, 2, 3, 2, 16), device=target.device), "upstream": torch.float32}
    want = gradients(call, given)
    for x in layouts(given[name]):
        leaf = x.detach().requires_grad_()
        outputs = call({**given, name: leaf})
        upstream = [transposed(x) for x in upstream_of(outputs)]
        torch.autograd.backward(outputs, upstream)
        assert torch.equal(leaf.grad, want[name])


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_backward"])
def test_a_slice_of_a_wider_row_is_not_copied(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, seen = _library._ops[op], []
    reference = operator.implementations["reference"]

    def look(*arguments: object) -> object:
        seen.append((arguments[0].data_ptr(), arguments[0].stride()))
        return reference(*arguments)

    monkeypatch.setattr(operator, "implementations", {"reference": look})
    given = make("no_text")
    width = given["qkv"].shape[2]
    projected = torch.randn(2, 6, 7 * width // 3, requires_grad=True)
    given["qkv"] = projected[..., :width]
    sum(x.sum() for x in call(given)).backward()
    assert seen == [(projected.data_ptr(), projected.stride())]
    assert projected.grad[..., :width].abs().min() > 0 and not projected.grad[..., width:].any()


def part(
    given: dict, upstream: list[Tensor], batch: slice, image: slice, text: int
) -> list[Tensor]:
    """Outputs and gradients of some rows and tokens, each at its own position."""
    before = given["text_qkv"].shape[1]
    qkv = given["qkv"][batch, image].clone().requires_grad_()
    text_qkv = given["text_qkv"][batch, :text].clone().requires_grad_()
    places = [*range(text), *range(before, given["cos"].shape[0])[image]]
    cos, sin = given["cos"][places], given["sin"][places]
    outputs = call({**given, "qkv": qkv, "text_qkv": text_qkv, "cos": cos, "sin": sin})
    torch.autograd.backward(outputs, [x[batch, places] for x in upstream])
    return [x[:, text:].detach() for x in outputs] + [qkv.grad, text_qkv.grad]


@pytest.mark.parametrize("sizes", ["odd", "flux"])
def test_bits_of_a_row_do_not_depend_on_its_company(sizes: str, target: Target) -> None:
    given = make(sizes, device=target.device)
    upstream, text = upstream_of(call(given)), given["text_qkv"].shape[1]
    whole = part(given, upstream, slice(None), slice(None), text)
    for row in range(given["qkv"].shape[0]):
        here = slice(row, row + 1)
        alone = part(given, upstream, here, slice(None), text)
        assert all(torch.equal(x[here], y) for x, y in zip(whole, alone, strict=True))
        *images, words = part(given, upstream, here, slice(1, 3), text - 1)
        assert all(torch.equal(x[here, 1:3], y) for x, y in zip(whole[:4], images, strict=True))
        assert torch.equal(whole[4][here, :-1], words)


# ---- torch.library and torch.compile ----


def raw(given: dict) -> tuple:
    names = ("qkv", "q_weight", "k_weight", "cos", "sin", *TENSORS[3:])
    return *(given.get(name) for name in names), given["heads"], 1e-6


@pytest.mark.parametrize("sizes", [Sizes(1, 2, 1, 1, 16), Sizes(2, 1, 0, 2, 16)], ids=str)
def test_opcheck(sizes: Sizes, target: Target) -> None:
    given = make(sizes, torch.float32, target.device)
    torch.library.opcheck(torch.ops.g2rpo.qk_norm_rope.default, raw(given))
    grads = call(given)
    for of_weights in (True, False):
        torch.library.opcheck(
            torch.ops.g2rpo.qk_norm_rope_backward.default, (*raw(given), *grads, of_weights)
        )
    for name in TENSORS:
        if name in given:
            given[name].requires_grad_()
    torch.library.opcheck(torch.ops.g2rpo.qk_norm_rope.default, raw(given))


def test_torch_compile_traces_it(target: Target) -> None:
    given = {**make("tiny", device=target.device), "upstream": torch.float32}
    want = gradients(call, given)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(*pair) for pair in zip(compiled(given), call(given), strict=True))
    for name, got in gradients(compiled, given).items():
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-6)


def test_a_cpu_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qk_norm_rope", "qk_norm_rope_backward"):
        _library._ops[name].forget()
    monkeypatch.setattr(_library, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(call, make("tiny"))


# ---- Bad input ----

WRONG = {
    "heads": [(0, "heads is 0; expected an integer >= 1"), (2.0, "heads is 2.0; expected an int")],
    "eps": [(-1e-6, "eps is -1e-06; expected a number >= 0")],
    "q_weight": [
        (torch.ones(24), r"q_weight has shape \(24,\); expected \[Dh\], Dh a multiple of 16"),
        (torch.ones(0), r"q_weight has shape \(0,\); expected \[Dh\]"),
        (torch.ones(1, 16), r"q_weight has shape \(1, 16\); expected \[Dh\]"),
        (torch.ones(16, device="meta"), "q_weight is on meta; expected cpu, the device of qkv"),
    ],
    "k_weight": [
        (torch.ones(32), r"k_weight has shape \(32,\); expected \(16,\), the shape of q_weight")
    ],
    "qkv": [
        (torch.ones(2, 5, 95), r"qkv has shape \(2, 5, 95\); expected .* 3 \* 2 \* 16 = 96"),
        (torch.ones(5, 96), r"qkv has shape \(5, 96\); expected \[B, L, 3 \* H \* Dh\]"),
        (torch.ones(2, 5, 96).int(), "qkv has dtype torch.int32; expected float32"),
        ("qkv", "qkv is a str; expected a torch.Tensor"),
    ],
    "text_qkv": [
        (torch.ones(3, 3, 96), r"text_qkv has shape \(3, 3, 96\); expected 2 rows, those of qkv"),
        (torch.ones(2, 3, 96).half(), "text_qkv has dtype torch.float16; expected torch.float32"),
        (torch.ones(2, 3, 96, device="meta"), "text_qkv is on meta; expected cpu"),
        (None, "text_qkv is None; expected all of .*, or none of them"),
    ],
    "text_k_weight": [
        (None, "text_k_weight is None; expected all of"),
        (torch.ones(32), r"text_k_weight has shape \(32,\); expected \(16,\)"),
    ],
    "cos": [
        (torch.ones(5, 16), r"cos has dtype torch.float32 and shape \(5, 16\); .*\(8, 16\), a row"),
        (torch.ones(8, 16).half(), "cos has dtype torch.float16 and shape .* expected torch.fl"),
        (torch.ones(8, 16, requires_grad=True), "cos requires a gradient, which qk_norm_rope does"),
    ],
    "sin": [(torch.ones(8, 8), r"sin has dtype torch.float32 and shape \(8, 8\); expected")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "says"), [(name, *wrong) for name in WRONG for wrong in WRONG[name]]
)
def test_wrong_input_is_refused(name: str, value: object, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        call({**make("tiny"), name: value})
