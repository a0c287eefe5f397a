"""`jindo-core data refine`: a model, with its adapter or without, rewrites the rows of a data set or scores them."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jindo_core.adapters import digest, load_adapter
from jindo_core.batch_generation import Answer, generate_batch
from jindo_core.causal_lm import CausalLM
from jindo_core.data.examples import Encoder, end_ids, prompt_ids
from jindo_core.data.formats import Format, detect_format
from jindo_core.data.readers import Row, RowSource, open_rows
from jindo_core.data.records import Record, Round
from jindo_core.data.templates import Template, load_template
from jindo_core.data.writers import RowWriter
from jindo_core.data_config_inspect import RefineConfig, check_output
from jindo_core.errors import InputError
from jindo_core.files import content_digest
from jindo_core.generation import stop_ids
from jindo_core.hub import resolve_model
from jindo_core.loader import load_model
from jindo_core.part_file import PartFile
from jindo_core.progress import ConversionView, loading_bar
from jindo_core.refinery.pipeline import Item
from jindo_core.refinery.text_steps import RenderedText
from jindo_core.refinery.writeback import require_writable, written_back
from jindo_core.run_record import base_and_run
from jindo_core.scoring import score
from jindo_core.tokenizer import Tokenizer, load_tokenizer

_CHUNK = 16  # batches whose rows are sorted by length together, and lie in the part file together
_FIELD = re.compile(r"\{(instruction|input|output)\}")
_NO_MATTER = ("output_path", "overwrite", "restart")  # what the results do not depend on


class Worker(Protocol):
    """What is done with rows: given numbered records, a result each, which JSON can hold."""

    def __call__(self, rows: Sequence[tuple[int, Record]]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Rewriter:
    """Asks the model for a new text in place of one of a row's, and keeps it where it passes the checks.

    A result holds for each round the new text, or None with the reason why the old one stays.

    Attributes:
        field: which text. instruction, input: what the model is asked; {instruction}, {input} and {output} in them are
            the row's, filled in one pass. input None: the text itself, unless `instruction` holds it.
        ratios: bounds of the new text's length in characters over the old one's.
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    field: str
    instruction: str
    input: str | None
    ratios: tuple[float, float]
    batch_size: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 42

    def __call__(self, rows: Sequence[tuple[int, Record]]) -> list[dict[str, Any]]:
        texts: list[list[str | None]] = [[None] * len(record.rounds) for _, record in rows]
        kept: list[list[str | None]] = [[None] * len(record.rounds) for _, record in rows]
        tasks: list[tuple[list[int], int, int]] = []  # prompt, place of the row, place of the round
        context = self.model.config.context
        for place, (_, record) in enumerate(rows):
            for turn, each in enumerate(record.rounds):
                if not getattr(each, self.field).strip():
                    kept[place][turn] = f"no {self.field}"
                    continue
                ids = self.prompt(each)
                if context is not None and len(ids) >= context:
                    kept[place][turn] = "the prompt fills the model's context"
                    continue
                tasks.append((ids, place, turn))
        tasks.sort(key=lambda task: len(task[0]))
        for start in range(0, len(tasks), self.batch_size):
            batch = tasks[start : start + self.batch_size]
            seeds = [_seed(self.seed, rows[place][0], turn) for _, place, turn in batch]
            for answer, (_, place, turn) in zip(self._answers([ids for ids, *_ in batch], seeds), batch, strict=True):
                old = getattr(rows[place][1].rounds[turn], self.field)
                text = self.tokenizer.decode(answer.ids).strip()
                kept[place][turn] = self.fault(old, text, answer.stopped)
                texts[place][turn] = text if kept[place][turn] is None else None
        return [{"texts": new, "kept": why} for new, why in zip(texts, kept, strict=True)]

    def _answers(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        stops = stop_ids(self.model, self.tokenizer) | end_ids(self.tokenizer, self.template)
        return generate_batch(
            self.model, prompts, max_new_tokens=self.max_new_tokens, stop_ids=stops,
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seeds=seeds,
        )  # fmt: skip

    def prompt(self, turn: Round) -> list[int]:
        """Token ids of what the model is asked about a round."""
        values = {"instruction": turn.instruction, "input": turn.input, "output": turn.output}
        asked = self.input
        if asked is None:
            asked = "" if f"{{{self.field}}}" in self.instruction else f"{{{self.field}}}"
        instruction, about = (_FIELD.sub(lambda found: values[found[1]], text) for text in (self.instruction, asked))
        return prompt_ids(self.tokenizer, self.template, Record.single(instruction, about))

    def fault(self, old: str, new: str, stopped: bool) -> str | None:
        """Why a new text is not taken; None: it is."""
        if not new:
            return "empty"
        if not stopped:
            return "not ended by the model"
        ratio = len(new) / len(old.strip())
        if not self.ratios[0] <= ratio <= self.ratios[1]:
            return f"too {'short' if ratio < self.ratios[0] else 'long'}"
        return None


@dataclass(frozen=True)
class Scorer:
    """Scores each row's answers; see `scoring.Score`. A result holds the figures, or the reason why there are none."""

    model: CausalLM
    tokenizer: Tokenizer
    encoder: Encoder
    batch_size: int

    def __call__(self, rows: Sequence[tuple[int, Record]]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        examples, places = [], []
        for place, encoded in enumerate(self.encoder.encode([record for _, record in rows])):
            results.append({"reason": "no answer within cutoff_len"})
            if encoded.example is not None:
                examples.append(encoded.example)
                places.append(place)
                results[place] = {"cut": encoded.cut or encoded.shortened}
        for place, found in zip(
            places, score(self.model, self.tokenizer, examples, batch_size=self.batch_size), strict=True
        ):
            figures = {"tokens": found.tokens, "loss": found.loss, "perplexity": found.perplexity, "ifd": found.ifd}
            if all(math.isfinite(figure) for figure in figures.values()):
                results[place] |= figures
            else:  # JSON knows no infinity
                results[place] = {"reason": "not finite"}
        return results


SCORE_COLUMNS = ("tokens", "loss", "perplexity", "ifd")
"""What a score adds to a row, behind the prefix: supervised tokens, their mean cross entropy in nats, exp of that, and
its ratio with / without the prompt."""


@dataclass(frozen=True)
class Refined:
    """Counts of a run: rows in and out (the same), resumed: rows that an earlier run had done; texts by what became of
    them ("rewritten", "the same again", or why the old one stayed; in scoring "scored", "cut …", or why not)."""

    rows: int
    resumed: int
    texts: Mapping[str, int]


def run_refine(config: RefineConfig) -> Refined:
    """The `data refine` command: every row in order, resumable, the output whole or not at all.

    Raises:
        InputError: rows that can't be read, a model that can't be loaded, a part file of another run.
    """
    view = ConversionView()
    output = check_output(config.output_path, config.overwrite)
    source = open_rows(config.data_path or "")
    form = detect_format(source, config.dataset_format)
    if config.mode == "rewrite":
        require_writable(form)
    total = _count(config, source, form)
    base, run = base_and_run(config.base_model, config.lora_weights)
    path = resolve_model(base)
    tokenizer = load_tokenizer(path)
    name = config.prompt_template_name or (run.prompt_template_name if run else "alpaca")
    template = load_template(name, tokenizer)
    kept = _settings(config, source, form, path, tokenizer, template)
    place = output.with_name(f".{output.name}.part")
    with PartFile(place, kept, flag="--restart", restart=config.restart) as part:
        resumed = min(part.resumed * config.batch_size * _CHUNK, total)
        if resumed:
            view.say(f"going on at row {resumed + 1} of {total:,}, where an earlier run stopped")
        if resumed < total:
            worker = _worker(config, view, path, tokenizer, template)
            try:
                _work(config, view, part, _rows(config, source), form, worker, total)
            except KeyboardInterrupt:
                kept_rows = min(part.batches * config.batch_size * _CHUNK, total)
                view.say(f"{kept_rows:,} rows are kept: the same command goes on behind them")
                raise
        texts = _write(config, output, source, form, part)
        part.remove()
    said = ", ".join(f"{count:,} {what}" for what, count in texts.most_common())
    view.say(f"{total:,} rows in, {total:,} out: {said}")
    view.say(f"written: {output}")
    return Refined(total, resumed, dict(texts))


def _rows(config: RefineConfig, source: RowSource) -> Iterator[Row]:
    return itertools.islice(source, config.max_rows or None)


def _count(config: RefineConfig, source: RowSource, form: Format) -> int:
    """Rows; each is read as a record, so that one that can't be is an error now and not after a night's work."""
    total = 0
    for row in _rows(config, source):
        form.record(row)
        total += 1
        if config.mode == "score":
            taken = [f"{config.prefix}{name}" for name in SCORE_COLUMNS if f"{config.prefix}{name}" in row.values]
            if taken:
                raise InputError(f"{row.where} has a column {taken[0]!r} already: give another --prefix")
    return total


def _settings(
    config: RefineConfig, source: RowSource, form: Format, model: Path, tokenizer: Tokenizer, template: Template
) -> dict[str, Any]:
    """What the results depend on."""
    return {name: value for name, value in asdict(config).items() if name not in _NO_MATTER} | {
        "data_path": source.digest(),
        "dataset_format": repr((form.name, form.mapped)),
        "prompt_template_name": template.identity(),
        "base_model": content_digest(model)[:16],
        "tokenizer": tokenizer.digest(),
        "lora_weights": None if config.lora_weights is None else digest(config.lora_weights),
    }


def _worker(config: RefineConfig, view: ConversionView, path: Path, tokenizer: Tokenizer, template: Template) -> Worker:
    with loading_bar(view.console) as on_progress:
        model = load_model(
            path, quantize=config.quantize, double_quant=config.double_quant, dtype=config.dtype, device=config.device,
            on_progress=on_progress,
        )  # fmt: skip
    tokenizer.check(model.config.vocab_size)
    if config.lora_weights is not None:
        load_adapter(model, config.lora_weights)
    model.eval()
    if config.mode == "score":
        context = model.config.context
        cutoff = config.cutoff_len if context is None else min(config.cutoff_len, context)
        if cutoff < config.cutoff_len:
            view.say(f"note: cutoff_len {config.cutoff_len} is beyond the model's context: {cutoff} is used")
        encoder = Encoder(tokenizer, template, cutoff_len=cutoff, train_on_inputs=False)
        return Scorer(model, tokenizer, encoder, config.batch_size)
    assert config.instruction is not None  # the config has seen to it
    return Rewriter(
        model, tokenizer, template, config.field, config.instruction, config.input,
        (config.min_length_ratio, config.max_length_ratio), config.batch_size, config.max_new_tokens,
        config.temperature, config.top_p, config.top_k, config.seed,
    )  # fmt: skip


def _work(
    config: RefineConfig, view: ConversionView, part: PartFile, rows: Iterator[Row], form: Format, worker: Worker,
    total: int,
) -> None:  # fmt: skip
    """What is not in the part file yet, a chunk at a time.

    In bf16 a row's result depends on its neighbours in the batch, by rounding: a chunk is there whole or done again
    whole, so that it is the uninterrupted run's.
    """
    assert config.mode is not None
    size = config.batch_size * _CHUNK
    done = part.resumed * size
    numbered = itertools.islice(enumerate(rows, 1), done, None)
    with view.bar({"rewrite": "rewriting", "score": "scoring"}[config.mode], total, in_bytes=False) as advance:
        advance(done)
        while chunk := [(number, form.record(row)) for number, row in itertools.islice(numbered, size)]:
            part.add(str(chunk[0][0]), worker(chunk))
            advance(len(chunk))


def _write(config: RefineConfig, output: Path, source: RowSource, form: Format, part: PartFile) -> Counter[str]:
    """The rows with what was found, in order, whole or not at all; returns what became of the texts."""
    counts: Counter[str] = Counter()
    without_copy = RenderedText()  # a rewritten row's copy in a template would say the old text
    with RowWriter(output) as writer:
        for number, (row, result) in enumerate(zip(_rows(config, source), part.results(), strict=True), 1):
            if config.mode == "score":
                counts["scored" if "loss" in result else result["reason"]] += 1
                counts["cut at cutoff_len"] += result.get("cut", False)
                writer.write(row.values | {f"{config.prefix}{name}": result.get(name) for name in SCORE_COLUMNS})
                continue
            record = form.record(row)
            for each, text, why in zip(record.rounds, result["texts"], result["kept"], strict=True):
                same = text == getattr(each, config.field)
                counts[f"kept: {why}" if why is not None else "the same again" if same else "rewritten"] += 1
            answer = without_copy(Item(record, row.values, number))
            values = (answer if isinstance(answer, Item) else answer.item).values
            counts["a column text that repeated the row left out"] += values is not row.values
            rounds = tuple(
                each if text is None else replace(each, **{config.field: text})
                for each, text in zip(record.rounds, result["texts"], strict=True)
            )
            writer.write(written_back(replace(record, rounds=rounds), values, form))
    return +counts


def _seed(seed: int, row: int, turn: int) -> int:
    """A round's own seed: its draws are the same whatever was done before it, in this run or another."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row}/{turn}".encode()).digest()[:8]) >> 1
