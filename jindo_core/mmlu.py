"""MMLU (Hendrycks et al., 2020, arXiv:2009.03300) as qlora.py's callback measures it while a model is trained.

A question is a text that ends in "Answer:"; the answer is the likeliest of the tokens of A, B, C and D behind it,
whatever else the model would rather say. A subject's accuracy is the share of its questions answered rightly, and
MMLU's is the mean of the subjects', however many questions each has.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jindo_core.causal_lm import CausalLM
from jindo_core.errors import InputError, nearest
from jindo_core.parallel import ALONE, Ranks
from jindo_core.tokenizer import Tokenizer

LETTERS = ("A", "B", "C", "D")

FOLDER = "data/mmlu"
"""Where qlora's repository has the questions."""


@dataclass(frozen=True)
class Question:
    """subject: one of MMLU's 57. ids: of the text. answer: 0 to 3."""

    subject: str
    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Scores:
    """What a model answered.

    Attributes:
        split: eval or test. predictions: 0 to 3 each, in the questions' order. subjects: right answers and
            questions of each. loss: mean cross entropy of the right letter among all tokens.
    """

    split: str
    predictions: tuple[int, ...]
    subjects: Mapping[str, tuple[int, int]]
    loss: float

    @property
    def accuracy(self) -> float:
        """The mean of the subjects' accuracies."""
        return sum(right / count for right, count in self.subjects.values()) / len(self.subjects)

    def metrics(self) -> dict[str, float]:
        """The line of metrics.jsonl, under qlora.py's names."""
        name = f"mmlu_{self.split}_accuracy"
        of_each = {f"{name}_{subject}": right / count for subject, (right, count) in self.subjects.items()}
        return {"mmlu_loss": self.loss, name: self.accuracy, **of_each}


Share = list[tuple[list[int], list[int], float]]
"""One rank's part: of each batch the questions' numbers, the answers, and the summed cross entropy."""


