"""Moves units of pages between a page store and a device.

A unit is what its user works on at once: a page of an optimizer's moments, a layer's weights. The first few stay on the
device. The others pass through two buffers: while the user works on one unit, the next is on its way, and a changed one
goes back. On CUDA the copies run on streams of their own, ordered by events, and nothing waits for the whole device;
that needs a store in pinned RAM: a copy between a GPU and a file's pages holds up Python until it has ended. On a CPU
a thread copies: the same code, so that every path is tested without a GPU.

Units are used in an order that is known (ascending, or up and down again), for which least-recently-used is the worst
policy: it drops each unit just before its turn. Hence a fixed prefix that stays.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.pages import PageStore


@dataclass
class Counters:
    """What was moved since the start. stall_seconds: the device waited for a copy (on CUDA as its own clock saw it)."""

    pages_in: int = 0
    pages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0


class _Slot:
    """A buffer that units pass through."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.unit: int | None = None
        self.held = False  # between get and done
        self.fresh = False  # brought ahead, not got yet
        self.ready: Any = None  # its unit has arrived
        self.free: Any = None  # nobody reads or writes it any more


class Pager:
    """
    Args:
        store: where the units lie that are not resident. It belongs to this pager.
        device: where they are worked on.
        units: how many there are. unit_bytes: of each.
        resident: how many of the first stay on the device.
        slots: buffers for the others, at least two.
    Raises:
        InputError: the store has no room.
    """

    def __init__(
        self, store: PageStore, device: torch.device, *, units: int, unit_bytes: int, resident: int, slots: int = 2
    ) -> None:
        self.store, self.device, self.units, self.unit_bytes = store, device, units, unit_bytes
        self._pages = -(-unit_bytes // store.page_bytes)
        self._counters = Counters()
        self._slots = [_Slot() for _ in range(slots)]
        self._saved: dict[int, Any] = {}  # unit -> when its last way back ended
        self._places: dict[int, int] = {}  # unit -> its first page in the store, once it has one
        self._copier: _Streams | _Thread = _Streams(device) if device.type == "cuda" else _Thread()
        resident = min(max(resident, 0), units)
        self._reserve(range(resident, units))
        self._resident = [self._new_buffer() for _ in range(resident)]

    @property
    def resident(self) -> int:
        """Units that stay on the device."""
        return len(self._resident)

    @property
    def counters(self) -> Counters:
        """So far. On CUDA this waits for the stalls that it counts."""
        self._counters.stall_seconds = self._copier.stalled()
        return self._counters

    def pages_of(self, unit: int) -> list[Tensor]:
        """The unit's pages in the store, of one that is not resident. Call `flush` before reading."""
        first = self._places[unit]
        return [self.store.page(first + i) for i in range(self._pages)]

    def read(self, unit: int) -> Tensor:
        """uint8 [unit_bytes] on the CPU: a copy of a unit that is not held. Asks the device for no memory."""
        if unit < self.resident:
            return self._resident[unit].to("cpu", copy=True)
        self._finish(self._saved.get(unit))
        return torch.cat(self.pages_of(unit))[: self.unit_bytes]

    def write(self, unit: int, start: int, value: Tensor) -> None:
        """Put a CPU tensor's bytes at byte `start` of a unit that is not held. Asks the device for no memory."""
        flat, size = value.contiguous().view(-1).view(torch.uint8), self.store.page_bytes
        if unit < self.resident:
            self._resident[unit][start : start + flat.numel()] = flat
            return
        self._finish(self._saved.get(unit))
        slot = self._find(unit)
        if slot is not None:  # what it holds is no longer what the store does
            self._finish(slot.ready)
            slot.unit, slot.fresh = None, False
        pages, done = self.pages_of(unit), 0
        while done < flat.numel():
            page, place = divmod(start + done, size)
            count = min(size - place, flat.numel() - done)
            pages[page][place : place + count] = flat[done : done + count]
            done += count

    def ahead(self, unit: int) -> None:
        """Begin to bring a unit, if there is a buffer for it; a number that is none is no unit."""
        if self.resident <= unit < self.units and self._find(unit) is None:
            # The slots are in the order of their last use.
            slot = next((slot for slot in self._slots if not slot.held and not slot.fresh), None)
            if slot is not None:
                self._load(unit, slot)

    def get(self, unit: int, *, load: bool = True) -> Tensor:
        """uint8 [unit_bytes] on the device, good for what is launched on the current stream until `done`.

        Args:
            load: False where all of it will be overwritten; it holds anything then.
        """
        if unit < self.resident:
            return self._resident[unit]
        slot = self._find(unit)
        if slot is None:
            slot = next((slot for slot in self._slots if not slot.held), None)
            if slot is None:
                raise RuntimeError(f"all {len(self._slots)} buffers are in use: call done before the next get")
            self._load(unit, slot, copy=load)
        slot.held, slot.fresh = True, False
        self._copier.wait(slot.ready)
        assert slot.buffer is not None
        return slot.buffer

    def done(self, unit: int, *, changed: bool) -> None:
        """The user has launched all its work on the unit. A changed one goes back to the store."""
        if unit < self.resident:
            return
        slot = self._find(unit)
        assert slot is not None
        assert slot.buffer is not None
        slot.held, slot.free = False, self._copier.mark()
        self._slots.append(self._slots.pop(self._slots.index(slot)))  # the one used last is the last to be taken
        if changed:
            slot.free = self._saved[unit] = self._copier.copy(self._cuts(unit, slot.buffer, False), [slot.free], True)
            self._count(out=True)

    def prepare(self) -> None:
        """Make the buffers now, so that later calls ask the device for no memory."""
        for slot in self._slots[: self.units - self.resident]:
            self._give_buffer(slot)

    def extend(self, units: int) -> None:
        """Let there be so many units. InputError where the store has no room; nothing has changed then."""
        self._reserve(range(self.units, units))
        self.units = max(units, self.units)

    def flush(self) -> None:
        """Wait until the store holds all that was changed outside the resident prefix."""
        for event in self._saved.values():
            self._finish(event)
        self._saved.clear()

    def move_to(self, folder: str | Path) -> int:
        """Let the store's pages that are in RAM lie in a file in `folder` from now on; returns their bytes. No unit may
        be held. InputError as `PageStore.move_to`."""
        if any(slot.held for slot in self._slots):
            raise RuntimeError("a unit is in use: call done before the pages move")
        if not self.store.in_ram:
            return 0
        self.flush()
        for slot in self._slots:
            self._finish(slot.ready)
        return self.store.move_to(folder)

    def close(self) -> None:
        """Wait for what is under way, and give the device's memory and the store's back."""
        self.flush()
        for slot in self._slots:
            self._finish(slot.ready)
        self._slots.clear()
        self._resident.clear()
        self.store.close()

    def evict(self, keep: int = 0) -> int:
        """Move all but the first `keep` resident units to the store; returns the bytes that the device got back.

        InputError where the store has no room for them; nothing has changed then.
        """
        gone = self._resident[keep:]
        self._reserve(range(keep, self.resident))
        for i, buffer in enumerate(gone, keep):
            for source, target in self._cuts(i, buffer, False):
                target.copy_(source)
            self._count(out=True)
        del self._resident[keep:]
        return len(gone) * self.unit_bytes

    def grow(self, resident: int) -> None:
        """Bring units back to the device until so many stay there. On out-of-memory those that came stay."""
        self.flush()
        for slot in self._slots:
            if slot.ready is not None:
                self._copier.wait(slot.ready)
            slot.unit, slot.fresh = None, False
        for unit in range(self.resident, min(resident, self.units)):
            buffer = self._new_buffer()
            for source, target in self._cuts(unit, buffer, True):
                target.copy_(source)
            self._count(out=False)
            self._resident.append(buffer)

    def _reserve(self, units: Iterable[int]) -> None:
        """Places in the store for those units that have none."""
        new, first = [unit for unit in units if unit not in self._places], len(self.store)
        self.store.reserve(first + len(new) * self._pages)
        self._places |= {unit: first + i * self._pages for i, unit in enumerate(new)}

    @staticmethod
    def _finish(event: Any) -> None:
        """Let Python wait for the end of a copy."""
        if event is not None:
            event.synchronize() if hasattr(event, "synchronize") else event.result()

    def _new_buffer(self) -> Tensor:
        return torch.zeros(self.unit_bytes, dtype=torch.uint8, device=self.device)

    def _give_buffer(self, slot: _Slot) -> None:
        if slot.buffer is None:
            slot.buffer = self._new_buffer()
            slot.free = self._copier.mark()  # its zeros

    def _find(self, unit: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.unit == unit), None)

    def _load(self, unit: int, slot: _Slot, *, copy: bool = True) -> None:
        self._give_buffer(slot)
        assert slot.buffer is not None
        # Behind the slot's last user, behind the way back of the unit that was in it (which a user that only read may
        # have come after), and behind the new unit's own.
        before = [slot.free, self._saved.get(unit)] + ([] if slot.unit is None else [self._saved.get(slot.unit)])
        before = [event for event in before if event is not None]
        slot.unit, slot.fresh = unit, True
        slot.ready = self._copier.copy(self._cuts(unit, slot.buffer, True) if copy else [], before, False)
        if copy:
            self._count(out=False)

    def _cuts(self, unit: int, buffer: Tensor, inwards: bool) -> list[tuple[Tensor, Tensor]]:
        """(from, to), page by page."""
        size = self.store.page_bytes
        parts = buffer.split(size)
        pages = [page[: len(part)] for page, part in zip(self.pages_of(unit), parts, strict=True)]
        return list(zip(pages, parts, strict=True) if inwards else zip(parts, pages, strict=True))

    def _count(self, *, out: bool) -> None:
        if out:
            self._counters.pages_out += self._pages
            self._counters.bytes_out += self.unit_bytes
        else:
            self._counters.pages_in += self._pages
            self._counters.bytes_in += self.unit_bytes


