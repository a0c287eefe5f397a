"""What all architectures share: the key/value cache, the stack of layers, and the model with its head and loss.

Shape suffixes in comments: B batch, T new tokens, S tokens attended to (cache and new), C hidden size,
G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jindo_core.head import StreamedHead
from jindo_core.kernels.attention import causal_mask
from jindo_core.kernels.linear_cross_entropy import linear_cross_entropy
from jindo_core.long_memory import LongMemory, MemoryStore
from jindo_core.recompute import CheckpointOffload, recomputed
from jindo_core.rotary import RotaryConfig, rope_frequencies
from jindo_core.streaming import LayerStream

Documents = Sequence[Sequence[int]]
"""The documents packed into each sequence of a batch: their lengths in order, which add up to T."""


class ModelConfig(RotaryConfig, Protocol):
    """What the engine asks of any architecture's configuration; model_type as transformers calls the family."""

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def context(self) -> int | None: ...
    @property
    def memory(self) -> LongMemory | None: ...
    def window(self, layer: int) -> int | None: ...


class KVCache:
    """Keys and values of the tokens so far; given to the model as an argument, and filled by it.

    Args:
        batch: B. capacity: the most tokens a sequence may reach. dtype, device: the activations'.
    Attributes:
        length: tokens held; of a LongLLaMA, those in its window. Memory: 2 * layers * B * G * capacity * D * itemsize
            bytes. A sliding window saves none of them.
        memory: a LongLLaMA's; the window holds no more than its context, then all of it joins memory.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        groups, size, memory = config.num_key_value_heads, config.head_dim, config.memory
        self.memory = None if memory is None else MemoryStore(memory, batch, groups, size, capacity, device)
        shape = (config.num_hidden_layers, batch, groups, min(capacity, memory.context) if memory else capacity, size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, G, T, D] of one layer; returns all of that layer's [B, G, S, D]."""
        end = self.length + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, {end} are needed: make it larger")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def begin_window(self) -> None:
        """What is in a LongLLaMA's window joins its memory; the window is empty then."""
        assert self.memory is not None
        self.memory.length += self.length
        self.length = 0


