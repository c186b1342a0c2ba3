"""Hooks: what is checked before a run, and what is shown during it."""

import atexit
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.dist import all_gather_object, all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest.optim import AutocastOptimWrapper, StepCheck
from mmseg_resnest.registry import HOOKS
from mmseg_resnest.steps import files_of, random_state, save_step
from mmseg_resnest.transforms import CheckedCompose


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
class SampleCheckHook(Hook):
    """Lets a bad sample stop the run with a message that names it, or lets training go on without it.

    Every data set's pipeline, inside wrappers too, becomes a ``CheckedCompose`` of the same transforms.

    Args:
        on_bad_sample: ``'stop'``, or ``'skip'``: in training another sample takes the place of a bad one, which is
            logged, written to ``bad_samples_RANK.txt`` beside the log, and reported at the end. Validation and test
            always stop: an mIoU over fewer images is another number.

    Raises:
        ValueError: ``on_bad_sample`` is something else.
    """

    def __init__(self, on_bad_sample: str = 'stop') -> None:
        if on_bad_sample not in ('stop', 'skip'):
            raise ValueError(f'SampleCheckHook: on_bad_sample={on_bad_sample!r}; expected stop or skip')
        self.skips = on_bad_sample == 'skip'
        self._skipped: list[str] = []
        self._read_to = 0

    def before_train(self, runner: Runner) -> None:
        """Checks training samples; heads say which label is ignored."""
        heads = (module for module in runner.model.modules() if isinstance(module, BaseDecodeHead))
        if self.skips:
            _check_samples(runner.train_dataloader.dataset, heads, skipped=self._file(runner))
        else:
            advice = '. Or skip bad samples in training: --cfg-options default_hooks.samples.on_bad_sample=skip'
            _check_samples(runner.train_dataloader.dataset, heads, advice)

    def before_val(self, runner: Runner) -> None:
        """Checks validation samples; the metrics say which label is ignored."""
        _check_samples(runner.val_dataloader.dataset, runner.val_evaluator.metrics)

    def before_test(self, runner: Runner) -> None:
        """Checks test samples; the metrics say which label is ignored."""
        _check_samples(runner.test_dataloader.dataset, runner.test_evaluator.metrics)

    def after_train_iter(self, runner: Runner, batch_idx: int, **_: object) -> None:
        """Logs the samples that workers of this process have skipped since the last iteration."""
        if not self.skips or not self._file(runner).is_file():
            return
        with self._file(runner).open() as file:
            file.seek(self._read_to)
            lines = file.read().splitlines()
            self._read_to = file.tell()
        for line in lines:
            runner.logger.warning(f'Skipped a bad sample: {line}')
        self._skipped += lines

    def after_train(self, runner: Runner) -> None:
        """Reports what all processes have skipped."""
        if not self.skips:
            return
        parts = all_gather_object(self._skipped)
        if runner.rank != 0 or not any(parts):
            return
        times = Counter(line for part in parts for line in part)
        listed = ''.join(f'\n  {count} times: {line}' for line, count in times.most_common(20))
        more = f'\n  and {len(times) - 20} more, in {runner.log_dir}/bad_samples_*.txt' if len(times) > 20 else ''
        runner.logger.warning(f'Skipped {times.total()} bad samples in training, {len(times)} different:{listed}{more}')

    def _file(self, runner: Runner) -> Path:
        return Path(runner.log_dir) / f'bad_samples_{runner.rank}.txt'


def _check_samples(dataset: Any, readers: Iterable, advice: str = '', skipped: Path | None = None) -> None:
    """Replaces the pipelines of a data set, whose labels ``readers`` will read, each with an ``ignore_index``."""
    ignored = {reader.ignore_index for reader in readers if isinstance(getattr(reader, 'ignore_index', None), int)}
    for part in _base_datasets(dataset):
        classes = part.metainfo.get('classes')
        # Where readers differ, no label is ignored by all of them.
        ignore_index = next(iter(ignored or {getattr(part, 'ignore_index', 255)})) if len(ignored) < 2 else None
        if type(part.pipeline) is Compose:
            part.pipeline = CheckedCompose(
                part.pipeline.transforms, len(classes) if classes else None, ignore_index, advice, skipped
            )


