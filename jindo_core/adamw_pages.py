"""How AdamW's moments lie in pages: which elements of which parameters, and in how many bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from jindo_core.kernels import adamw
from jindo_core.pages import PAGE_BYTES

SMALLEST_8BIT = 4096
"""Tensors of fewer elements keep fp32 moments, as bitsandbytes' AdamW8bit."""


class Segment(NamedTuple):
    """`length` elements of a parameter, from `start`, whose moments are elements `place`… of their page."""

    param: torch.nn.Parameter
    start: int
    length: int
    place: int

    @property
    def values(self) -> Tensor:
        """Its elements, flat; a view."""
        return self.param.detach().view(-1)[self.start : self.start + self.length]

    @property
    def gradient(self) -> Tensor:
        """Their gradient, flat; a view of a contiguous one."""
        assert self.param.grad is not None
        return self.param.grad.view(-1)[self.start : self.start + self.length]


@dataclass
class Page:
    """A page's tenants: one parameter group, one kind of moments."""

    group: int
    bits: int
    segments: list[Segment] = field(default_factory=list)
    used: int = 0

    def moments(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts of a page's bytes: flat tensors of `capacity` elements, or blocks."""
        most = capacity(self.bits)
        if self.bits == 32:
            wide = buffer[: 8 * most].view(torch.float32)
            return dict(zip(("exp_avg", "exp_avg_sq"), wide.chunk(2), strict=True))
        maxima = buffer[2 * most :][: most // adamw.BLOCK * 8].view(torch.float32)
        codes = {"codes1": buffer[:most], "codes2": buffer[most : 2 * most]}
        return codes | dict(zip(("absmax1", "absmax2"), maxima.chunk(2), strict=True))

    def runs(self, steps: Mapping[torch.nn.Parameter, int], joined: int) -> Iterator[list[Segment]]:
        """Segments with a gradient; neighbours of at most `joined` elements, without a gap, at the same step, together.

        Args:
            steps: of every parameter, the number of its update.
        """
        run: list[Segment] = []
        for segment in self.segments:
            if segment.param.grad is None:
                continue
            if run and not _fits(run[-1], segment, steps, joined):
                yield run
                run = []
            run.append(segment)
        if run:
            yield run


def _fits(last: Segment, segment: Segment, steps: Mapping[torch.nn.Parameter, int], joined: int) -> bool:
    """Whether two segments can be updated in one call."""
    one, other = last.param, segment.param
    return (
        max(last.length, segment.length) <= joined
        and last.place + last.length == segment.place
        and steps[one] == steps[other]
        and one.dtype == other.dtype
        and one.grad is not None
        and other.grad is not None
        and one.grad.dtype == other.grad.dtype
    )


class Room:
    """Where neighbours' values and gradients are put side by side during a step. Made at once: a step must not run out
    of memory between its updates."""

    def __init__(self, device: torch.device, pages: Sequence[Page]) -> None:
        most = max((page.used for page in pages if len(page.segments) > 1), default=0)
        self._flat = [torch.empty(4 * most, dtype=torch.uint8, device=device) for _ in range(2)]

    def join(self, number: int, parts: Sequence[Tensor]) -> Tensor:
        """The parts, flat and of one dtype, one after another; in buffer 0 or 1, good until its next use."""
        count = sum(part.numel() for part in parts)
        flat = self._flat[number][: count * parts[0].element_size()].view(parts[0].dtype)
        return torch.cat(list(parts), out=flat)


def capacity(bits: int) -> int:
    """Elements whose moments a page holds: 8 bytes an element in fp32; 2, and 8 a block of 256, in 8 bits."""
    return PAGE_BYTES // 8 if bits == 32 else PAGE_BYTES // (2 * adamw.BLOCK + 8) * adamw.BLOCK


def bits_of(param: Tensor, bits: int) -> int:
    """Of a parameter's moments, where `bits` are asked for."""
    return 32 if param.numel() < SMALLEST_8BIT else bits


def place(param: torch.nn.Parameter, group: int, bits: int, pages: list[Page]) -> None:
    """Cut a parameter into segments, each at the start of a block of 256: the blocks are then a tensor's own."""
    start, most = 0, capacity(bits)
    while start < param.numel():
        page = pages[-1] if pages and (pages[-1].group, pages[-1].bits) == (group, bits) else None
        if page is None or page.used >= most:
            page = Page(group, bits)
            pages.append(page)
        count = min(param.numel() - start, most - page.used)
        page.segments.append(Segment(param, start, count, page.used))
        page.used += -(-count // adamw.BLOCK) * adamw.BLOCK
        start += count
