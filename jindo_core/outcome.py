"""What a training run ends with: its figures, the adapter, the record of it, and what to do next."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jindo_core import embedded
from jindo_core.adapters import CONFIG, WEIGHTS, save_adapter
from jindo_core.config import TrainConfig
from jindo_core.data.examples import end_ids, prompt_ids
from jindo_core.data.records import Record
from jindo_core.data.templates import Template
from jindo_core.errors import TrainingError
from jindo_core.generation import generate
from jindo_core.memory import is_out_of_memory
from jindo_core.prepare import ANSWER_TOKENS, TrainingJob
from jindo_core.progress import typed
from jindo_core.run_record import METRICS, RunRecord, keep_template, write_run
from jindo_core.run_state import History, perplexity
from jindo_core.training_view import TrainingView

PICTURE = "loss.png"


@dataclass(frozen=True)
class TrainResult:
    """output_dir: where the adapter lies; adapter_step: after which step it was as it is. Losses are on the held-out
    rows, NaN without any."""

    output_dir: Path
    steps: int
    adapter_step: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    peak_bytes: int
    skipped_steps: int = 0

    @property
    def perplexity_before(self) -> float:
        """NaN without held-out rows."""
        return perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """NaN without held-out rows."""
        return perplexity(self.loss_after)


def save(job: TrainingJob, output_dir: Path) -> None:
    """The adapter to output_dir; where that fails, to a folder for temporary files: what was learnt is not lost."""
    base = base_name(job.config)
    try:
        save_adapter(job.model, output_dir, base_model=base)
    except OSError as error:
        elsewhere = save_adapter(job.model, tempfile.mkdtemp(prefix="jindo-adapter-"), base_model=base)
        raise TrainingError(
            f"the adapter could not be written to {output_dir} ({error.strerror}): it is in {elsewhere}, copy it from "
            "there"
        ) from error


def answer(job: TrainingJob, view: TrainingView) -> str:
    """A greedy answer to the probe; empty where no row serves as one, or no memory is left for it."""
    if job.probe is None or not job.ranks.leads or job.ranks.sharded:  # alone, no rank has a sharded layer
        return ""
    prompt = prompt_ids(job.tokenizer, job.template, job.probe)
    ends = end_ids(job.tokenizer, job.template)
    try:
        return generate(job.model, job.tokenizer, prompt, max_new_tokens=ANSWER_TOKENS, ends=ends)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        view.notice("no memory for a sample answer: it is left out")
        return ""


def one_line(record: Record) -> str:
    text = " / ".join(part for part in (record.instruction, record.input) if part)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:99] + "…"


def figures_of(result: TrainResult, history: History) -> dict[str, Any]:
    """What a run came to, by name; None: it was not measured. MMLU's accuracies only where it was asked."""
    found: dict[str, Any] = {
        "steps": result.steps,
        "adapter_of_step": result.adapter_step,
        "held_out_loss_before": result.loss_before,
        "held_out_loss_after": result.loss_after,
        "held_out_perplexity_before": result.perplexity_before,
        "held_out_perplexity_after": result.perplexity_after,
        "tokens_per_second": result.tokens_per_second,
        "peak_bytes": result.peak_bytes,
        "skipped_steps": result.skipped_steps,
    }
    if (first := history.first_scores) is not None and (last := history.last_scores) is not None:
        found |= {"mmlu_accuracy_before": first.accuracy, "mmlu_accuracy_after": last.accuracy}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def record(config: TrainConfig, result: TrainResult, template: Template, results: dict[str, Any]) -> None:
    """The record of a run beside its adapter. results: `figures_of` it."""
    name = keep_template(result.output_dir, config.prompt_template_name, template)
    write_run(result.output_dir, record_of(config, results, name))


def record_of(config: TrainConfig, results: dict[str, Any], template: str | None = None) -> RunRecord:
    """template: left out, the user's own file where it lies."""
    template = template or _lasting(config.prompt_template_name) or config.prompt_template_name
    return RunRecord(_lasting(config.base_model), template, dataclasses.asdict(config), results)


def base_name(config: TrainConfig) -> str:
    """What the adapter's config calls its base."""
    return _lasting(config.base_model) or embedded.HUB_ID


def _lasting(name: str | None) -> str | None:
    """A local path made absolute, so that the run can be used from any folder; other names as they are."""
    return str(Path(name).absolute()) if name is not None and Path(name).exists() else name


def farewell(
    view: TrainingView, config: TrainConfig, result: TrainResult, probe: Record | None, card: str | None = None
) -> None:
    """What a person is told at the end, after the results. card: the run card's name, if one was written."""
    budget = config.max_memory_MB * 1_000_000
    if budget and result.peak_bytes > budget:
        over = (result.peak_bytes - budget) / 1e6
        view.notice(f"that is {over:,.0f} MB over the {config.max_memory_MB:,} MB asked for")
    files = ", ".join(filter(None, (WEIGHTS, CONFIG, METRICS, PICTURE, card)))
    view.say(f"Saved and read back: {result.output_dir}/{files}")
    base = [] if config.base_model is None else ["--base_model", config.base_model]
    asked = [("--instruction", probe.instruction), ("--input", probe.input)] if probe else [("--instruction", "…")]
    if probe is not None and not probe.instruction:
        asked[0] = ("--instruction", "…")  # rows that are learned whole: what stands for a prompt, only the user knows
    given = [part for flag, text in asked if text for part in (flag, text if len(text) < 80 else "…")]
    command = ["jindo-core", "generate", *base, "--lora_weights", str(result.output_dir), *given]
    view.say("Next: " + typed(command))
