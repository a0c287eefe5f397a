"""Token ids and labels of training rows, and their batches: alpaca-lora's, qlora's and FastChat's semantics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jindo_core.data.records import Record
from jindo_core.data.script import LEARNED, Part, Script
from jindo_core.data.templates import Segment, Template
from jindo_core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from jindo_core.tokenizer import Tokenizer

IGNORE = -100
"""The label of a token that the loss passes over."""
PROMPTS_TOO = "prompts are learned too, alpaca-lora's default; --train_on_inputs False for answers only"
"""What is said where nobody asked for it."""
_VERSION = 2  # of the rules in this file and in script.py: kept tokens of another version are not used


@dataclass(frozen=True)
class Example:
    """Token ids and, of the same length, their labels: the id itself, or -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a row.

    example: None where it has nothing to learn. cut: its end did not fit. shortened: its prompt did not, cut apart
    from the answer.
    """

    example: Example | None
    cut: bool
    row: int
    shortened: bool = False


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
    generate_and_tokenize_prompt. Where prompt and answer melt into one token, that count is off: then a token counts
    if its last character lies in the answer and all that it holds of the prompt is white space. Given `source_max_len`
    and `target_max_len`, prompt and answer with its EOS are tokenized and cut apart, as qlora does (its
    DataCollatorForCausalLM). Conversations are tokenized between their special tokens, as LLaMA's own tokenizer is
    around </s>, and cut on the right; there a token counts if the last character that it stands for lies in an answer.
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
            Encoded(found.example if found.learns else None, found.cut_end > 0, found.row, found.cut_prompt > 0)
            for found in self.lay_out(records)
        ]

    def lay_out(self, records: Sequence[Record]) -> list[Layout]:
        """As `encode`, with the rows that have nothing to learn, and with what was cut."""
        plans = [self._plan(record) for record in records]
        self._script.tokenize([part for plan in plans for part in plan.parts])
        melted = {place: self._melted(record) for place, record in enumerate(records) if plans[place].melts}
        self._script.tokenize([part for plan in melted.values() for part in plan.parts])
        plans = [melted.get(place, plan) for place, plan in enumerate(plans)]
        return [self._finish(plan, record.row) for plan, record in zip(plans, records, strict=True)]

    def _plan(self, record: Record) -> _Plan:
        segments = self._template.render(record)
        bos = self._script.bos(record)
        first = _first(segments, LEARNED)
        if len(record.rounds) > 1 or not (self._apart or record.formatted or self._template.single_turn):
            return _Plan("conversation", [self._script.parts(segments)], bos)
        if self._apart:
            return _Plan("apart", [self._script.parts(segments[:first]), self._script.parts(segments[first:])], bos)
        end = _first(segments, ("end",))
        # The prompt's own tokens say what the loss passes over, if the whole begins with them: asking for every
        # token's place takes several times as long.
        prompt = [] if self._train_on_inputs else segments[:first]
        pieces = (prompt, segments[:end], segments[end:])
        return _Plan("alpaca-lora", [self._script.parts(piece, learned=False) for piece in pieces], bos)

    def _melted(self, record: Record) -> _Plan:
        """A row of alpaca-lora's ids, whose tokens are asked for their places."""
        segments = self._template.render(record)
        end = _first(segments, ("end",))
        sides = [self._script.parts(piece) for piece in (segments[:end], segments[end:])]
        for part in sides[0]:
            part.own = True
        return _Plan("conversation", sides, self._script.bos(record))

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
            found, flags = _joined(plan.parts)
            ids, learned = ids + found, learned + flags
        else:
            prompt, whole, end = (_joined(parts)[0] for parts in plan.sides)
            ids = [*ids, *whole, *end]
            learned += [False] * len(prompt) + [True] * (len(whole) - len(prompt) + len(end))
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

    @property
    def melts(self) -> bool:
        """Whether the prompt's tokens are others with its answer behind it. Asked when all are tokenized."""
        if self.kind != "alpaca-lora":
            return False
        prompt, whole = (_joined(parts)[0] for parts in self.sides[:2])
        return whole[: len(prompt)] != prompt


def _first(segments: Sequence[Segment], kinds: Sequence[str]) -> int:
    """Where the first segment of one of these kinds stands."""
    return next((place for place, segment in enumerate(segments) if segment.kind in kinds), len(segments))


def _joined(parts: Iterable[Part]) -> tuple[list[int], list[bool]]:
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


@dataclass(frozen=True, slots=True)
class Losses:
    """The numbers of rows that are not learned as they are.

    Attributes:
        filled: left out, for their prompt leaves no room. empty: left out, with nothing to learn even whole.
        cut: without their end. shortened: without some of their prompt.
    """

    filled: Sequence[int]
    empty: Sequence[int]
    cut: Sequence[int]
    shortened: Sequence[int]


def report(total: int, losses: Losses, limit: str) -> list[str]:
    """A warning for each of the four that is not nothing.

    Args:
        total: rows in all. limit: `Encoder.limit`.
    """
    said = (
        (losses.filled, f"left out: the prompt alone fills {limit}; raise it"),
        (losses.empty, "left out: nothing to learn, whatever their length"),
        (losses.cut, f"cut at {limit}: their end and EOS are not learned"),
        (losses.shortened, f"have a shortened prompt ({limit}): its end is cut off, the answer follows"),
    )
    return [f"{_rows(rows)} of {total} {what}" for rows, what in said if len(rows)]


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
    losses = Losses(
        filled=[row.row for row in found if row.example is None and row.cut],
        empty=[row.row for row in found if row.example is None and not row.cut],
        cut=[row.row for row in found if row.example is not None and row.cut],
        shortened=[row.row for row in found if row.example is not None and row.shortened],
    )
    return [row.example for row in found if row.example is not None], report(len(found), losses, encoder.limit)


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
