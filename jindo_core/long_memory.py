"""LongLLaMA (Tworkowski et al. 2023, arXiv:2307.03170): a LLaMA whose memory layers also attend to keys and values of
earlier windows of a long input. LLaMA's weights and names; nothing is added to them.

An input longer than `last_context_length` is read in windows: what comes before its last `last_context_length` tokens
in windows of the model's context, then those. Positions begin again at 0 in each. In a window, a memory layer's queries
see, under one softmax, the window causally and all of memory; memory's keys stand as at position 0, that is unturned,
while the queries keep their position in the window: so it is in the authors' code, which has it from the paper's "as if
first". Other layers see the window alone. A window that is read, or full, joins memory.

Shapes: B batch, T new tokens, S tokens of the window (held and new), M of memory, H query heads, G key/value heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jindo_core.errors import InputError
from jindo_core.kernels.attention import causal_attention

MEMORY_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LongMemory:
    """The numbers of a LongLLaMA's memory, under config.json's names.

    Attributes:
        layers: which layers have memory (`mem_layers`). dtype: memory's keys and values are kept in it (`mem_dtype`).
        positionals: whether queries and keys of the memory layers are turned at all (`mem_positionals`).
        grouping: (heads, queries) that a memory layer works on at once (`mem_attention_grouping`), or None: all.
        last_context_length: tokens of the last window. context: of the windows before it, and the most of any.
    """

    layers: tuple[int, ...]
    context: int
    positionals: bool = True
    dtype: torch.dtype = torch.bfloat16
    grouping: tuple[int, int] | None = None
    last_context_length: int = 1024

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], layers: int, context: int) -> LongMemory | None:
        """From a config.json of so many layers; None where no layer has memory: then it is a plain LLaMA.

        Raises:
            InputError: a setting that can not be.
        """
        chosen = raw.get("mem_layers") or []
        if not chosen:
            return None
        numbers = isinstance(chosen, list | tuple) and all(_whole(n) and 0 <= n < layers for n in chosen)
        if not numbers or len(set(chosen)) != len(chosen):
            raise InputError(f"config.json has mem_layers {chosen!r}, expected different layers from 0 to {layers - 1}")
        dtype, grouping = raw.get("mem_dtype", "bfloat16"), raw.get("mem_attention_grouping")
        if not isinstance(dtype, str) or dtype not in MEMORY_DTYPES:
            raise InputError(f"config.json has mem_dtype {dtype!r}, expected one of {', '.join(MEMORY_DTYPES)}")
        pair = grouping if isinstance(grouping, list | tuple) else ()
        if grouping is not None and (len(pair) != 2 or not all(_whole(n) and n > 0 for n in pair)):
            raise InputError(
                f"config.json has mem_attention_grouping {grouping!r}, expected null or two positive whole numbers: "
                "heads and queries"
            )
        last = raw.get("last_context_length", min(1024, context))
        if not _whole(last) or not 0 < last <= context:
            raise InputError(
                f"config.json has last_context_length {last!r}, expected 1 to max_position_embeddings, {context}"
            )
        positionals = raw.get("mem_positionals", True)
        if not isinstance(positionals, bool):
            raise InputError(f"config.json has mem_positionals {positionals!r}, expected true or false")
        groups = (pair[0], pair[1]) if pair else None
        return cls(tuple(sorted(chosen)), context, positionals, MEMORY_DTYPES[dtype], groups, last)

    def windows(self, tokens: int) -> list[tuple[int, int]]:
        """(start, end) of the windows in which an input of so many tokens is read."""
        before = max(tokens - self.last_context_length, 0)
        starts = [*range(0, before, self.context), before]
        return list(zip(starts, [*starts[1:], tokens], strict=True))

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """int64 [1, T]: each token's position in its window."""
        return torch.cat([torch.arange(end - start, device=device) for start, end in self.windows(tokens)])[None]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class MemoryStore:
    """Keys, unturned, and values of the memory layers, for all tokens as they come; the first `length` of them are
    memory, the others are still in the window.

    Args:
        batch: B. groups: G. head_dim: D. capacity: the most tokens, window and memory together.
    Attributes:
        length: tokens that are memory. Bytes: 2 * memory layers * B * G * capacity * D * itemsize.
    """

    def __init__(
        self, memory: LongMemory, batch: int, groups: int, head_dim: int, capacity: int, device: torch.device
    ) -> None:
        shape = (len(memory.layers), batch, groups, capacity, head_dim)
        self._row = {layer: row for row, layer in enumerate(memory.layers)}
        self._keys = torch.empty(shape, dtype=memory.dtype, device=device)
        self._values = torch.empty(shape, dtype=memory.dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self._keys.shape[3]

    def put(self, layer: int, held: int, k: Tensor, v: Tensor) -> None:
        """Keep k, v [B, G, T, D] of one layer, behind the `held` tokens of the window."""
        start = self.length + held
        end = start + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed: make it larger")
        self._keys[self._row[layer], :, :, start:end] = k
        self._values[self._row[layer], :, :, start:end] = v

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Memory's keys and values of one layer, [B, G, M, D]."""
        row = self._row[layer]
        return self._keys[row, :, :, : self.length], self._values[row, :, :, : self.length]


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    mask: Tensor | None = None,
    grouping: tuple[int, int] | None = None,
) -> Tensor:
    """softmax(s q [memory, local]^T) [memory, local]: all of memory, and the window as far as the mask lets see.

    Args:
        q: [B, H, T, D]. k, v: [B, G, S, D]. memory_k, memory_v: [B, G, M, D], of any floating dtype.
        mask: bool [B or 1, 1, T, M + S]; None: the last T of the window are the queries, and see causally.
        grouping: (heads, queries) worked on at once, which bounds the scores and the joined keys; None: all.
    Returns:
        [B, H, T, D].
    """
    heads, new = q.shape[1:3]
    memorized, local, shared = memory_k.shape[2], k.shape[2], heads // k.shape[1]
    most_heads, most_queries = grouping or (heads, new)
    by_heads = []
    for first in range(0, heads, most_heads):
        last = min(first + most_heads, heads)
        own = torch.arange(first, last, device=q.device) // shared
        keys = torch.cat([memory_k[:, own].to(k.dtype), k[:, own]], dim=2)
        values = torch.cat([memory_v[:, own].to(v.dtype), v[:, own]], dim=2)
        by_queries = []
        for start in range(0, new, most_queries):
            end = min(start + most_queries, new)
            seen = _causal(memorized, local, new, start, end, q.device) if mask is None else mask[:, :, start:end]
            queries = q[:, first:last, start:end]
            by_queries.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen))
        by_heads.append(torch.cat(by_queries, dim=2))
    return torch.cat(by_heads, dim=1)


