"""What qlora.py's --do_predict leaves: the held-out rows answered by the adapter that a run ends with."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jindo_core import adapters, predictions
from jindo_core.errors import TrainingError
from jindo_core.files import write_atomically
from jindo_core.interrupt import Broken, StopSignals
from jindo_core.memory import in_halves, is_out_of_memory
from jindo_core.part_file import PartFile
from jindo_core.predictions import Prediction, Question, Sampling
from jindo_core.prepare import TrainingJob
from jindo_core.progress import spoken
from jindo_core.training_view import TrainingView

FILE = "predictions.jsonl"
FIGURES = "metrics.json"
"""qlora.py's names."""

_ROWS_AT_ONCE = 8


def clear(output_dir: Path, *, going_on: bool) -> None:
    """Take away what another adapter answered in this folder. going_on: `predict` comes next, and takes up what it has
    answered itself."""
    for name in (FILE, FIGURES, *([] if going_on else [f"{FILE}.part"])):
        (output_dir / name).unlink(missing_ok=True)


def predict(
    job: TrainingJob, output_dir: Path, loss: float, signals: StopSignals, view: TrainingView
) -> tuple[int | None, dict[str, float]]:
    """Answer the held-out rows, after the adapter was saved to `output_dir`: `FILE` and `FIGURES`.

    What is done so far lies in a part file, from which a run that is taken up goes on if it ends with the same adapter.

    Args:
        loss: on those rows, NaN where it is not known.
    Returns:
        The signal that stopped it, or None; and what `FIGURES` holds.
    Raises:
        TrainingError: no memory for one answer, or no room on the disk; the adapter is as it was saved.
    """
    sampling = _sampling(job)
    rows = ((row, record) for _, row, record in job.data.answered)
    files = [file for file, _, _ in job.data.answered]
    questions = predictions.ask(rows, job.tokenizer, job.template, files)
    settings = {
        "adapter": adapters.digest(output_dir), "rows": predictions.digest(questions, job.tokenizer, job.template),
        **vars(sampling), "rows_at_once": _ROWS_AT_ONCE,
    }  # fmt: skip
    place = output_dir / f"{FILE}.part"
    with PartFile(place, settings, flag="--overwrite_output_dir", overwrite=True) as part:
        try:
            with signals.breakable():
                found = _answers(job, questions, sampling, part, view)
        except Broken:
            assert signals.asked is not None
            return int(signals.asked), {}
        figures = _figures(questions, found, loss)
        texts = {FILE: _lines(job, questions, found), FIGURES: json.dumps(figures, indent=2) + "\n"}
        for name, text in texts.items():
            try:
                write_atomically(output_dir / name, text.encode())
            except OSError as error:
                raise TrainingError(
                    f"{name} could not be written to {output_dir} ({error.strerror}): the adapter is saved there"
                ) from error
        part.remove()
    return None, figures


def _sampling(job: TrainingJob) -> Sampling:
    config = job.config
    if not config.do_sample:
        return Sampling(max_new_tokens=config.max_new_tokens)
    return Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k,
        seed=config.seed,
    )


def _answers(
    job: TrainingJob, questions: Sequence[Question], sampling: Sampling, part: PartFile, view: TrainingView
) -> list[Prediction]:
    view.say(f"Answering {len(questions):,} held-out rows" + (", some of them done before" if part.resumed else ""))
    run = functools.partial(predictions.answer, job.model, job.tokenizer, job.template, sampling)
    tell, found = spoken(view.say), dict[int, list[int]]()
    for batch in predictions.batches(questions, _ROWS_AT_ONCE, job.model.config.context):
        rows = part.get(str(batch[0]))
        if rows is None:
            try:
                rows = in_halves(run, [questions[i] for i in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise TrainingError(
                    "no memory to answer a held-out row: the adapter is saved; lower --max_new_tokens, or answer with "
                    "jindo-core eval --tasks generation"
                ) from error
            part.add(str(batch[0]), rows)
        found.update(zip(batch, rows, strict=True))
        tell("answers", len(found), len(questions))
    return [predictions.read(one, found.get(i), job.tokenizer) for i, one in enumerate(questions)]


def _lines(job: TrainingJob, questions: Iterable[Question], found: Iterable[Prediction]) -> str:
    """qlora.py's keys: input is the whole prompt, and with it comes the answer once more."""
    lines = []
    for (file, row, record), question, made in zip(job.data.answered, questions, found, strict=True):
        prompt = job.tokenizer.decode(question.ids)
        own: dict[str, Any] = {"file": job.data.names[file]} if len(job.data.names) > 1 else {}
        own |= {"row": row, "input": prompt, "output": record.rounds[-1].output}
        answers = {"prediction_with_input": (prompt + made.text).strip(), "prediction": made.text.strip()}
        lines.append(json.dumps({**own, **answers, "ended": made.ended}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _figures(questions: Sequence[Question], found: Sequence[Prediction], loss: float) -> dict[str, float]:
    measured = predictions.measures([one.reference for one in questions], found)
    named = {f"predict_{name}": value for name, value in measured.items() if name != "n" and not name.startswith("n_")}
    return {**({} if math.isnan(loss) else {"predict_loss": loss}), "predict_samples": len(questions), **named}
