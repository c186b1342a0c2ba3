"""Transforms that give what mmsegmentation's do, faster; and what is checked while a pipeline runs."""

import re
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from mmcv.transforms import TestTimeAug as _TestTimeAug
from mmcv.transforms.utils import cache_randomness
from mmengine.dataset import Compose
from mmengine.structures import PixelData
from mmseg.datasets.transforms import PackSegInputs
from mmseg.datasets.transforms import PhotoMetricDistortion as _PhotoMetricDistortion
from mmseg.datasets.transforms import RandomCrop as _RandomCrop
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_resnest.registry import TRANSFORMS

Labels = TypeVar('Labels', np.ndarray, Tensor)

MAX_BAD_IN_A_ROW = 100


@TRANSFORMS.register_module()
class RandomCrop(_RandomCrop):
    """mmsegmentation's RandomCrop: the same crops, where a histogram counts the classes that ``np.unique`` sorted."""

    @cache_randomness
    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """Draws a crop, at most ten times more while one class has ``cat_max_ratio`` of its labelled pixels.

        Args:
            results: The pipeline's: ``img`` (H, W, C) and ``gt_seg_map`` (H, W), non-negative integers.

        Returns:
            Top, bottom, left, right.
        """
        box = self._draw(results['img'].shape)
        for _ in range(10 if self.cat_max_ratio < 1 else 0):
            counts = np.bincount(self.crop(results['gt_seg_map'], box).ravel())
            if self.ignore_index is not None and 0 <= self.ignore_index < len(counts):
                counts[self.ignore_index] = 0
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
            box = self._draw(results['img'].shape)
        return box

    def _draw(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        height, width = self.crop_size
        top = np.random.randint(0, max(shape[0] - height, 0) + 1)
        left = np.random.randint(0, max(shape[1] - width, 0) + 1)
        return top, top + height, left, left + width


@TRANSFORMS.register_module()
class PhotoMetricDistortion(_PhotoMetricDistortion):
    """mmsegmentation's PhotoMetricDistortion: the same pictures, where a table of 256 entries replaces arithmetic."""

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """Returns ``clip(img * alpha + beta, 0, 255)``, uint8."""
        if img.dtype != np.uint8:
            return super().convert(img, alpha, beta)
        return cv2.LUT(img, super().convert(np.arange(256, dtype=np.uint8), alpha, beta))

    def hue(self, img: np.ndarray) -> np.ndarray:
        """Turns the hue of a picture (H, W, 3), BGR, by up to ``hue_delta``, every other time."""
        if img.dtype != np.uint8:
            return super().hue(img)
        if not np.random.randint(2):
            return img
        hsv = cv2.cvtColor(img, cv2.COLOR_BGR2HSV)
        delta = np.random.randint(-self.hue_delta, self.hue_delta)
        table = ((np.arange(256) + delta) % 180).astype(np.uint8)
        hsv[..., 0] = cv2.LUT(hsv[..., 0], table)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)


@TRANSFORMS.register_module()
class PackByteLabels(PackSegInputs):
    """mmsegmentation's PackSegInputs, where a label map (H, W) stays uint8: an eighth of the bytes to move.

    mmsegmentation makes it int64, which torch's losses need: this project's EncoderDecoder does so on the GPU, where a
    loss is not fused; for another segmentor take mmsegmentation's own. The image is the same, taken apart into
    channels by OpenCV.
    """

    def transform(self, results: dict) -> dict:
        """Returns ``inputs`` (C, H, W) and ``data_samples``, with ``gt_sem_seg`` (1, H, W)."""
        results = dict(results)
        image, label = results['img'], results.get('gt_seg_map')
        if image.ndim == 3 and image.shape[2] <= 4:  # OpenCV mixes up more than 128 channels
            planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
            cv2.split(image, list(planes))
            results['img'] = planes.transpose(1, 2, 0)  # which PackSegInputs turns back, without a copy
        if label is None or label.dtype != np.uint8 or label.ndim != 2:
            return super().transform(results)
        del results['gt_seg_map']
        packed = super().transform(results)
        _add_label(packed['data_samples'], label)
        return packed


