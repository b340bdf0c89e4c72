"""Triton kernels of the ops: `IMPLEMENTATIONS`, from an op's name to its launcher.

A launcher has the signature of the op's reference. It is given contiguous tensors (but for those an
op calls `strided`) whose shapes, dtypes and devices have been checked, none of them float64, and
writes every element of its outputs.
Imported at the first use on a GPU and never by `import g2rpo_kernels`: Triton is optional.
"""

from collections.abc import Callable

from .adaln_modulate import adaln_modulate, adaln_modulate_backward, adaln_modulate_fp8
from .branch_log_prob import branch_log_prob, log_prob_backward
from .gated_residual import (
    gated_residual,
    gated_residual_backward,
    gated_residual_modulate,
    gated_residual_modulate_backward,
    gated_residual_modulate_fp8,
)
from .gelu_tanh import (
    gelu_tanh,
    gelu_tanh_backward,
    gelu_tanh_beside,
    gelu_tanh_beside_backward,
    gelu_tanh_beside_fp8,
    gelu_tanh_fp8,
)
from .group_advantages import group_advantages
from .normal import normal
from .ode_step import ode_step
from .policy_loss import policy_loss
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_backward
from .quantize_fp8 import quantize_fp8
from .sde_step import sde_step
from .step_mean import step_mean

IMPLEMENTATIONS: dict[str, Callable] = {
    "adaln_modulate": adaln_modulate,
    "adaln_modulate_backward": adaln_modulate_backward,
    "adaln_modulate_fp8": adaln_modulate_fp8,
    "branch_log_prob": branch_log_prob,
    "gated_residual": gated_residual,
    "gated_residual_backward": gated_residual_backward,
    "gated_residual_modulate": gated_residual_modulate,
    "gated_residual_modulate_backward": gated_residual_modulate_backward,
    "gated_residual_modulate_fp8": gated_residual_modulate_fp8,
    "gelu_tanh": gelu_tanh,
    "gelu_tanh_backward": gelu_tanh_backward,
    "gelu_tanh_beside": gelu_tanh_beside,
    "gelu_tanh_beside_backward": gelu_tanh_beside_backward,
    "gelu_tanh_beside_fp8": gelu_tanh_beside_fp8,
    "gelu_tanh_fp8": gelu_tanh_fp8,
    "group_advantages": group_advantages,
    "log_prob_backward": log_prob_backward,
    "normal": normal,
    "ode_step": ode_step,
    "policy_loss": policy_loss,
    "qk_norm_rope": qk_norm_rope,
    "qk_norm_rope_backward": qk_norm_rope_backward,
    "quantize_fp8": quantize_fp8,
    "sde_step": sde_step,
    "step_mean": step_mean,
}
