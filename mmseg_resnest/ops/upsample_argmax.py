"""Bilinear upsampling of logits fused with their argmax: full-resolution logits are never stored."""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from mmseg_resnest.ops.placement import Placement, Taps, check_placement, label_type, place, row_taps

IMPLEMENTATIONS = ('triton', 'torch', 'exact')
BAND = 128  # rows of pixels for which the plain path holds the logits of their width
SEGMENT = 1 << 17  # logits of a row that it finishes at a time: they stay in the cache
CHUNK = 1 << 24  # the exact path holds so many interpolated logits at a time
LOG2_E = math.log2(math.e)


def upsample_argmax(
    logits: Tensor,
    placement: Placement,
    *,
    threshold: float | None = None,
    confidence: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The class with the highest logit at each pixel of the image, and its probability.

    With ``z = place(logits, placement)`` the labels are ``z.argmax(1)`` and their confidence is the softmax of z there;
    for one channel ``sigmoid(z) > threshold``, and the probability of what was decided. Labels differ from those of
    ``z.argmax(1)`` only where the two highest logits differ by rounding; with ``impl='exact'`` nowhere.

    Args:
        logits: (N, C, h, w), bfloat16, float16, float32 or float64, any strides. Computed in float32 (float64).
        placement: How the logits come to lie on the image.
        threshold: Of the probability, for one channel.
        confidence: Whether the probabilities are wanted.
        impl: ``'triton'``, not for float64; ``'torch'``, on the CPU; or ``'exact'``, with torch's own interpolation, a
            few classes at a time, anywhere. None: the plain path on a CPU, Triton on an NVIDIA or AMD GPU but for
            float64, else the exact one.

    Returns:
        Labels (N, H, W), uint8 for up to 256 classes, else int64; and their confidence (N, H, W), float32 (float64),
        or None.

    Raises:
        ValueError: A shape or option is not one of those above.
    """
    _check(logits, placement, threshold, impl)
    if impl is None:
        impl = {'cpu': 'torch', 'cuda': 'triton'}.get(logits.device.type, 'exact')
        impl = 'exact' if impl == 'triton' and logits.dtype == torch.float64 else impl
    if impl == 'triton':
        from mmseg_resnest.ops.upsample_argmax_triton import labels_and_confidence
    else:
        labels_and_confidence = _in_bands if impl == 'torch' else _exactly
    return labels_and_confidence(logits, placement, threshold, confidence)


def _check(logits: Tensor, placement: Placement, threshold: float | None, impl: str | None) -> None:
    if logits.ndim != 4 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f'upsample_argmax: logits {tuple(logits.shape)}, {logits.dtype}; expected (N, C, h, w), floating point'
        )
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f'upsample_argmax: impl={impl!r}; expected one of {IMPLEMENTATIONS} or None')
    if impl == 'torch' and logits.device.type != 'cpu':
        raise ValueError(f"upsample_argmax: impl='torch', logits on {logits.device}; expected a CPU")
    if impl == 'triton' and logits.dtype == torch.float64:
        raise ValueError(
            f"upsample_argmax: impl='triton', logits {logits.dtype}; expected float32 or less, or impl='exact'"
        )
    check_placement(placement)
    if (logits.shape[1] == 1) != (threshold is not None):
        raise ValueError(
            f'upsample_argmax: {logits.shape[1]} channels, threshold={threshold}; expected a threshold for one channel'
        )


def _in_bands(
    logits: Tensor, placement: Placement, threshold: float | None, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """The plain path for a CPU: channels-last, a few rows at a time.

    Rows of logits are resized along the width first; a pixel's logits are then a weighted sum of two vectors (three
    or four, resized twice), and lie side by side, where NumPy finds the highest ten times faster than torch.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.detach().to(dtype)
    taps = row_taps(logits.shape[2], placement, dtype, logits.device)
    labels = torch.empty(len(logits), *placement.size, dtype=label_type(logits.shape[1]))
    sureness = torch.empty(labels.shape, dtype=dtype) if confidence else None
    for n, image in enumerate(logits):
        for start in range(0, placement.size[0], BAND):
            index, weight = (part[start : start + BAND] for part in taps)
            first = int(index.min())
            wide = _along_width(image[:, first : int(index.max()) + 1], placement)
            with _one_thread():
                for y, columns, z in _rows(wide, Taps(index - first, weight)):
                    labels[n, start + y, columns], sure = _decide(z, threshold, confidence)
                    if confidence:
                        sureness[n, start + y, columns] = sure
    return labels, sureness