class DecoderStack(nn.Module, ABC):
    """The stack below the head: token ids to hidden states. A subclass holds the modules, under its own names.

    Attributes:
        layers: each called as `model.DecoderLayer` is. compiled: what runs in their place in training, if anything.
        norm: behind the last one; its weight says device and dtype.
    """

    layers: nn.ModuleList
    norm: Any

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointed_layers = 0
        self.checkpoint_offload: CheckpointOffload | None = None
        self.stream: LayerStream | None = None
        self.compiled: Sequence[Callable[..., Tensor]] | None = None

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """Of the input tokens."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether every layer is checkpointed in training. `checkpointed_layers` says how many of the first are: the
        activations of the others are gone again by the time the first ones run a second time."""
        return self.checkpointed_layers >= len(self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, every: bool) -> None:
        self.checkpointed_layers = len(self.layers) if every else 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T] -> [B, T, C]; arguments as in `CausalLM.forward`."""
        if documents is not None:
            if attention_mask is not None or position_ids is not None or cache is not None:
                raise ValueError("documents say what is seen: expected no attention_mask, position_ids or cache")
            return self._read_documents(input_ids, documents)
        memory, new = self.config.memory, input_ids.shape[1]
        if memory is not None and (cache is not None or new > memory.last_context_length):
            if position_ids is not None or (cache is not None and attention_mask is not None):
                raise ValueError(
                    "a LongLLaMA counts positions in its windows, and its memory holds no padding: expected no "
                    "position_ids, and no attention_mask with a cache"
                )
            if cache is not None:
                return self._read_in_windows(input_ids, cache, memory)
            position_ids = memory.places(new, self.norm.weight.device)
        return self._read(input_ids, attention_mask, position_ids, cache)

    def _read_in_windows(self, input_ids: Tensor, cache: KVCache, memory: LongMemory) -> Tensor:
        """Window by window, so that no more than one is worked on at a time."""
        empty, hidden = cache.length == 0, []
        for start, end in memory.windows(input_ids.shape[1]):
            if (empty and start) or cache.length + end - start > memory.context:
                cache.begin_window()
            hidden.append(self._read(input_ids[:, start:end], None, None, cache))
        return torch.cat(hidden, dim=1)

    def _read_documents(self, input_ids: Tensor, documents: Documents) -> Tensor:
        """Positions begin at 0 in each document, and attention stays in it."""
        if self.config.memory is not None:
            raise ValueError("a LongLLaMA reads its input in windows: expected no documents packed into one sequence")
        if [sum(lengths) for lengths in documents] != [input_ids.shape[1]] * input_ids.shape[0]:
            raise ValueError(
                f"got documents of {[list(lengths) for lengths in documents]} tokens, expected, for each of "
                f"{input_ids.shape[0]} sequences, lengths that add up to {input_ids.shape[1]}"
            )
        lengths = [length for sequence in documents for length in sequence]
        places = torch.cat([torch.arange(length) for length in lengths]).view(input_ids.shape)
        x = self._embed(input_ids)
        # Where RoPE's frequencies depend on the length they are the longest document's, as in a padded batch.
        cos, sin = self.angles(_sent(places, x.device), max(lengths))
        return self._through(x, cos=cos, sin=sin, masks={}, causal=False, cache=None, documents=lengths)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        past = 0 if cache is None else cache.length
        new = input_ids.shape[1]
        x = self._embed(input_ids)
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        memory, windows = self.config.memory, {self.config.window(i) for i in range(len(self.layers))}
        cos, sin = self.angles(position_ids, past + new if memory is None else min(past + new, memory.context))
        masks = {window: _attention_mask(attention_mask, past, new, window, x.device) for window in windows}
        x = self._through(x, cos=cos, sin=sin, masks=masks, causal=new > 1, cache=cache)
        if cache is not None:
            cache.length += new
        return x

    def _through(
        self, x: Tensor, *, cos: Tensor, sin: Tensor, masks: Mapping[int | None, Tensor | None], causal: bool,
        cache: KVCache | None, documents: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """x through all layers and the norm. masks: by a layer's window; causal: whether one without a mask is causal.
        documents: lengths, sequence by sequence."""
        for i, layer in enumerate(self.layers):
            mask = masks.get(self.config.window(i))
            run = functools.partial(
                layer if self.compiled is None or not self.training else self.compiled[i],
                cos=cos, sin=sin, mask=mask, causal=causal and mask is None, cache=cache, documents=documents,
            )  # fmt: skip
            if self._checkpointed(i):
                around = functools.partial(self._weights, i)
                x = recomputed(run, x, tuple(layer.parameters()), around=around, offload=self.checkpoint_offload)
            else:
                with self._weights(i, False):
                    x = run(x)
        return self.norm(x)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The table may lie on the CPU while the layers do not."""
        embedding = self.embedding
        return _sent(embedding(input_ids.to(embedding.weight.device)), self.norm.weight.device)

    def _checkpointed(self, layer: int) -> bool:
        # A streamed layer's weights are gone when its backward pass comes: it has to run again.
        streamed = self.stream is not None and layer in self.stream
        return torch.is_grad_enabled() and (streamed or (self.training and layer < self.checkpointed_layers))

    def _weights(self, layer: int, again: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.stream is None else self.stream.use(layer, backwards=again)

    def angles(self, position_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [B or 1, T, D/2]."""
        inverse, factor = rope_frequencies(self.config, length)
        angle = position_ids[:, :, None].float() * _sent(inverse, position_ids.device)
        return angle.cos() * factor, angle.sin() * factor


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. To a GPU from pinned memory: a copy from any other first waits for all that was launched."""
    if x.device.type == "cpu" and device.type == "cuda" and not x.requires_grad:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _attention_mask(
    attention_mask: Tensor | None, past: int, new: int, window: int | None, device: torch.device
) -> Tensor | None:
    """bool [B or 1, 1, T, S], True where a query may look; None when causality and the window say it all."""
    if attention_mask is None and (past == 0 or new == 1):
        return None
    query, key = torch.arange(past, past + new, device=device), torch.arange(past + new, device=device)
    mask = causal_mask(query, key, window)[None, None]
    if attention_mask is not None:
        # A padded query sees itself: with no key at all its softmax, and its gradient, would be NaN.
        mask = mask & (attention_mask.bool()[:, None, None] | (key[None] == query[:, None]))
    return mask


class CausalLMOutput:
    """What the model returns: `.loss` (fp32 scalar, or None without labels) and `.logits` [B, T, V].

    With labels the logits are made only when asked for: the loss never needs them whole. Those of a `StreamedHead` give
    no gradient: its loss does, from labels.
    """

    def __init__(self, hidden: Tensor, head: nn.Module, loss: Tensor | None) -> None:
        self.loss = loss
        # A streamed head's slices are gone when a backward pass comes.
        self._hidden, self._head = hidden.detach() if isinstance(head, StreamedHead) else hidden, head
        self._logits = head(self._hidden) if loss is None else None

    @property
    def logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._head(self._hidden)
        return self._logits


class CausalLM(nn.Module, ABC):
    """A decoder with its language-model head: what every architecture's model is to the rest of the engine.

    Attributes:
        LAYERS, EMBEDDING: paths of the list of layers and of the input embedding, in the checkpoint's names.
        lm_head: without bias; its weight may be the embedding's.
    """

    LAYERS: ClassVar[str]
    EMBEDDING: ClassVar[str]
    config: ModelConfig
    lm_head: nn.Linear | StreamedHead

    @property
    @abstractmethod
    def stack(self) -> DecoderStack:
        """All below the head."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        num_items_in_batch: Tensor | float | None = None,
        documents: Documents | None = None,
        supervised: Tensor | None = None,
    ) -> CausalLMOutput:
        """
        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], 1 for tokens and 0 for padding. Right padding needs none: a causal token
                never sees what follows it.
            labels: int64 [B, T], the token ids with -100 where no loss counts; shifted here.
            position_ids: int64 [B, T]; counted from the cache's length by default.
            cache: filled with this call's keys and values.
            num_items_in_batch: divisor of the loss; the counted labels of this call by default.
            documents: what is packed into each sequence, which is computed as it would be alone: positions, attention
                and labels stop at its bounds. Padding at the end is a document, too.
            supervised: int64 [N], in order the places in the flattened [B * T] whose next token counts, from who knows
                them: without them a GPU is waited for to count labels.
        Returns:
            `.loss`: mean cross entropy, or None. `.logits`: [B, T, V].
        """
        hidden = self.stack(input_ids, attention_mask, position_ids, cache, documents)
        if labels is None:
            return CausalLMOutput(hidden, self.lm_head, None)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        if documents is not None and supervised is None:  # the last token of one does not foretell the next one's first
            ends = itertools.accumulate(length for sequence in documents for length in sequence)
            shifted.view(-1)[torch.tensor(list(ends), device=labels.device) - 1] = -100
        rows, wanted = hidden.flatten(0, 1), shifted.flatten()
        if isinstance(self.lm_head, StreamedHead):
            loss = self.lm_head.loss(rows, wanted, num_items_in_batch, supervised)
        else:
            loss = linear_cross_entropy(
                rows, self.lm_head.weight, wanted, count=num_items_in_batch, counted_rows=supervised
            )
        return CausalLMOutput(hidden, self.lm_head, loss)

    @property
    def device(self) -> torch.device:
        return self.stack.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, embedding, norms and head."""
        return self.stack.norm.weight.dtype
