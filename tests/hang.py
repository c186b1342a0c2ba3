"""A hook that lets one rank of a run stand still, for tests of who notices."""

import os
import time
from multiprocessing.util import Finalize
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tiny import CAMVID


@HOOKS.register_module()
class Hang(Hook):
    """Sleeps on ``rank`` in the iteration ``at``, at the ``point`` of training: a hook's name, or ``'exit'``."""

    priority = 'LOWEST'

    def __init__(self, rank: int, point: str, at: int, seconds: float) -> None:
        self.rank, self.point, self.at, self.seconds = rank, point, at, seconds

    def _reach(self, runner, point):
        if (runner.rank, runner.iter, self.point) == (self.rank, self.at, point):
            time.sleep(self.seconds)

    def before_train(self, runner):
        if (runner.rank, self.point) == (self.rank, 'exit'):
            Finalize(None, time.sleep, (self.seconds,), exitpriority=0)  # atexit is not for multiprocessing

    def before_train_iter(self, runner, *_, **__):
        self._reach(runner, 'before_train_iter')

    def after_train_iter(self, runner, *_, **__):
        self._reach(runner, 'after_train_iter')

    def after_val_epoch(self, runner, *_, **__):
        self._reach(runner, 'after_val_epoch')


def write_config(folder: Path, **options) -> Path:
    """Writes the config of the tests with this hook, and these options of it; returns the file."""
    path = folder / 'hang.py'
    path.write_text(
        f'_base_ = {os.fspath(CAMVID)!r}\n'
        "custom_imports = dict(imports=['hang'])\n"
        f'custom_hooks = [*_base_.custom_hooks, dict(type="Hang", **{options})]\n'
    )
    return path