@TRANSFORMS.register_module()
class ImageTestTimeAug(_TestTimeAug):
    """mmcv's TestTimeAug after LoadAnnotations: the label map stays as it is, with the first augmentation alone.

    No other is read; mmsegmentation's pipelines load it anew for each.
    """

    def transform(self, results: dict) -> dict:
        """Returns ``inputs`` and ``data_samples``, each a list of the augmentations'."""
        label = results.get('gt_seg_map')
        bare = {key: value for key, value in results.items() if key != 'gt_seg_map'} | dict(seg_fields=[])
        augmented = super().transform(bare)
        if label is not None:
            _add_label(augmented['data_samples'][0], label)
        return augmented


def _add_label(sample: SegDataSample, label: np.ndarray) -> None:
    sample.gt_sem_seg = PixelData(data=torch.from_numpy(np.ascontiguousarray(label[None])))


class CheckedCompose(Compose):
    """A data set's pipeline whose failures name the sample, and which checks a label map once it is loaded and packed.

    A label map must be as large as its image, with values in [0, classes) or ``ignore_index``. A bad sample raises a
    ValueError of one line (all that is shown of a data loader's worker), or is written to ``skipped`` and gives None,
    for which MMEngine's data sets fetch another sample. Where only the packed label map has other values, a transform
    has filled them in: that always raises. The check of a loaded one costs 0.2 ms for a label map of 512 x 683 and
    0.5 ms for one of 2048 x 1024, where loading the pair takes 1.8 and 41 ms; that of a packed crop of
    512 x 512 costs 0.3 ms, of 1024 x 512 0.6 ms.

    Args:
        transforms: The pipeline's; they run one by one, as they are.
        classes: Number of classes; None leaves the values unchecked.
        ignore_index: The label that is ignored; None if there is none.
        advice: What the message ends with.
        skipped: The file that gets a line for each bad sample, from all workers: its files, a tab, what was found;
            None: a bad sample raises.

    Raises:
        ValueError: A sample is bad, or ``MAX_BAD_IN_A_ROW`` of them were skipped with no good one between.
    """

    def __init__(
        self,
        transforms: list,
        classes: int | None,
        ignore_index: int | None,
        advice: str = '',
        skipped: Path | None = None,
    ) -> None:
        super().__init__(transforms)
        self.classes = classes
        self.ignore_index = ignore_index
        self.advice = advice
        self.skipped = skipped
        self._bad_in_a_row = 0

    def __call__(self, data: dict) -> dict | None:
        """Returns the sample as the transforms made it; None if one of them gave it up, or if it is skipped."""
        files = dict(image=data.get('img_path'), label=data.get('seg_map_path'))
        label_is_due = 'gt_seg_map' not in data
        for transform in self.transforms:
            try:
                data = transform(data)
            except Exception as error:
                text = re.sub(' at 0x[0-9a-f]+', '', ' '.join(str(error).split()))  # which differ from time to time
                return self._bad(files, f'{type(transform).__name__} failed: {type(error).__name__}: {text}', error)
            if data is None:
                return None
            if label_is_due and 'gt_seg_map' in data:
                label_is_due = False
                if problem := label_problem(data, self.classes, self.ignore_index):
                    return self._bad(files, problem)
        self._bad_in_a_row = 0
        self._check_packed(data, files)
        return data

    def _check_packed(self, data: dict, files: dict[str, str | None]) -> None:
        packed = getattr(data.get('data_samples'), 'gt_sem_seg', None)  # a list under test-time augmentation
        if packed is None or self.classes is None:
            return
        if len(wrong := out_of_range(np.asarray(packed.data), self.classes, self.ignore_index)):
            raise ValueError(
                f'image {files["image"]}: after the transforms its label has values {listing(wrong)}; expected '
                f'{expected_labels(self.classes, self.ignore_index)}, as it had when it was loaded. Let the transform '
                'that fills them in use the ignored label: seg_pad_val=..., or pad_val=dict(img=0, seg=...) of Pad'
            )

    def _bad(self, files: dict[str, str | None], found: str, cause: Exception | None = None) -> None:
        named = ', '.join(f'{kind} {_with_size(path)}' for kind, path in files.items() if path)
        if self.skipped is None:
            raise ValueError(f'bad sample: {named}: {found}{self.advice}') from cause
        self._bad_in_a_row += 1
        if self._bad_in_a_row == MAX_BAD_IN_A_ROW:
            last = f'{named}: {found}'
            raise ValueError(f'{MAX_BAD_IN_A_ROW} bad samples in a row, no good one between; the last: {last}')
        with self.skipped.open('a') as file:  # workers append a line each, which does not interleave
            file.write(f'{named}:\t{found}\n')


