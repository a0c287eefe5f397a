"""KoBEST: five Korean tasks of multiple choice, asked and scored as lm-evaluation-harness does.

Kim et al. 2022, arXiv:2204.04541. A question's choices follow its context after one space; the choice with the largest
log-probability is the answer (`acc`), or the largest per character of the choice (`acc_norm`). `f1` is the unweighted
mean over the labels that occur in either column of 2 TP / (true + predicted). Of equal choices the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jindo_core.data.readers import Row, RowSource, open_rows
from jindo_core.errors import InputError
from jindo_core.likelihood import Request, Score, encode_request
from jindo_core.tokenizer import Tokenizer

_ENDINGS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_SPLITS = {"test": ("test",), "dev": ("dev", "validation")}


@dataclass(frozen=True, slots=True)
class Question:
    """A row as it is asked. gold: index of the right choice. row: counts from 1 within its file."""

    row: int
    context: str
    choices: tuple[str, ...]
    gold: int

    def requests(self, tokenizer: Tokenizer) -> list[Request]:
        """One for each choice."""
        return [encode_request(tokenizer, self.context, f" {choice}") for choice in self.choices]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model chose: by log-probability, and by log-probability per character."""

    gold: int
    choice: int
    choice_norm: int


@dataclass(frozen=True)
class KobestTask:
    """One of the five.

    Attributes:
        file: what its published file is called before `.test.tsv`.
        columns: {name of a column in the files: the name on the Hub (skt/kobest_v1)}; either is read.
        labels: {a label as written, in lower case: index of the choice}; the Hub's are the index itself.
        ask: a row under the Hub's names -> (context, choices).
        normalized: whether acc_norm is counted.
    """

    name: str
    file: str
    columns: Mapping[str, str]
    labels: Mapping[str, int]
    ask: Callable[[Mapping[str, str]], tuple[str, tuple[str, ...]]]
    normalized: bool = False

    def question(self, row: Row) -> Question:
        """The row as it is asked. Raises InputError where a column is missing or a value is none of its kind."""
        values = {}
        for published, name in self.columns.items():
            value = row.values.get(published, row.values.get(name))
            if value is None or value == "":
                has = ", ".join(row.values)
                raise InputError(f"{row.place}: no value in {published} or {name} (it has {has}), expected {self.name}")
            values[name] = value
        label = values.pop("label")
        on_hub = "label" in row.values and "label" not in self.columns
        gold = self._gold(label, on_hub)
        wrong = next((name for name, value in values.items() if not isinstance(value, str)), None)
        if wrong is not None:
            raise InputError(f"{row.place}: {wrong} is a {type(values[wrong]).__name__}, expected text")
        try:
            context, choices = self.ask(values)
        except KeyError as error:
            raise InputError(f"{row.place}: got the question {error.args[0]!r}, expected 원인 or 결과") from None
        if gold is None or not 0 <= gold < len(choices):
            raise InputError(f"{row.place}: got the label {label!r}, expected {' or '.join(self.labels)}")
        # lm-evaluation-harness finds COPA's right answer by its text.
        return Question(row.number, context, choices, choices.index(choices[gold]))

    def _gold(self, label: object, on_hub: bool) -> int | None:
        """Index of the right choice; the Hub's label is that, in figures or as a number."""
        text = str(label).strip().lower()
        if text in self.labels and not on_hub and not isinstance(label, float):
            return self.labels[text]
        return int(text) if on_hub and text.isdecimal() else None


_TRUTH = {"false": 0, "true": 1}
_ENDING_COLUMNS = {f"choice{i}": f"ending_{i}" for i in range(1, 5)}


