"""One user of a directory at a time."""

import contextlib
import os
import warnings
import weakref
from pathlib import Path

from bacon_fast.system import OPEN_FILES_CAN_BE_REMOVED, UNSUPPORTED, lock_file

_FILE = ".lock"


class DirectoryLock:
    """Exclusive use of a directory, which is made when it is missing.

    It lasts until `release`, or until this process and all that inherit `descriptor` have ended, in whatever way. Where
    the file system has no locks, a warning says so and nobody is kept out.

    Args:
        folder: the directory; the file .lock in it carries the lock.
        name: the argument that named the directory, for the message.

    Raises:
        ValueError: it is locked already, by another process or another object of this one.
        OSError: the directory or the file cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder = folder.absolute()
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
            self._close = weakref.finalize(self, os.close, self.descriptor)
            try:
                lock_file(self.descriptor)
            except BlockingIOError as error:
                self._close()
                message = f"{name}: {folder} is in use by another command, which may be saving its state"
                raise ValueError(message) from error
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    self._close()
                    raise
                text = f"{name}: cannot lock {folder} ({error.strerror}): see that no other command uses it"
                warnings.warn(text, stacklevel=3)
            if self._is_in_place():
                return
            self._close()

    def _is_in_place(self) -> bool:
        """Whether the file is still in the directory: the previous holder of the lock may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.folder / _FILE))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the directory back. If it was made for the lock and is otherwise empty, it goes, with new parents."""
        if not self._close.alive:
            return
        # Where an open file can be removed, it goes while it is locked, so that nobody locks what is about to go. Where
        # it cannot, it is closed first, and stays if another command has opened it by then.
        if not OPEN_FILES_CAN_BE_REMOVED:
            self._close()
        with contextlib.suppress(OSError):  # a parent may be in use by now
            if os.listdir(self.folder) == [_FILE]:
                (self.folder / _FILE).unlink()
                for path in self._made:
                    path.rmdir()
        self._close()