def _along_width(image: Tensor, placement: Placement) -> Tensor:
    """Maps rows of logits (C, rows, w) to (rows, W, C): the part of a placement that acts along them."""
    height = image.shape[1]
    (_, width), via = placement.size, placement.via and (height, placement.via[1])
    flip = placement.flip if placement.flip == 'horizontal' else None
    along = Placement((height, width), via, (*placement.padding[:2], 0, 0), flip, placement.align_corners)
    wide = place(image[None].contiguous(memory_format=torch.channels_last), along)
    return wide.permute(0, 2, 3, 1)[0].contiguous()


@functools.cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def _one_thread() -> AbstractContextManager:
    """Keeps torch from sharing a row among threads: hardly faster, and on a busy machine they wait for each other.

    Of OpenMP, whose number is the calling thread's own: ``torch.set_num_threads`` would also set what new ones get.
    """
    torch.get_num_threads()  # which sets a new thread's number, at the first time it is asked
    return _thread_pools().limit(limits=1, user_api='openmp')


def _rows(wide: Tensor, taps: Taps) -> Iterator[tuple[int, slice, Tensor]]:
    """Yields the logits (columns, C) of rows of pixels, segment by segment; the next overwrites them."""
    _, width, channels = wide.shape
    step = max(SEGMENT // channels, 1)
    buffer = wide.new_empty(step * channels)
    for y, (indices, weights) in enumerate(zip(taps.index.tolist(), taps.weight.tolist(), strict=True)):
        for start in range(0, width, step):
            columns = slice(start, min(start + step, width))
            z = buffer[: (columns.stop - start) * channels].view(-1, channels)
            # From the last tap to the first, with fused multiply-adds: torch's own bits, with two taps.
            torch.mul(wide[indices[-1], columns], weights[-1], out=z)
            for i, weight in zip(indices[-2::-1], weights[-2::-1], strict=True):
                z.add_(wide[i, columns], alpha=weight)
            yield y, columns, z


def _decide(z: Tensor, threshold: float | None, confidence: bool) -> tuple[Tensor, Tensor | None]:
    """Maps logits (pixels, C), which it may overwrite, to labels and their probability (pixels,)."""
    if threshold is not None:
        positive = z[:, 0].sigmoid()
        labels = positive > threshold
        return labels, positive.where(labels, 1 - positive)
    labels = torch.from_numpy(z.numpy().argmax(-1))
    if not confidence:
        return labels, None
    z.sub_(z.amax(1, keepdim=True)).mul_(LOG2_E).exp2_()  # exp is MKL's, of as many threads as the process has
    return labels, z.sum(1).reciprocal_()


def _exactly(
    logits: Tensor, placement: Placement, threshold: float | None, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """Torch's own interpolation and argmax, for as many classes at a time as memory is meant for."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.detach().to(dtype)
    count, channels = logits.shape[:2]
    if threshold is not None:
        positive = place(logits, placement)[:, 0].sigmoid()
        labels = positive > threshold
        return labels.byte(), positive.where(labels, 1 - positive) if confidence else None
    step = max(CHUNK // (count * max(map(_area, (placement.size, placement.via or placement.size)))), 1)
    labels = best = total = None
    for start in range(0, channels, step):
        z = place(logits[:, start : start + step], placement)
        highest, which = z.max(1)
        part = z.logsumexp(1) if confidence else None
        if start == 0:
            labels, best, total = which, highest, part
        else:
            higher = (highest > best) | (highest.isnan() & ~best.isnan())  # as in all classes at once
            labels = torch.where(higher, which + start, labels)
            best = torch.maximum(best, highest)
            total = torch.logaddexp(total, part) if confidence else None
    return labels.to(label_type(channels)), (best - total).exp() if confidence else None


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