def _ask_copa(row: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    because = {"원인": " 왜냐하면", "결과": " 그래서"}[row["question"].strip()]
    return f"{row['premise']} {because}", (row["alternative_1"], row["alternative_2"])


TASKS = {
    task.name: task
    for task in (
        KobestTask(
            "kobest_boolq", "BoolQ", {"Text": "paragraph", "Question": "question", "Answer": "label"}, _TRUTH,
            lambda row: (f"{row['paragraph']} 질문: {row['question']} 답변: ", ("아니오", "예")),
        ),
        KobestTask(
            "kobest_copa", "COPA",
            {"sentence": "premise", "question": "question", "1": "alternative_1", "2": "alternative_2",
             "Answer": "label"}, {"1": 0, "2": 1}, _ask_copa,
        ),
        KobestTask(
            "kobest_hellaswag", "HellaSwag", {"context": "context", **_ENDING_COLUMNS, "label": "label"},
            {str(i): i for i in range(4)},
            lambda row: (f"문장: {row['context']}", tuple(row[name] for name in _ENDING_COLUMNS.values())),
            normalized=True,
        ),
        KobestTask(
            "kobest_sentineg", "SentiNeg", {"Text": "sentence", "Label": "label"}, {"0": 0, "1": 1},
            lambda row: (f"문장: {row['sentence']} 긍부정:", ("부정", "긍정")),
        ),
        KobestTask(
            "kobest_wic", "WiC",
            {"Target": "word", "SENTENCE1": "context_1", "SENTENCE2": "context_2", "ANSWER": "label"}, _TRUTH,
            lambda row: (
                f"문장1: {row['context_1']} 문장2: {row['context_2']} 두 문장에서 {row['word']}가 같은 뜻으로 쓰였나?",
                ("아니오", "예"),
            ),
        ),
    )
}  # fmt: skip
"""By lm-evaluation-harness' names. SentiNeg's files hold every sentence twice, before and after its negation: the
Hub's data, and so what is asked, is the negated one (Text, Label)."""


def find_source(task: KobestTask, path: str | Path, split: str) -> RowSource:
    """The task's file of a split.

    Args:
        path: the file itself, or a folder with files named as published (`BoolQ.test.tsv`, any of our endings) or as
            in the Hub's folders (`boolq/test-00000-of-00001.parquet`).
        split: "test" or "dev".
    Raises:
        InputError: nothing there, or nothing of this task and split.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return open_rows(place)
    for word in _SPLITS[split]:
        for ending in _ENDINGS:
            if (file := place / f"{task.file}.{word}{ending}").is_file():
                return open_rows(file)
        if parts := sorted((place / task.file.lower()).glob(f"{word}-*.parquet")):
            return RowSource(tuple(parts))
    raise InputError(
        f"{place} holds no {task.file}.{split}.tsv, which {task.name} asks: expected KoBEST's files, or give the file "
        f"as {task.name}=FILE"
    )


def read_questions(task: KobestTask, source: RowSource, limit: int | None = None) -> list[Question]:
    """The first `limit` rows, or all. Raises InputError where a row is none of the task's."""
    return [task.question(row) for row in islice(source, limit)]


def answer(question: Question, scores: Sequence[Score]) -> Answer:
    """What was chosen, from the scores of `question.requests` in their order."""
    logs = [score.log_probability for score in scores]
    by_character = [log / len(choice) for log, choice in zip(logs, question.choices, strict=True)]
    return Answer(question.gold, logs.index(max(logs)), by_character.index(max(by_character)))


def measures(task: KobestTask, answers: Sequence[Answer]) -> dict[str, float]:
    """acc, acc_norm where it is counted, f1, the standard errors of means (one row has none), and n."""
    right = {"acc": [float(a.choice == a.gold) for a in answers]}
    if task.normalized:
        right["acc_norm"] = [float(a.choice_norm == a.gold) for a in answers]
    found: dict[str, float] = {}
    for name, hits in right.items():
        found[name] = sum(hits) / len(hits)
        if len(hits) > 1:
            found[f"{name}_stderr"] = _standard_error(hits)
    found["f1"] = macro_f1([a.gold for a in answers], [a.choice for a in answers])
    return {**found, "n": len(answers)}


def _standard_error(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def macro_f1(golds: Sequence[int], predictions: Sequence[int]) -> float:
    """The unweighted mean of the labels' F1, over labels that occur in either."""
    labels = sorted({*golds, *predictions})
    pairs = list(zip(golds, predictions, strict=True))
    found = [2 * pairs.count((label, label)) / (golds.count(label) + predictions.count(label)) for label in labels]
    return sum(found) / len(found)


def group(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """lm-evaluation-harness' row `kobest`: means weighted by rows, and the pooled standard error of acc."""
    found: dict[str, float] = {}
    for name in ("acc", "acc_norm", "f1"):
        rows = [result for result in results if name in result]
        if rows:
            found[name] = sum(row[name] * row["n"] for row in rows) / sum(row["n"] for row in rows)
            found[f"n_{name}"] = sum(row["n"] for row in rows)
        if rows and all(f"{name}_stderr" in row for row in rows):
            pooled = sum((row["n"] - 1) * row[f"{name}_stderr"] ** 2 * row["n"] for row in rows)
            total = sum(row["n"] for row in rows)
            found[f"{name}_stderr"] = math.sqrt(pooled / (total - len(rows)) / total)
    return {**found, "n": sum(result["n"] for result in results)}
