"""Answers to the rows of a data file, and how near they come to the rows' own.

A row's last answer is left out and asked for, as `generate` would ask. Figures of all answers together:

    exact_match   the share that is the reference, white space at both ends aside
    chrf          chrF2 (Popović 2015, aclanthology.org/W15-3049) as sacrebleu counts it for a corpus: n-grams of up to
                  six characters, recall weighing twice; 0 to 100
    ended         the share that the model ended by itself
    mean_tokens   of an answer
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jindo_core.batch_generation import generate_batch
from jindo_core.causal_lm import CausalLM
from jindo_core.data.examples import end_ids, prompt_ids
from jindo_core.data.records import Record
from jindo_core.data.templates import Template
from jindo_core.generation import stop_ids
from jindo_core.tokenizer import Tokenizer

Ended = Literal["end", "length", "no room", "no prompt"]
"""Why an answer ends: the model said so; max_new_tokens or the model's context; or why there is none: its prompt fills
the context, or holds not even the token that begins a text."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are picked; as in `generate`, but each row draws from a seed of its own."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Question:
    """A row as it is asked. row: counts from 1 in its file or folder. ids: of the prompt. file: which of several it is
    from, counted from 0."""

    row: int
    record: Record
    ids: tuple[int, ...]
    file: int = 0

    @property
    def reference(self) -> str | None:
        """The row's own answer; None where it has none."""
        return self.record.rounds[-1].output or None

    def can_be_answered(self, context: int | None) -> bool:
        """Whether there is a prompt, and room for a token behind it. context: the model's."""
        return bool(self.ids) and (context is None or len(self.ids) < context)


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer. tokens: new ones, without the one that ends it."""

    text: str
    ended: Ended
    tokens: int

    def matches(self, reference: str | None) -> bool | None:
        """Whether it is the reference; None without one."""
        return None if reference is None else self.text.strip() == reference.strip()


def ask(
    rows: Iterable[tuple[int, Record]], tokenizer: Tokenizer, template: Template, files: Iterable[int] | None = None
) -> list[Question]:
    """Rows, each with its number, as questions. files: of several, the number of each row's.

    Raises:
        InputError: a row for which the template has no place.
    """
    owners = itertools.repeat(0) if files is None else files
    return [
        Question(row, record, tuple(prompt_ids(tokenizer, template, record)), file)
        for (row, record), file in zip(rows, owners, strict=False)  # the endless one is no row's
    ]


def digest(questions: Sequence[Question], tokenizer: Tokenizer, template: Template) -> str:
    """SHA-256 of all that is asked, of what ends an answer, and of the references."""
    asked = [(one.file, one.row, one.ids, one.reference) for one in questions]
    said = json.dumps([asked, sorted(end_ids(tokenizer, template)), tokenizer.digest()])
    return hashlib.sha256(said.encode()).hexdigest()


def batches(questions: Sequence[Question], batch_size: int, context: int | None) -> list[list[int]]:
    """Numbers of those that can be answered, the longest first: memory runs out at once or never.

    They depend on nothing else, so that a run which is taken up again has the same ones.
    """
    order = [i for i, one in enumerate(questions) if one.can_be_answered(context)]
    order.sort(key=lambda i: -len(questions[i].ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer(
    model: CausalLM, tokenizer: Tokenizer, template: Template, sampling: Sampling, questions: Sequence[Question]
) -> list[list[int]]:
    """All answers of a batch, as `read` takes them: whether the model ended it (1) or not (0), then its tokens."""
    found = generate_batch(
        model, [one.ids for one in questions], max_new_tokens=sampling.max_new_tokens,
        stop_ids=stop_ids(model, tokenizer) | end_ids(tokenizer, template), temperature=sampling.temperature,
        top_p=sampling.top_p, top_k=sampling.top_k, seeds=[_seed(sampling.seed, one) for one in questions],
    )  # fmt: skip
    return [[int(one.stopped), *one.ids] for one in found]


def read(question: Question, found: Sequence[int] | None, tokenizer: Tokenizer) -> Prediction:
    """One of `answer`'s; None: it could not be answered."""
    if found is None:
        return Prediction("", "no room" if question.ids else "no prompt", 0)
    stopped, *ids = found
    return Prediction(tokenizer.decode(ids), "end" if stopped else "length", len(ids))


def measures(references: Sequence[str | None], predictions: Sequence[Prediction]) -> dict[str, float]:
    """The figures above, over rows that have what each needs; n: rows, n_…: those of one figure, where they are less.

    What could not be answered counts as a wrong, empty answer; `unanswered` says how many.
    """
    from sacrebleu.metrics import CHRF

    pairs = [(one.text, wanted) for one, wanted in zip(predictions, references, strict=True) if wanted is not None]
    found: dict[str, float] = {}
    if pairs:
        share = sum(text.strip() == wanted.strip() for text, wanted in pairs) / len(pairs)
        found["exact_match"] = share
        if len(pairs) > 1:
            found["exact_match_stderr"] = math.sqrt(share * (1 - share) / (len(pairs) - 1))
        found["chrf"] = CHRF().corpus_score([text for text, _ in pairs], [[wanted for _, wanted in pairs]]).score
        found |= {"n_exact_match": len(pairs), "n_chrf": len(pairs)}
    found["ended"] = sum(one.ended == "end" for one in predictions) / len(predictions)
    found["mean_tokens"] = sum(one.tokens for one in predictions) / len(predictions)
    return found | {"n": len(predictions), "unanswered": sum(one.ended.startswith("no ") for one in predictions)}


def line(question: Question, prediction: Prediction) -> dict[str, Any]:
    """A row of the predictions' file."""
    last = question.record.rounds[-1]
    return {
        "row": question.row,
        "instruction": last.instruction,
        "input": last.input,
        "reference": question.reference,
        "prediction": prediction.text,
        "ended": prediction.ended,
        "tokens": prediction.tokens,
        "exact": prediction.matches(question.reference),
    }


def _seed(seed: int, question: Question) -> int:
    """A row's own: its draws are the same whatever is answered beside it, in `train` as in `eval` of the one file."""
    place = f"{question.file}/{question.row}" if question.file else question.row
    return int.from_bytes(hashlib.sha256(f"{seed}/{place}".encode()).digest()[:8]) >> 1
