"""Every setting of `jindo-core eval`, and which file each of its tasks reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jindo_core.config import check_device, read_fields
from jindo_core.data_config_inspect import adapter_setting, base_setting
from jindo_core.errors import InputError, nearest
from jindo_core.settings import setting

KOBEST = ("kobest_boolq", "kobest_copa", "kobest_hellaswag", "kobest_sentineg", "kobest_wic")
TASKS = ("perplexity", "mmlu", "generation", *KOBEST)
"""What --tasks may name, beside `kobest` for all five."""

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
"""Settings of the task `generation` that its answers depend on."""

_ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz")
_TASKS, _OUTPUT, _MEMORY = "what is measured", "what is written", "memory and device"
_ANSWERS = "generation: how answers are asked for"


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The settings of `jindo-core eval`. Raises InputError when a value is wrong."""

    base_model: str | None = base_setting()
    lora_weights: str | None = adapter_setting()
    tasks: tuple[str, ...] | None = setting(
        None, _TASKS, "perplexity, mmlu, generation, kobest (all five) or one as kobest_copa",
        metavar="A,B", example="tasks such as perplexity,kobest",
    )  # fmt: skip
    data_path: tuple[str, ...] | None = setting(
        None, _TASKS, "text (perplexity), .json (mmlu), folder or .tsv (kobest), rows (generation), or TASK=PATH",
        path=True, metavar="DATA...",
    )  # fmt: skip
    split: Literal["test", "dev"] = setting("test", _TASKS, "of KoBEST's files in a folder")
    limit: int | None = setting(None, _TASKS, "the first N questions, windows or rows of each task", at_least=1)
    window: int | None = setting(
        None, _TASKS, "perplexity: tokens in a window; left out: the model's context, 2048 at most", at_least=2
    )
    stride: int | None = setting(
        None, _TASKS, "perplexity: tokens between two windows; left out: half a window", at_least=1
    )
    mmlu_dataset: Literal["mmlu-fs", "mmlu-zs", "mmlu"] = setting(
        "mmlu-fs", _TASKS, "mmlu: which of a folder's files, five-shot or zero-shot"
    )
    mmlu_split: Literal["eval", "test"] = setting("eval", _TASKS, "mmlu: which of these")
    mmlu_source_max_len: int = setting(2048, _TASKS, "mmlu: longest question in tokens", at_least=2)

    dataset_format: str | None = setting(None, _ANSWERS, "of the rows; left out: by their columns", metavar="NAME")
    prompt_template_name: str | None = setting(
        None, _ANSWERS, "a template's name or file; left out: the adapter's, else alpaca", metavar="NAME"
    )
    max_new_tokens: int = setting(128, _ANSWERS, "longest answer in tokens", at_least=1)
    temperature: float = setting(0.0, _ANSWERS, "0: always the likeliest token (greedy)", at_least=0)
    top_p: float = setting(1.0, _ANSWERS, "sample from this share of the probability", above=0, at_most=1)
    top_k: int = setting(0, _ANSWERS, "sample from the k likeliest tokens (0: all)", at_least=0)
    seed: int = setting(42, _ANSWERS, "of the sampling, with a row's number", at_least=0, at_most=2**32 - 1)

    quantize: Literal["nf4", "none", "both"] = setting(
        "nf4", _MEMORY, "how the base is kept; both: one after the other, and how far they are apart"
    )
    double_quant: bool = setting(True, _MEMORY, "quantize NF4's scales too")
    batch_size: int = setting(8, _MEMORY, "inputs at once; halved where memory runs out", at_least=1)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", _MEMORY, "of the arithmetic")
    device: str = setting("auto", _MEMORY, "auto, cpu, cuda or cuda:N", metavar="DEVICE")

    output_path: str | None = setting(
        None, _OUTPUT, "results as JSON; what is done so far lies in FILE.part, from where a stopped run goes on",
        path=True, metavar="FILE",
    )  # fmt: skip
    predictions_path: str | None = setting(None, _OUTPUT, "each answer as a line of JSON", path=True, metavar="FILE")
    overwrite: bool = setting(False, _OUTPUT, "replace these files, and another run's FILE.part")

    def __post_init__(self) -> None:
        read_fields(self)
        check_device(self.device)
        if self.tasks is None:
            raise InputError(f"--tasks: got nothing, expected some of {', '.join((*TASKS, 'kobest'))}")
        for name in self.tasks:
            if name not in (*TASKS, "kobest"):
                known = (*TASKS, "kobest")
                raise InputError(f"--tasks: got {name!r}, expected some of {', '.join(known)}.{nearest(name, known)}")
        if self.data_path is None:
            raise InputError("--data_path: got nothing, expected the file or folder that each task reads")
        if self.output_path is not None and self.output_path == self.predictions_path:
            raise InputError(f"--predictions_path: got --output_path's {self.output_path}, expected another file")
        task_paths(self)

    def chosen(self) -> tuple[str, ...]:
        """The tasks, `kobest` as its five, each once."""
        assert self.tasks is not None
        names = (name for task in self.tasks for name in (KOBEST if task == "kobest" else (task,)))
        return tuple(dict.fromkeys(names))


def task_paths(config: EvalConfig) -> dict[str, str]:
    """{task: the path that it reads}, from `TASK=PATH`, else by what a path looks like.

    A folder or a .tsv is KoBEST's, a .json or .jsonl MMLU's, rows in any form generation's where those are not asked
    for, and anything else perplexity's text; a single path is the one task's that is asked for, whatever it looks like.

    Raises:
        InputError: a task without a path, a path without a task, or two for one.
    """
    chosen = config.chosen()
    found: dict[str, str] = {}
    for given in config.data_path or ():
        named, equals, path = given.partition("=")
        if equals and named in (*TASKS, "kobest"):
            own = [task for task in chosen if task == named or (named == "kobest" and task in KOBEST)]
        else:
            path = given
            own = _readers_of(path, chosen)
        if not own:
            raise InputError(f"--data_path: got {given}, which none of --tasks {','.join(chosen)} reads: add its task")
        for task in own:
            if task in found:
                raise InputError(f"--data_path: got {found[task]} and {path} for {task}, expected one: write TASK=PATH")
            found[task] = str(Path(path).expanduser())
    missing = [task for task in chosen if task not in found]
    if missing:
        raise InputError(f"--data_path: got nothing for {missing[0]}, expected {missing[0]}=PATH among its paths")
    return found


def _readers_of(path: str, chosen: Sequence[str]) -> list[str]:
    """The tasks among `chosen` that a path without a name is for."""
    families = {"kobest" if task in KOBEST else task for task in chosen}
    if len(families) == 1:
        return list(chosen)
    likely = [
        ("kobest", (".tsv", ".parquet"), Path(path).expanduser().is_dir()),
        ("mmlu", (".json", ".jsonl"), False),
        ("generation", _ROWS, Path(path).expanduser().is_dir()),
    ]
    for family, endings, folder in likely:
        if family in families and (folder or path.endswith(endings)):
            return [task for task in chosen if task == family or (family == "kobest" and task in KOBEST)]
    return [task for task in chosen if task == "perplexity"]
