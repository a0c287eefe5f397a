"""`jindo-core train`: flags and config file -> TrainConfig -> the trainer."""

from __future__ import annotations

from jindo_core.cli.flags import parse_flags
from jindo_core.config import TrainConfig, resolve_train_config

_DESCRIPTION = """\
Fine-tune a language model with LoRA on its 4-bit weights; without flags,
SmolLM2-135M on bundled Korean rows. qlora.py's flags work too: docs/qlora.md.
[a / b]: the default with --base_model / without. Switches take --x, --x False
or --no_x. In a flag's name - and _ are the same. Many GPUs: docs/parallel.md."""

_EPILOG = """\
example:
  jindo-core train --base_model ./my-llama --data_path rows.json"""


def run(argv: list[str]) -> int:
    """Trains as `argv` says and returns 0. Raises InputError for wrong input."""
    given = parse_flags(TrainConfig, argv, prog="jindo-core train", description=_DESCRIPTION, epilog=_EPILOG)
    config, explicit, notices = resolve_train_config(given)

    if config.preview:
        from jindo_core.prepare import preview
        from jindo_core.progress import TrainingView

        view = TrainingView()
        for notice in notices:
            view.notice(notice)
        preview(config, explicit, view)
        return 0

    from jindo_core.train import train

    train(config, explicit, notices)
    return 0
