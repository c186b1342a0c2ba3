"""Test-time augmentation: OpenMMLab's, and the authors' multi-scale evaluation (zhanghang1989/PyTorch-Encoding)."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn import functional

from mmseg_resnest.inference import WINDOWS, are_finite
from mmseg_resnest.ops import Placement, place, upsample_argmax, upsample_softmax
from mmseg_resnest.registry import MODELS
from mmseg_resnest.segmentor import EncoderDecoder, keeps, predicts_from_logits

SCORES = 1 << 29  # 2 GiB, of the images that run together


@MODELS.register_module()
class TTAModel(BaseTTAModel):
    """mmsegmentation's SegTTAModel: the mean of the softmax over an image's augmentations, and its highest class.

    It keeps that one sum, to which probabilities are added from low-resolution logits; SegTTAModel keeps the logits of
    all augmentations, at full resolution. Those of one size, mirrored or not, run through the network together, of as
    many images of the batch as have ``SCORES`` scores. For one channel the mean is of the probabilities: SegTTAModel
    takes the sigmoid of what is a probability already, which is above 0.5 everywhere.

    Args:
        module: The segmentor, or its config.
        data_preprocessor: Of the segmentor, if its config has none.
    """

    def merge_preds(self, data_samples_list: list[Sequence[SegDataSample]]) -> list[SegDataSample]:
        """Merges the samples of each image, one an augmentation; ``test_step`` does without it."""
        return [self._merged(samples, sum(map(_scores, samples)) / len(samples)) for samples in data_samples_list]

    @torch.no_grad()
    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predicts a batch.

        Args:
            data: ``inputs`` and ``data_samples``, each a list of the augmentations' lists of the images'.

        Returns:
            A sample an image, with ``pred_sem_seg`` (1, H, W), the mean (C, H, W) as ``seg_logits``, and the label map
            of the first augmentation's sample.
        """
        first = zip(data['inputs'][0], data['data_samples'][0], strict=True)
        largest = max(math.prod(sample.get('ori_shape', image.shape[1:])[:2]) for image, sample in first)
        step = max(SCORES // (self.module.out_channels * largest), 1)
        predictions = []
        for start in range(0, len(data['inputs'][0]), step):
            part = {key: [items[start : start + step] for items in data[key]] for key in ('inputs', 'data_samples')}
            predictions += self._predict(part)
        return predictions

    def _predict(self, data: dict) -> list[SegDataSample]:
        if _adds_from_logits(self.module):
            data = self.module.data_preprocessor.cast_data(data)  # all at once: to move them waits for the GPU
        totals: list[Tensor] = []
        finite: list[Tensor] = []  # of each image of each augmentation
        count = len(data['inputs'][0])
        for _, group in groupby(range(len(data['inputs'])), lambda i: [x.shape for x in data['inputs'][i]]):
            group = list(group)
            batch = {key: [item for i in group for item in data[key][i]] for key in ('inputs', 'data_samples')}
            samples = self._add_scores(batch, totals, count)
            finite.extend(sample.get('finite', totals[0].new_ones((), dtype=torch.bool)) for sample in samples)
        means = [total.div_(len(data['inputs'])) for total in totals]
        firsts, lasts = data['data_samples'][0], samples[-count:]
        merged = [self._merged(samples, mean) for *samples, mean in zip(firsts, lasts, means, strict=True)]
        for i, sample in enumerate(merged):
            sample.finite &= torch.stack(finite[i::count]).all()
        return merged

    def _add_scores(self, batch: dict, totals: list[Tensor], count: int) -> list[SegDataSample]:
        """Adds to each image's total the scores of its augmentations in a batch; at first there are no totals.

        Args:
            batch: As a segmentor gets it; every ``count`` images another augmentation begins.
            totals: (C, H, W) of each image.
            count: How many images there are.

        Returns:
            The batch's samples.
        """
        module = self.module
        if not _adds_from_logits(module):
            samples = module.test_step(batch)
            if not totals:
                totals.extend(torch.zeros_like(sample.seg_logits.data) for sample in samples[:count])
            for i, sample in enumerate(samples):
                totals[i % count] += _scores(sample)
            return samples
        batch = module.data_preprocessor(batch)
        logits, placements = module.placed_logits(batch['inputs'], batch['data_samples'])
        if not totals:
            sizes = [(logits.shape[1], *placement.size) for placement in placements[:count]]
            totals.extend(logits.new_zeros(size, dtype=torch.float32) for size in sizes)
        for sample, is_finite in zip(batch['data_samples'], are_finite(logits), strict=True):
            sample.finite = is_finite
        impl = module.test_cfg.get('upsample_argmax')
        for i, placement in enumerate(placements):
            upsample_softmax(logits[i : i + 1], placement, totals[i % count][None], impl=impl)
        return batch['data_samples']

    def _merged(self, samples: Sequence[SegDataSample], mean: Tensor) -> SegDataSample:
        """Returns the last augmentation's sample with the merged prediction, as SegTTAModel does."""
        first, merged = samples[0], samples[-1]
        if len(mean) > 1:
            labels = upsample_argmax(mean[None], Placement(tuple(mean.shape[1:])))[0]
        else:
            labels = (mean > self.module.decode_head.threshold).byte()
        merged.pred_sem_seg, merged.seg_logits = PixelData(data=labels), PixelData(data=mean)
        merged.finite = mean.sum().isfinite()  # as inference.check_finite wants to know
        if 'gt_sem_seg' in first:
            merged.gt_sem_seg = first.gt_sem_seg
        merged.set_metainfo(dict(img_path=first.get('img_path')))
        return merged


def _adds_from_logits(module: nn.Module) -> bool:
    """Whether a segmentor predicts as our EncoderDecoder does, from low-resolution logits."""
    return keeps(module, EncoderDecoder, 'predict') and predicts_from_logits(module)


def _scores(sample: SegDataSample) -> Tensor:
    logits = sample.seg_logits.data
    return logits.softmax(0) if len(logits) > 1 else logits


@MODELS.register_module()
class AuthorsTTAModel(BaseModel):
    r"""Segments an image at several scales, each with sliding windows and mirrored, as the authors evaluate.

    The normalised image is resized so that its long side is ``ceil(base_size * scale)`` and covered by windows
    ``crop_size`` square, at a stride of two thirds, padded at the right and bottom with black. With the logits
    :math:`z` of a window :math:`x`, at its size, and the mirror :math:`m`, its scores are
    :math:`\exp(z(x) + m(z(m(x))))`. They are averaged where windows overlap, resized to the image and summed over the
    scales; the class with the highest sum is predicted. All resizing of images and scores is bilinear with
    ``align_corners=True``; ``test_cfg`` of the module has no say.

    Scores are float64. In float32 their exponential is infinite from 88.7 on, two logits of 45 suffice, and resizing
    infinite scores gives nan: that is what the authors' program computes. Here the limit is 709, and where their
    scores are finite the prediction is the same up to rounding.

    For Cityscapes the authors' program has other scales, 0.75 to 2.25 in steps of 0.25. Its defaults for ``base_size``
    and ``crop_size`` are those below for all data sets, and its documentation has no command for Cityscapes that would
    give others: ``configs/_base_/cityscapes.py`` takes 2048 and 768, with which GluonCV trains on that data set.

    Args:
        module: The segmentor, or its config.
        scales: Scales of ``base_size``.
        base_size: Long side of the image at scale 1, in pixels.
        crop_size: Side of a window, in pixels.

    Raises:
        ValueError: The segmentor has one logit a pixel, of which the highest means nothing.
    """

    def __init__(
        self,
        module: dict | nn.Module,
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        base_size: int = 520,
        crop_size: int = 480,
    ) -> None:
        super().__init__()
        self.module = module if isinstance(module, nn.Module) else MODELS.build(module)
        if self.module.out_channels == 1:
            raise ValueError(
                'AuthorsTTAModel: model.decode_head.out_channels=1; expected one for each of at least two classes. '
                "Test without the authors' evaluation, or train with num_classes=2 and the softmax."
            )
        self.scales = tuple(scales)
        self.base_size = base_size
        self.crop_size = crop_size
        self.stride = int(crop_size * (2 / 3))

    @torch.no_grad()
    def test_step(self, data: dict) -> list[SegDataSample]:
        """Adds ``pred_sem_seg`` (1, H, W), int64, to each sample of a batch, whose images may differ in size.

        Args:
            data: ``inputs``, images (3, H, W) as loaded, not resized; and their ``data_samples``.

        Raises:
            ValueError: An image has another size than its file, or scores are not finite.
        """
        samples = []
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            height, width = image.shape[1:]
            if tuple(sample.ori_shape) != (height, width):
                raise ValueError(
                    f'{sample.get("img_path")}: {height}x{width} pixels after the test pipeline, '
                    f'{"x".join(map(str, sample.ori_shape))} in the file; expected the same, for AuthorsTTAModel '
                    'resizes by itself. Take what resizes, crops or pads out of the test pipeline.'
                )
            batch = dict(inputs=[image, torch.zeros_like(image)], data_samples=[sample, sample])
            batch = self.module.data_preprocessor(batch)
            normalised, black = batch['inputs'][..., :height, :width]  # without the padding that it may add
            scores = self(normalised, black[:, :1, :1])
            if not scores.isfinite().all():
                raise ValueError(
                    f'{sample.get("img_path")}: scores are not finite; expected logits of at most 354. '
                    "The model's weights are damaged, or its training diverged."
                )
            sample = batch['data_samples'][0]
            sample.set_data(dict(pred_sem_seg=PixelData(data=scores.argmax(0, keepdim=True))))
            samples.append(sample)
        return samples

    def forward(self, image: Tensor, black: Tensor) -> Tensor:
        """Computes the scores of each class, summed over the scales.

        Args:
            image: A normalised image (3, H, W).
            black: A normalised black pixel (3, 1, 1).

        Returns:
            Scores (classes, H, W), float64.
        """
        size = image.shape[1:]
        scores = image.new_zeros(self.module.out_channels, *size, dtype=torch.float64)
        for scale in self.scales:
            resized = _resize(image, self._scaled_size(*size, scale))
            scores += _resize(self._windowed_scores(resized, black), size)
        return scores

    def _scaled_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        long_side = math.ceil(self.base_size * scale)
        if height > width:
            return long_side, int(width * long_side / height + 0.5)
        return int(height * long_side / width + 0.5), long_side

    def _windowed_scores(self, image: Tensor, black: Tensor) -> Tensor:
        """Averages the scores of the windows over an image (3, H, W); the windows at its border look over it."""
        height, width = image.shape[1:]
        crop, rows, columns = self.crop_size, self._window_starts(height), self._window_starts(width)
        padded = black.repeat(1, rows[-1] + crop, columns[-1] + crop)
        padded[:, :height, :width] = image
        scores = padded.new_zeros(self.module.out_channels, *padded.shape[1:], dtype=torch.float64)
        covered = padded.new_zeros(padded.shape[1:])
        corners = [(top, left) for top in rows for left in columns]
        windows = torch.stack([padded[:, top : top + crop, left : left + crop] for top, left in corners])
        for (top, left), part in zip(corners, self._mirrored_scores(windows), strict=True):
            window = slice(top, top + crop), slice(left, left + crop)
            scores[:, *window] += part
            covered[window] += 1
        return (scores / covered)[:, :height, :width]

    def _window_starts(self, length: int) -> range:
        return range(0, max(length - self.crop_size, 0) + self.stride, self.stride)

    def _mirrored_scores(self, windows: Tensor) -> Iterator[Tensor]:
        """Yields the scores of each window, which run through the network together, each with its mirror."""
        for part in windows.split(WINDOWS // 2):
            logits, mirrored = self._logits(torch.cat([part, part.flip(-1)])).chunk(2)
            for one, other in zip(logits, mirrored, strict=True):
                yield (one.double() + other.flip(-1)).exp()

    def _logits(self, images: Tensor) -> Tensor:
        """Returns the logits of images, at their size; our segmentor runs as ``network.speed_up`` has made it."""
        if isinstance(self.module, EncoderDecoder) and predicts_from_logits(self.module):
            logits = self.module.low_resolution_logits(images)
            logits = logits.masked_fill(~are_finite(logits)[:, None, None, None], torch.nan)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            return place(logits.to(dtype), Placement(tuple(images.shape[2:]), align_corners=self.module.align_corners))
        # mmseg takes a torch.Size for the size to which logits are resized.
        return self.module.encode_decode(images, [dict(img_shape=images.shape[2:])] * len(images))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes (C, H, W) so that the centres of the corner pixels stay where they are."""
    return functional.interpolate(x[None], tuple(size), mode='bilinear', align_corners=True)[0]
