"""Token ids and labels of training rows, and their batches: alpaca-lora's, qlora's and FastChat's semantics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jindo_core.data.records import Record
from jindo_core.data.script import LEARNED, Part, Script
from jindo_core.data.templates import Template
from jindo_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from jindo_core.tokenizer import Tokenizer

IGNORE = -100
"""The label of a token that the loss passes over."""
PROMPTS_TOO = "prompts are learned too, alpaca-lora's default; --train_on_inputs False for answers only"
"""What is said where nobody asked for it."""
_VERSION = 1  # of the rules in this file and in script.py: kept tokens of another version are not used


@dataclass(frozen=True)
class Example:
    """Token ids and, of the same length, their labels: the id itself, or -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a row. example: None where it has nothing to learn. cut: some of it did not fit."""

    example: Example | None
    cut: bool
    row: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A row's ids and labels as they fit, and how many tokens of the prompt and of what follows did not."""

    example: Example
    cut_prompt: int
    cut_end: int
    row: int

    @property
    def learns(self) -> bool:
        """Whether a label counts: the first has nothing before it that could predict it."""
        return any(label != IGNORE for label in self.example.labels[1:])


class Encoder:
    """Rows to ids and labels (docs/masks.md).

    A row of one round in a template for one is tokenized as alpaca-lora does: prompt and answer as one text (BOS where
    the tokenizer adds one), cut on the right at `cutoff_len`; EOS follows where it still fits; unless
    `train_on_inputs`, as many labels as the prompt alone has tokens are -100. Source: its finetune.py,
    generate_and_tokenize_prompt. Given `source_max_len` and `target_max_len`, prompt and answer with its EOS are
    tokenized and cut apart, as qlora does (its DataCollatorForCausalLM). Conversations are tokenized between their
    special tokens, as LLaMA's own tokenizer is around </s>, and cut on the right; there a token counts if the last
    character that it stands for lies in an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        cutoff_len: int,
        train_on_inputs: bool,
        source_max_len: int | None = None,
        target_max_len: int | None = None,
    ) -> None:
        """
        Args:
            cutoff_len: tokens of a row at most. source_max_len, target_max_len: of its prompt and of its answer
                instead, both or neither; a conversation of several rounds has their sum.
        Raises:
            InputError: one of the two lengths without the other, or a template whose end is no token of this tokenizer.
        """
        if (source_max_len is None) != (target_max_len is None):
            raise InputError(
                f"source_max_len is {source_max_len} and target_max_len {target_max_len}: expected both or neither"
            )
        self._tokenizer, self._template = tokenizer, template
        self._train_on_inputs = train_on_inputs
        self._apart = None if source_max_len is None or target_max_len is None else (source_max_len, target_max_len)
        self._cutoff = cutoff_len if self._apart is None else sum(self._apart)
        self._script = Script(tokenizer, template)
        self._script.require_end()

    @property
    def limit(self) -> str:
        """The lengths that rows are cut at, by the names of their settings."""
        if self._apart is None:
            return f"cutoff_len {self._cutoff}"
        return f"source_max_len {self._apart[0]} and target_max_len {self._apart[1]}"

    @property
    def fingerprint(self) -> str:
        """A digest of all that ids and labels depend on, besides the rows."""
        rest = (_VERSION, self._template.identity(), self._apart, self._cutoff, self._train_on_inputs)
        return hashlib.sha256((repr(rest) + self._tokenizer.digest()).encode()).hexdigest()

    def encode(self, records: Sequence[Record]) -> list[Encoded]:
        """The rows' examples, in their order. All are tokenized at once, on the tokenizer library's threads.

        Raises:
            InputError: a row that the template has no place for.
        """
        return [
            Encoded(found.example if found.learns else None, bool(found.cut_prompt or found.cut_end), found.row)
            for found in self.lay_out(records)
        ]

    def lay_out(self, records: Sequence[Record]) -> list[Layout]:
        """As `encode`, with the rows that have nothing to learn, and with what was cut."""
        plans = [self._plan(record) for record in records]
        self._script.tokenize([part for plan in plans for part in plan.parts])
        return [self._finish(plan, record.row) for plan, record in zip(plans, records, strict=True)]

    def _plan(self, record: Record) -> _Plan:
        segments = self._template.render(record)
        bos = self._script.bos(record)
        first = next((i for i, segment in enumerate(segments) if segment.kind in LEARNED), len(segments))
        if len(record.rounds) > 1 or not (self._apart or record.formatted or self._template.single_turn):
            return _Plan("conversation", [self._script.parts(segments)], bos)
        if self._apart:
            return _Plan("apart", [self._script.parts(segments[:first]), self._script.parts(segments[first:])], bos)
        end = next((i for i, segment in enumerate(segments) if segment.kind == "end"), len(segments))
        # The prompt's own tokens say what the loss passes over: where its text ends inside the whole is not asked.
        prompt = [] if self._train_on_inputs else segments[:first]
        pieces = (prompt, segments[:end], segments[end:])
        return _Plan("alpaca-lora", [self._script.parts(piece, learned=False) for piece in pieces], bos)

    def _finish(self, plan: _Plan, row: int) -> Layout:
        ids, learned = [*plan.bos], [False] * len(plan.bos)
        if plan.kind == "apart":
            assert self._apart is not None
            source, target = (_joined(parts) for parts in plan.sides)
            ids += source[0]
            limit, room = self._apart
            kept = min(len(ids), limit)
            target_ids = target[0][:room]
            learned = [False] * kept + target[1][:room]
            return self._layout(
                ids[:kept] + target_ids, learned, len(ids) - kept, len(target[0]) - len(target_ids), row
            )
        if plan.kind == "conversation":
            found, flags = _joined(plan.sides[0])
            ids, learned = ids + found, learned + flags
        else:
            prompt, whole, end = (_joined(parts)[0] for parts in plan.sides)
            # A prompt can have more tokens than it has as the beginning of a longer text.
            masked = min(len(prompt), len(whole))
            ids = [*ids, *whole, *end]
            learned += [False] * masked + [True] * (len(whole) - masked + len(end))
        # Only what would have been learned counts as cut: not a line break behind the last EOS.
        cut = len(learned[self._cutoff :]) if any(learned[self._cutoff :]) else 0
        return self._layout(ids[: self._cutoff], learned[: self._cutoff], 0, cut, row)

    def _layout(self, ids: list[int], learned: list[bool], cut_prompt: int, cut_end: int, row: int) -> Layout:
        if self._train_on_inputs:
            return Layout(Example(ids, list(ids)), cut_prompt, cut_end, row)
        labels = [token if flag else IGNORE for token, flag in zip(ids, learned, strict=True)]
        return Layout(Example(ids, labels), cut_prompt, cut_end, row)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A row before it is tokenized. kind: which of the Encoder's three ways. sides: what its text was cut into."""

    kind: Literal["alpaca-lora", "apart", "conversation"]
    sides: list[list[Part]]
    bos: list[int]

    @property
    def parts(self) -> Iterator[Part]:
        return (part for side in self.sides for part in side)


