"""Flags made from a config class: spelling, values, help, and one-line errors.

argparse keeps the flags and writes the help; it never sees what a person typed. That is first brought to one
spelling (`_canonical`), because argparse by itself cannot take `--a-b` for `--a_b`, `--flag False` beside
`--flag`, a list with or without brackets, quotes and spaces, or a value that begins with a dash.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from jindo_core.config import PROFILES, TrainConfig, accepted, did_you_mean, meant
from jindo_core.config_files import read_config_file
from jindo_core.errors import InputError
from jindo_core.qlora import ours
from jindo_core.settings import SEPARATOR, Config, Setting, show

HELP = ("-h", "--help")
_DASHES = "-‐‑‒–—−"  # web pages and word processors turn "--" into these

_BARE = re.compile(r"(?!-)|-[\d.]")  # a word, or a negative number
_LISTS = {"names": " ", "numbers": " ", "paths": SEPARATOR}
"""Kinds of settings that take several words, and what joins them."""
_GATHERED = ("numbers", "paths")
"""Of these, the kinds whose flag may be given again, for more of them."""


class _Parser(argparse.ArgumentParser):
    """argparse without its usage dump and without its own exit on an error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help")


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((100, 24)).columns, 110) - 2
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)


def make_parser(
    config_class: type[Config], *, prog: str, description: str = "", epilog: str = ""
) -> argparse.ArgumentParser:
    """A parser that holds `--help`, `--config` and a flag for every setting of `config_class`."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [--flag value]... [--config FILE]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        add_help=False,
        formatter_class=_formatter,
    )
    add_flags(parser, config_class)
    group = parser.add_argument_group("also")
    group.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="settings from a .yaml or .toml file; flags win",
    )
    group.add_argument(*HELP, action="help", help="this text")
    return parser


def add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Adds a flag for every setting, in the groups of the config class.

    None has a default here: what stays unset is filled in once the profile is known.
    """
    groups: dict[str, Any] = {}
    columns = [PROFILES["alpaca"], PROFILES["embedded"]] if config_class is TrainConfig else []
    for setting in accepted(config_class).values():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        group = groups[setting.group]
        help = (setting.help + _default_text(setting, columns)).replace("%", "%%")
        if setting.hidden:
            help = argparse.SUPPRESS
        if setting.kind == "bool":
            group.add_argument(
                f"--{setting.name}", action="store_const", const="True", default=argparse.SUPPRESS, help=help
            )
            group.add_argument(
                f"--no_{setting.name}",
                dest=setting.name,
                action="store_const",
                const="False",
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )
        else:
            action = "append" if setting.kind in _GATHERED else "store"
            group.add_argument(
                f"--{setting.name}", metavar=setting.metavar, action=action, default=argparse.SUPPRESS, help=help
            )


def _default_text(setting: Setting, columns: Sequence[Mapping[str, Any]]) -> str:
    """` [128 / 8]` where the profiles differ, ` [42]` where not, nothing where the help says it."""
    if setting.default is None:
        return ""
    values = dict.fromkeys(show(column.get(setting.name, setting.default)) for column in columns)
    return f" [{' / '.join(values) or show(setting.default)}]"


def parse_flags(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    prog: str = "jindo-core",
    description: str = "",
    epilog: str = "",
) -> dict[str, Any]:
    """The settings that `argv` gives, and no others, each read in its own type.

    `--config FILE` is read first and flags win over it. A repeated flag's last value counts; paths and numbers, of
    which there may be several, are gathered in their order. `--help` prints and exits. Raises InputError, one line, for
    an unknown flag (with the nearest name), a missing or a wrong value, and a word that belongs to no flag.
    """
    parser = make_parser(config_class, prog=prog, description=description, epilog=epilog)
    if any(word in HELP for word in argv):
        # Not argparse's own way out, which swallows a closed pipe.
        print(parser.format_help(), end="", flush=True)
        raise SystemExit(0)
    known = accepted(config_class)
    typed = vars(parser.parse_args(list(_canonical(config_class, argv, prog))))
    config_file = typed.pop("config", None)
    flags = {name: _read(known[name], said) for name, said in typed.items()}
    filed = read_config_file(config_file, config_class) if config_file is not None else {}
    said = {ours(name) for name in flags}
    return {**{name: value for name, value in filed.items() if ours(name) not in said}, **flags}


def _read(setting: Setting, said: str | list[str]) -> Any:
    """A flag's value, or those of all its places in the line."""
    if isinstance(said, str):
        return setting.read(said)
    return tuple(itertools.chain.from_iterable(setting.read(text) for text in said))


