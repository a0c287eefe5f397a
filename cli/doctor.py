"""`jindo-core doctor`: what is there, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from jindo_core.cli.flags import parse_flags

_DESCRIPTION = """\
Say what this machine has, which implementation of each operator it would run, and whether it can train.
Exit code 0 when it can, 1 when something needed is broken."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The settings of `jindo-core doctor`."""

    json: bool = field(default=False, metadata={"help": "JSON for machines instead of a table", "group": "output"})


def run(argv: list[str]) -> int:
    """Prints the findings; returns 0 where the machine can train, else 1."""
    config = DoctorConfig(**parse_flags(DoctorConfig, argv, prog="jindo-core doctor", description=_DESCRIPTION))

    from jindo_core.doctor import examine, show

    findings = examine()
    if config.json:
        print(json.dumps(findings, indent=2, ensure_ascii=False))
    else:
        show(findings)
    return 1 if findings["problems"] else 0
