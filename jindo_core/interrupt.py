"""SIGTERM and SIGINT while a run must not lose what it has done: asked for once, it ends in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_KINDS = (signal.SIGTERM, signal.SIGINT)
_AT_ONCE: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Broken(Exception):
    """Raised inside `StopSignals.breakable` when a signal comes."""


class StopSignals:
    """A context manager: inside, the first signal is only noted, and the second acts at once.

    Signals that the process ignores (a job under nohup) stay ignored. Outside the main thread, where Python takes no
    handlers, signals are its owner's.

    Attributes:
        asked: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._breakable = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for kind in _KINDS:
                if signal.getsignal(kind) not in (signal.SIG_IGN, None):
                    self._former[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._former.items():
            signal.signal(kind, handler)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """What may be left off in the middle and done again later. Raises `Broken` when a signal comes, or has come."""
        self._breakable = True
        try:
            if self.asked is not None:
                raise Broken
            yield
        finally:
            self._breakable = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        for kind in self._former:
            signal.signal(kind, _AT_ONCE[kind])
        if self._breakable:
            self._breakable = False
            raise Broken
