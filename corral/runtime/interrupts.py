"""Ctrl-C, SIGTERM and a closed terminal, as one KeyboardInterrupt that comes once and never in the wrong moment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How long after an interruption that Python swallowed it comes once more.
AGAIN_S = 0.01


class Interrupts:
    """While it is entered, the first of these signals raises KeyboardInterrupt; later ones are ignored."""

    def __init__(self) -> None:
        self._old: dict[signal.Signals, Any] = {}
        self._old_hook = sys.unraisablehook
        self._is_held = self._is_due = False

    def __enter__(self) -> Self:
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = [number for number in SIGNALS if number != signal.SIGHUP or not is_nohup]
        handlers = {signal.SIGALRM: self._deliver} | dict.fromkeys(heard, self._receive)
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._old_hook

    def _receive(self, *_: object) -> None:
        self.ignore()
        self._is_due = True
        self._deliver()

    def _deliver(self, *_: object) -> None:
        if self._is_due and not self._is_held:
            self._is_due = False
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From now on nothing interrupts: what was begun is being put away."""
        self._is_due = False
        for number in self._old.keys() & set(SIGNALS):
            signal.signal(number, signal.SIG_IGN)

    def _swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
        """An interruption inside a finalizer or a weak reference's callback does not rise from there."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._is_due = True
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            self._old_hook(unraisable)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What happens inside is done to its end; an interruption meanwhile comes right after it."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self._deliver()  # also in the place of an error: what was interrupted fails for that very reason
