"""Fused operations for reinforcement learning on flow-matching models.

    import g2rpo_kernels as gk
    c = gk.step_coefficients(sigma, sigma_next, eta=0.7)
    x_next, log_prob = gk.sde_step(velocity, latents, c, seeds=seeds)

Every op has a plain PyTorch reference that runs on any device; native and Triton backends are
chosen per device where they are there (`backends()` says which and why). All ops are registered
with `torch.library` under the namespace `g2rpo` and trace under `torch.compile(fullgraph=True)`.
"""

from ._library import BackendStatus, backends, use_backend
from ._load import load_backends
from .adaln_modulate import adaln_modulate
from .branch_log_prob import branch_log_prob
from .dynamics import DYNAMICS, StepCoefficients, step_coefficients
from .flux import fuse_flux, unfuse_flux
from .flux_rollout import FluxRollout
from .fp8_linear import Fp8Support, fp8_linear, fp8_support
from .fp8_rollout import Fp8Rollout
from .gated_residual import gated_residual, gated_residual_modulate
from .gelu_tanh import gelu_tanh, gelu_tanh_beside
from .gradient_factors import (
    GradientFactors,
    factor_gradients,
    total_grad_norm,
    unfactor_gradients,
)
from .group_advantages import group_advantages
from .normal import normal
from .ode_step import ode_step
from .optim import AdamW8bit
from .policy_loss import PolicyLoss, policy_loss
from .qk_norm_rope import qk_norm_rope
from .quantize_fp8 import Fp8Tensor, dequantize, quantize_fp8, refresh_fp8
from .sde_step import sde_step
from .step_mean import step_mean

load_backends()

__all__ = [
    "DYNAMICS",
    "AdamW8bit",
    "BackendStatus",
    "FluxRollout",
    "Fp8Rollout",
    "Fp8Support",
    "Fp8Tensor",
    "GradientFactors",
    "PolicyLoss",
    "StepCoefficients",
    "adaln_modulate",
    "backends",
    "branch_log_prob",
    "dequantize",
    "factor_gradients",
    "fp8_linear",
    "fp8_support",
    "fuse_flux",
    "gated_residual",
    "gated_residual_modulate",
    "gelu_tanh",
    "gelu_tanh_beside",
    "group_advantages",
    "normal",
    "ode_step",
    "policy_loss",
    "qk_norm_rope",
    "quantize_fp8",
    "refresh_fp8",
    "sde_step",
    "step_coefficients",
    "step_mean",
    "total_grad_norm",
    "unfactor_gradients",
    "unfuse_flux",
    "use_backend",
]
