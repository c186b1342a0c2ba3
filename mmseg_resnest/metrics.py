"""Evaluation metrics."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmseg.evaluation import IoUMetric as _IoUMetric
from numpy import ndarray
from torch import Tensor

from mmseg_resnest.inference import check_finite
from mmseg_resnest.registry import METRICS
from mmseg_resnest.transforms import expected_labels, listing, out_of_range

# A GPU is asked so seldom, in images, whether their values were right: each time it must have done all its work.
CHECKED_TOGETHER = 32


@METRICS.register_module()
class IoUMetric(_IoUMetric):
    """mmsegmentation's IoUMetric over one confusion matrix of whole numbers, which refuses what it cannot count.

    Every image counts once: of several processes each reports its matrix, less the image that MMEngine's
    DefaultSampler repeats where the images do not come out even. mmsegmentation adds up float32, which loses counts
    above 2**24, and leaves labels out of range away.

    Attributes:
        confusion: (classes, classes) int64, the pixels of each label (row) and prediction (column) that are not
            ignored, of the last evaluation.
        per_class: class name -> metric (``'IoU'``, ``'Acc'``) -> its value in percent; nan for a class that does not
            occur in the labels, and IoU only if it is not predicted either.
    """

    confusion: Tensor
    per_class: dict[str, dict[str, float]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reset()

    def _reset(self) -> None:
        self._images = 0
        self._sum: Tensor | None = None
        self._last: Tensor | None = None  # the last image's part of the sum
        self._unchecked: list[tuple[dict, Tensor]] = []
        self._written: dict[Path, str] = {}

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Counts a batch.

        Raises:
            ValueError: A label map has another size than the prediction, or one of both has values that are no class;
                the logits were not finite; or the data set names no classes.
        """
        if not self.dataset_meta.get('classes'):
            raise ValueError(
                f'{type(self).__name__}: the data set names no classes; expected metainfo=dict(classes=(...)) in '
                'val_dataloader.dataset, and in test_dataloader.dataset'
            )
        for sample in data_samples:
            if self.format_only:
                self._check(sample)
            else:
                self._count(sample)
            if self.output_dir is not None:
                self._write(sample)

    def _count(self, sample: dict) -> None:
        classes = len(self.dataset_meta['classes'])
        prediction, label = (sample[key]['data'].squeeze() for key in ('pred_sem_seg', 'gt_sem_seg'))
        label = label.to(prediction.device)
        if label.shape != prediction.shape:
            self._check(sample)
        table = joint_counts(label, prediction, max(256, classes) + 1)
        # Another ignored label is counted with all that lies outside, of which _check tells it.
        if self.ignore_index is not None and 0 <= self.ignore_index < len(table) - 1:
            table[self.ignore_index, :classes] = 0
        self._last = table[:classes, :classes].clone()
        self._sum = self._last.clone() if self._sum is None else self._sum.add_(self._last.to(self._sum.device))
        self._images += 1
        keys = ('img_path', 'seg_map_path', 'pred_sem_seg', 'gt_sem_seg', 'finite')
        kept = {key: sample[key] for key in keys if key in sample}
        wrong = table.sum() - self._last.sum()
        self._unchecked.append((kept, wrong + ~sample['finite'] if 'finite' in sample else wrong))
        if self._looks_at_once(table) or len(self._unchecked) == CHECKED_TOGETHER:
            self._check_all()

    def _looks_at_once(self, table: Tensor) -> bool:
        return not table.is_cuda

    def _check_all(self) -> None:
        """Looks at the pixels that were counted outside the matrix, and at logits that were not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        for (sample, _), wrong in zip(unchecked, torch.stack([count for _, count in unchecked]).tolist(), strict=True):
            if wrong:
                self._check(sample)

    def _check(self, sample: Mapping) -> None:
        """Refuses what mmsegmentation leaves out of the histograms without a word, and counts wrongly."""
        check_finite(sample)
        classes = len(self.dataset_meta['classes'])
        image = sample.get('img_path', 'an image without a path')
        prediction = _comparable(sample['pred_sem_seg']['data'].squeeze())
        if len(wrong := out_of_range(prediction, classes, None)):
            raise ValueError(
                f'{image}: the prediction has values {listing(wrong)}; expected {expected_labels(classes, None)}: '
                'the model has other classes than the data set. Set num_classes, or use the right checkpoint'
            )
        if self.format_only:
            return
        label = _comparable(sample['gt_sem_seg']['data'].squeeze())
        name = sample.get('seg_map_path', f'the label of {image}')
        if label.shape != prediction.shape:
            raise ValueError(
                f'{name}: the label is {tuple(label.shape)}, the prediction for {image} {tuple(prediction.shape)} '
                '(height, width); expected the same size. Pair the right files, or export the label anew'
            )
        if len(wrong := out_of_range(label, classes, self.ignore_index)):
            raise ValueError(
                f'{name}: the label has values {listing(wrong)}; expected '
                f'{expected_labels(classes, self.ignore_index)}. Repair the label, or set the classes or '
                'reduce_zero_label'
            )

    def _write(self, sample: Mapping) -> None:
        """Writes the prediction to ``output_dir`` as PNG, with the data set's own numbers."""
        image = sample['img_path']
        path = Path(self.output_dir, os.path.splitext(os.path.basename(image))[0] + '.png')
        _claim(self._written, path, image)
        # where 0 is what is ignored, the data set's first class is 1
        first = int(bool(sample.get('reduce_zero_label', False)))
        dtype = np.uint8 if len(self.dataset_meta['classes']) + first <= 256 else np.uint16
        data = sample['pred_sem_seg']['data']
        labels = data.reshape(data.shape[-2:]).cpu().numpy().astype(dtype)
        if not cv2.imwrite(str(path), labels + dtype(first)):
            raise OSError(f'{path}: cannot be written; expected a folder with space left')

    def evaluate(self, size: int) -> dict[str, float]:
        """Sums the matrices of all processes and returns the figures.

        Args:
            size: The number of images in the data set.

        Raises:
            ValueError: Another number of images was counted, or one of the last had values that are no class; or
                predictions of two processes were written to one file.
        """
        self._check_all()
        if self.output_dir is not None:
            everywhere: dict[Path, str] = {}
            for written in all_gather_object(self._written):
                for path, image in written.items():
                    _claim(everywhere, path, image)
        metrics = {}
        if not self.format_only:
            self.confusion = self._total(size)
            both, labels, predictions = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
            areas = (both, labels + predictions - both, predictions, labels)
            metrics = self.compute_metrics([tuple(area.double() for area in areas)])
        self._reset()
        return {f'{self.prefix}/{name}' if self.prefix else name: value for name, value in metrics.items()}

    def _total(self, size: int) -> Tensor:
        """Returns the matrix of the whole data set, each image counted once."""
        classes = len(self.dataset_meta['classes'])
        own = torch.zeros(classes, classes, dtype=torch.int64) if self._sum is None else self._sum.clone()
        images = torch.tensor(self._images)
        all_reduce(images)
        # DefaultSampler fills the last round, one image a process, from the start again.
        surplus = int(images) - size
        if not 0 <= surplus < max(get_world_size(), 1):
            raise ValueError(
                f'{type(self).__name__}: {int(images)} images were evaluated; expected the {size} of the data set. '
                'Let the sampler give each once: DefaultSampler(shuffle=False), or mmseg_resnest.EqualSizeBatchSampler'
            )
        if get_rank() >= get_world_size() - surplus:
            own -= self._last
        all_reduce(own)
        return own.cpu()

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Returns mIoU, mAcc and aAcc in percent, as plain numbers: MMEngine stores the best one in checkpoints."""
        return {name: round(float(value), 2) for name, value in super().compute_metrics(results).items()}

    def total_area_to_metrics(self, *args: Any, **kwargs: Any) -> dict[str, ndarray]:
        """Returns each metric's values, one a class, as fractions (``aAcc``: one value in all)."""
        metrics = super().total_area_to_metrics(*args, **kwargs)
        self.per_class = {
            name: {metric: float(values[i]) * 100 for metric, values in metrics.items() if metric != 'aAcc'}
            for i, name in enumerate(self.dataset_meta['classes'])
        }
        return metrics


