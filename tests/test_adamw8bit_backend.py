"""Which backend steps the parameters of AdamW8bit."""

from __future__ import annotations

import warnings

import pytest
import torch

import g2rpo_kernels as gk
from g2rpo_kernels import _library
from g2rpo_kernels.optim import native as native_optim

CPU = torch.device("cpu")


def test_the_backend_is_the_one_in_force() -> None:
    pytest.importorskip("g2rpo_kernels._C", reason="no native extension here")
    assert native_optim.backend_for(CPU) == "cpu"
    with gk.use_backend("reference"):
        assert native_optim.backend_for(CPU) == "reference"
    with gk.use_backend("cpu"):
        assert native_optim.backend_for(CPU) == "cpu"
        with pytest.raises(RuntimeError, match=r"'cpu'\) with parameters on meta: it runs on CPUs"):
            native_optim.backend_for(torch.device("meta"))


def test_a_device_without_native_code_has_the_reference() -> None:
    assert native_optim.backend_for(torch.device("meta")) == "reference"


def test_triton_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_forced", "triton")
    with pytest.raises(RuntimeError, match=r"'triton'\): AdamW8bit has no such implementation"):
        native_optim.backend_for(CPU)


def test_a_missing_extension_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_optim, "EXTENSIONS", {})
    monkeypatch.setattr(_library, "_warned", set())
    monkeypatch.setitem(_library._absent, "cpu", "no C++17 compiler")
    with pytest.warns(RuntimeWarning, match="reference on cpu.*no C\\+\\+17 compiler"):
        assert native_optim.backend_for(CPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_optim.backend_for(CPU) == "reference"
