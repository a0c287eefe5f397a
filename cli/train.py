"""`jindo-core train`: flags and config file -> TrainConfig -> the trainer."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig, resolve_train_config
from jindo_core.errors import CrossoverError, InputError, Stopped, TrainingError

_DESCRIPTION = """\
Fine-tune a language model with LoRA on its 4-bit weights; without flags,
SmolLM2-135M on bundled Korean rows. qlora.py's flags work too: docs/qlora.md.
[a / b]: the default with --base_model / without. Switches take --x, --x False
or --no_x. In a flag's name - and _ are the same. Many GPUs: docs/parallel.md."""

_EPILOG = """\
example:
  jindo-core train --base_model ./my-llama --data_path rows.json"""


def run(argv: list[str]) -> int:
    """Trains as `argv` says and returns 0. Raises InputError for wrong input. With --json what ends a run early is told
    on standard output, too. Of torchrun's processes the first one tells of wrong flags; the others exit with 2."""
    as_json = _asks_for_json(argv)
    try:
        given = parse_flags(TrainConfig, argv, prog="jindo-core train", description=_DESCRIPTION, epilog=_EPILOG)
        config, explicit, notices = resolve_train_config(given)
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        _tell(error, as_json)
        raise
    try:
        _run(config, explicit, notices)
    except (InputError, CrossoverError, TrainingError, Stopped, KeyboardInterrupt) as error:
        _tell(error, config.json)
        raise
    return 0


def _tell(error: BaseException, as_json: bool) -> None:
    if as_json:
        from jindo_core.training_view import JsonView

        JsonView().ended(error)


def _run(config: TrainConfig, explicit: frozenset[str], notices: Sequence[str]) -> None:
    if config.preview:
        from jindo_core.prepare import preview
        from jindo_core.training_view import TrainingView

        view = TrainingView()
        for notice in notices:
            view.notice(notice)
        preview(config, explicit, view)
        return

    from jindo_core.train import train

    train(config, explicit, notices)


def _asks_for_json(argv: Sequence[str]) -> bool:
    """Whether --json is among the words, of which another one may be wrong, or in the file that they name."""
    asked: bool | None = None
    file = ""
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name == "--config":
            file = value if equals else following
        if name == "--json":
            value = value if equals else following
            asked = value.lower() not in ("false", "0", "no", "off")
        elif word == "--no_json":
            asked = False
    return _file_asks(Path(file).expanduser()) if asked is None and file else bool(asked)


def _file_asks(path: Path) -> bool:
    """Whether a config file has `json: true`; it may have no other line that can be read."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:  # which is the error that is told of
        return False
    found = re.findall(r"""^["']?json["']?\s*[:=]\s*["']?(\w+)""", text, re.MULTILINE)
    return bool(found) and found[-1].lower() in ("true", "1", "yes", "on")
