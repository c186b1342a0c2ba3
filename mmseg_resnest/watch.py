"""The watch over the other processes of a run: one that is dead or stands still ends the job, and is named."""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.distributed import TCPStore

from mmseg_resnest.registry import HOOKS

EXIT_STALLED = 124  # as of the command `timeout`


@HOOKS.register_module()
class WatchHook(Hook):
    """Ends this process, with the code 124, when another one of the run has not moved for ``timeout`` seconds.

    A thread of each process tells the others, through the store that they were started with, that it is alive and at
    which iteration. Named is a rank that tells nothing (killed, stopped, its machine gone), or one that stays behind
    while the others wait for it (its data do not come, say). What holds all of them up at the same iteration is left to
    the time limit of the collectives, 30 minutes, and so is one process alone.

    Args:
        timeout: Seconds; more than one rank alone may take to save a checkpoint or to finish an evaluation.

    Raises:
        ValueError: ``timeout`` is not positive.
    """

    priority = 'VERY_HIGH'

    def __init__(self, timeout: float = 600) -> None:
        if timeout <= 0:
            raise ValueError(f'WatchHook: timeout={timeout}; expected a number of seconds above 0')
        self.timeout = timeout
        self._progress = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def before_train(self, runner: Runner) -> None:
        """Starts the watch, where there are others to look at."""
        if runner.world_size > 1:
            watch = (runner.rank, runner.world_size)
            self._thread = threading.Thread(target=self._watch, args=watch, name='watch', daemon=True)
            self._thread.start()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Notes that this process has its data, and begins a step."""
        self._progress += 1

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Notes that this process has its data, and evaluates a batch."""
        self._progress += 1

    def after_train(self, runner: Runner) -> None:
        """Ends the watch."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, rank: int, world_size: int) -> None:
        # A connection of its own: collectives may hold the process group's for long.
        limit = timedelta(seconds=self.timeout)
        prefix = f'mmseg_resnest/watch/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
        others = [other for other in range(world_size) if other != rank]
        seen = _Seen(others)
        try:
            store = TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False, timeout=limit)
            beat = 0
            while not self._done.wait(min(self.timeout / 5, 5)):
                beat += 1
                store.set(f'{prefix}/{rank}', f'{beat} {self._progress}')
                told = {other: f'{prefix}/{other}' for other in others}
                seen.update({other: store.get(key).decode() for other, key in told.items() if store.check([key])})
                if reason := seen.judge(self._progress, self.timeout):
                    _end(rank, reason)
            store.set(f'{prefix}/{rank}', 'done')
        except Exception as error:
            if not self._done.is_set():
                _end(rank, f'the store at {os.environ["MASTER_ADDR"]}, kept by rank 0 or torchrun, is gone: {error}')


class _Seen:
    """What the other ranks have told, and when they last told something else."""

    def __init__(self, ranks: list[int]) -> None:
        now = time.monotonic()
        self.told = dict.fromkeys(ranks, '0 0')
        self.changed = dict.fromkeys(ranks, now)
        self.moved = dict.fromkeys(ranks, now)
        self.own_progress, self.own_moved = 0, now

    def update(self, told: dict[int, str]) -> None:
        now = time.monotonic()
        for rank, text in told.items():
            if text != self.told[rank]:
                self.changed[rank] = now
            if text.split()[-1] != self.told[rank].split()[-1]:
                self.moved[rank] = now
            self.told[rank] = text

    def judge(self, progress: int, timeout: float) -> str:
        """Returns which rank holds the run up and how that is known; empty: none does."""
        now = time.monotonic()
        if progress != self.own_progress:
            self.own_progress, self.own_moved = progress, now
        for rank, text in self.told.items():
            if text == 'done':
                continue
            if now - self.changed[rank] > timeout:
                return f'rank {rank} has not been heard of for {timeout:g} s: dead, stopped, or cut off'
            if min(now - self.moved[rank], now - self.own_moved) > timeout and int(text.split()[1]) < progress:
                return f'rank {rank} has been behind the others for {timeout:g} s: its data do not come, or it hangs'
        return ''


def _end(rank: int, reason: str) -> None:
    """Ends this process from whatever it waits in."""
    advice = 'The checkpoints are whole; --resume goes on from the newest.'
    sys.stderr.write(f'\nerror on rank {rank}: {reason}. This rank ends the job. {advice}\n')
    sys.stderr.flush()
    os._exit(EXIT_STALLED)
