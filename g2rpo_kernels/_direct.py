"""Past torch's dispatcher: when that makes no difference, and autograd without it.

On a small tensor the dispatcher's Python kernels and the autograd that torch.library generates cost
several times what a native op does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._library import Operator

# Each of torch's own ways to be asked "does anybody look?"; tens of nanoseconds each.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.maybe_current_level  # grad, vmap, ...: None outside of them
_jit_trace = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled
_compiling = torch.compiler.is_compiling


def something_listens() -> bool:
    """Whether a graph is traced, a mode or transform is active, or the profiler runs."""
    return (
        _compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms() is not None
        or _jit_trace() is not None
        or _profiling()
    )


def direct_function(
    op: Operator, backward: Callable, setup_context: Callable | None
) -> type[torch.autograd.Function]:
    """What `register_autograd` generates, less the way back through the dispatcher.

    Outputs behind the differentiable ones go past autograd, into the list given last.
    """
    count = op.differentiable

    def forward(ctx, *arguments):
        *arguments, others = arguments
        output = op.select(arguments[0].device)(*arguments)  # contiguous, as Operator has seen
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        if not isinstance(output, tuple):
            return output
        others += output[count:]
        if count == 1:
            return output[0]
        ctx.set_materialize_grads(False)  # as through the dispatcher
        return output[:count]

    def backward_and_none(ctx, *grads):
        grads = backward(ctx, *grads)
        return (*grads, None) if isinstance(grads, tuple) else (grads, None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_none)}
    # The base of autograd.Function, whose own apply() asks again for what Operator has asked.
    return type(f"{op.name}_function", (torch.autograd.function._SingleLevelFunction,), members)
