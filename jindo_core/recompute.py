"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): only a layer's input is kept, and the layer runs again
in the backward pass.

torch.utils.checkpoint does the same by hooks on every saved tensor, whose Python took half of a 2,048-token step on
an H100. Here a layer is one node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def recomputed(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """run(x), of which nothing but x is kept; differentiable once in x and the parameters that take gradients.

    Args:
        run: the layer; what it draws from the random generator of x's device, it draws again. Autocast is as it was.
        parameters: all that `run` uses.
    """
    return _Recomputed.apply(run, x, *(p for p in parameters if p.requires_grad))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, *trained):  # type: ignore[no-untyped-def]
        ctx.run, ctx.random = run, _random_state(x.device)
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x, *trained)
        return run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, *trained = ctx.saved_tensors
        inputs = [x.detach().requires_grad_(ctx.needs_input_grad[1]), *trained]
        now = _random_state(x.device)
        _set_random_state(x.device, ctx.random)
        try:
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.run(inputs[0])
        finally:
            _set_random_state(x.device, now)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return (None, *(next(found) if t.requires_grad else None for t in inputs))


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
