"""Hooks: what is checked before a run, and what is shown during it."""

import atexit
import logging
import sys

from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest.registry import HOOKS


@HOOKS.register_module()
class BatchNormCheckHook(Hook):
    """Refuses to train batch norm on one image per process: after global pooling it would see one value a channel."""

    def before_train(self, runner: Runner) -> None:
        """Raises a ValueError that names the layers, before the first iteration."""
        if runner.train_dataloader.batch_size != 1:
            return
        runner.model.train()
        synchronised = runner.world_size > 1
        layers = [
            name
            for name, module in runner.model.named_modules()
            if isinstance(module, _BatchNorm)
            and module.training
            and not (synchronised and isinstance(module, nn.SyncBatchNorm))
        ]
        if layers:
            raise ValueError(
                f'train_dataloader.batch_size=1, but {len(layers)} batch norm layers train (the first: {layers[0]}): '
                'one image has no batch statistics. Use train_dataloader.batch_size=2 or more, '
                'several processes with sync_bn="torch", or norm_cfg=dict(type="GN", num_groups=8) '
                'in the backbone and the heads, from scratch: model.backbone.init_cfg=None (the weights are for BN).'
            )


@HOOKS.register_module()
class ProgressBarHook(Hook):
    """Shows a progress bar on a terminal, below the log; elsewhere the log's own lines tell how far a run is."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._bars: list[Progress] = []

    def _start(self, runner: Runner, name: str, total: int, done: int = 0) -> None:
        console = Console(stderr=True)
        bar = Progress(
            TextColumn(name),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Into the bar's terminal, for lines above the bar; but not out of a file.
            redirect_stdout=sys.stdout.isatty(),
            disable=not console.is_terminal or runner.rank != 0,
        )
        if self._bars:  # validation inside training: a terminal shows one bar at a time
            self._bars[-1].stop()
        bar.add_task(name, total=total, completed=done)
        bar.start()
        atexit.register(bar.stop)  # a run that fails gives the terminal its cursor back
        self._bars.append(bar)
        _log_to_stdout(runner)

    def _stop(self, runner: Runner) -> None:
        bar = self._bars.pop()
        bar.stop()
        atexit.unregister(bar.stop)
        if self._bars:
            self._bars[-1].start()
        _log_to_stdout(runner)

    def _advance(self) -> None:
        self._bars[-1].advance(self._bars[-1].task_ids[0])

    def before_train(self, runner: Runner) -> None:
        """Starts training's bar, at the iteration that a resumed run goes on from."""
        self._start(runner, 'train', runner.max_iters, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """Starts validation's bar."""
        self._start(runner, 'validate', len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        """Starts the test's bar."""
        self._start(runner, 'test', len(runner.test_dataloader))

    def after_train_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        """Advances the bar by one iteration."""
        self._advance()

    def after_val_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        """Advances the bar by one batch."""
        self._advance()

    def after_test_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        """Advances the bar by one batch."""
        self._advance()

    def after_train(self, runner: Runner) -> None:
        """Ends training's bar."""
        self._stop(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Ends validation's bar."""
        self._stop(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Ends the test's bar."""
        self._stop(runner)


def _log_to_stdout(runner: Runner) -> None:
    """Points the console log at today's ``sys.stdout``, which rich replaces so that lines appear above the bar."""
    for handler in runner.logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stdout)
