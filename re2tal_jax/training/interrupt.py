"""SIGTERM and Ctrl-C ask a run to finish its step, save and leave; a second Ctrl-C leaves at once."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class Leave(BaseException):
    """Raised inside `StopSignals.leaving_early` by the first signal; not an Exception, so that nothing swallows it."""


class StopSignals:
    """A context in which the two signals set `requested` instead of killing; does nothing outside the main thread."""

    def __init__(self):
        self.requested: str | None = None
        self._may_raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested is not None:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            return
        self.requested = name
        log.warning("%s: this step is finished and saved, then the run ends. Ctrl-C once more leaves at once.", name)
        if self._may_raise:
            raise Leave

    @contextmanager
    def leaving_early(self) -> Iterator[None]:
        """Within this context a signal raises Leave: for work that takes long and can be repeated.

        Not with several processes, where the others would wait for this one in that work.
        """
        self._may_raise = jax.process_count() == 1
        try:
            yield
        finally:
            self._may_raise = False

    def agreed(self, may_wait: bool) -> bool:
        """Whether to stop now, the same answer in every process; several processes ask each other if `may_wait`."""
        if jax.process_count() == 1:
            return self.requested is not None
        if not may_wait:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(self.requested is not None)).any())