def _canonical(config_class: type[Config], argv: Sequence[str], prog: str) -> Iterator[str]:
    """What was typed, as `--name=value` with single values, `--name` and `--no_name` for booleans."""
    known = accepted(config_class)
    words, before = list(argv), None
    while words:
        word = words.pop(0)
        spelled, equals, value = word.partition("=")
        name = _name(spelled)
        if name == "config" or (name in known and known[name].kind != "bool"):
            setting = known.get(name)
            if name == "profile" and not equals and not (words and not words[0].startswith("-")):
                value = "True"  # bare: a profile of some steps
            elif not equals:
                value = _take_value(setting, name, words, known, prog)
            elif setting is not None and setting.kind in _LISTS:
                value = _LISTS[setting.kind].join([value, *_take_list(words)])
            parts = [value] if _verbatim(setting) else [_unquoted(part) for part in value.split(SEPARATOR)]
            own, said = meant(name, SEPARATOR.join(parts))
            yield f"--{own}={said}"
            before = setting
        elif name in known:
            if not equals:
                value = words.pop(0) if words and not words[0].startswith("-") else "True"
            yield f"--{name}" if known[name].read(_unquoted(value)) else f"--no_{name}"
        elif name is not None and name.startswith("no_") and _is_bool(known, name[3:]):
            if equals:
                raise InputError(
                    f"{spelled}: got the value {value!r}, expected none: write {spelled} or --{name[3:]}"
                )
            yield f"--{name}"
        elif name is not None and not equals and name.startswith("no_") and _is_word(known, name[3:]):
            yield f"--{name[3:]}=False"
        else:
            if before is not None and before.name == "data_path" and not word.startswith(tuple(_DASHES)):
                raise InputError(
                    f"got {word!r} after a --data_path, and this command takes one: give a folder or a quoted pattern. "
                    f"See {prog} --help"
                )
            raise InputError(_unknown(word, config_class, prog))


def _name(spelled: str) -> str | None:
    """`base_model` of `--base-model`; None of a word that is no flag."""
    return spelled[2:].replace("-", "_") if spelled.startswith("--") else None


def _is_bool(known: Mapping[str, Setting], name: str) -> bool:
    return name in known and known[name].kind == "bool"


def _is_word(known: Mapping[str, Setting], name: str) -> bool:
    return name in known and known[name].kind == "word"


def _is_flag(word: str, known: Mapping[str, Setting]) -> bool:
    name = _name(word.partition("=")[0])
    return name is not None and (name in (*known, "config") or _is_bool(known, name.removeprefix("no_")))


def _take_value(
    setting: Setting | None, name: str, words: list[str], known: Mapping[str, Setting], prog: str
) -> str:
    """Removes the value of `--name` from the front of `words`. Free text may begin with dashes."""
    if setting is not None and setting.kind == "word":  # nothing depends on it: what follows, or nothing
        parts = list(_take_list(words, _BARE))
        return " ".join(parts) if parts else "True"
    if setting is not None and setting.kind in _LISTS:
        parts = list(_take_list(words))
        if parts:
            return _LISTS[setting.kind].join(parts)
    elif words and (not words[0].startswith("--") or (_verbatim(setting) and not _is_flag(words[0], known))):
        return words.pop(0)
    got = f"the flag {words[0]}" if words else "nothing"
    expected = setting.expected() if setting is not None else "a .yaml or .toml file"
    raise InputError(f"--{name}: got {got} after it, expected a value: {expected}. See {prog} --help")


def _verbatim(setting: Setting | None) -> bool:
    return setting is not None and setting.verbatim


def _take_list(words: list[str], bare: re.Pattern[str] = re.compile("(?!-)")) -> Iterator[str]:
    while words and bare.match(words[0]):
        yield words.pop(0)


def _unquoted(value: str) -> str:
    """Without the matched quotes round it, which Windows' CMD hands on as part of the word."""
    text = value.strip()
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else value


def _unknown(word: str, config_class: type[Config], prog: str) -> str:
    spelled = word.partition("=")[0]
    bare = spelled.lstrip(_DASHES).replace("-", "_")
    if spelled[:1] in tuple(_DASHES):
        return f"got the unknown flag {spelled!r}.{did_you_mean(bare, config_class, '--')} See {prog} --help"
    if bare in accepted(config_class):
        return f"got {word!r}, expected a flag. Did you mean '--{bare}'? See {prog} --help"
    return f"got {word!r}, which belongs to no flag: a value with spaces needs quotes. See {prog} --help"
