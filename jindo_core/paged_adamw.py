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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jindo_core.adamw_pages import Page, Room, Segment, bits_of, place
from jindo_core.kernels import adamw
from jindo_core.pager import Counters, Pager
from jindo_core.pages import PAGE_BYTES, PageStore

JOINED_ON_CUDA = 1 << 62
JOINED_ON_CPU = 1 << 16
"""Elements of a tensor up to which it is updated in one call with its neighbours: a call costs more than that many."""

WRAPPED = "__bnb_optimizer_quant_state__"
"""bitsandbytes' key of a parameter's quantized moments in a state dict."""

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
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        state_bits: 32, or 8: a quarter of the memory.
        resident_bytes: of moments that stay on each device; the rest is streamed at every step. "auto": all on a CPU;
            on a GPU what is free at the first step beyond the peak so far.
        store: where the rest lies: "host" (RAM, pinned for a GPU) or a folder for a memory-mapped file.
    Attributes:
        skipped_steps: steps whose gradients were not finite.
    Raises:
        ValueError: a number out of bounds or a parameter that is not contiguous. InputError: a store that can't be
        written to. In a step: InputError where the store has no room (the first step), torch.OutOfMemoryError where the
        device has none; nothing was changed then, and the step may be tried again.
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
            raise ValueError(f"PagedAdamW got state_bits {state_bits}, expected 32 or 8")
        if resident_bytes != "auto" and (not isinstance(resident_bytes, int) or resident_bytes < 0):
            raise ValueError(f"PagedAdamW got resident_bytes {resident_bytes!r}, expected 'auto' or a number of bytes")
        if store != "host":
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
        _check_numbers(self.defaults | param_group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_contiguous() or param.dtype not in adamw.DTYPES:
                dtype, strides = param.dtype, param.stride()
                del self.param_groups[-1]
                raise ValueError(
                    f"PagedAdamW got a {dtype} parameter with strides {strides}, "
                    "expected contiguous fp32, bf16 or fp16: make it .contiguous()"
                )

    # --- the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        if any(p.grad.is_sparse for p in given):
            raise ValueError("PagedAdamW got a sparse gradient, expected dense ones")
        if not _all_finite([p.grad for p in given]):
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
        self._budget = 0
        return sum(pager.evict() for pager in self._pagers.values())

    def regrow(self, resident_bytes: int) -> None:
        """Let so many bytes of moments stay on each device again."""
        self._budget = resident_bytes
        for pager in self._pagers.values():
            pager.evict(resident_bytes // pager.unit_bytes)
            pager.grow(resident_bytes // pager.unit_bytes)

    def _lay_out(self, given: list[torch.nn.Parameter]) -> None:
        """Give every trained parameter its places, anew where one of those given has none. Either all of it succeeds,
        or nothing has changed."""
        if self._placed.issuperset(given):
            return
        kept = self._collect()
        pages: dict[torch.device, list[Page]] = {}
        for number, group in enumerate(self.param_groups):
            for bits in (32, 8):
                for param in group["params"]:
                    trained = param.requires_grad or param in self._steps
                    if trained and bits_of(param, self._bits) == bits:
                        place(param, number, bits, pages.setdefault(param.device, []))
        pagers = {}
        for device, own in pages.items():
            pagers[device] = self._pager(device, len(own), self._affordable(device, len(own)) // PAGE_BYTES)
        self._forget()
        self._pages, self._pagers = pages, pagers
        self._placed = {segment.param for own in pages.values() for page in own for segment in page.segments}
        self._fill(kept)

    def _pager(self, device: torch.device, pages: int, resident: int) -> Pager:
        store = PageStore(self._place, pin=device.type == "cuda")
        try:
            return Pager(store, device, units=pages, unit_bytes=PAGE_BYTES, resident=resident, slots=SLOTS)
        except torch.OutOfMemoryError:
            if not resident:
                raise
        size = resident * PAGE_BYTES >> 20
        warnings.warn(f"{device} has no room for {size} MiB of AdamW's moments: all are paged", stacklevel=4)
        return self._pager(device, pages, 0)

    def _affordable(self, device: torch.device, pages: int) -> int:
        wanted = pages * PAGE_BYTES
        if self._budget != "auto":
            return min(int(self._budget), wanted)
        if device.type != "cuda":
            return wanted
        free, _ = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_allocated(device)
        return max(min(free + torch.cuda.memory_reserved(device) - peak - MARGIN, wanted), 0)

    def _forget(self) -> None:
        for pager in self._pagers.values():
            pager.flush()
            pager.store.close()
        self._pages, self._pagers, self._placed = {}, {}, set()

    # --- checkpoints ------------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[torch.nn.Parameter, list[tuple[torch.device, int, Segment]]]]:
        found: dict[torch.nn.Parameter, list[tuple[torch.device, int, Segment]]] = {}
        for device, pages in self._pages.items():
            for i, page in enumerate(pages):
                for segment in page.segments:
                    found.setdefault(segment.param, []).append((device, i, segment))
        yield from found.items()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """In the shape of torch.optim.AdamW's, which can load it; tensors on the CPU, copies.

        8-bit moments are as bitsandbytes' AdamW8bit writes them, which can load them too.
        """
        packed = super().state_dict()
        kept = self._collect()
        params = [p for group in self.param_groups for p in group["params"]]
        state = {i: kept[param] for i, param in enumerate(params) if param in kept}
        more = _torch_defaults()
        groups = [more | group for group in packed["param_groups"]]
        return {"state": state, "param_groups": groups}

    def _named(self, found: dict[str, Tensor], param: Tensor) -> dict[str, Any]:
        """A parameter's moments as they are checkpointed."""
        if self._bits == 32:
            return {name: value.view(param.shape) for name, value in found.items()}
        if "exp_avg" in found:
            return {WRAPPED: {f"state{i}": value.view(param.shape) for i, value in enumerate(found.values(), 1)}}
        cpu = torch.device("cpu")
        inner = {
            "state1": found["codes1"].view(param.shape), "state2": found["codes2"].view(param.shape),
            "absmax1": found["absmax1"], "absmax2": found["absmax2"],
            "qmap1": adamw.dynamic_map(cpu).clone(), "qmap2": adamw.unsigned_map(cpu).clone(),
        }  # fmt: skip
        return {WRAPPED: inner}

    def _collect(self) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """What `state_dict` has of each parameter that was updated."""
        kept = {}
        for param, places in self._places():
            if param in self._steps:
                bits = bits_of(param, self._bits)
                found = _empty_state(param, bits)
                for device, i, segment in places:
                    self._exchange(device, i, segment, found, into_page=False)
                kept[param] = {"step": torch.tensor(float(self._steps[param])), **self._named(found, param)}
        return kept

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes torch.optim.AdamW's, bitsandbytes' AdamW8bit's and its own, with moments of either kind.

        Raises:
            ValueError: groups, shapes or settings that do not fit; all is as it was then.
        """
        groups, own = state_dict["param_groups"], self.param_groups
        sizes = [[len(group["params"]) for group in side] for side in (groups, own)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state has groups of {sizes[0]} parameters, the optimizer of {sizes[1]}")
        for group in groups:
            _check_numbers(group)
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"the state was made with {name}, which PagedAdamW does not have")
        ids = [i for group in groups for i in group["params"]]
        state = {ids.index(key): _unwrapped(value) for key, value in state_dict["state"].items()}
        params = [p for group in own for p in group["params"]]
        for i, found in state.items():
            _check_state(found, params[i], i)
        for group, loaded in zip(own, groups, strict=True):
            group.update({name: loaded[name] for name in ("lr", "betas", "eps", "weight_decay")})
            if "initial_lr" in loaded:  # of a learning-rate schedule
                group["initial_lr"] = loaded["initial_lr"]
        self._forget()
        self._steps = {params[i]: int(found["step"]) for i, found in state.items()}
        self._lay_out(list(self._steps))
        self._fill({params[i]: found for i, found in state.items()})

    def _fill(self, state: dict[torch.nn.Parameter, dict[str, Any]]) -> None:
        for param, places in self._places():
            if param not in state:
                continue
            moments = _converted(_unwrapped(state[param]), param, bits_of(param, self._bits))
            for device, page, segment in places:
                self._exchange(device, page, segment, moments, into_page=True)
        for pager in self._pagers.values():
            pager.flush()

    def _exchange(
        self, device: torch.device, number: int, segment: Segment, flat: dict[str, Tensor], *, into_page: bool
    ) -> None:
        """Copy a segment's moments between its page and flat CPU tensors of the whole parameter."""
        page, pager = self._pages[device][number], self._pagers[device]
        moments = page.moments(pager.get(number))
        for name, part in moments.items():
            block = adamw.BLOCK if name.startswith("absmax") else 1
            here = part[segment.place // block : -(-(segment.place + segment.length) // block)]
            there = flat[name][segment.start // block : -(-(segment.start + segment.length) // block)]
            (here if into_page else there).copy_(there if into_page else here)
        pager.done(number, changed=into_page)


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
    """One number a device is waited for. A sum of absolute values is finite if all are, unless it overflows itself."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    for own in by_device.values():
        peaks = torch._foreach_norm(own, math.inf)
        if not torch.stack([peak.float() for peak in peaks]).isfinite().all().item():
            return False
    return True


# --- checkpoints' shapes --------------------------------------------------------------------------------


def _check_numbers(group: dict[str, Any]) -> None:
    lr, (beta1, beta2), eps, decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if not (lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and decay >= 0):
        raise ValueError(
            f"PagedAdamW got lr {lr}, betas {(beta1, beta2)}, eps {eps}, weight_decay {decay}, expected "
            "lr, eps and weight_decay of at least 0 and betas in [0, 1)"
        )


def _torch_defaults() -> dict[str, Any]:
    """The keys that torch.optim.AdamW expects in a group."""
    return dict(torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))]).defaults)


def _empty_state(param: Tensor, bits: int) -> dict[str, Tensor]:
    count = param.numel()
    if bits == 32:
        return {name: torch.zeros(count) for name in ("exp_avg", "exp_avg_sq")}
    codes = {name: torch.zeros(count, dtype=torch.uint8) for name in ("codes1", "codes2")}
    return codes | {name: torch.zeros(-(-count // adamw.BLOCK)) for name in ("absmax1", "absmax2")}


def _unwrapped(found: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes puts quantized moments into a dictionary of their own."""
    return {name: value for name, value in found.items() if name != WRAPPED} | found.get(WRAPPED, {})


def _check_state(found: dict[str, Any], param: Tensor, number: int) -> None:
    names = ("exp_avg", "exp_avg_sq") if "exp_avg" in found else ("state1", "state2")
    if "step" not in found or any(name not in found for name in names):
        raise ValueError(f"the state of parameter {number} has {sorted(found)}, expected step, {', '.join(names)}")
    for name in names:
        if found[name].shape != param.shape:
            raise ValueError(
                f"the state of parameter {number} has {name} {tuple(found[name].shape)}, expected {tuple(param.shape)}"
            )


def _converted(found: dict[str, Any], param: Tensor, bits: int) -> dict[str, Tensor]:
    """A checkpoint's moments of one parameter as flat CPU tensors of the kind that is kept."""
    eight = found.get("state1") is not None and found["state1"].dtype == torch.uint8
    if eight and bits == 8:
        names = {"codes1": "state1", "codes2": "state2", "absmax1": "absmax1", "absmax2": "absmax2"}
        return {own: found[theirs].cpu().reshape(-1) for own, theirs in names.items()}
    if eight:
        wide = [
            adamw.decode(found[f"state{i}"].cpu().reshape(-1), found[f"absmax{i}"].cpu(), found[f"qmap{i}"].cpu())
            for i in (1, 2)
        ]
    else:
        keys = ("exp_avg", "exp_avg_sq") if "exp_avg" in found else ("state1", "state2")
        wide = [found[key].detach().cpu().float().reshape(-1).contiguous() for key in keys]
    if bits == 32:
        return dict(zip(("exp_avg", "exp_avg_sq"), wide, strict=True))
    made = _empty_state(param, 8)
    for i, moment in enumerate(wide, 1):
        adamw.encode(moment, made[f"codes{i}"], made[f"absmax{i}"], signed=i == 1)
    return made
