"""The `eval` command: tasks measured on a model, in NF4, as it is, or both, with all that is done so far on disk."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from jindo_core import __version__, kobest, parallel, perplexity, predictions
from jindo_core.adapters import digest, load_adapter
from jindo_core.causal_lm import CausalLM
from jindo_core.data.templates import NONE, load_template
from jindo_core.errors import InputError, TrainingError
from jindo_core.eval_config import KOBEST, SAMPLING, EvalConfig, task_paths
from jindo_core.files import content_digest, write_atomically
from jindo_core.formats import open_checkpoint
from jindo_core.hub import resolve_model
from jindo_core.likelihood import Request, Score, batches, score
from jindo_core.loader import load_model, pick_device, pick_dtype
from jindo_core.memory import in_halves
from jindo_core.mmlu import load_mmlu
from jindo_core.part_file import PartFile
from jindo_core.progress import ConversionView, EvaluationRow, loading_bar
from jindo_core.run_record import RunRecord, base_and_run
from jindo_core.tokenizer import Tokenizer, load_tokenizer
from jindo_core.training_data import open_file

T = TypeVar("T")
Row = list[Any]
"""What is kept of a request or a question: two numbers, as JSON has them."""


class Runner(Protocol):
    """Does a task's batches one after the other, those that an earlier run has done without their work."""

    def __call__(self, work: Iterable[list[T]], run: Callable[[list[T]], list[Row]]) -> Iterator[list[Row]]: ...


_KEPT = (
    "batch_size", "limit", "window", "stride", "split", "mmlu_dataset", "mmlu_split", "mmlu_source_max_len", "quantize",
    "double_quant",
)  # fmt: skip