def _joined(parts: Sequence[Part]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    for part in parts:
        ids += part.ids
        learned += part.learned
    return ids, learned


def prompt_ids(tokenizer: Tokenizer, template: Template, record: Record) -> list[int]:
    """The ids that ask for a row's last answer, as a model that was trained on such rows saw them before one.

    Raises:
        InputError: the template has no place for what the row holds.
    """
    script = Script(tokenizer, template)
    parts = script.parts(template.render(record, open=True), learned=False)
    script.tokenize(parts)
    return script.bos(record) + _joined(parts)[0]


def end_ids(tokenizer: Tokenizer, template: Template) -> frozenset[int]:
    """The tokens that end an answer in this template, to stop at beside the tokenizer's EOS."""
    return Script(tokenizer, template).require_end()


def report(total: int, left_out: Sequence[int], cut: Sequence[int], limit: str) -> list[str]:
    """A warning each for rows with nothing to learn and for rows that did not fit.

    Args:
        total: rows in all. left_out, cut: the numbers of those rows. limit: `Encoder.limit`.
    """
    warnings = []
    if left_out:
        warnings.append(f"{_rows(left_out)} of {total} left out: the prompt alone fills {limit}; raise it")
    if cut:
        warnings.append(f"{_rows(cut)} of {total} cut at {limit}: their end and EOS are not learned")
    return warnings


def encode_example(
    tokenizer: Tokenizer, template: Template, record: Record, *, cutoff_len: int, train_on_inputs: bool
) -> Example:
    """One row as ids and labels, also where it has nothing to learn."""
    encoder = Encoder(tokenizer, template, cutoff_len=cutoff_len, train_on_inputs=train_on_inputs)
    return encoder.lay_out([record])[0].example


def encode_all(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    *,
    cutoff_len: int,
    train_on_inputs: bool,
) -> tuple[list[Example], list[str]]:
    """Encode rows; those with nothing to learn (the prompt fills `cutoff_len`) are left out.

    Returns:
        The examples, in the rows' order, and a warning each for rows left out and for rows cut short.
    """
    encoder = Encoder(tokenizer, template, cutoff_len=cutoff_len, train_on_inputs=train_on_inputs)
    found = encoder.encode(records)
    left_out = [row.row for row in found if row.example is None]
    cut = [row.row for row in found if row.cut and row.example is not None]
    return [row.example for row in found if row.example is not None], report(
        len(found), left_out, cut, encoder.limit
    )


def collate(examples: Sequence[Example], pad_id: int, *, multiple_of: int = 8) -> dict[str, Tensor]:
    """Pad examples on the right to one length, a multiple of `multiple_of`.

    Returns:
        int64 [B, T] each: `input_ids` (padded with pad_id), `labels` (with -100), `attention_mask` (1 on the
        example's own tokens, by its length: pad_id may well be a token that it holds).
    Raises:
        ValueError: no examples.
    """
    import torch

    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), -(-longest // multiple_of) * multiple_of)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, :length] = torch.tensor(example.labels, dtype=torch.int64)
        mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def _rows(rows: Sequence[int]) -> str:
    """ "3 rows (4, 7, 9)", at most five of them named."""
    named = ", ".join(str(row) for row in rows[:5]) + (", …" if len(rows) > 5 else "")
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} ({named})"
