"""Token ids and labels of training rows, and their batches: alpaca-lora's semantics, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jindo_core.data.records import Record
from jindo_core.data.templates import Template

if TYPE_CHECKING:
    from torch import Tensor

    from jindo_core.tokenizer import Tokenizer

IGNORE = -100
"""The label of a token that the loss passes over."""


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


class Encoder:
    """Thin, until branch masks is here."""

    def __init__(self, tokenizer, template, *, cutoff_len, train_on_inputs, source_max_len=None, target_max_len=None):
        self.args = (tokenizer, template)
        self.more = (cutoff_len, train_on_inputs)
        self.limit = f"cutoff_len {cutoff_len}"
        self.fingerprint = repr((self.more, template))

    def encode(self, records):
        out = []
        for r in records:
            e, cut = _encode(*self.args, r, *self.more)
            out.append(Encoded(e if any(x != IGNORE for x in e.labels[1:]) else None, cut, r.row))
        return out


def report(total: int, left_out: Sequence[int], cut: Sequence[int], limit: str) -> list[str]:
    warnings = []
    if left_out:
        warnings.append(f"{_rows(left_out)} of {total} left out: the prompt alone fills {limit}; raise it")
    if cut:
        warnings.append(f"{_rows(cut)} of {total} cut at {limit}: their end and EOS are not learned")
    return warnings


def encode_example(
    tokenizer: Tokenizer, template: Template, record: Record, *, cutoff_len: int, train_on_inputs: bool
) -> Example:
    """A row as ids and labels.

    Prompt and answer are tokenized as one text (BOS where the tokenizer adds one) and cut on the right at
    `cutoff_len`; EOS follows where it still fits. Unless `train_on_inputs`, as many labels as the prompt alone
    has tokens are -100. Source: alpaca-lora's finetune.py, generate_and_tokenize_prompt.
    """
    return _encode(tokenizer, template, record, cutoff_len, train_on_inputs)[0]


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
        The examples, in the rows' order, and a warning each for rows left out and for answers cut short.
    """
    examples, empty, cut = [], [], []
    for record in records:
        example, was_cut = _encode(tokenizer, template, record, cutoff_len, train_on_inputs)
        if all(label == IGNORE for label in example.labels[1:]):  # the first has nothing before it
            empty.append(record.row)
            continue
        examples.append(example)
        if was_cut:
            cut.append(record.row)
    warnings = []
    if empty:
        warnings.append(
            f"{_rows(empty)} of {len(records)} left out: the prompt alone fills cutoff_len {cutoff_len}; raise it"
        )
    if cut:
        warnings.append(
            f"{_rows(cut)} of {len(records)} cut at cutoff_len {cutoff_len}: their end and EOS are not learned"
        )
    return examples, warnings


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


def _encode(
    tokenizer: Tokenizer, template: Template, record: Record, cutoff_len: int, train_on_inputs: bool
) -> tuple[Example, bool]:
    """The example, and whether its text was cut."""
    prompt = template.prompt(record.instruction, record.input)
    whole = tokenizer.encode(prompt + record.output)
    ids = whole[:cutoff_len]
    eos = tokenizer.eos_id
    if eos is not None and len(ids) < cutoff_len and (not ids or ids[-1] != eos):
        ids.append(eos)
    labels = list(ids)
    if not train_on_inputs:
        masked = min(len(tokenizer.encode(prompt)), cutoff_len, len(ids))
        labels[:masked] = [IGNORE] * masked
    return Example(ids, labels), len(whole) > cutoff_len


def _rows(rows: Sequence[int]) -> str:
    """ "3 rows (4, 7, 9)", at most five of them named."""
    named = ", ".join(str(row) for row in rows[:5]) + (", …" if len(rows) > 5 else "")
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} ({named})"
