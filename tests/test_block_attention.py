"""qk_norm_rope and its gradients against the formula in float64, on every backend that has it.

The error may be at most twice that of eager PyTorch at the same dtype, plus a floor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Target
from torch import Tensor

import g2rpo_kernels as gk

FLOOR = 5e-7  # four roundings of float32
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TARGETS = [target for target in cases.targets() if target.backend in ("reference", "triton")]


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Native backends do not have the op."""
    request.node.user_properties.append(("target", str(request.param)))
    with gk.use_backend(request.param.backend):
        yield request.param


class Sizes(NamedTuple):
    batch: int
    image: int
    text: int  # tokens; 0 for no text at all
    heads: int
    head: int


SIZES = {
    "tiny": Sizes(2, 5, 3, 2, 16),
    "odd": Sizes(3, 4, 2, 3, 48),
    "no_text": Sizes(2, 6, 0, 5, 16),
    "flux": Sizes(1, 3, 2, 24, 128),
}
TENSORS = "qkv", "q_weight", "k_weight", "text_qkv", "text_q_weight", "text_k_weight"


def make(sizes: str | Sizes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    """Keyword arguments of the op; cos and sin of a pair differ, so that none stands for both."""
    s = SIZES[sizes] if isinstance(sizes, str) else sizes
    draw = cases.generator("qk_norm_rope", *s)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype).to(device)

    made = {
        "qkv": randn(s.batch, s.image, 3 * s.heads * s.head),
        "q_weight": 1 + randn(s.head) / 4,
        "k_weight": 1 + randn(s.head) / 4,
        "cos": randn(s.text + s.image, s.head, dtype=torch.float32),
        "sin": randn(s.text + s.image, s.head, dtype=torch.float32),
        "heads": s.heads,
    }
    if s.text:
        made["text_qkv"] = randn(s.batch, s.text, 3 * s.heads * s.head)
        made["text_q_weight"], made["text_k_weight"] = 1 + randn(2, s.head) / 4
    return made


def plain(given: dict, dtype: torch.dtype | None = torch.float64) -> tuple[Tensor, ...]:
    """The formula in `dtype`; None: as eager PyTorch and diffusers compute it, at their dtypes."""
    eager, heads, eps = dtype is None, given["heads"], given.get("eps", 1e-6)
    if not eager:
        given = cases.at_dtype(given, dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        if eager:
            return F.rms_norm(x, weight.shape, weight, eps)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        wide = x.float() if eager else x
        even, odd = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return (wide * given["cos"][:, None] + turned * given["sin"][:, None]).to(x.dtype)

    parts = []
    for prefix in ("text_", "") if "text_qkv" in given else ("",):
        qkv = given[f"{prefix}qkv"]
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).unbind(2)
        weights = given[f"{prefix}q_weight"], given[f"{prefix}k_weight"]
        parts.append((norm(q, weights[0]), norm(k, weights[1]), v))
    q, k, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return rotate(q), rotate(k), v


def upstream_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    draw = cases.generator("upstream")
    return [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in outputs]


def gradients(function, given: dict) -> dict[str, Tensor]:  # noqa: ANN001
    leaves = {n: given[n].detach().clone().requires_grad_() for n in TENSORS if n in given}
    outputs = function({**given, **leaves})
    upstream = upstream_of(outputs)
    if all(x.dtype is torch.float64 for x in outputs):  # what a half-precision op is given
        upstream = [x.to(given["upstream"]).double() for x in upstream]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(leaves, grads, strict=True))


def call(given: dict) -> tuple[Tensor, Tensor, Tensor]:
    return gk.qk_norm_rope(**{name: x for name, x in given.items() if name != "upstream"})


