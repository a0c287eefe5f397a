"""What the settings of `train` say about each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jindo_core.errors import InputError, nearest
from jindo_core.settings import show

if TYPE_CHECKING:
    from jindo_core.config import TrainConfig

SINKS = ("tensorboard", "wandb")
"""Where a run's figures may be reported to, by the names of the packages."""


def check_together(config: TrainConfig) -> None:
    """See that no two settings contradict, and put words that others use into ours, in place; for `__post_init__`.

    Raises:
        InputError: they do.
    """
    _check_rows(config)
    if config.micro_batch_size > config.batch_size:
        raise InputError(
            f"--micro_batch_size: got {config.micro_batch_size}, expected at most --batch_size "
            f"({config.batch_size}): lower it, or raise --batch_size"
        )
    _check_resume(config)
    _check_reports(config)
    if config.json and config.preview:
        raise InputError("--json: got it beside --preview, which shows rows to people: leave one of them out")
    if config.max_steps == 0:
        raise InputError("--max_steps: got 0, expected a whole number above 0, or -1 for no limit")
    if "all-linear" in config.lora_target_modules and len(config.lora_target_modules) > 1:
        raise InputError(
            f"--lora_target_modules: got {show(config.lora_target_modules)}, expected all-linear alone or "
            "a list of names: leave all-linear out or the rest"
        )


def _check_rows(config: TrainConfig) -> None:
    """What the settings of the data say about each other. Raises InputError."""
    paths, weights = len(config.data_path or ()), config.data_weights
    if weights is not None and len(weights) != paths:
        raise InputError(
            f"--data_weights: got {len(weights)} for {paths} of --data_path, expected one for each, in their order"
        )
    lengths = {"source_max_len": config.source_max_len, "target_max_len": config.target_max_len}
    for one, other in (lengths, list(lengths)[::-1]):
        if lengths[one] is None and lengths[other] is not None:
            raise InputError(f"--{other}: got it alone, expected --{one} beside it: a row is cut by both or neither")


def _check_resume(config: TrainConfig) -> None:
    """alpaca-lora's three words for resume_from_checkpoint, where a path may stand too. Raises InputError."""
    word = (config.resume_from_checkpoint or "none").lower()
    if word in ("none", "false"):
        object.__setattr__(config, "resume_from_checkpoint", None)
    elif config.resume:
        raise InputError("--resume: got it beside --resume_from_checkpoint, expected one of them")
    elif word == "true":
        object.__setattr__(config, "resume_from_checkpoint", "True")


def _check_reports(config: TrainConfig) -> None:
    """The names of report_to, in small letters; and none beside what asks for wandb. Raises InputError."""
    if config.report_to is not None:
        names = tuple(dict.fromkeys(name.lower() for name in config.report_to))
        expected = "expected tensorboard and wandb, or all or none alone"
        for name in names:
            if name not in (*SINKS, "all", "none"):
                raise InputError(f"--report_to: got {name!r}, {expected}.{nearest(name, [*SINKS, 'all', 'none'])}")
        if len(names) > 1 and {"all", "none"} & set(names):
            raise InputError(f"--report_to: got {show(names)}, {expected}")
        if names == ("none",) and config.wandb_project is not None:
            raise InputError("--wandb_project: got it beside --report_to none, expected one of them: leave one out")
        object.__setattr__(config, "report_to", names)
    if config.wandb_watch == "False":
        object.__setattr__(config, "wandb_watch", "false")
