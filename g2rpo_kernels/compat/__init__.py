"""The steps of other flow-RL trainers, with their own signatures and return values, on our ops.

One import in the peer's file is the whole change; docs/integrate.md shows each. Noise comes
from torch's generators, as theirs does, so their seeds keep their meaning. These functions read
schedules on the host and are not meant for the inside of a compiled region.
"""

from .dance_grpo import flux_step
from .flow_factory import SDESchedulerOutput
from .flow_factory import step as flow_factory_step
from .flow_grpo import sde_step_with_logprob
from .mix_grpo import dance_grpo_step, flow_grpo_step, mix_grpo_step

__all__ = [
    "SDESchedulerOutput",
    "dance_grpo_step",
    "flow_factory_step",
    "flow_grpo_step",
    "flux_step",
    "mix_grpo_step",
    "sde_step_with_logprob",
]