class Task(Protocol):
    """What is measured, read and seen to be whole before a model is loaded.

    Attributes:
        total: batches that `measure` will ask for, None where that shows as it goes.
    """

    name: str
    source: str
    digest: str

    def total(self, model: CausalLM) -> int | None: ...

    def measure(self, model: CausalLM, runner: Runner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The figures, and a row for each prediction.

        A figure's own count, where it is not `n`, is named n_ and its name.
        """
        ...


class KobestRun:
    """One of KoBEST's tasks."""

    def __init__(self, name: str, path: str, tokenizer: Tokenizer, config: EvalConfig) -> None:
        self.name, self._task = name, kobest.TASKS[name]
        self._batch_size, self._pad_id = config.batch_size, tokenizer.pad_id
        rows = kobest.find_source(self._task, path, config.split)
        self.source, self.digest = ", ".join(file.name for file in rows.paths), rows.digest()
        self._questions = kobest.read_questions(self._task, rows, config.limit)
        self._requests = [request for question in self._questions for request in question.requests(tokenizer)]

    def total(self, model: CausalLM) -> int | None:
        return len(batches(self._requests, self._batch_size, model))

    def measure(self, model: CausalLM, runner: Runner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        order = batches(self._requests, self._batch_size, model)
        work = ([self._requests[i] for i in batch] for batch in order)
        found: dict[int, Score] = {}
        for batch, rows in zip(order, runner(work, functools.partial(_scored, model, self._pad_id)), strict=True):
            found.update(zip(batch, (Score(*row) for row in rows), strict=True))
        in_order = (found[i] for i in range(len(found)))
        answers, told = [], []
        for question in self._questions:
            scores = [next(in_order) for _ in question.choices]
            answers.append(kobest.answer(question, scores))
            told.append(
                {
                    "row": question.row,
                    "context": question.context,
                    "choices": list(question.choices),
                    "log_probabilities": [one.log_probability for one in scores],
                    "choice": answers[-1].choice,
                    "label": question.gold,
                    "correct": answers[-1].choice == question.gold,
                }
            )
        figures = kobest.measures(self._task, answers)
        limit = model.config.context
        # The model reads all but the last token.
        cut = 0 if limit is None else sum(len(request) - 1 > limit for request in self._requests)
        return {**figures, "cut": cut}, told


class PerplexityRun:
    """A text file."""

    name = "perplexity"

    def __init__(self, path: str, tokenizer: Tokenizer, config: EvalConfig, context: int | None) -> None:
        self._file, self._tokenizer, self._config = Path(path), tokenizer, config
        self._window, self._stride = perplexity.choose_window(context, config.window, config.stride)
        self.source = self._file.name
        try:
            with self._file.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: got '{error.strerror}', expected a readable text file") from None

    def total(self, model: CausalLM) -> int | None:
        return None

    def measure(self, model: CausalLM, runner: Runner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        text = perplexity.TextTokens(self._file, self._tokenizer)
        windows = perplexity.Windows(text, self._tokenizer, self._window, self._stride, self._config.limit)
        counts: list[int] = []
        run = functools.partial(_scored, model, self._tokenizer.pad_id)
        found = [Score(*row) for rows in runner(self._grouped(windows, counts), run) for row in rows]
        if not found:
            raise InputError(f"{self._file} holds no text: expected at least two tokens")
        scores = list(zip(counts, found, strict=True))
        rows = [
            {"window": i, "tokens": count, "nats_per_token": -one.log_probability / count}
            for i, (count, one) in enumerate(scores, 1)
        ]
        return {**perplexity.measures(windows, scores), "window": self._window, "stride": self._stride}, rows

    def _grouped(self, windows: perplexity.Windows, counts: list[int]) -> Iterator[list[Request]]:
        """Batches; beside them the count of each window's tokens, so that none has to be kept."""
        batch: list[Request] = []
        for request in windows:
            batch.append(request)
            counts.append(len(request.continuation))
            if len(batch) == self._config.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


class MmluRun:
    """MMLU's questions."""

    name = "mmlu"

    def __init__(self, path: str, tokenizer: Tokenizer, config: EvalConfig, context: int | None) -> None:
        self._mmlu = load_mmlu(
            path, tokenizer, dataset=config.mmlu_dataset, split=config.mmlu_split, max_samples=config.limit,
            source_max_len=config.mmlu_source_max_len, context=context,
        )  # fmt: skip
        self.source = Path(path).name
        asked = [(one.subject, one.ids, one.answer) for one in self._mmlu.questions]
        self.digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        self._batch_size = config.batch_size

    def total(self, model: CausalLM) -> int | None:
        return -(-len(self._mmlu.questions) // self._batch_size)

    def measure(self, model: CausalLM, runner: Runner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        questions = self._mmlu.questions
        order = sorted(range(len(questions)), key=lambda i: -len(questions[i].ids))
        work = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        picked, losses = [0] * len(order), []

        def ask(batch: Sequence[int]) -> list[Row]:
            asked = dataclasses.replace(self._mmlu, questions=[questions[i] for i in batch])
            scores = asked.ask(model, batch_size=self._batch_size)
            return [[choice, scores.loss] for choice in scores.predictions]

        for batch, rows in zip(work, runner(work, functools.partial(in_halves, ask)), strict=True):
            for i, (choice, loss) in zip(batch, rows, strict=True):
                picked[i] = choice
                losses.append(loss)  # the mean of those that were asked at once, for each of them
        subjects: dict[str, list[bool]] = {}
        for question, choice in zip(questions, picked, strict=True):
            subjects.setdefault(question.subject, []).append(choice == question.answer)
        of_each = {f"acc_{subject}": sum(right) / len(right) for subject, right in sorted(subjects.items())}
        figures = {"acc": sum(of_each.values()) / len(of_each), "loss": math.fsum(losses) / len(losses), **of_each}
        counts = {f"n_acc_{subject}": len(right) for subject, right in subjects.items()}
        told = [
            {
                "row": row,
                "subject": question.subject,
                "choice": choice,
                "label": question.answer,
                "correct": choice == question.answer,
            }
            for row, (question, choice) in enumerate(zip(questions, picked, strict=True), 1)
        ]
        return {**figures, **counts, "n": len(questions), "cut": self._mmlu.cut}, told


class GenerationRun:
    """The rows of a data file, answered."""

    name = "generation"

    def __init__(self, path: str, tokenizer: Tokenizer, config: EvalConfig, run: RunRecord | None) -> None:
        file = open_file(path, config.dataset_format)
        name = config.prompt_template_name or (run.prompt_template_name if run else "alpaca")
        self.template = load_template(NONE if file.formatted else name, tokenizer)
        rows = itertools.islice(enumerate(file.records(), 1), config.limit)
        self._questions = predictions.ask(rows, tokenizer, self.template)
        self.source = ", ".join(one.name for one in file.source.paths)
        self.digest = predictions.digest(self._questions, tokenizer, self.template)
        self._tokenizer, self._batch_size = tokenizer, config.batch_size
        self._sampling = predictions.Sampling(**{setting: getattr(config, setting) for setting in SAMPLING})

    def total(self, model: CausalLM) -> int | None:
        return len(predictions.batches(self._questions, self._batch_size, model.config.context))

    def measure(self, model: CausalLM, runner: Runner) -> tuple[dict[str, float], list[dict[str, Any]]]:
        order = predictions.batches(self._questions, self._batch_size, model.config.context)
        if order:  # of logits that are not finite a token would be picked, too
            longest = self._questions[order[0][0]].ids
            _require_finite("generation", _scored(model, self._tokenizer.pad_id, [Request(longest, longest[-1:])]))

        def run(batch: Sequence[predictions.Question]) -> list[Row]:
            return predictions.answer(model, self._tokenizer, self.template, self._sampling, batch)

        found: dict[int, Row] = {}
        work = ([self._questions[i] for i in batch] for batch in order)
        for batch, rows in zip(order, runner(work, functools.partial(in_halves, run)), strict=True):
            found.update(zip(batch, rows, strict=True))
        told = [predictions.read(one, found.get(i), self._tokenizer) for i, one in enumerate(self._questions)]
        figures = predictions.measures([one.reference for one in self._questions], told)
        return figures, [predictions.line(one, said) for one, said in zip(self._questions, told, strict=True)]


def _require_finite(name: str, rows: Iterable[Row]) -> None:
    if not all(math.isfinite(value) for row in rows for value in row):
        raise TrainingError(
            f"{name}: the model's log-probabilities are not finite: its weights or the adapter are damaged, or --dtype "
            "is too narrow for them"
        )


def _scored(model: CausalLM, pad_id: int, requests: list[Request]) -> list[Row]:
    return [[one.log_probability, one.greedy] for one in score(model, requests, pad_id=pad_id)]


def run_eval(config: EvalConfig) -> dict[str, Any]:
    """The `eval` command.

    Returns:
        What is written to --output_path: settings, data, and {how the model is kept: {task: {figure: value}}}.
    Raises:
        InputError: what is wrong with a model, a file or a target, most of it before a model is loaded.
        TrainingError: a model whose log-probabilities are not finite.
    """
    parallel.require_alone("jindo-core eval")
    view = ConversionView()
    output, predicted = _targets(config)
    base, run = base_and_run(config.base_model, config.lora_weights)
    path = resolve_model(base)
    tokenizer = load_tokenizer(path)
    context = open_checkpoint(path).config.context
    paths = task_paths(config).items()
    tasks = [_open_task(name, source, tokenizer, config, context, run) for name, source in paths]
    described = _described(config, path, tasks)
    place = None if output is None else output.with_name(f"{output.name}.part")
    results: dict[str, dict[str, dict[str, float]]] = {}
    lines: list[dict[str, Any]] = []
    with PartFile(place, described["settings"], flag="--overwrite", overwrite=config.overwrite) as part:
        if part.resumed:
            view.say(f"going on: {part.resumed} batches were done before")
        for kept in ("nf4", "none") if config.quantize == "both" else (config.quantize,):
            model = _load(path, config, kept, view)
            tokenizer.check(model.config.vocab_size)
            results[kept] = {}
            for task in tasks:
                figures, rows = _measure(task, model, f"{kept}/{task.name}", part, view)
                results[kept][task.name] = figures
                lines += [{"task": task.name, "quantize": kept, **row} for row in rows]
            if "kobest" in (config.tasks or ()):
                results[kept]["kobest"] = kobest.group([results[kept][name] for name in KOBEST])
            del model
            gc.collect()
        report = {**described, "results": results}
        if config.quantize == "both":
            report["drift"] = _drift(results, lines)
        _write(report, lines, output, predicted, part, view)
    _show(report, view)
    return report


def _targets(config: EvalConfig) -> tuple[Path | None, Path | None]:
    """Where results and predictions go, seen to be free and in folders that are there. Raises InputError."""
    paths = []
    for name in ("output_path", "predictions_path"):
        given = getattr(config, name)
        path = None if given is None else Path(given)
        if path is not None and not path.parent.is_dir():
            raise InputError(f"--{name}: got {given}, expected it in a folder that is there: make {path.parent}")
        if path is not None and path.exists() and not (config.overwrite and path.is_file()):
            fix = "a file" if not path.is_file() else "another name, or --overwrite"
            raise InputError(f"--{name}: {given} is there already, expected {fix}")
        paths.append(path)
    return paths[0], paths[1]


def _open_task(
    name: str, path: str, tokenizer: Tokenizer, config: EvalConfig, context: int | None, run: RunRecord | None
) -> Task:
    if name == "mmlu":
        return MmluRun(path, tokenizer, config, context)
    if name == "perplexity":
        return PerplexityRun(path, tokenizer, config, context)
    if name == "generation":
        return GenerationRun(path, tokenizer, config, run)
    return KobestRun(name, path, tokenizer, config)


def _load(path: Path, config: EvalConfig, kept: str, view: ConversionView) -> CausalLM:
    with loading_bar(view.console) as on_progress:
        model = load_model(
            path, quantize=None if kept == "none" else kept, double_quant=config.double_quant, dtype=config.dtype,
            device=config.device, on_progress=on_progress,
        )  # fmt: skip
    if config.lora_weights is not None:
        load_adapter(model, config.lora_weights)
    return model


def _measure(
    task: Task, model: CausalLM, name: str, part: PartFile, view: ConversionView
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    with view.bar(name, task.total(model), in_bytes=False) as advance:

        def runner(work: Iterable[list[T]], run: Callable[[list[T]], list[Row]]) -> Iterator[list[Row]]:
            for number, batch in enumerate(work):
                rows = part.get(f"{name}/{number}")
                if rows is None:
                    rows = run(batch)
                    _require_finite(name, rows)
                    part.add(f"{name}/{number}", rows)
                advance(1)
                yield rows

        return task.measure(model, runner)


# --- what is said and written ---------------------------------------------------------------------------


def _described(config: EvalConfig, path: Path, tasks: list[Task]) -> dict[str, Any]:
    """What the figures are of. Files by name and digest: no path of this machine goes into a report."""
    device = pick_device(config.device)
    settings = {name: getattr(config, name) for name in _KEPT} | {
        "tasks": [task.name for task in tasks],
        "data": {task.name: {"file": task.source, "sha256": task.digest} for task in tasks},
        "base_model": {"name": path.name, "files": content_digest(path)[:16]},
        "lora_weights": None,
        "device": device.type,
        "dtype": str(pick_dtype(config.dtype, device)).removeprefix("torch."),
        "versions": {"jindo_core": __version__, "torch": torch.__version__},
    }
    for task in tasks:
        if isinstance(task, GenerationRun):
            settings |= {name: getattr(config, name) for name in SAMPLING} | {"prompt_template": task.template.name}
    if config.lora_weights is not None:
        settings["lora_weights"] = {"name": Path(config.lora_weights).name, "sha256": digest(config.lora_weights)}
    return {"settings": settings}


def _drift(
    results: dict[str, dict[str, dict[str, float]]], lines: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """{task: {figure: NF4's less the other's}}, and how many answers differ."""
    choices: dict[str, dict[tuple[str, int], int | str]] = {"nf4": {}, "none": {}}
    for line in lines:
        if (answer := line.get("choice", line.get("prediction"))) is not None:
            choices[line["quantize"]][line["task"], line["row"]] = answer
    found: dict[str, dict[str, float]] = {}
    for task, figures in results["nf4"].items():
        other = results["none"][task]
        found[task] = {name: figures[name] - other[name] for name in _compared(figures)}
        own = [key for key in choices["nf4"] if key[0] == task]
        if own:
            found[task]["answers_changed"] = sum(choices["nf4"][key] != choices["none"][key] for key in own)
    return found


def _compared(figures: dict[str, float]) -> list[str]:
    """The figures that are results, not sizes or errors."""
    sizes = ("n", "tokens", "bytes", "window", "stride", "cut", "unanswered")
    return [n for n in figures if n not in sizes and not n.startswith("n_") and not n.endswith("_stderr")]


def _show(report: dict[str, Any], view: ConversionView) -> None:
    results: dict[str, dict[str, dict[str, float]]] = report["results"]
    first = next(iter(results.values()))
    said = {"nf4": "NF4", "none": f"not quantized ({report['settings']['dtype']})"}
    rows = []
    for task, figures in first.items():
        for place, name in enumerate(_compared(figures)):
            values = [found[task][name] for found in results.values()]
            changed = report.get("drift", {}).get(task, {}).get("answers_changed")
            error, count = figures.get(f"{name}_stderr"), int(figures.get(f"n_{name}", figures["n"]))
            rows.append(EvaluationRow(task, name, values, error, count, None if place else changed))
        if figures.get("cut"):
            view.say(f"note: {task}: {figures['cut']:g} inputs were too long for the model and lost their beginning")
        if figures.get("unanswered"):
            view.say(f"note: {task}: {figures['unanswered']:g} rows leave no room for an answer, and count as wrong")
    view.evaluation([said[kept] for kept in results], rows)


def _write(
    report: dict[str, Any],
    lines: list[dict[str, Any]],
    output: Path | None,
    predicted: Path | None,
    part: PartFile,
    view: ConversionView,
) -> None:
    """Predictions, then results; only then the part file goes: with --overwrite a new run has them from it again."""
    texts = [(predicted, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))]
    texts.append((output, json.dumps(report, indent=2, ensure_ascii=False) + "\n"))
    for path, text in texts:
        if path is None:
            continue
        try:
            write_atomically(path, text.encode())
        except OSError as error:
            raise InputError(f"{path} could not be written ({error.strerror}): what was there is unchanged") from error
        view.say(f"written: {path.name}")
    part.remove()
