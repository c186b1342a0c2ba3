"""Signals: a run that is asked to stop finishes its iteration, saves, and ends with a code that says why."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmseg_resnest.checkpointing import CheckpointHook
from mmseg_resnest.optim import AutocastOptimWrapper
from mmseg_resnest.registry import HOOKS

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


@HOOKS.register_module()
class SignalHook(Hook):
    """Stops training after SIGTERM, SIGINT or SIGUSR1 on any rank: at the end of a step, saved, all ranks together.

    The process then ends with the code 128 + the signal's number: 143, 130 or 138; where ranks got different ones, the
    largest. A second SIGINT ends it at once, unsaved. An evaluation is finished first, with the iteration after it.
    The ranks agree by the message that AutocastOptimWrapper exchanges at each step anyway, or by one of their own.
    Workers of the data loaders ignore these signals, unless their own process sends them: they end with it.
    """

    priority = 'LOWEST'  # after schedules and checkpoints

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Takes over the signals, and shields the workers, which have not started yet."""
        for loader in (runner.train_dataloader, getattr(runner.val_loop, 'dataloader', None)):
            if isinstance(loader, DataLoader):
                loader.worker_init_fn = _Shielded(loader.worker_init_fn)
        if threading.current_thread() is threading.main_thread():  # Python allows no other thread to
            self._wrapper = runner.optim_wrapper
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
            atexit.register(self._give_back)  # a run that fails can be stopped while it ends

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._wrapper.signal = max(self._received, number)
        again = ''
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            again = '; a second SIGINT ends it at once, unsaved'
        # Not by the logger: a signal may come while it holds its lock.
        sys.stderr.write(f'\n{signal.Signals(number).name}: the run stops after this iteration, saved{again}\n')

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
        self.after_train(runner)
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        atexit.unregister(self._give_back)


class _Shielded:
    """A worker's initialisation that lets it outlive the signals: Ctrl-C and Slurm send them to all processes.

    SIGTERM from its parent, which is how multiprocessing ends a worker, ends it.
    """

    def __init__(self, initialise: Callable[[int], None] | None) -> None:
        self.initialise = initialise

    def __call__(self, worker: int) -> None:
        if hasattr(signal, 'sigwaitinfo'):  # not on macOS; a handler would not be told who has sent the signal
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=_end_with, args=(os.getppid(),), name='signals', daemon=True).start()
        if self.initialise is not None:
            self.initialise(worker)


def _end_with(parent: int) -> None:
    """Takes the signals of a worker, and ends it when its parent wants it to."""
    while True:
        received = signal.sigwaitinfo(SIGNALS)
        if (received.si_signo, received.si_pid) == (signal.SIGTERM, parent):
            os._exit(0)
