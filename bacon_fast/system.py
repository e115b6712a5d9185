"""What differs between operating systems: cores, memory, locks on files."""

import errno
import os
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    try:
        import msvcrt
    except ImportError:
        msvcrt = None

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of `lock_file` where there are no locks, such as on some file systems that machines share."""
OPEN_FILES_CAN_BE_REMOVED = fcntl is not None
_WAIT_SECONDS = 0.1


def usable_cores() -> int:
    """CPU cores that this process may run on; where the system does not say, those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def lock_file(descriptor: int, *, wait: bool = False) -> None:
    """Locks an open file for this process and those that inherit the descriptor, until the last of them closes it.

    Raises:
        BlockingIOError: it is locked through another descriptor, unless `wait` waits for that one.
        OSError: anything else; with one of `UNSUPPORTED`, there are no locks here.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    if msvcrt is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while True:
        os.lseek(descriptor, 0, os.SEEK_SET)  # it locks from the current position on
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except PermissionError as error:
            if not wait:
                raise BlockingIOError(errno.EWOULDBLOCK, error.strerror) from error
        time.sleep(_WAIT_SECONDS)
