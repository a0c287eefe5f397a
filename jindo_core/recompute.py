"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): only a layer's input is kept, and the layer runs again
in the backward pass. The inputs themselves may be kept outside the device.

torch.utils.checkpoint does the same by hooks on every saved tensor, whose Python took half of a 2,048-token step on
an H100. Here a layer is one node of the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from jindo_core.pager import Counters, Pager
from jindo_core.pages import store_for

Around = Callable[[bool], contextlib.AbstractContextManager[None]]


def recomputed(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    around: Around | None = None,
    offload: CheckpointOffload | None = None,
) -> Tensor:
    """run(x), of which nothing but x is kept; differentiable once in x and the parameters that take gradients.

    Args:
        run: the layer; what it draws from the random generator of x's device, it draws again. Autocast is as it was.
        parameters: all that `run` uses.
        around: entered about each of the two runs, with True for the one of the backward pass and its gradients.
        offload: keeps x instead of the device, for one backward pass.
    """
    return _Recomputed.apply(run, around or _nothing, offload, x, *(p for p in parameters if p.requires_grad))


def _nothing(_again: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, around, offload, x, *trained):  # type: ignore[no-untyped-def]
        ctx.run, ctx.around, ctx.random = run, around, random_state(x.device)
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.kept = None if offload is None else offload.put(x)
        ctx.save_for_backward(*([x] if offload is None else []), *trained)
        with around(False):
            return run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        if ctx.kept is None:
            x, *trained = ctx.saved_tensors
            found = _gradients(ctx, dy, x, trained)
        else:
            with ctx.kept as x:
                found = _gradients(ctx, dy, x, ctx.saved_tensors)
        return (None, None, None, *found)


def _gradients(ctx, dy: Tensor, x: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    """Runs the layer again; the gradients of x and of what is trained."""
    inputs = [x.detach().requires_grad_(ctx.needs_input_grad[3]), *trained]
    now = random_state(x.device)
    with ctx.around(True):
        set_random_state(x.device, ctx.random)
        try:
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.run(inputs[0])
        finally:
            set_random_state(x.device, now)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


class CheckpointOffload:
    """Keeps layers' inputs outside the device: each goes there while its layer runs, and comes back while the layer
    above it runs again. It returns once: a second backward pass through the same graph is a RuntimeError.

    Args:
        store: where they lie, as `store_for` takes it: "host", or a folder for a memory-mapped file.
    """

    def __init__(self, store: str | Path = "host") -> None:
        self._place = store
        self._pagers: list[Pager] = []  # the last one is in use; earlier ones, of smaller units, drain
        self._stack: list[tuple[Pager, int]] = []  # what is away, in the order it went
        self._free: dict[Pager, list[int]] = {}

    @property
    def counters(self) -> Counters:
        """Of the pager in use."""
        return self._pagers[-1].counters if self._pagers else Counters()

    def move_to(self, folder: str | Path) -> int:
        """Let what lies in RAM lie in a file in `folder` from now on, between two passes; returns its bytes.
        InputError: no room there."""
        moved = sum(pager.move_to(folder) for pager in self._pagers)
        self._place = folder
        return moved

    def put(self, x: Tensor) -> Kept:
        """Begin to move a copy of x away."""
        pager = self._pager_for(x)
        free = self._free[pager]
        if not free:
            pager.extend(pager.units + 1)
            free.append(pager.units - 1)
        unit = free[-1]
        buffer = pager.get(unit, load=False)  # which may run out of memory: the unit stays free then
        free.remove(unit)
        _view(buffer, x.shape, x.dtype).copy_(x)
        pager.done(unit, changed=True)
        kept = Kept(self, pager, unit, x)
        self._stack.append((pager, unit))
        return kept

    def _pager_for(self, x: Tensor) -> Pager:
        last = self._pagers[-1] if self._pagers else None
        if last is None or last.unit_bytes < x.nbytes or last.device != x.device:
            last = Pager(store_for(x.device, self._place), x.device, units=0, unit_bytes=x.nbytes, resident=0)
            self._pagers.append(last)
            self._free[last] = []
            self._drop_drained()
        return last

    def _drop_drained(self) -> None:
        used = {pager for pager, _ in self._stack} | {self._pagers[-1]}
        self._free = {pager: free for pager, free in self._free.items() if pager in used}
        for pager in self._pagers:
            if pager not in used:
                pager.close()
        self._pagers = [pager for pager in self._pagers if pager in used]

    def _bring_before(self, pager: Pager, unit: int) -> None:
        place = self._stack.index((pager, unit))
        if place:
            before, its_unit = self._stack[place - 1]
            before.ahead(its_unit)

    def _give_back(self, pager: Pager, unit: int) -> None:
        if (pager, unit) in self._stack:
            self._stack.remove((pager, unit))
            self._free[pager].append(unit)
            self._drop_drained()


class Kept:
    """One input that is away; as a context it is back on the device."""

    def __init__(self, owner: CheckpointOffload, pager: Pager, unit: int, x: Tensor) -> None:
        self.pager, self.unit = pager, unit
        self._owner, self._shape, self._dtype = owner, x.shape, x.dtype
        self._gone = False

    def __enter__(self) -> Tensor:
        if self._gone:
            raise RuntimeError(
                "a second backward pass through a graph whose checkpoints are offloaded: they are freed at the first "
                "one. Run the forward pass again, or don't offload checkpoints"
            )
        with contextlib.ExitStack() as undo:
            buffer = self.pager.get(self.unit)
            undo.callback(self.pager.done, self.unit, changed=False)
            self._owner._bring_before(self.pager, self.unit)  # may run out of memory
            undo.pop_all()
        return _view(buffer, self._shape, self._dtype)

    def __exit__(self, *_: object) -> None:
        self.pager.done(self.unit, changed=False)
        self._give_back()

    def __del__(self) -> None:
        self._give_back()  # of a graph that was dropped

    def _give_back(self) -> None:
        if not self._gone:
            self._gone = True
            self._owner._give_back(self.pager, self.unit)


def _view(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return buffer[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


def random_state(device: torch.device) -> Tensor:
    """Of the device's generator."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """The inverse of `random_state`."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