@dataclass(frozen=True)
class Mmlu:
    """Questions that are ready to be asked. Made by `load_mmlu`.

    Attributes:
        letters: ids of the four answers. cut: how many questions were too long and lost their beginning.
    """

    split: str
    questions: Sequence[Question]
    letters: tuple[int, ...]
    pad_id: int
    cut: int

    def ask(
        self, model: CausalLM, *, batch_size: int, on_progress: Callable[[int], None] | None = None
    ) -> Scores:
        """Ask the model every question, dropout off.

        Args:
            batch_size: questions at once; changes no answer. on_progress: is told how many are answered.
        """
        return self.scores([self.ask_share(model, batch_size=batch_size, on_progress=on_progress)])

    @torch.no_grad()
    def ask_share(
        self, model: CausalLM, *, batch_size: int, ranks: Ranks = ALONE,
        on_progress: Callable[[int], None] | None = None,
    ) -> Share:  # fmt: skip
        """Ask this rank's part of the batches, which are one process's: `scores` of all parts are what it would find.

        Nothing meets the other ranks in here but what a sharded layer does, for which all make as many passes.
        """
        was_training = model.training
        model.eval()
        try:
            return self._answered(model, batch_size, ranks, on_progress)
        finally:  # out of memory, say: what is tried again must find the model as it was
            model.train(was_training)

    def _answered(
        self, model: CausalLM, batch_size: int, ranks: Ranks, on_progress: Callable[[int], None] | None
    ) -> Share:
        # A LongLLaMA counts its windows from the end of what a batch is padded to.
        size = 1 if model.config.memory is not None else batch_size
        # Alike lengths together, the longest first: running out of memory shows at once.
        order = sorted(range(len(self.questions)), key=lambda i: -len(self.questions[i].ids))
        wanted = torch.tensor(self.letters, device=model.device)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found: Share = []
        done = 0
        for asked in ranks.deal(batches):
            # An empty batch stands beside the other ranks': its pass counts for nothing.
            logits = self._logits(model, [self.questions[i].ids for i in asked or order[:1]])
            if not asked:
                continue
            right = wanted[torch.tensor([self.questions[i].answer for i in asked], device=model.device)]
            loss = torch.nn.functional.cross_entropy(logits, right, reduction="sum").item()
            found.append((asked, logits[:, wanted].argmax(1).tolist(), loss))
            done += len(asked)
            if on_progress is not None:
                on_progress(done)
        return found

    def scores(self, shares: Sequence[Share]) -> Scores:
        """What all ranks' parts make together; every question is in one of them."""
        picked, losses = [0] * len(self.questions), []
        for asked, answers, loss in itertools.chain.from_iterable(shares):
            losses.append(loss)
            for i, answer in zip(asked, answers, strict=True):
                picked[i] = answer
        subjects: dict[str, tuple[int, int]] = {}
        for question, answer in zip(self.questions, picked, strict=True):
            done, count = subjects.get(question.subject, (0, 0))
            subjects[question.subject] = (done + (answer == question.answer), count + 1)
        # fsum: the same in whatever order the batches come.
        return Scores(self.split, tuple(picked), subjects, math.fsum(losses) / len(picked))

    def _logits(self, model: CausalLM, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """fp32 [B, V], behind each text's last token. Right padding: no causal token sees it."""
        length = max(map(len, texts))
        ids = torch.full((len(texts), length), self.pad_id)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        last = torch.tensor([len(text) - 1 for text in texts], device=model.device)
        hidden = model.stack(ids.to(model.device))
        return model.lm_head(hidden[torch.arange(len(texts), device=model.device), last]).float()


def load_mmlu(
    path: str | Path | None,
    tokenizer: Tokenizer,
    *,
    dataset: str = "mmlu-fs",
    split: str = "eval",
    max_samples: int | None = None,
    source_max_len: int = 2048,
    context: int | None = None,
) -> Mmlu:
    """Questions from a file, as ids.

    Args:
        path: JSON lines, or a list, of rows with subject, input (the text that ends in "Answer:") and output (A, B,
            C or D), all columns of qlora's files; or a folder that holds those; None: `FOLDER`.
        dataset, split: which of a folder's files: mmlu-fs or mmlu-zs; eval or test.
        max_samples: the first so many. source_max_len: longest text in tokens; of a longer one the beginning is cut,
            for the question stands at the end (qlora.py cuts that).
        context: the model's, which bounds source_max_len.
    Raises:
        InputError: no such file, a row that is no question, a tokenizer to which two of the letters are the same.
    """
    letters = tuple(tokenizer.encode(letter, bos=False)[0] for letter in LETTERS)
    if len(set(letters)) < len(LETTERS):
        raise InputError(f"MMLU: this tokenizer has no tokens of their own for {', '.join(LETTERS)}: got {letters}")
    file = _find(path, dataset, split)
    longest = source_max_len if context is None else min(source_max_len, context)
    questions: list[Question] = []
    cut = 0
    for where, row in _rows(file):
        if len(questions) == max_samples:
            break
        subject, text, answer = _checked(file, where, row)
        ids = tokenizer.encode(text)
        if len(ids) > longest:
            cut += 1
            first = ids[:1] if tokenizer.adds_bos else []
            ids = first + ids[len(ids) - longest + len(first) :]
        questions.append(Question(subject, tuple(ids), answer))
    if not questions:
        raise InputError(f"{file} has no rows: expected MMLU's questions")
    return Mmlu(split, questions, letters, tokenizer.pad_id, cut)


def _find(path: str | Path | None, dataset: str, split: str) -> Path:
    place = Path(path or FOLDER).expanduser()
    if place.is_file():
        return place
    shots, end = "zero" if dataset == "mmlu-zs" else "five", "val" if split == "eval" else "test"
    file = place / f"{shots}_shot_mmlu_{end}.json"
    if file.is_file():
        return file
    there = [found.name for found in sorted(place.glob("*_shot_mmlu_*.json"))] if place.is_dir() else []
    held = f"{place} holds {', '.join(there)}: choose with --mmlu_dataset and --mmlu_split" if there else ""
    missing = place if path is not None and not place.is_dir() else file
    raise InputError(f"MMLU's questions: {missing} does not exist: {held or 'give --mmlu_path their file or folder'}")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a list or of JSON lines."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 (byte {error.start}): save it as UTF-8") from error
    try:
        if text.lstrip().startswith("["):
            yield from ((f"row {number}", row) for number, row in enumerate(json.loads(text), 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"line {number}"
                yield where, json.loads(line)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if text.lstrip().startswith("[") else where
        raise InputError(f"{file}, {place}: broken JSON ({error.msg})") from error


def _checked(file: Path, where: str, row: Any) -> tuple[str, str, int]:
    """subject, text and answer of a row."""
    columns = ("subject", "input", "output")
    if not isinstance(row, dict):
        raise InputError(f"{file}, {where}: got a {type(row).__name__}, expected an object with {', '.join(columns)}")
    for column in columns:
        if not isinstance(row.get(column), str) or not row[column].strip():
            near = "" if column in row else nearest(column, map(str, row))
            got = f"has no text in {column!r}" if column in row else f"has {', '.join(map(str, row))} and no {column!r}"
            raise InputError(f"{file}, {where} {got}: expected {', '.join(columns)}.{near}")
    answer = row["output"].strip()
    if answer not in LETTERS:
        raise InputError(f"{file}, {where}: the output is {answer[:20]!r}, expected one of {', '.join(LETTERS)}")
    return row["subject"], row["input"], LETTERS.index(answer)
