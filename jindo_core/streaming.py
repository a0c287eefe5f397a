"""Frozen layers that do not fit on the device: they lie in a page store and come one layer ahead of their turn.

QLoRA's base never changes, so a layer is read only: in the forward pass, and again, downwards, where gradient
checkpointing runs it a second time for the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jindo_core.nf4 import NF4Linear
from jindo_core.pager import Counters, Pager
from jindo_core.pages import store_for

ALIGNMENT = 256
"""Bytes at whose multiples a tensor starts within its layer: what 128-bit loads and a device's lines like."""


class _Part(NamedTuple):
    """A tensor of a layer: where it belongs, and where it lies in the layer's bytes."""

    owner: nn.Module
    name: str
    start: int
    placeholder: Tensor  # on the meta device: shape and dtype, no bytes

    def view(self, buffer: Tensor) -> Tensor:
        shape, dtype = self.placeholder.shape, self.placeholder.dtype
        return buffer[self.start : self.start + self.placeholder.nbytes].view(dtype).view(shape)

    def put(self, value: Tensor) -> None:
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.name] = value


class LayerStream:
    """The NF4 weights of some of a model's layers.

    Outside `use` a streamed layer's weights are placeholders on the meta device, which no operator takes.

    Args:
        device: where layers are used.
        store: where they lie, as `store_for` takes it: "host", or a folder for a memory-mapped file.
    """

    def __init__(self, device: torch.device, store: str | Path = "host") -> None:
        self._device, self._place = device, store
        self._parts: dict[int, list[_Part]] = {}
        self._pager: Pager | None = None
        self._units: dict[int, int] = {}
        self._spare: list[int] = []  # units of no layer
        self._next: dict[tuple[int, bool], int] = {}  # (layer, backwards) -> the unit that comes after it

    def __contains__(self, number: int) -> bool:
        return number in self._parts

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that are streamed."""
        return sorted(self._parts)

    @property
    def nbytes(self) -> int:
        """Of the streamed weights."""
        return sum(part.placeholder.nbytes for parts in self._parts.values() for part in parts)

    @property
    def counters(self) -> Counters:
        return Counters() if self._pager is None else self._pager.counters

    def take(self, number: int, layer: nn.Module) -> None:
        """Move the NF4 weights of layer `number` from the device to the store.

        Raises:
            InputError: the store has no room. ValueError: a layer that was taken already, larger than the first one or
            without NF4 weights. The layer is as it was then.
        """
        if number in self:
            raise ValueError(f"layer {number} is streamed already: restore it first")
        parts, held, start = [], [], 0
        for module in layer.modules():
            if not isinstance(module, NF4Linear):
                continue
            for name in ("weight", "absmax", "nested_absmax", "offset"):
                value = getattr(module, name)
                if value is None:
                    continue
                if value.is_meta:
                    raise ValueError(f"layer {number} has its weights elsewhere: it is streamed already, or not loaded")
                value = value.detach()
                parts.append(_Part(module, name, start, torch.empty_like(value, device="meta")))
                held.append(value)
                start += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        if not parts:
            raise ValueError(f"layer {number} has no NF4 weights: only those are streamed")
        if self._pager is None:
            store = store_for(self._device, self._place)
            self._pager = Pager(store, self._device, units=0, unit_bytes=start, resident=0)
        pager = self._pager
        if start > pager.unit_bytes:
            raise ValueError(f"layer {number} takes {start} bytes, expected at most the first one's {pager.unit_bytes}")
        if not self._spare:
            pager.extend(pager.units + 1)
            self._spare.append(pager.units - 1)
        for part, value in zip(parts, held, strict=True):
            pager.write(self._spare[-1], part.start, value.cpu())
        for part in parts:
            part.put(part.placeholder)
        self._parts[number], self._units[number] = parts, self._spare.pop()
        self._find_order()

    def move_to(self, folder: str | Path) -> int:
        """Let what lies in RAM lie in a file in `folder` from now on; returns its bytes. InputError: no room there."""
        moved = 0 if self._pager is None else self._pager.move_to(folder)
        self._place = folder
        return moved

    def _find_order(self) -> None:
        pairs = list(pairwise(self.layers))
        self._next = {(a, False): self._units[b] for a, b in pairs} | {(b, True): self._units[a] for a, b in pairs}

    @contextlib.contextmanager
    def use(self, number: int, *, backwards: bool = False) -> Iterator[None]:
        """Layer `number` has its weights on the device inside; the next one, upwards or `backwards`, is on its way."""
        if number not in self:
            yield
            return
        pager, unit = self._pager, self._units[number]
        assert pager is not None
        buffer = pager.get(unit)
        try:
            if (number, backwards) in self._next:
                pager.ahead(self._next[number, backwards])  # may run out of memory
            for part in self._parts[number]:
                part.put(part.view(buffer))
            yield
        finally:
            for part in self._parts[number]:
                part.put(part.placeholder)
            pager.done(unit, changed=False)

    def restore(self) -> None:
        """Bring every layer back to the device for good, and give the store and the buffers back. On out-of-memory
        those that came stay, and the others are streamed."""
        for number in self.layers:
            with self.use(number):
                values = [getattr(part.owner, part.name).detach().clone() for part in self._parts[number]]
            for part, value in zip(self._parts.pop(number), values, strict=True):
                part.put(value)
            self._spare.append(self._units.pop(number))
            self._find_order()
        if self._pager is not None:
            self._pager.close()
            self._pager, self._spare = None, []
