"""A language model's head that lies outside the device: its rows come in slices, one ahead of its turn.

A head in bf16 is 0.26 GB for a LLaMA-2 7B and 1.05 GB for a LLaMA-3 8B. The loss goes over the slices twice, once for
the rows' log-sum-exp and once for the gradient, so neither the head nor the logits are ever whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.kernels.linear_cross_entropy import sliced_cross_entropy
from jindo_core.pager import Counters, Pager
from jindo_core.pages import store_for

SLICE_BYTES = 32 << 20
"""Of a slice: 4,096 rows of a 7B's head, so that its product still fills a GPU."""


class StreamedHead(nn.Module):
    """In place of `lm_head`: y = x W^T, W [V, C] in a page store.

    Args:
        weight: W, from where it lies now. device: where it is used.
        store: "host", or a folder for a memory-mapped file.
    Attributes:
        weight: a placeholder on the meta device: shape and dtype, no bytes. `state_dict` has W itself, on the CPU.
    Raises:
        InputError: the store has no room.
    """

    def __init__(self, weight: Tensor, device: torch.device, store: str | Path = "host") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        rows, row = weight.shape[0], weight.shape[1] * weight.dtype.itemsize
        self.slice_rows = min(max(SLICE_BYTES // row, 1), rows)
        units = -(-rows // self.slice_rows)
        pages = store_for(device, store)
        self._pager = Pager(pages, device, units=units, unit_bytes=self.slice_rows * row, resident=0)
        self.write(weight)

    def write(self, weight: Tensor) -> None:
        """Take the values of another W of the same shape; they are cast to this one's dtype."""
        if weight.shape != self.weight.shape:
            raise ValueError(f"a head of {tuple(self.weight.shape)} got {tuple(weight.shape)}")
        for unit, part in enumerate(weight.detach().split(self.slice_rows)):
            self._pager.write(unit, 0, part.to("cpu", self.weight.dtype))

    def whole(self) -> Tensor:
        """W [V, C], a copy on the CPU."""
        out = torch.empty_like(self.weight, device="cpu", requires_grad=False)
        for place, part in zip(out.split(self.slice_rows), self.slices(), strict=True):
            place.copy_(part)
        return out

    def move_to(self, folder: str | Path) -> int:
        """Let what lies in RAM lie in a file in `folder` from now on; returns its bytes. InputError: no room there."""
        return self._pager.move_to(folder)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.whole()  # the placeholder says nothing

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != self.weight.shape:
            error_msgs.append(f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(self.weight.shape)}")
        else:
            self.write(state_dict[name])

    @property
    def nbytes(self) -> int:
        """Of W."""
        return self.weight.nbytes

    @property
    def counters(self) -> Counters:
        return self._pager.counters

    def slices(self) -> Iterator[Tensor]:
        """W's rows in order, [slice_rows or fewer, C] each, good until the next one is asked for."""
        (rows, columns), dtype = self.weight.shape, self.weight.dtype
        for unit, start in enumerate(range(0, rows, self.slice_rows)):
            buffer = self._pager.get(unit)
            try:
                self._pager.ahead(unit + 1)
                count = min(self.slice_rows, rows - start)
                yield buffer[: count * columns * dtype.itemsize].view(dtype).view(count, columns)
            finally:
                self._pager.done(unit, changed=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., V]; for generation and evaluation: x, through which no gradient flows, asks for none."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a streamed head gives gradients through `loss` alone: its logits need torch.no_grad()")
        return torch.cat([F.linear(x, part) for part in self.slices()], -1)

    def loss(
        self, hidden: Tensor, labels: Tensor, count: Tensor | float | None = None, counted_rows: Tensor | None = None
    ) -> Tensor:
        """As `linear_cross_entropy` with this head."""
        return sliced_cross_entropy(hidden, self.slices, labels, count=count, counted_rows=counted_rows)
