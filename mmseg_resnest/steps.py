"""A training step as a file: all that it was computed from, so that it can be computed again and looked into."""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_resnest.checkpoints import read_checkpoint

ELEMENTS = {kind.__name__: kind for kind in (SegDataSample, PixelData)}


def random_state() -> dict:
    """Returns the states of the generators of Python, numpy, torch and, where one is used, the current GPU."""
    return dict(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    )


def set_random_state(state: dict) -> None:
    """Sets the generators to what ``random_state`` gave, or ``read_step`` read."""
    random.setstate(state['python'])
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def files_of(batch: Any) -> list[str]:
    """Returns the image files of a data loader's batch; empty if it has none of mmsegmentation's samples."""
    samples = batch.get('data_samples') or [] if isinstance(batch, Mapping) else []
    return [sample.metainfo.get('img_path', 'an image without a path') for sample in samples]


def save_step(path: Path, model: nn.Module, batches: list[dict], **facts: object) -> None:
    """Writes a step to a file of tensors and plain values, which ``read_checkpoint`` reads.

    Args:
        path: The file.
        model: With the weights and the batch norm statistics that the step started from.
        batches: Those whose gradients the step adds up, each with ``batch`` (as a data loader gives it), ``random``
            (the ``random_state`` before its forward pass) and ``losses`` (name -> value).
        **facts: What else a reader wants to know: plain values.
    """
    torch.save(dict(state_dict=model.state_dict(), step=_plain(dict(facts, batches=batches))), path)


def read_step(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Returns the weights of a file of ``save_step``, and the rest with batches as a data loader gives them.

    Raises:
        ValueError: It is another kind of file.
    """
    content = read_checkpoint(path)
    if 'step' not in content:
        raise ValueError(f'{path}: holds no training step; expected a nonfinite_iter_N.pth of a run that has stopped')
    return content['state_dict'], _rebuilt(content['step'])


def _plain(value: Any) -> Any:
    """A copy of tensors on the CPU and plain values."""
    if isinstance(value, BaseDataElement):
        fields = dict(metainfo=dict(value.metainfo_items()), data=dict(value.items()))
        return dict(element=type(value).__name__, **_plain(fields))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] if isinstance(value, list) else tuple(map(_plain, value))
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would take its whole storage along
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value if isinstance(value, str | int | float | None) else repr(value)


def _rebuilt(value: Any) -> Any:
    """What ``_plain`` was given, with its data elements."""
    if isinstance(value, dict) and 'element' in value:
        element = ELEMENTS[value['element']](metainfo=value['metainfo'])
        element.set_data(_rebuilt(value['data']))
        return element
    if isinstance(value, dict):
        return {key: _rebuilt(item) for key, item in value.items()}
    return [_rebuilt(item) for item in value] if isinstance(value, list) else value


class FirstNonFinite:
    """Names the first module, in the order of computation, whose output or gradient is not finite.

    Attributes:
        output: The first module with an output that is not finite; None if there is none.
        gradient: The first one, backwards, whose output gets a gradient that is not finite; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.output: str | None = None
        self.gradient: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._look, name or type(module).__name__))

    def _look(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in _float_tensors(output):
            if self.output is None and not tensor.isfinite().all():
                self.output = name
            if tensor.requires_grad:  # a hook of the tensor, not of the module: those forbid in-place activations
                tensor.register_hook(partial(self._look_back, name))

    def _look_back(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not gradient.isfinite().all():
            self.gradient = name


def _float_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _float_tensors(item)
