"""How far long work is: a bar with the time left on a terminal, a line in the log now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_SEC = 10.0


class WorkProgress:
    """Counts finished units of work; a context that takes its bar away when it is left.

    The first unit starts the clock of the time left: what comes before it (compiling, opening files) is not repeated.
    """

    def __init__(self, total: int, what: str, unit: str):
        """Say what is done ("predict") and what is counted ("window"), of which there are `total`."""
        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty())
        self._first: tuple[float, int] | None = None
        self._told = time.monotonic()

    def __enter__(self) -> "WorkProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count some units more."""
        self.done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._first is None:
            self._first = (now, self.done)
        elif self._bar.disable and now - self._told > LOG_EVERY_SEC:
            self._told = now
            begin, before = self._first
            left = (now - begin) / (self.done - before) * (self.total - self.done)
            log.info("%s | %s %d of %d | %.0f s left", self.what, self.unit, self.done, self.total, left)