class _Streams:
    """Copies on two CUDA streams, in and out; an event stands for a moment of a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {out: torch.cuda.Stream(device) for out in (False, True)}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def mark(self) -> torch.cuda.Event:
        """Now, on the current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, cuts: list[tuple[Tensor, Tensor]], before: list[torch.cuda.Event], out: bool) -> torch.cuda.Event:
        stream = self._streams[out]
        for event in before:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for source, target in cuts:
                # Its memory was allocated for the current stream: once freed, no other tensor gets it before this ends.
                (source if out else target).record_stream(stream)
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """Let the current stream wait; what that took is measured on the device."""
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(stream)
        stream.wait_event(event)
        last.record(stream)
        self._waits.append((first, last))
        if len(self._waits) > 1024 and self._waits[511][1].query():
            self._sum(512)

    def stalled(self) -> float:
        self._sum(len(self._waits))
        return self._seconds

    def _sum(self, count: int) -> None:
        for first, last in self._waits[:count]:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1e3
        del self._waits[:count]


class _Thread:
    """Copies on one thread, in the order they were asked for; a future stands for the end of one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jindo-pager")
        self._seconds = 0.0

    def mark(self) -> None:
        return None  # a CPU's work is done when its call returns

    def copy(self, cuts: list[tuple[Tensor, Tensor]], before: list[Future[None]], out: bool) -> Future[None]:
        # memmove, not copy_: torch's own threads would spin beside the ones that compute.
        spans = [(target.data_ptr(), source.data_ptr(), source.nbytes) for source, target in cuts]

        def move(held: list[tuple[Tensor, Tensor]] = cuts) -> None:
            for target, source, count in spans:
                ctypes.memmove(target, source, count)

        return self._pool.submit(move)

    def wait(self, event: Future[None]) -> None:
        started = time.perf_counter()
        event.result()
        self._seconds += time.perf_counter() - started

    def stalled(self) -> float:
        return self._seconds
