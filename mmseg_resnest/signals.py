"""Signals: a run that is asked to stop finishes its iteration, saves, and ends with a code that says why."""

import atexit
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmseg_resnest.checkpointing import CheckpointHook
from mmseg_resnest.optim import AutocastOptimWrapper
from mmseg_resnest.registry import HOOKS
from mmseg_resnest.watch import WatchHook

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
END = b'\0'  # to the thread that reads the signals' numbers


@HOOKS.register_module()
class SignalHook(Hook):
    """Stops training after one of ``SIGNALS`` on any rank: at the end of a step, saved, all ranks together.

    The process then ends with the code 128 + the signal's number: for SIGTERM 143, for SIGINT 130, for SIGUSR1 138, for
    SIGHUP 129; where ranks got different ones, the largest. SIGHUP that is ignored, as under nohup, stays so. A second
    SIGINT ends the process at once, unsaved, with 130, whatever it waits for. An evaluation is finished first, with the
    iteration after it.
    The ranks agree by the message that AutocastOptimWrapper exchanges at each step anyway, or by one of their own.
    Workers of the data loaders ignore these signals, unless their own process sends them: they end with it.
    """

    priority = 'LOWEST'  # after schedules and checkpoints

    def __init__(self) -> None:
        self._received = 0
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Takes over the signals, and shields the workers, which have not started yet."""
        for loader in (runner.train_dataloader, getattr(runner.val_loop, 'dataloader', None)):
            if isinstance(loader, DataLoader):
                loader.worker_init_fn = _Shielded(loader.worker_init_fn)
        if threading.current_thread() is threading.main_thread():  # Python allows no other thread to
            self._wrapper = runner.optim_wrapper
            self._take()
            atexit.register(self._give_back)  # a run that fails can be stopped while it ends

    def _take(self) -> None:
        """Lets a thread take the signals: the main one runs no handler while it waits for a collective or a GPU."""
        _guard_forks()
        numbers, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._listener = threading.Thread(target=self._listen, args=(numbers,), name='signals', daemon=True)
        self._listener.start()
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        # Only signals that have a handler are written to the pipe.
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *_: None) for number in taken}

    def _listen(self, numbers: int) -> None:
        with os.fdopen(numbers, 'rb', buffering=0) as pipe:
            while (byte := pipe.read(1)) != END:
                if byte[0] in SIGNALS:
                    self._receive(signal.Signals(byte[0]))

    def _receive(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._interrupted:
            _print('SIGINT: the run ends at once, unsaved')
            os._exit(128 + number)
        self._received = self._wrapper.signal = max(self._received, number)
        again = ''
        if number == signal.SIGINT:
            self._interrupted = True
            again = '; a second SIGINT ends it at once, unsaved'
        _print(f'{number.name}: the run stops after this iteration, saved{again}')

    def after_train_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        """Saves and ends the process if a rank has been asked to stop.

        Raises:
            SystemExit: With the code.
        """
        number = self._agreed(runner)
        if not number:
            return
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        saved = hook.save_between(runner) if hook else 'nothing: the run has no mmseg_resnest.CheckpointHook'
        barrier()  # the first process that ends may take the others along
        name = signal.Signals(number).name
        runner.logger.warning(f'{name}: stopped after iteration {runner.iter + 1}; saved {saved}. --resume goes on')
        for watch in (hook for hook in runner.hooks if isinstance(hook, WatchHook)):
            watch.after_train(runner)
        self.after_train(runner)
        runner.call_hook('after_run')  # closes what shows the run
        raise SystemExit(128 + number)

    def _agreed(self, runner: Runner) -> int:
        """Returns the largest signal that any rank had at the last step; 0: none, or gradients accumulate."""
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AutocastOptimWrapper):
            agreed, wrapper.agreed_signal = wrapper.agreed_signal, 0
            return agreed
        if (runner.iter + 1) % getattr(wrapper, '_accumulative_counts', 1):
            return 0
        received = torch.tensor(self._received, device=next(runner.model.parameters()).device)
        all_reduce(received, 'max')
        return int(received)

    def after_train(self, runner: Runner) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
            signal.set_wakeup_fd(self._wakeup_before)
            # By a byte, since forked workers keep the pipe open; here, since a thread that ends together with the
            # interpreter, and is the last to hold tensors, aborts the process.
            os.write(self._wakeup, END)
            self._listener.join()
            os.close(self._wakeup)
            atexit.unregister(self._give_back)


def _print(text: str) -> None:
    """Prints to stderr past Python's own buffer, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):  # Ctrl-C ends the `tee` behind it too
        os.write(2, f'\n{text}\n'.encode())


@functools.cache
def _guard_forks() -> None:
    """Keeps the signals of forked processes out of this one's pipe, which they inherit."""
    forking = threading.local()

    def block() -> None:
        forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, forking.mask)

    def leave() -> None:
        signal.set_wakeup_fd(-1)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=leave)


class _Shielded:
    """A worker's initialisation that lets it outlive the signals: Ctrl-C and Slurm send them to all processes.

    SIGTERM from the process that has made this, which is how multiprocessing ends a worker, ends it.
    """

    def __init__(self, initialise: Callable[[int], None] | None) -> None:
        self.initialise = initialise
        self.trainer = os.getpid()  # a worker's parent is another one where a server forks

    def __call__(self, worker: int) -> None:
        if hasattr(signal, 'sigwaitinfo'):  # not on macOS; a handler would not be told who has sent the signal
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=_end_with, args=(self.trainer,), name='signals', daemon=True).start()
        if self.initialise is not None:
            self.initialise(worker)


def _end_with(trainer: int) -> None:
    """Takes the signals of a worker, and ends it when the process that trains wants it to."""
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if (received.si_signo, received.si_pid) == (signal.SIGTERM, trainer):
            os._exit(0)
