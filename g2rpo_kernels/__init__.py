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
from .branch_log_prob import branch_log_prob
from .dynamics import DYNAMICS, StepCoefficients, step_coefficients
from .group_advantages import group_advantages
from .normal import normal
from .ode_step import ode_step
from .policy_loss import PolicyLoss, policy_loss
from .sde_step import sde_step
from .step_mean import step_mean

load_backends()

__all__ = [
    "DYNAMICS",
    "BackendStatus",
    "PolicyLoss",
    "StepCoefficients",
    "backends",
    "branch_log_prob",
    "group_advantages",
    "normal",
    "ode_step",
    "policy_loss",
    "sde_step",
    "step_coefficients",
    "step_mean",
    "use_backend",
]
