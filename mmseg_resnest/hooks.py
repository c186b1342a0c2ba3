"""Hooks: what is checked before a run, and what is shown during it."""

import atexit
import logging
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Pad
from mmengine.dataset import BaseDataset, Compose
from mmengine.dist import all_gather_object, all_reduce, barrier
from mmengine.hooks import Hook
from mmengine.hooks import RuntimeInfoHook as _RuntimeInfoHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import BaseSegmentor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest.checkpoints import model_weights, read_checkpoint
from mmseg_resnest.norm import SyncBatchNorm
from mmseg_resnest.optim import AutocastOptimWrapper, StepCheck
from mmseg_resnest.registry import HOOKS
from mmseg_resnest.segmentor import EncoderDecoder
from mmseg_resnest.steps import files_of, random_state, save_step
from mmseg_resnest.transforms import CheckedCompose, PackByteLabels, expected_labels


@HOOKS.register_module()
class RuntimeInfoHook(_RuntimeInfoHook):
    """MMEngine's RuntimeInfoHook, which takes seconds to format the config for checkpoints, only where a run trains."""

    def before_run(self, runner: Runner) -> None:
        """Leaves to ``before_train`` what MMEngine does here."""
        self.last_loop_stage = None

    def before_train(self, runner: Runner) -> None:
        """Stores the config and the seed, and what MMEngine does here."""
        super().before_run(runner)
        super().before_train(runner)


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
            and not (synchronised and isinstance(module, nn.SyncBatchNorm | SyncBatchNorm))
        ]
        if layers:
            raise ValueError(
                f'train_dataloader.batch_size=1, but {len(layers)} batch norm layers train (the first: {layers[0]}): '
                'one image has no batch statistics. Use train_dataloader.batch_size=2 or more, '
                'several processes with sync_bn="mmseg_resnest.SyncBN", or norm_cfg=dict(type="GN", num_groups=8) '
                'in the backbone and the heads, from scratch: model.backbone.init_cfg=None (the weights are for BN).'
            )


@HOOKS.register_module()
class SampleCheckHook(Hook):
    """Lets a bad sample stop the run with a message that names it, or lets training go on without it.

    Every data set's pipeline, inside wrappers too, becomes a ``CheckedCompose`` of the same transforms. In training the
    labels must be classes of the heads and of the data set, whichever has fewer; so must what label maps are padded
    with, if it is not ignored.

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
        """Checks training samples; heads say which label is ignored.

        Raises:
            ValueError: Label maps are padded with a number that a head takes for no class and does not ignore, or are
                uint8 where the model or the padding needs int64.
        """
        self._start = runner.iter
        named = _unwrapped(runner.model).named_modules()
        heads = {name: module for name, module in named if isinstance(module, BaseDecodeHead)}
        _check_padding(runner, heads)
        _check_label_dtype(runner)
        heads = list(heads.values())
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
            runner.logger.warning(f'Skipped a bad sample: {line.replace(chr(9), " ")}')
        self._skipped += lines

    def after_train(self, runner: Runner) -> None:
        """Reports what all processes have skipped since the run was started or resumed."""
        if not self.skips:
            return
        parts = all_gather_object(self._skipped)
        if runner.rank != 0 or not any(parts):
            return
        lines = [line.split('\t', 1) for part in parts for line in part]
        found = dict(lines)
        times = Counter(files for files, _ in lines)  # the reason may differ from time to time
        listed = ''.join(f'\n  {count} times: {files} {found[files]}' for files, count in times.most_common(20))
        more = f'\n  and {len(times) - 20} more, in {runner.log_dir}/bad_samples_*.txt' if len(times) > 20 else ''
        runner.logger.warning(
            f'Skipped {times.total()} bad samples in iterations {self._start + 1} to {runner.iter}, '
            f'{len(times)} different:{listed}{more}'
        )

    def _file(self, runner: Runner) -> Path:
        return Path(runner.log_dir) / f'bad_samples_{runner.rank}.txt'


def _check_samples(dataset: Any, readers: Sequence, advice: str = '', skipped: Path | None = None) -> None:
    """Replaces the pipelines of a data set, whose labels ``readers`` will read: heads, or metrics."""
    ignored = {reader.ignore_index for reader in readers if isinstance(getattr(reader, 'ignore_index', None), int)}
    known = [_labels_of(reader) for reader in readers if isinstance(reader, BaseDecodeHead)]
    for part in _base_datasets(dataset):
        named = part.metainfo.get('classes')
        classes = min([*known, len(named)] if named else known, default=None)
        # Where readers differ, no label is ignored by all of them.
        ignore_index = next(iter(ignored or {getattr(part, 'ignore_index', 255)})) if len(ignored) < 2 else None
        if type(part.pipeline) is Compose:
            part.pipeline = CheckedCompose(part.pipeline.transforms, classes, ignore_index, advice, skipped)


def _labels_of(head: BaseDecodeHead) -> int:
    """How many labels a head tells apart: a single channel, which a sigmoid reads, is for two."""
    return 2 if head.out_channels == 1 else head.num_classes


def _check_padding(runner: Runner, heads: Mapping[str, BaseDecodeHead]) -> None:
    """Raises a ValueError where label maps are padded with what a head neither knows nor ignores."""
    paddings = {
        'model.data_preprocessor.seg_pad_val': getattr(_unwrapped(runner.model).data_preprocessor, 'seg_pad_val', None)
    }
    for transform in _transforms(runner.train_dataloader.dataset):
        where = f'{type(transform).__name__} in train_dataloader.dataset.pipeline'
        paddings[f'seg_pad_val of {where}'] = getattr(transform, 'seg_pad_val', None)
        if isinstance(transform, Pad):
            paddings[f'pad_val.seg of {where}'] = transform.pad_val.get('seg', 255)
    for key, value in paddings.items():
        for name, head in heads.items():
            if isinstance(value, int | float) and value != head.ignore_index and not 0 <= value < _labels_of(head):
                raise ValueError(
                    f'{key} is {value}, but model.{name} has ignore_index={head.ignore_index} and the classes '
                    f'{expected_labels(_labels_of(head), None)}: padding would be neither. Set both to the same number'
                )


def _check_label_dtype(runner: Runner) -> None:
    """Raises a ValueError where PackByteLabels leaves uint8 what mmsegmentation's losses or a padding cannot have."""
    model = _unwrapped(runner.model)
    padding = getattr(model.data_preprocessor, 'seg_pad_val', None)
    reason = ''
    if isinstance(model, BaseSegmentor) and not isinstance(model, EncoderDecoder):
        reason = f"{type(model).__name__}'s losses need int64; model.type='mmseg_resnest.EncoderDecoder' takes both"
    elif isinstance(padding, int | float) and not 0 <= padding <= 255:
        reason = f'model.data_preprocessor.seg_pad_val={padding} is no uint8'
    if reason and any(isinstance(part, PackByteLabels) for part in _transforms(runner.train_dataloader.dataset)):
        raise ValueError(
            f'train_dataloader.dataset.pipeline: mmseg_resnest.PackByteLabels packs label maps as uint8, but {reason}. '
            "Or pack with mmsegmentation's dict(type='PackSegInputs')"
        )


