"""One reused buffer for what an operator needs only while it runs: above all a dequantized W.

Fresh memory is dear: on the CPU its page faults cost ten times the dequantize, on a GPU it splits the
allocator's blocks. Buffers are kept by thread, and on CUDA by stream, whose order keeps a kernel from
overwriting what an earlier one still reads.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with any contents, good until the next call on this thread (and CUDA stream)."""
    buffers: dict[tuple[str, int | None, int], Tensor] = _kept.__dict__.setdefault("buffers", {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device.type, device.index, stream)
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    held = buffers.get(key)
    if held is None or held.numel() < count:
        buffers.pop(key, None)
        del held  # the old one goes before the new one comes
        held = buffers[key] = torch.empty(count, dtype=torch.uint8, device=device)
    return held[:count].view(dtype).view(shape)
