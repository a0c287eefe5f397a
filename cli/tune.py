"""`jindo-core tune`: measures the dispatcher's crossovers on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from jindo_core.cli.flags import parse_flags

_DESCRIPTION = """\
Measure up to how many rows the kernels for few rows beat dequantize + matrix product on this machine,
and write it into your crossovers.json, which the dispatcher reads. Under a minute on a GPU."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The settings of `jindo-core tune`."""

    device: str = field(
        default="auto", metadata={"help": "auto, cpu, cuda or cuda:N", "group": "what", "metavar": "DEVICE"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print only, write nothing", "group": "what"})


def run(argv: list[str]) -> int:
    """Measures, prints and (unless told not to) writes; returns 0. Raises InputError for wrong input."""
    config = TuneConfig(**parse_flags(TuneConfig, argv, prog="jindo-core tune", description=_DESCRIPTION))

    from jindo_core.tune import show, tune

    show(tune(config.device, dry_run=config.dry_run))
    return 0