def _causal(memorized: int, local: int, new: int, start: int, end: int, device: torch.device) -> Tensor:
    """bool [end - start, M + S] for queries start to end of the `new` last tokens of a window."""
    query = torch.arange(local - new + start, local - new + end, device=device)
    return torch.arange(-memorized, local, device=device)[None] <= query[:, None]


def attention_in_windows(
    memory: LongMemory, layer: int, q: Tensor, k: Tensor, v: Tensor, plain_k: Tensor, mask: Tensor | None
) -> Tensor:
    """A layer's attention over a whole input that is longer than one window; differentiable, through memory too.

    Args:
        q: [B, T, H, D], k: [B, T, G, D], turned to their places in their windows. v: [B, T, G, D].
        plain_k: [B, T, G, D], unturned: what memory holds.
        mask: bool [B, 1, T, T], padding and causality; None: no padding.
    Returns:
        [B, T, H, D].
    """
    return torch.cat(list(_each_window(memory, layer, q, k, v, plain_k, mask)), dim=1)


def _each_window(
    memory: LongMemory, layer: int, q: Tensor, k: Tensor, v: Tensor, plain_k: Tensor, mask: Tensor | None
) -> Iterator[Tensor]:
    remembers = layer in memory.layers
    kept_k, kept_v = (x.to(memory.dtype if remembers else v.dtype).transpose(1, 2) for x in (plain_k, v))
    for start, end in memory.windows(q.shape[1]):
        here = slice(start, end)
        seen = start if remembers else 0
        if mask is None and seen == 0:
            yield causal_attention(q[:, here], k[:, here], v[:, here])
            continue
        own = None
        if mask is not None:  # its columns: memory's tokens, all of them earlier, and the window's
            own = mask[:, :, here, start - seen : end]
        queries, keys, values = (x[:, here].transpose(1, 2) for x in (q, k, v))
        y = memory_attention(queries, keys, values, kept_k[:, :, :seen], kept_v[:, :, :seen], own, memory.grouping)
        yield y.transpose(1, 2)