def assert_accurate(got: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    assert got.shape == exact.shape, what
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    allowed += FLOOR * max(1.0, exact.abs().max().item())
    if INTERPRETING and got.dtype is torch.bfloat16:  # whose last bit the interpreter cuts off
        allowed += torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed, f"{what} errs by {error:.3g}, allowed {allowed:.3g}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_accuracy_type_and_layout(sizes: str, dtype: torch.dtype, target: Target) -> None:
    given = make(sizes, dtype, target.device)
    results, exact, eager = call(given), plain(given), plain(given, None)
    for name, got, true, other in zip("qkv", results, exact, eager, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_accurate(got, true, other, name)
    assert torch.equal(results[2], eager[2])  # a copy
    assert all(x.data_ptr() != given["qkv"].data_ptr() for x in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(sizes: str, dtype: torch.dtype, target: Target) -> None:
    given = {**make(sizes, dtype, target.device), "upstream": dtype}
    ours, exact = gradients(call, given), gradients(plain, cases.at_dtype(given, torch.float64))
    eager = gradients(lambda g: plain(g, None), given)
    for name, got in ours.items():
        assert got.dtype == dtype and got.is_contiguous()
        assert_accurate(got, exact[name], eager[name], name)


def test_weights_of_another_dtype(target: Target) -> None:
    given = make("tiny", torch.bfloat16, target.device)
    for name in TENSORS:
        if "weight" in name:
            given[name] = given[name].float() + 1e-3  # not numbers of bfloat16
    exact, eager = plain(given), [x.bfloat16() for x in plain(given, torch.float32)]
    for name, got, true, other in zip("qkv", call(given), exact, eager, strict=True):
        assert got.dtype is torch.bfloat16
        assert_accurate(got, true, other, name)
    grads = gradients(call, {**given, "upstream": torch.bfloat16})
    assert grads["k_weight"].dtype is torch.float32 and grads["qkv"].dtype is torch.bfloat16


def test_the_rotary_embedding_is_diffusers(target: Target) -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 7, 0], [0, 9, 63]])
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=[16, 24, 24])(ids.float())
    given = make(Sizes(2, 4, 2, 3, 64), device=target.device)
    given["cos"], given["sin"] = cos.float().to(target.device), sin.float().to(target.device)
    q, k, v = call(given)
    identity = {"cos": torch.ones_like(given["cos"]), "sin": torch.zeros_like(given["sin"])}
    normal = plain({**given, **identity}, torch.float32)
    for got, x in ((q, normal[0]), (k, normal[1])):
        want = apply_rotary_emb(x, (given["cos"], given["sin"]), sequence_dim=1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_float64_on_the_reference() -> None:
    given = {**make("odd", torch.float64), "upstream": torch.float64}
    for got, want in zip(call(given), plain(given), strict=True):
        assert got.dtype is torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    tiny = make(Sizes(1, 2, 1, 2, 16), torch.float64)
    leaves = [tiny[name].requires_grad_() for name in TENSORS]
    assert torch.autograd.gradcheck(
        lambda *x: call({**tiny, **dict(zip(TENSORS, x, strict=True))}), leaves, fast_mode=True
    )


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_outputs(used: tuple[int, ...], target: Target) -> None:
    given = make("tiny", device=target.device)
    found = []
    for function in (call, plain):
        leaves = {name: given[name].clone().requires_grad_() for name in TENSORS}
        outputs = function({**given, **leaves})
        sum(outputs[i].square().sum() for i in used).backward()
        found.append([x.grad for x in leaves.values()])
    for got, want in zip(*found, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", TENSORS)
def test_gradient_of_one_input(name: str, target: Target) -> None:
    given = make("tiny", device=target.device)
    everything = gradients(call, given)[name]
    given[name].requires_grad_()
    outputs = call(given)
    torch.autograd.backward(outputs, upstream_of(outputs))
    torch.testing.assert_close(given[name].grad, everything, rtol=1e-6, atol=1e-6)
    assert all(given[other].grad is None for other in TENSORS if other != name)


def test_a_gradient_has_no_gradient(target: Target) -> None:
    given = make("tiny", device=target.device)
    leaf = given["text_qkv"].requires_grad_()
    (gradient,) = torch.autograd.grad(call(given)[0].square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_sums_over_many_programs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens a program, of two rows of the batch, and several programs a sum."""
    if target.backend == "triton":
        monkeypatch.setattr(import_module("g2rpo_kernels.triton.qk_norm_rope"), "PROGRAMS", 3)
        monkeypatch.setattr(import_module("g2rpo_kernels.triton.qk_norm_rope"), "PARTIALS", 2)
    given = {**make(Sizes(2, 7, 5, 3, 16), device=target.device), "upstream": torch.float32}
    ours, again = gradients(call, given), gradients(call, given)
    exact = gradients(plain, cases.at_dtype(given, torch.float64))
    eager = gradients(lambda g: plain(g, None), given)
    for name, got in ours.items():
        assert torch.equal(got, again[name])
        assert_accurate(got, exact[name], eager[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extremes(dtype: torch.dtype, target: Target) -> None:
    """Heads of 0, of one value, of 1e4, and of an offset far above their spread."""
    given = make(Sizes(2, 4, 3, 2, 16), dtype, target.device)
    qkv = given["qkv"]
    qkv[0, 0], qkv[0, 1], qkv[0, 2] = 0, 3, 1e4 * qkv[0, 2].sign()
    qkv[1, 0] = qkv[1, 0] * 0.01 + 1e3
    given["upstream"] = dtype
    exact, eager = plain(given), plain(given, None)
    for name, got, true, other in zip("qkv", call(given), exact, eager, strict=True):
        assert got.isfinite().all()
        assert_accurate(got, true, other, name)
    assert not call(given)[0][0, 3].any()
    ours = gradients(call, given)
    exact = gradients(plain, cases.at_dtype(given, torch.float64))
    eager = gradients(lambda g: plain(g, None), given)
    for name, got in ours.items():
        assert got.isfinite().all()
        assert_accurate(got, exact[name], eager[name], name)


def test_a_nan_stays_in_its_head(target: Target) -> None:
    given = make("tiny", device=target.device)
    given["qkv"][1, 2, 5] = torch.nan  # head 0 of q
    q, k, v = call(given)
    assert q[1, 5, 0].isnan().all() and q.isnan().sum() == q.shape[3]
    assert not k.isnan().any() and not v.isnan().any()


@pytest.mark.parametrize("empty", ["batch", "image", "text"])
def test_no_rows_or_no_tokens(empty: str, target: Target) -> None:
    sizes = Sizes(2, 3, 2, 2, 16)._asdict()
    given = make("tiny", device=target.device)
    shapes = {**sizes, empty: 0}
    width = given["qkv"].shape[2]
    given["qkv"] = torch.ones(shapes["batch"], shapes["image"], width, device=target.device)
    given["text_qkv"] = torch.ones(shapes["batch"], shapes["text"], width, device=target.device)
    length = shapes["image"] + shapes["text"]
    given["cos"], given["sin"] = given["cos"][:length], given["sin"][:length]
    grads = gradients(call, given)
    assert all(x.shape == (shapes["batch"], length, 2, 16) for x in call(given))
    assert all(x.shape == given[n].shape and x.isfinite().all() for n, x in grads.items())