def _base_datasets(dataset: Any) -> Iterator[BaseDataset]:
    """Yields MMEngine's data sets: this one, or those inside of its wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    elif hasattr(dataset, 'dataset'):
        yield from _base_datasets(dataset.dataset)
    for part in getattr(dataset, 'datasets', []):
        yield from _base_datasets(part)


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Acts where a loss or the gradient norm is not finite: the optimiser wrapper has made no step then.

    The batch norm statistics, which the forward pass has changed, become those from before it again, so that a skipped
    step leaves no trace in the model; the schedule goes on. A step that stops the run is written to the work dir with
    its batches and random states, for ``tools/reproduce_step.py``. Weights that are not finite are not evaluated.
    With another optimiser wrapper than AutocastOptimWrapper the loss is checked, after the step: the run stops, and
    there is no file.

    Args:
        action: ``'stop'``, or ``'skip'``: the run goes on with the next batch.
        limit: With ``'skip'``, this many steps in a row stop the run.

    Raises:
        ValueError: ``action`` or ``limit`` is something else; or ``'skip'`` with another optimiser wrapper.
    """

    priority = 'ABOVE_NORMAL'  # before averages of the weights, the log and checkpoints

    def __init__(self, action: str = 'stop', limit: int = 10) -> None:
        if action not in ('stop', 'skip') or limit < 1:
            raise ValueError(f'NonFiniteHook: action={action!r}, limit={limit}; expected stop or skip, and at least 1')
        self.action = action
        self.limit = limit
        self._batches: list[dict] = []  # those since the last step
        self._skipped = 0
        self._in_a_row = 0

    def before_train(self, runner: Runner) -> None:
        """Takes over from the optimiser wrapper, which raises by itself without this hook."""
        self._judges = isinstance(runner.optim_wrapper, AutocastOptimWrapper)
        if self._judges:
            runner.optim_wrapper.raises = False
            self._buffers = _BufferCopies(runner.model)
        elif self.action == 'skip':
            raise ValueError(
                f"NonFiniteHook: action='skip' cannot undo a step of {type(runner.optim_wrapper).__name__}; "
                "use optim_wrapper.type='mmseg_resnest.AutocastOptimWrapper', or action='stop'"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keeps what the iteration starts from."""
        if self._judges:
            if not self._batches:
                self._buffers.save()
            self._batches.append(dict(batch=data_batch, random=random_state()))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Stops or skips where the step of this iteration, if there was one, was not finite.

        Raises:
            ValueError: The run stops.
        """
        if not self._judges:
            _check_loss_after_step(runner, data_batch, outputs or {})
            return
        self._batches[-1]['losses'] = _detached(outputs or {})
        check, runner.optim_wrapper.last_check = runner.optim_wrapper.last_check, None
        if check is None:  # gradients accumulate
            return
        batches, self._batches = self._batches, []
        if check.finite:
            self._in_a_row = 0
            return
        for batch in batches:
            batch['losses'] = {name: float(value) for name, value in batch['losses'].items()}
        self._buffers.restore()
        self._in_a_row += 1
        what = _describe(runner, check, batches)
        if self.action == 'stop' or self._in_a_row == self.limit:
            times = '' if self.action == 'stop' else f', {self.limit} times in a row'
            _stop(runner, check, batches, f'{what}\nNo step was made{times}; the weights are those from before.')
        self._skipped += 1
        runner.logger.warning(f'{what}\nThe step was skipped.')

    def after_train(self, runner: Runner) -> None:
        """Reports how many steps were skipped."""
        if self._skipped:
            runner.logger.warning(f'Skipped {self._skipped} steps whose loss or gradient norm was not finite')

    def before_val_epoch(self, runner: Runner) -> None:
        """Refuses weights that are not finite."""
        _check_weights(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Refuses weights that are not finite."""
        _check_weights(runner)


class _BufferCopies:
    """A copy of a model's buffers, such as batch norm statistics; a few kernels, whatever their number."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        self._pairs = []
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            self._pairs.append((same, [buffer.clone() for buffer in same]))

    def save(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(buffers, copies)


def _detached(losses: dict) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value).detach() for name, value in losses.items()}


def _describe(runner: Runner, check: StepCheck, batches: list[dict]) -> str:
    """What happened, and to which images."""
    losses = '; '.join(', '.join(f'{name} {value:.6g}' for name, value in b['losses'].items()) for b in batches)
    files = [file for batch in batches for file in files_of(batch['batch'])]
    where = '' if check.own_losses_finite or runner.world_size == 1 else f' (on rank {runner.rank})'
    return (
        f'Iteration {runner.iter + 1}: the loss is {"finite" if check.losses_finite else "not finite"}{where}, '
        f'the gradient norm {check.grad_norm:.6g} ({losses}).\n'
        f'Images: {", ".join(files) or "the batch does not name them"}'
    )


def _stop(runner: Runner, check: StepCheck, batches: list[dict], reason: str) -> None:
    """Writes the step, where this rank has seen what is not finite, and raises the message."""
    advice = 'The loss of another rank is not finite; its message says how to reproduce the step.'
    if not check.own_losses_finite or check.losses_finite:
        advice = _write_step(runner, check, batches)
    barrier()  # the first process that ends takes the others along
    raise ValueError(
        f'{reason}\nLast good checkpoint: {_last_checkpoint(runner)}\n{advice}\n'
        'Usual remedies: a lower learning rate, optim_wrapper.clip_grad="dict(max_norm=1)", '
        'or going on without such steps: --cfg-options default_hooks.nonfinite.action=skip'
    )


def _write_step(runner: Runner, check: StepCheck, batches: list[dict]) -> str:
    wrapper = runner.optim_wrapper
    work_dir = Path(runner.work_dir)
    rank = f'_rank{runner.rank}' if runner.world_size > 1 else ''
    path = work_dir / f'nonfinite_iter_{runner.iter + 1}{rank}.pth'
    config = work_dir / (Path(runner.cfg.filename).name if runner.cfg.filename else f'{runner.timestamp}.py')
    try:
        save_step(
            path,
            runner.model.module if is_model_wrapper(runner.model) else runner.model,
            batches,
            iteration=runner.iter + 1,
            device=wrapper.device_type,
            dtype=str(wrapper.dtype).removeprefix('torch.') if wrapper.enabled else 'float32',
            grad_norm=check.grad_norm,
            loss_scaler=check.loss_scaler,
        )
    except (OSError, RuntimeError) as error:  # a full disk must not hide what has happened
        return f'The step could not be written to {path}: {error}'
    return f'Reproduce it with: python tools/reproduce_step.py {config} {path}'


def _last_checkpoint(runner: Runner) -> str:
    note = Path(runner.work_dir) / 'last_checkpoint'
    return note.read_text().strip() if note.is_file() else f'none yet in {runner.work_dir}'


def _check_loss_after_step(runner: Runner, data_batch: Any, outputs: dict) -> None:
    """Raises a ValueError on all ranks where a loss is not finite; the optimiser has used it already."""
    loss = float(outputs.get('loss', 0))
    finite = torch.tensor(float(math.isfinite(loss)), device=next(runner.model.parameters()).device)
    all_reduce(finite, 'min')
    if not finite:
        raise ValueError(
            f'Iteration {runner.iter + 1}: the loss is not finite (here {loss}).\n'
            f'Images: {", ".join(files_of(data_batch)) or "the batch does not name them"}\n'
            f'{type(runner.optim_wrapper).__name__} has stepped with it: the weights are lost, and the step cannot be '
            "reproduced; with optim_wrapper.type='mmseg_resnest.AutocastOptimWrapper' it can.\n"
            f'Last good checkpoint: {_last_checkpoint(runner)}'
        )


def _check_weights(runner: Runner) -> None:
    """Raises a ValueError where weights are not finite: an evaluation would give a number like any other."""
    state = runner.model.state_dict()
    wrong = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise ValueError(
            f'{len(wrong)} of {len(state)} tensors of the model are not finite (the first: {", ".join(wrong[:3])}); '
            'an evaluation would report a number all the same. Use a checkpoint from before the training diverged'
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
