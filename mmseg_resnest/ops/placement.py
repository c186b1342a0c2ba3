"""How low-resolution logits come to lie on an image, as a whole and along each axis."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLIPS = ('horizontal', 'vertical', None)


class Placement(NamedTuple):
    """How logits come to lie on the image: resized to the network's input, unpadded, mirrored, resized to the image.

    Attributes:
        size: Height and width of the image.
        via: Those of the network's input, padding included; None: ``size``, and nothing is resized twice.
        padding: What lies left, right, above and below the image in the network's input, in pixels.
        flip: How the network's input is mirrored: ``'horizontal'``, ``'vertical'`` or None.
        align_corners: As in ``torch.nn.functional.interpolate``.
    """

    size: tuple[int, int]
    via: tuple[int, int] | None = None
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    flip: str | None = None
    align_corners: bool = False


def check_placement(placement: Placement) -> None:
    """Raises a ValueError unless a placement is one of a picture inside of its padding."""
    left, right, top, bottom = placement.padding
    height, width = placement.via or placement.size
    if placement.flip not in FLIPS:
        raise ValueError(f'flip={placement.flip!r}; expected one of {FLIPS}')
    if min(*placement.padding, *placement.size, height - top - bottom - 1, width - left - right - 1) < 0:
        raise ValueError(f'{placement}; expected a picture inside of the padding')


class Taps(NamedTuple):
    """An axis as a sparse matrix: ``out[i] = sum_t weight[i, t] * x[index[i, t]]``.

    Attributes:
        index: (out_size, T) int64, rising; at the end the last may repeat, without weight.
        weight: (out_size, T), of the logits' dtype.
    """

    index: Tensor
    weight: Tensor


def label_type(classes: int) -> torch.dtype:
    """Returns the smaller of uint8 and int64 that holds the labels."""
    return torch.uint8 if classes <= 256 else torch.int64


def place(logits: Tensor, placement: Placement) -> Tensor:
    """Maps logits (N, C, h, w) to (N, C, H, W), as mmsegmentation does it step by step, less what changes nothing."""
    size, via, (left, right, top, bottom), flip, align_corners = placement
    via = via or size
    logits = _resize(logits, via, align_corners)[..., top : via[0] - bottom, left : via[1] - right]
    if flip is not None:
        logits = logits.flip(3 if flip == 'horizontal' else 2)
    return _resize(logits, size, align_corners)


def _resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode='bilinear', align_corners=align_corners)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the taps are remembered, and the next call may be in no inference mode
def row_taps(height: int, placement: Placement, dtype: torch.dtype, device: torch.device) -> Taps:
    """Returns how the rows of pixels come from ``height`` rows of logits: what torch makes of unit vectors."""
    (size, _), via = placement.size, placement.via and (placement.via[0], 1)
    flip = placement.flip if placement.flip == 'vertical' else None
    top, bottom = placement.padding[2:]
    if height == (via[0] if via else size) == size + top + bottom:  # nothing is resized
        index = torch.arange(top, top + size, device=device)
        index = index if flip is None else index.flip(0)
        return Taps(index[:, None], torch.ones(size, 1, dtype=dtype, device=device))
    along = Placement((size, 1), via, (0, 0, top, bottom), flip, placement.align_corners)
    matrix = place(torch.eye(height, dtype=dtype, device=device)[None, :, :, None], along)[0, :, :, 0].T.contiguous()
    used = matrix != 0
    count = used.sum(1, keepdim=True)
    tap = torch.arange(int(count.max()), device=device)
    # Taps that a row does not need lie at its last one: elsewhere 0 times infinity would make it nan.
    index = used.byte().argsort(dim=1, descending=True, stable=True).gather(1, tap.minimum(count - 1))
    return Taps(index, matrix.gather(1, index).where(tap < count, 0))


@lru_cache(maxsize=256)
def column_taps(width: int, placement: Placement, dtype: torch.dtype, device: torch.device) -> Taps:
    """Returns how the columns of pixels come from ``width`` columns of logits."""
    left, right, top, bottom = placement.padding
    flip = {'horizontal': 'vertical', 'vertical': 'horizontal'}.get(placement.flip)
    via = placement.via and placement.via[::-1]
    turned = Placement(placement.size[::-1], via, (top, bottom, left, right), flip, placement.align_corners)
    return row_taps(width, turned, dtype, device)
