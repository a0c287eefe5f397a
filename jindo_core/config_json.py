"""Reading a model's config.json (or what says the same in other formats): every value of the type it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jindo_core.errors import InputError

LARGEST = 1 << 29
"""A size beyond it is a mistake, and two such sizes make a tensor whose bytes no longer fit 64 bits."""
MOST_LAYERS = 1 << 16
_LARGEST_FLOAT = 3e38  # fp32's, about


class ConfigReader:
    """Values by name, checked; null counts as left out.

    Args:
        raw: the contents. source: what messages call them. aliases: {name: what older files call it}.
        prefix: before the names in messages.
    """

    def __init__(
        self, raw: Mapping[str, Any], source: str = "config.json", aliases: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> None:  # fmt: skip
        self.raw, self.source, self._aliases, self._prefix = raw, source, aliases or {}, prefix

    def __call__(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        for known in (name, self._aliases.get(name)):
            if known is not None and self.raw.get(known) is not None:
                return self.raw[known]
        return default

    def fault(self, name: str, value: Any, expected: str) -> InputError:
        """The error that says what `name` is and should be."""
        return InputError(f"{self.source} has {self._prefix}{name} = {repr(value)[:200]}, expected {expected}")

    def whole(self, name: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 1 to `most`. Raises InputError."""
        value = self(name, default)
        if type(value) is not int or value < 1:
            raise self.fault(name, value, "a positive whole number")
        if value > most:
            raise self.fault(name, value, f"at most {most}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0. Raises InputError."""
        value = self(name, default)
        # Compared as it stands, for a whole number may be too large for a float; NaN is neither above nor below.
        if type(value) not in (int, float) or not 0 < value <= _LARGEST_FLOAT:
            raise self.fault(name, value, "a positive number")
        return value

    def switch(self, name: str, default: bool) -> bool:
        """True or false. Raises InputError."""
        value = self(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, value, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them. Raises InputError."""
        value = self(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int or abs(i) > LARGEST for i in ids):
            raise self.fault(name, value, "a token id or a list of them")
        return tuple(ids)

    def rope(self) -> ConfigReader:
        """RoPE's parameters; transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.

        Raises:
            InputError: they are no object.
        """
        parameters = self("rope_parameters") or self("rope_scaling") or {}
        if not isinstance(parameters, Mapping):
            raise InputError(f"{self.source} has RoPE parameters {parameters!r}, expected an object")
        return ConfigReader(parameters, self.source, prefix="RoPE ")