def _transforms(owner: Any) -> Iterator[Any]:
    """Yields the transforms of a data set or of a transform, and all that is inside of it."""
    for name in ('dataset', 'datasets', 'pipeline', 'transforms'):
        inner = getattr(owner, name, [])
        for part in inner if isinstance(inner, Sequence) else [inner]:
            yield part
            yield from _transforms(part)


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


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
    its batches and random states, for ``tools/reproduce_step.py``. Weights that are not finite, which a finite gradient
    leads to if the learning rate is too high, are neither evaluated nor saved, and no run ends well with them.
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
        parameters = dict(runner.model.named_parameters())  # those of all ranks
        _check_trained(runner, runner.iter + 1, parameters, 'before its step, so no loss can be finite')
        self._in_a_row += 1
        what = _describe(runner, check, batches)
        if self.action == 'stop' or self._in_a_row == self.limit:
            times = '' if self.action == 'stop' else f', {self.limit} times in a row'
            _stop(runner, check, batches, f'{what}\nNo step was made{times}; the weights are those from before.')
        self._skipped += 1
        runner.logger.warning(f'{what}\nThe step was skipped.')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuses weights that are not finite, before anything is written."""
        iteration = checkpoint['meta'].get('iter', runner.iter)
        _check_trained(runner, iteration, checkpoint['state_dict'], 'after it, and no checkpoint of them was saved')

    def after_train(self, runner: Runner) -> None:
        """Refuses weights that are not finite; reports how many steps were skipped."""
        _check_trained(runner, runner.iter, runner.model.state_dict(), 'after it, at the end of training')
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
            _unwrapped(runner.model),
            batches,
            iteration=runner.iter + 1,
            device=wrapper.device_type,
            dtype=str(wrapper.dtype).removeprefix('torch.') if wrapper.enabled else 'float32',
            grad_norm=check.grad_norm,
            loss_scaler=check.loss_scaler,
        )
    except (OSError, RuntimeError) as error:  # a full disk must not hide what has happened
        return f'The step could not be written to {path}: {error}'
    return f'Reproduce it with: {shlex.join(["python", "tools/reproduce_step.py", str(config), str(path)])}'


def _last_checkpoint(runner: Runner) -> str:
    """The newest checkpoint that can be read and is finite."""
    others = ''
    files = [path for path in Path(runner.work_dir).glob('*.pth') if re.search(r'(iter|epoch)_\d+$', path.stem)]
    files = [path for path in files if not path.name.startswith('nonfinite_')]
    for path in sorted(files, key=lambda path: int(path.stem.rpartition('_')[2]), reverse=True):
        try:
            if not _not_finite(model_weights(read_checkpoint(path))):
                return f'{path}{others}'
            others += f' ({path.name} is not finite)'
        except (ValueError, OSError):
            others += f' ({path.name} cannot be read)'
    return f'none yet in {runner.work_dir}{others}'


def _check_loss_after_step(runner: Runner, data_batch: Any, outputs: dict) -> None:
    """Raises a ValueError on all ranks where a loss is not finite; the optimiser has used it already."""
    loss = float(torch.as_tensor(outputs.get('loss', 0)).detach())
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
    if wrong := _not_finite(state):
        raise ValueError(
            f'{len(wrong)} of {len(state)} tensors of the model are not finite (the first: {", ".join(wrong[:3])}); '
            'an evaluation would report a number all the same. Use a checkpoint from before the training diverged'
        )


def _check_trained(runner: Runner, iteration: int, state: Mapping[str, torch.Tensor], when: str) -> None:
    """Raises a ValueError where training has led to weights that are not finite."""
    if wrong := _not_finite(state):
        raise ValueError(
            f'Iteration {iteration}: {len(wrong)} of {len(state)} tensors of the model are not finite '
            f'(the first: {", ".join(wrong[:3])}) {when}.\n'
            'A step has broken them, not a sample: its update, or batch norm statistics, overflowed.\n'
            f'Last good checkpoint: {_last_checkpoint(runner)}\n'
            'Usual remedies: a lower learning rate, a longer warm-up, optim_wrapper.clip_grad="dict(max_norm=1)"'
        )


def _not_finite(state: Mapping[str, torch.Tensor]) -> list[str]:
    return [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


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