def _with_size(path: str) -> str:
    return f'{path} ({Path(path).stat().st_size} bytes)' if Path(path).is_file() else path


def label_problem(results: dict, classes: int | None, ignore_index: int | None) -> str:
    """Returns what is wrong with the label map that a transform has just loaded, and the fix; '' if nothing is.

    Args:
        results: The pipeline's: ``gt_seg_map``, an integer array, and the image's ``ori_shape`` and ``img``.
        classes: Number of classes, or None.
        ignore_index: The label that is ignored, or None.
    """
    label = results['gt_seg_map']
    # Its size is the image's as loaded or, where one transform loads and resizes both, as it is now.
    sizes = [tuple(results['ori_shape'])] if 'ori_shape' in results else []
    sizes += [results['img'].shape[:2]] if isinstance(results.get('img'), np.ndarray) else []
    if sizes and label.ndim > len(sizes[0]):
        return (
            f'the label has {label.shape[-1]} channels (shape {label.shape}); expected one, with the number of the '
            'class at each pixel. Convert its colours to numbers'
        )
    if sizes and label.shape not in sizes:
        return (
            f'the label is {_size(label.shape)}, the image {_size(sizes[0])} (width x height, EXIF rotation applied); '
            'expected the same size. Pair the right files, or export the label anew'
        )
    wrong = [] if classes is None else out_of_range(label, classes, ignore_index)
    if len(wrong) == 0:
        return ''
    reduced = ' after reduce_zero_label (0 is ignored, n becomes n - 1)' if results.get('reduce_zero_label') else ''
    return (
        f'the label has values {listing(wrong)}; expected {expected_labels(classes, ignore_index)}{reduced}. '
        'Repair the label, or set the classes or reduce_zero_label'
    )


def out_of_range(label: Labels, classes: int, ignore_index: int | None) -> Labels:
    """Returns the values that are neither in [0, classes) nor ``ignore_index``."""
    wrong = (label >= classes) | (label < 0)
    if label.dtype == torch.uint8 and ignore_index not in range(256):
        ignore_index = None  # torch would ignore what it wraps to: 156 for -100
    if ignore_index is not None:
        wrong &= label != ignore_index
    return label[wrong] if wrong.any() else label.flatten()[:0]  # indexing by a mask takes ten times the rest


def listing(values: Labels) -> str:
    """Returns how many values there are and which, the first eight of them, for a message."""
    found = [str(int(value)) for value in sorted(set(values.tolist()))]
    return f'{", ".join(found[:8])}{", ..." if len(found) > 8 else ""} at {len(values)} pixels'


def expected_labels(classes: int, ignore_index: int | None) -> str:
    """Returns which labels are allowed, for a message."""
    return f'0-{classes - 1}' + ('' if ignore_index is None else f' or {ignore_index} (ignored)')


def _size(shape: tuple[int, ...]) -> str:
    return 'x'.join(str(side) for side in reversed(shape))
