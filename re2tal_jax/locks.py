"""One run at a time in a folder: a file there that belongs to the run, whatever ends it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from re2tal_jax.errors import DataError


def claim(path: Path, *, work: str, option: str) -> BinaryIO:
    """Return a file that is this process's alone until it is closed, or the process ends.

    It and its folder are created if they are not there; it is open to read and to append, at no particular place.

    Args:
        path: of the file.
        work: what is at work in the folder if it is not free, for the error: "prediction".
        option: of the command line that names another folder, for the error: "--out".

    Raises:
        DataError: another run has it; it cannot be written, or its file system knows no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()  # whoever had it has removed it between the two
    except BlockingIOError as error:
        raise DataError(
            f"{path.parent}: another {work} is at work there. Wait for it, or choose another folder with {option}."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot be written ({error.strerror or error}): choose another folder with {option}."
        ) from error


@contextmanager
def claimed(path: Path, *, work: str, option: str) -> Iterator[None]:
    """Hold a file that says nothing but that somebody is at work, and remove it afterwards; see `claim`."""
    with claim(path, work=work, option=option):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
