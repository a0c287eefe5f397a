"""AdamW whose moments lie in pages, on the device as far as a budget allows and outside it beyond that.

Loshchilov and Hutter 2019 (arXiv:1711.05101) by `kernels/adamw.py`; paging as QLoRA proposes it (Dettmers et al. 2023,
arXiv:2305.14314, section 3), but with pages that the optimizer moves itself. bitsandbytes leaves that to the driver's
unified memory: it waits for the device after every tensor, and tensors under 100,000 elements, as most of LoRA's are,
stay where they are. Here small tensors are packed into pages.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core import adamw_state
from jindo_core.adamw_pages import Page, Room, Segment, bits_of, place
from jindo_core.adamw_state import Moments
from jindo_core.kernels import adamw
from jindo_core.pager import Counters, Pager
from jindo_core.pages import PAGE_BYTES, PageStore, store_for

JOINED_ON_CUDA = 1 << 62
JOINED_ON_CPU = 1 << 16
"""Elements of a tensor up to which it is updated in one call with its neighbours: a call costs more than that many."""

SLOTS = 3
"""Buffers for pages under way: one worked on, one coming, one going back."""

MARGIN = 256 << 20
"""Bytes of a GPU that resident_bytes="auto" leaves free beyond the peak so far: workspaces, fragmentation."""


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with paged moments.

    With fp32 moments parameters follow torch.optim.AdamW's trajectory, bit for bit on the CPU, whatever the budget;
    with 8-bit ones bitsandbytes' AdamW8bit's. A step whose gradients are not all finite changes nothing and is counted.

    Args:
        params: parameters or groups of them, contiguous; fp32, bf16 or fp16. Each group's lr may change at any time.
            Frozen ones may be among them, of any kind.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        state_bits: 32, or 8: a quarter of the memory.
        resident_bytes: of moments that stay on each device; the rest is streamed at every step. "auto": all on a CPU;
            on a GPU what is free at the first step beyond the peak so far, within
            torch.cuda.set_per_process_memory_fraction.
        store: where the rest lies: "host" (pinned RAM for a GPU, a file in the system's temporary folder for a CPU) or
            a folder for a memory-mapped file. Copies between a GPU and a file hold up the step until they have ended.
    Attributes:
        skipped_steps: steps whose gradients were not finite.
    Raises:
        ValueError: a number out of bounds or a parameter of another kind. InputError: a store that can't be written to.
        In a step: InputError where the store has no room (the first step), torch.OutOfMemoryError where the device has
        none; nothing was changed then, and the step may be tried again.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        resident_bytes: int | str = "auto",
        store: str | Path = "host",
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"PagedAdamW got state_bits {state_bits!r}, expected 32 or 8")
        if resident_bytes != "auto" and (not isinstance(resident_bytes, int) or resident_bytes < 0):
            raise ValueError(f"PagedAdamW got resident_bytes {resident_bytes!r}, expected 'auto' or a number of bytes")
        PageStore(store).close()  # a folder that can't be written to is an error now
        self._bits, self._budget, self._place = state_bits, resident_bytes, store
        self._steps: dict[torch.nn.Parameter, int] = {}
        self._pages: dict[torch.device, list[Page]] = {}
        self._pagers: dict[torch.device, Pager] = {}
        self._placed: set[torch.nn.Parameter] = set()
        self.skipped_steps = 0
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; moments that exist already are kept."""
        adamw_state.check_numbers(self.defaults | param_group, "PagedAdamW got")
        super().add_param_group(param_group)
        try:
            _check_kind(param for param in self.param_groups[-1]["params"] if param.requires_grad)
        except ValueError:
            del self.param_groups[-1]
            raise

    # --- the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, finite: bool = False
    ) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss.

        Args:
            finite: the caller has seen that all gradients are (by their norm, say): they are not looked at again, which
                spares a GPU's queue a wait.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        if any(p.grad.is_sparse for p in given):
            raise ValueError("PagedAdamW got a sparse gradient, expected dense ones")
        _check_kind(given)
        if not finite and not _all_finite([p.grad for p in given]):
            self.skipped_steps += 1
            return loss
        self._lay_out(given)
        # All memory that the step takes is asked for here: from the first update on nothing can run out of it.
        for param in given:
            assert param.grad is not None
            param.grad = param.grad.contiguous()
        for pager in self._pagers.values():
            pager.prepare()
        room = {device: Room(device, pages) for device, pages in self._pages.items()}
        for param in given:
            self._steps[param] = self._steps.get(param, 0) + 1
        for device, pages in self._pages.items():
            pager = self._pagers[device]
            wanted = [i for i, page in enumerate(pages) if any(s.param.grad is not None for s in page.segments)]
            for turn, i in enumerate(wanted):
                buffer = pager.get(i)
                if turn + 1 < len(wanted):
                    pager.ahead(wanted[turn + 1])
                self._update(pages[i], buffer, room[device])
                pager.done(i, changed=True)
        return loss

    def _update(self, page: Page, buffer: Tensor, room: Room) -> None:
        moments = page.moments(buffer)
        for run in page.runs(self._steps, JOINED_ON_CUDA if buffer.is_cuda else JOINED_ON_CPU):
            first, last = run[0].place, run[-1].place + run[-1].length
            group = self.param_groups[page.group]
            lr, (beta1, beta2), eps, decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
            step = self._steps[run[0].param]
            update = adamw.Update(float(lr), float(beta1), float(beta2), float(eps), float(decay), step)
            own, gradients = [segment.values for segment in run], [segment.gradient for segment in run]
            if len(run) == 1:
                _step_flat(own[0], gradients[0], moments, first, last, update)
                continue
            joined = room.join(0, own)
            _step_flat(joined, room.join(1, gradients), moments, first, last, update)
            torch._foreach_copy_(own, list(joined.split([segment.length for segment in run])))

    # --- memory -----------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """Pages and bytes moved, and the time that steps waited for them, over all devices."""
        found = [dataclasses.astuple(pager.counters) for pager in self._pagers.values()]
        return Counters(*map(sum, zip(*found, strict=True)))

    @property
    def resident_bytes(self) -> int:
        """Of moments that are on the devices now, buffers aside."""
        return sum(pager.resident * pager.unit_bytes for pager in self._pagers.values())

    @property
    def state_bytes(self) -> int:
        """Of all pages of moments; 0 before the first step."""
        return sum(pager.units * pager.unit_bytes for pager in self._pagers.values())

    def evict(self) -> int:
        """Move all resident moments to the store, from now on; returns the bytes that became free on the devices."""
        freed = sum(pager.evict() for pager in self._pagers.values())
        self._budget = 0
        return freed

    def move_to(self, folder: str | Path) -> int:
        """Let the moments that lie in RAM outside the devices lie in a file in `folder` from now on; returns their
        bytes. InputError: no room there."""
        moved = sum(pager.move_to(folder) for pager in self._pagers.values())
        self._place = folder
        return moved

    def regrow(self, resident_bytes: int) -> None:
        """Let so many bytes of moments stay on each device again."""
        for pager in self._pagers.values():
            pager.evict(resident_bytes // pager.unit_bytes)
            pager.grow(resident_bytes // pager.unit_bytes)
        self._budget = resident_bytes

    def _lay_out(self, given: list[torch.nn.Parameter]) -> None:
        """Give every trained parameter its places, anew where one of those given has none. Either all of it succeeds,
        or nothing has changed."""
        if not self._placed.issuperset(given):
            self._lay_anew({*given, *self._steps}, self._collect())

    def _lay_anew(self, updated: set[torch.nn.Parameter], moments: Mapping[torch.nn.Parameter, Moments]) -> None:
        """New pages that hold `moments`, in place of those that there are; where it raises, these are as they were.

        Args:
            updated: what gets a place beside the parameters that require a gradient.
        """
        pages: dict[torch.device, list[Page]] = {}
        for number, group in enumerate(self.param_groups):
            for bits in (32, 8):
                for param in group["params"]:
                    if (param.requires_grad or param in updated) and bits_of(param, self._bits) == bits:
                        _check_kind([param])
                        place(param, number, bits, pages.setdefault(param.device, []))
        pagers, short = {}, {}
        for device, own in pages.items():
            resident = self._affordable(device, len(own)) // PAGE_BYTES
            try:
                pagers[device] = self._pager(device, len(own), resident)
            except torch.OutOfMemoryError:
                if not resident:
                    raise
                pagers[device], short[device] = self._pager(device, len(own), 0), resident
        _fill(pages, pagers, moments)
        old, self._pages, self._pagers = self._pagers, pages, pagers
        self._placed = {segment.param for own in pages.values() for page in own for segment in page.segments}
        held = {device: pager.resident for device, pager in old.items()}
        for pager in old.values():
            pager.close()
        for device, resident in short.items():
            self._settle(device, resident, min(resident, held.get(device, 0)))

    def _settle(self, device: torch.device, wanted: int, held: int) -> None:
        """Pages that could not stay beside the former ones take the place of as many as were `held`; says what did not
        fit."""
        pager, said = self._pagers[device], "all are paged"
        try:
            pager.grow(held)
        except torch.OutOfMemoryError:
            pager.evict()
        if pager.resident == wanted:
            return
        if pager.resident:
            said = f"{pager.resident * PAGE_BYTES >> 20} MiB stay there, the rest is paged"
        size = wanted * PAGE_BYTES >> 20
        warnings.warn(f"{device} has no room for {size} MiB of AdamW's moments: {said}", stacklevel=6)

    def _pager(self, device: torch.device, pages: int, resident: int) -> Pager:
        store = store_for(device, self._place)
        return Pager(store, device, units=pages, unit_bytes=PAGE_BYTES, resident=resident, slots=SLOTS)

    def _affordable(self, device: torch.device, pages: int) -> int:
        """Bytes that may stay, of so many pages."""
        wanted = pages * PAGE_BYTES
        if self._budget != "auto":
            return min(int(self._budget), wanted)
        if device.type != "cuda":
            return wanted
        free, total = torch.cuda.mem_get_info(device)
        # What other processes leave, and what a cap on this one does, of which mem_get_info knows nothing.
        most = min(
            free + torch.cuda.memory_reserved(device), int(torch.cuda.get_per_process_memory_fraction(device) * total)
        )
        room = most - torch.cuda.max_memory_allocated(device) - MARGIN
        # The peak so far may hold the pages that these replace: as many found room already.
        held = self._pagers[device].resident * PAGE_BYTES if device in self._pagers else 0
        return max(min(max(room, held), wanted), 0)

    # --- checkpoints ------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """In the shape of torch.optim.AdamW's, which can load it; tensors on the CPU, copies.

        8-bit moments are as bitsandbytes' AdamW8bit writes them, which can load them too.
        """
        packed, kept = super().state_dict(), self._collect()
        state = {}
        for i, param in enumerate(p for group in self.param_groups for p in group["params"]):
            if param in kept:
                step = torch.tensor(float(self._steps[param]))
                state[i] = {"step": step, **adamw_state.named(kept[param], param, self._bits)}
        defaults = adamw_state.torch_defaults()
        return {"state": state, "param_groups": [defaults | group for group in packed["param_groups"]]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes torch.optim.AdamW's, bitsandbytes' AdamW8bit's and its own, with moments of either kind.

        Raises:
            ValueError: a state that does not fit or is another optimizer's. InputError, torch.OutOfMemoryError: no room
            for it beside the present one, in the store or on the device. All is as it was then.
        """
        found = adamw_state.loaded(state_dict, self.param_groups, self._bits)
        self._lay_anew(set(found.steps), found.moments)
        self._steps = found.steps
        for group, numbers in zip(self.param_groups, found.groups, strict=True):
            group.update(numbers)

    @property
    def bits(self) -> int:
        """Of a moment; of small parameters' they are always 32."""
        return self._bits

    @property
    def updates(self) -> dict[torch.nn.Parameter, int]:
        """How often each parameter was updated, in the order in which `stream_moments` has them."""
        ends = (s.param for own in self._pages.values() for page in own for s in page.segments if _ends(s))
        return {param: self._steps[param] for param in ends if param in self._steps}

    @torch.no_grad()
    def stream_moments(self) -> Iterator[tuple[torch.nn.Parameter, Moments]]:
        """Copies of the moments of each parameter that was updated; no more of them at once than touch one page."""
        begun: dict[torch.nn.Parameter, Moments] = {}
        for device, pages in self._pages.items():
            for number, page in enumerate(pages):
                tenants = [segment for segment in page.segments if segment.param in self._steps]
                moments = page.moments(self._pagers[device].read(number)) if tenants else {}
                for segment in tenants:
                    if segment.param not in begun:
                        begun[segment.param] = adamw_state.empty(segment.param, page.bits)
                    for here, there in _pairs(segment, moments, begun[segment.param]):
                        there.copy_(here)
                    if _ends(segment):
                        yield segment.param, begun.pop(segment.param)

    @torch.no_grad()
    def load_moments(
        self, updates: Mapping[torch.nn.Parameter, int], moments: Mapping[torch.nn.Parameter, Moments]
    ) -> None:
        """The inverse of `updates` and `stream_moments`; `moments` is asked for one parameter at a time.

        Raises:
            ValueError: moments of another kind or size. InputError, torch.OutOfMemoryError: no room for them. All is as
            it was then.
        """
        self._lay_anew(set(updates), _Fitting(moments, self._bits))
        self._steps = dict(updates)

    def _collect(self) -> dict[torch.nn.Parameter, Moments]:
        return dict(self.stream_moments())


class _Fitting(Mapping[torch.nn.Parameter, Moments]):
    """Moments that are seen to fit as they are asked for. The last is kept: a parameter may lie in several pages."""

    def __init__(self, moments: Mapping[torch.nn.Parameter, Moments], bits: int) -> None:
        self._moments, self._bits = moments, bits
        self._last: tuple[torch.nn.Parameter, Moments] | None = None

    def __getitem__(self, param: torch.nn.Parameter) -> Moments:
        if self._last is None or self._last[0] is not param:
            with torch.device("meta"):
                expected = adamw_state.empty(param, bits_of(param, self._bits))
            found = self._moments[param]
            kinds = [{name: (value.dtype, value.shape) for name, value in part.items()} for part in (found, expected)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"moments of a parameter of {tuple(param.shape)} are {kinds[0]}, expected {kinds[1]}")
            self._last = param, found
        return self._last[1]

    def __contains__(self, param: object) -> bool:
        return param in self._moments

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _ends(segment: Segment) -> bool:
    """Whether it is its parameter's last."""
    return segment.start + segment.length == segment.param.numel()


def _fill(
    pages: dict[torch.device, list[Page]], pagers: dict[torch.device, Pager], kept: Mapping[torch.nn.Parameter, Moments]
) -> None:
    """Write the parameters' moments into the pages, without a buffer on the device."""
    for device, own in pages.items():
        for number, page in enumerate(own):
            tenants = [segment for segment in page.segments if segment.param in kept]
            if tenants:
                raw = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
                for segment in tenants:
                    for here, there in _pairs(segment, page.moments(raw), kept[segment.param]):
                        here.copy_(there)
                pagers[device].write(number, 0, raw)


def _pairs(segment: Segment, page: Moments, flat: Moments) -> list[tuple[Tensor, Tensor]]:
    """Views of a segment's moments, in its page's and in its whole parameter's."""
    found = []
    for name, part in page.items():
        block = adamw.BLOCK if name.startswith("absmax") else 1
        here = part[segment.place // block : -(-(segment.place + segment.length) // block)]
        found.append((here, flat[name][segment.start // block : -(-(segment.start + segment.length) // block)]))
    return found


def _step_flat(
    param: Tensor, grad: Tensor, moments: dict[str, Tensor], first: int, last: int, update: adamw.Update
) -> None:
    if "exp_avg" in moments:
        adamw.adamw_(param, grad, moments["exp_avg"][first:last], moments["exp_avg_sq"][first:last], update)
        return
    blocks = slice(first // adamw.BLOCK, -(-last // adamw.BLOCK))
    adamw.adamw_8bit_(
        param, grad, moments["codes1"][first:last], moments["codes2"][first:last], moments["absmax1"][blocks],
        moments["absmax2"][blocks], update,
    )  # fmt: skip


def _all_finite(gradients: list[Tensor]) -> bool:
    """One number a device is waited for."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    # If a 2-norm is finite, all is. It may overflow by itself: then the largest magnitude tells, in 17 times the time
    # on a CPU.
    return all(_finite_norms(own, 2.0) or _finite_norms(own, math.inf) for own in by_device.values())


def _finite_norms(gradients: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(gradients, order, dtype=torch.float32)
    return bool(torch.stack(norms).isfinite().all())


def _check_kind(params: Iterable[torch.nn.Parameter]) -> None:
    """ValueError where the kernels would misread one."""
    for param in params:
        if param.dtype not in adamw.DTYPES:
            raise ValueError(
                f"PagedAdamW got a {param.dtype} parameter of shape {tuple(param.shape)}, expected fp32, bf16 or fp16: "
                "convert it with .float(), or freeze it"
            )
        if not param.is_contiguous():
            raise ValueError(
                f"PagedAdamW got a parameter of shape {tuple(param.shape)} with strides {param.stride()}, expected a "
                "contiguous one: make it .contiguous()"
            )
