"""Answers to many prompts at once: prompts of unequal length, padded on the left, over one key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from jindo_core.causal_lm import CausalLM, KVCache
from jindo_core.errors import InputError
from jindo_core.generation import generate_ids, pick_token


@dataclass(frozen=True, slots=True)
class Answer:
    """New token ids, without the stop id; stopped: by a stop id, not by max_new_tokens or the model's context."""

    ids: list[int]
    stopped: bool


@torch.no_grad()
def generate_batch(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Continue each prompt as `generate_ids` would by itself; sampling as there.

    Left padding keeps every prompt's last token at one place, so that a step appends one column to the cache. A row
    that has ended leaves the batch once half of them have. A model whose angles or memory depend on how long the padded
    sequence is (dynamic NTK, LongLLaMA) answers one prompt after another.

    Args:
        prompts: token ids, each at least one and below the model's context.
        seeds: one for each prompt, whose draws don't depend then on what else is in the batch; None: torch's generator.
    Returns:
        The answers, in the prompts' order.
    Raises:
        InputError: an empty prompt, or one that leaves no room in the model's context (its number is said).
    """
    context = model.config.context
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise InputError(f"prompt {number} is empty: expected at least one token")
        if context is not None and len(ids) >= context:
            raise InputError(f"prompt {number} is {len(ids)} tokens long, the model's context {context}: shorten it")
    rooms = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    if len(prompts) == 1 or depends_on_padding(model):  # one alone decodes faster: `decoding.Decoder`
        each = [None] * len(prompts) if seeds is None else seeds
        alone = partial(generate_ids, model, stop_ids=stop_ids, temperature=temperature, top_p=top_p, top_k=top_k)
        asked = zip(prompts, rooms, each, strict=True)
        return [_answer(list(alone(ids, max_new_tokens=n, seed=seed)), stop_ids) for ids, n, seed in asked]
    generators = _generators(model, seeds, len(prompts))
    made: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        batch = _Batch(model, prompts, max(rooms, default=0))
        while batch.rows:
            tokens = _picked(batch, generators, temperature, top_p, top_k)
            for i, token in zip(batch.rows, tokens, strict=True):
                if not _ended(made[i], rooms[i], stop_ids):
                    made[i].append(token)
            batch.keep([not _ended(made[i], rooms[i], stop_ids) for i in batch.rows], tokens)
    finally:
        model.train(was_training)
    return [_answer(tokens, stop_ids) for tokens in made]


def _generators(model: CausalLM, seeds: Sequence[int] | None, count: int) -> list[torch.Generator | None]:
    if seeds is None:
        return [None] * count
    return [torch.Generator(model.device).manual_seed(seed) for seed in seeds]


def _picked(
    batch: _Batch, generators: Sequence[torch.Generator | None], temperature: float, top_p: float, top_k: int
) -> list[int]:
    """The next token of each row of the batch."""
    if temperature <= 0:
        return cast("list[int]", batch.logits.argmax(-1).tolist())
    drawn = zip(batch.logits, batch.rows, strict=True)
    return [pick_token(row, temperature, top_p, top_k, generators[i]) for row, i in drawn]


def depends_on_padding(model: CausalLM) -> bool:
    """Whether a row of a padded batch may come out otherwise than alone: angles or windows go by the batch's length."""
    return model.config.memory is not None or (model.config.rope or {}).get("rope_type") == "dynamic"


def _ended(tokens: Sequence[int], room: int, stop_ids: frozenset[int]) -> bool:
    return len(tokens) >= room or (bool(tokens) and tokens[-1] in stop_ids)


def _answer(tokens: list[int], stop_ids: frozenset[int]) -> Answer:
    stopped = bool(tokens) and tokens[-1] in stop_ids
    return Answer(tokens[:-1] if stopped else tokens, stopped)


class _Batch:
    """The rows still being continued.

    Attributes:
        rows: numbers of the prompts in the batch, ended ones among them until half have. logits: fp32 [rows, V].
    """

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._model, self.rows = model, list(range(len(prompts)))
        if not prompts or not room:
            self.rows = []
            return
        longest, device = max(map(len, prompts)), model.device
        # Padding is never looked at: any id serves.
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self._mask = torch.zeros(len(prompts), longest + room, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            self._mask[row, longest - len(prompt) :] = True
        self._mask = self._mask.to(device)
        self._padding = (~self._mask).sum(1, keepdim=True)  # [rows, 1]
        self._padded = bool(self._padding.any())
        self._cache = KVCache(model.config, len(prompts), longest + room, model.dtype, device)
        self._advance(ids.to(device))

    def _advance(self, ids: Tensor) -> None:
        """ids [rows, T] to the end of the cache; the logits are then of what follows them."""
        past, end = self._cache.length, self._cache.length + ids.shape[1]
        places = torch.arange(past, end, device=ids.device)[None] - self._padding
        mask = self._mask[:, :end] if self._padded else None
        hidden = self._model.stack(ids, mask, places.clamp(min=0), self._cache)
        self.logits = self._model.lm_head(hidden[:, -1]).float()

    def keep(self, going: Sequence[bool], tokens: Sequence[int]) -> None:
        """Append a token to each row, but leave out ended ones where they are half of the batch; `rows` is empty in the
        end."""
        if not any(going):
            self.rows = []
            return
        if 2 * sum(going) <= len(going):
            kept = [place for place, on in enumerate(going) if on]
            self.rows, tokens = [self.rows[i] for i in kept], [tokens[i] for i in kept]
            index = torch.tensor(kept, device=self._mask.device)
            self._mask, self._padding = self._mask[index], self._padding[index]
            self._cache.keys, self._cache.values = self._cache.keys[:, index], self._cache.values[:, index]
        self._advance(torch.tensor(tokens, device=self._mask.device)[:, None])
