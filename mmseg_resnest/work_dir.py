"""A work dir is one run's at a time: of two, each would overwrite the other's checkpoints."""

import fcntl
import os
import socket
import time
from logging import WARNING
from pathlib import Path
from typing import TextIO

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log

LOCK = '.lock'  # the file of a work dir that the run's rank 0 holds

_held: dict[Path, TextIO] = {}  # closed, a file gives its lock up


def claim(work_dir: str | Path) -> None:
    """Takes a work dir for the run of this process, and of those beside it, until ``release`` or rank 0's end.

    The lock is the operating system's (POSIX, ``fcntl``): workers that rank 0 forks have no part in it. Network file
    systems that know such locks hold it against other machines; of those that do not, the log tells.

    The folder is made if need be.

    Raises:
        ValueError: Another run has it, on all processes.
    """
    refused = [_lock(Path(work_dir).resolve() / LOCK) if is_main_process() else None]
    broadcast_object_list(refused)
    if refused[0]:
        raise ValueError(refused[0])


def release(work_dir: str | Path) -> None:
    """Gives a work dir up, if this process has it."""
    if file := _held.pop(Path(work_dir).resolve() / LOCK, None):
        file.close()


def _lock(path: Path) -> str | None:
    """Locks a file that says by whom; returns why not, if another process has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _held.get(path) or path.open('a+')  # a second one, closed, would give up the lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f'{path.parent}: another run is training here: {path.read_text()}. Expected a work dir of its own for each '
            f'run: name one with --work-dir, or stop that run. If its machine is gone, delete {path}'
        )
    except OSError as error:
        print_log(f'{path}: not locked ({error}): see that no other run is given this work dir', 'current', WARNING)
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}')
    file.flush()
    _held[path] = file
    return None