def _claim(written: dict[Path, str], path: Path, image: str) -> None:
    if (other := written.setdefault(path, image)) != image:
        raise ValueError(f'{image} and {other} would both become {path}; expected images of different names')


def joint_counts(label: Tensor, prediction: Tensor, side: int) -> Tensor:
    """Counts the pixels of each pair of values: ``counts[i, j]`` have label i and prediction j.

    Args:
        label: (H, W), whole numbers of any dtype.
        prediction: (H, W), likewise.
        side: What lies outside of [0, side - 1) counts as ``side - 1``; more than 256.

    Returns:
        (side, side) int64.
    """
    pairs = (_bounded(label, side) * side).add_(_bounded(prediction, side)).flatten()
    if not pairs.is_cuda:
        return torch.bincount(pairs, minlength=side * side).view(side, side)
    counts = torch.zeros(side * side, dtype=torch.int64, device=pairs.device)  # bincount would wait for the GPU
    return counts.scatter_add_(0, pairs.long(), torch.ones_like(counts[:1]).expand(len(pairs))).view(side, side)


def _bounded(values: Tensor, side: int) -> Tensor:
    if values.dtype == torch.uint8:
        return values.int()
    values = _comparable(values)
    return values.int().where((values >= 0) & (values < side), side - 1)


def _comparable(values: Tensor) -> Tensor:
    """Returns uint16 and larger as int64, which torch does not compare, and int8, where 257 would wrap around to 1."""
    fits = values.dtype == torch.uint8 or (values.dtype.is_signed and values.dtype != torch.int8)
    return values if fits else values.long()
