"""Triton kernels of the ops: `IMPLEMENTATIONS`, from an op's name to its launcher.

A launcher has the signature of the op's reference. It is given contiguous tensors whose shapes,
dtypes and devices have been checked, none of them float64, and writes every element of its outputs.
Imported at the first use on a GPU and never by `import g2rpo_kernels`: Triton is optional.
"""

from collections.abc import Callable

from .branch_log_prob import branch_log_prob, log_prob_backward
from .group_advantages import group_advantages
from .normal import normal
from .ode_step import ode_step
from .policy_loss import policy_loss
from .sde_step import sde_step
from .step_mean import step_mean

IMPLEMENTATIONS: dict[str, Callable] = {
    "branch_log_prob": branch_log_prob,
    "group_advantages": group_advantages,
    "log_prob_backward": log_prob_backward,
    "normal": normal,
    "ode_step": ode_step,
    "policy_loss": policy_loss,
    "sde_step": sde_step,
    "step_mean": step_mean,
}
