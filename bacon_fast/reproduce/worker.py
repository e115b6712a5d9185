"""One run of a table: `bacon-fast train` in a process that stops, and saves, when its parent dies."""

import ctypes
import os
import signal
import sys

from bacon_fast.cli import train

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *words = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    train(words)


if __name__ == "__main__":
    main()
