"""Stopping a run between two steps, so that what is saved is a whole step's state."""

import signal
import threading


class StopRequest:
    """Context manager that turns the first SIGINT or SIGTERM into a request; a second one interrupts at once.

    `signum` is the signal received, or None. Outside the main thread, where Python delivers no signals, it stays None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

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
