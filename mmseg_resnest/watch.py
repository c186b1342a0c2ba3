"""The watch over the other processes of a run: one that is dead or stands still ends the job, and is named."""

import os
import sys
import threading
import time
import uuid
from enum import IntEnum
from typing import Any, NamedTuple

from mmengine.dist import barrier, broadcast_object_list
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.hooks import RemovableHandle

from mmseg_resnest.registry import HOOKS

EXIT_STALLED = 124  # as of the command `timeout`


class Phase(IntEnum):
    """What a process is at, in the order of one iteration; an evaluation comes before the iteration of its number."""

    EVALUATION = 0
    EVALUATED = 1  # its own batches
    DATA = 2
    FORWARD = 3
    BACKWARD = 4
    STEPPED = 5
    TRAINED = 6


class Progress(NamedTuple):
    """How far a process is; the larger, the further."""

    iteration: int = 0
    phase: int = Phase.EVALUATION
    batches: int = 0  # evaluated


@HOOKS.register_module()
class WatchHook(Hook):
    """Ends this process, with the code 124, when another one of the run has not moved for ``timeout`` seconds.

    A thread of each process tells the others, through the store that they were started with, that it is alive and how
    far it is. Named is a rank that tells nothing (killed, stopped, its machine gone), or one that stays behind while
    the others wait for it (its data do not come, say); every rank that can still speak tells the same reason. A store
    that does not answer, as its process is stopped, ends them too. What holds all of them up between the same two
    phases is left to the time limit of the collectives, 30 minutes, and so is one process alone.

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
        self._progress = Progress()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard = 0.0  # when the store last answered
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Runner) -> None:
        """Starts the watch, where there are others to look at."""
        if runner.world_size == 1:
            return
        # Called by the process alone, before and after the collectives of the pass. Nothing here waits for a GPU.
        self._handles = [
            runner.model.register_forward_pre_hook(lambda *_: self._reach(runner, Phase.FORWARD)),
            runner.model.register_forward_hook(lambda *_: self._reach(runner, Phase.BACKWARD)),
        ]
        name = [uuid.uuid4().hex]  # the store may outlive this run
        broadcast_object_list(name)
        # A connection of its own: collectives may hold the process group's for long.
        store = PrefixStore(f'watch/{name[0]}', _get_default_store().clone())
        watch = (runner.rank, runner.world_size, store)
        self._thread = threading.Thread(target=self._watch, args=watch, name='watch', daemon=True)
        self._heard = time.monotonic()
        self._thread.start()
        threading.Thread(target=self._watch_store, args=(runner.rank,), name='watch of the store', daemon=True).start()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Notes that this process has its data."""
        self._reach(runner, Phase.DATA)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes that this process has made its step."""
        self._reach(runner, Phase.STEPPED)

    def before_val_epoch(self, runner: Runner) -> None:
        """Notes that this process begins an evaluation."""
        self._evaluate(runner, 0)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes that this process has evaluated a batch."""
        self._evaluate(runner, batch_idx + 1)

    def after_train(self, runner: Runner) -> None:
        """Ends the watch, once all ranks have come here; the one that keeps the store leaves when all have ended it."""
        if self._thread is None:
            return
        self._reach(runner, Phase.TRAINED)
        barrier()
        self._done.set()
        self._thread.join()
        barrier()
        for handle in self._handles:
            handle.remove()

    def _evaluate(self, runner: Runner, batches: int) -> None:
        if batches < len(runner.val_loop.dataloader):
            self._reach(runner, Phase.EVALUATION, batches)
        else:  # one rank may have more batches than another
            self._reach(runner, Phase.EVALUATED)

    def _reach(self, runner: Runner, phase: Phase, batches: int = 0) -> None:
        self._progress = Progress(runner.iter, phase, batches)

    def _watch(self, rank: int, world_size: int, store: Store) -> None:
        others = [str(other) for other in range(world_size) if other != rank]
        seen = _Seen([int(other) for other in others])
        interval = min(self.timeout / 5, 5)
        beat = 0
        try:
            while not self._done.wait(interval):
                beat += 1
                progress = self._progress
                store.set(str(rank), ' '.join(map(str, (beat, *map(int, progress)))))
                seen.update({int(other): store.get(other).decode() for other in others if store.check([other])})
                reason = store.get('reason').decode() if store.check(['reason']) else ''
                self._heard = time.monotonic()
                if reason := reason or seen.judge(progress, self.timeout):
                    reason = store.compare_set('reason', '', reason).decode()  # the first one's
                    # The others have read it before any leaves, with the store or out of a collective. No daemon: if
                    # that fails meanwhile, the process waits for this end.
                    threading.Thread(target=_end, args=(rank, reason, 2 * interval), name='end').start()
                    return
            store.set(str(rank), 'done')
        except Exception as error:
            if not self._done.is_set():
                _end(rank, f'{_store()} is gone: {error}')

    def _watch_store(self, rank: int) -> None:
        """Ends this process if the store does not answer, for which no call of it has a time limit."""
        while not self._done.wait(min(self.timeout / 5, 5)):
            if time.monotonic() - self._heard > self.timeout:
                _end(rank, f'{_store()} has not answered for {self.timeout:g} s: stopped, or cut off')


def _store() -> str:
    return f'the store at {os.environ["MASTER_ADDR"]}, kept by rank 0 or torchrun,'


class _Seen:
    """What the other ranks have told, and when they last told something else."""

    def __init__(self, ranks: list[int]) -> None:
        now = time.monotonic()
        self.told = dict.fromkeys(ranks, '')
        self.progress = dict.fromkeys(ranks, Progress())
        self.changed = dict.fromkeys(ranks, now)
        self.moved = dict.fromkeys(ranks, now)
        self.own_progress, self.own_moved = Progress(), now

    def update(self, told: dict[int, str]) -> None:
        now = time.monotonic()
        for rank, text in told.items():
            if text != self.told[rank]:
                self.told[rank], self.changed[rank] = text, now
            if text != 'done' and (progress := Progress(*map(int, text.split()[1:]))) != self.progress[rank]:
                self.progress[rank], self.moved[rank] = progress, now

    def judge(self, progress: Progress, timeout: float) -> str:
        """Returns which rank holds the run up and how that is known; empty: none does."""
        now = time.monotonic()
        if progress != self.own_progress:
            self.own_progress, self.own_moved = progress, now
        for rank, text in self.told.items():
            if text == 'done':
                continue
            if now - self.changed[rank] > timeout:
                return f'rank {rank} has not been heard of for {timeout:g} s: dead, stopped, or cut off'
            if min(now - self.moved[rank], now - self.own_moved) > timeout and self.progress[rank] < progress:
                return f'rank {rank} has been behind the others for {timeout:g} s: its data do not come, or it hangs'
        return ''


def _end(rank: int, reason: str, seconds: float = 0) -> None:
    """Tells the reason and, after some seconds, ends this process from whatever it waits in."""
    advice = 'The checkpoints are whole; --resume goes on from the newest.'
    sys.stderr.write(f'\nerror on rank {rank}: {reason}. This rank ends the job. {advice}\n')
    sys.stderr.flush()
    time.sleep(seconds)
    os._exit(EXIT_STALLED)
