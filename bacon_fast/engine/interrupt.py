"""Stopping a run between two steps, so that the saved state is that of a whole step."""

import signal
import threading
import time

from bacon_fast.engine import distributed

# Every so many seconds the ranks ask each other whether one of them was told to stop.
ASK_EVERY = 1.0


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    `signum` is the signal that this process received, or None. Outside the main thread, where Python delivers no
    signals, it stays None.

    Args:
        step: completed steps at the start.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, step: int = 0) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}
        self._asked, self._next, self._time = step, step + 1, time.perf_counter()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum

    def agreed(self, step: int, *, now: bool = False) -> int | None:
        """The signal that any rank received, on all ranks after the same step; None while there is none.

        One process answers at once. Several ask each other about once a second, after a number of steps that follows
        from the speed they all measured. Their hosts wait for each other then, but for no device.

        Args:
            step: completed steps, the same on all ranks.
            now: ask in any case; the same on all ranks.
        """
        if distributed.num_ranks() == 1:
            return self.signum
        if not now and step < self._next:
            return None
        steps, seconds = max(1, step - self._asked), time.perf_counter() - self._time
        # At most twice as long as before: the time of a first step, or of a burst of launches, says little.
        gap = max(1, min(2 * steps, int(steps * ASK_EVERY / max(seconds, 1e-6))))
        signum, negative_gap = distributed.all_reduce_max(self.signum or 0, -gap)
        self._asked, self._next, self._time = step, step - negative_gap, time.perf_counter()
        return signum or None
