"""Where bilinear interpolation along one axis reads, and with which weight."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """The interpolation of one axis: ``out[i] = (1 - weight[i]) * x[left[i]] + weight[i] * x[right[i]]``.

    Attributes:
        left: (out_size,) int64.
        right: (out_size,) int64, ``left + 1`` or, at a border, ``left``.
        weight: (out_size,) float64, in [0, 1].
    """

    left: Tensor
    right: Tensor
    weight: Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training too
def bilinear_axis(in_size: int, out_size: int, align_corners: bool) -> Axis:
    """Returns torch's bilinear interpolation of ``in_size`` values to ``out_size``, in float64 on the CPU."""
    positions = torch.arange(out_size, dtype=torch.float64)
    if align_corners:
        source = positions * ((in_size - 1) / max(out_size - 1, 1))
    else:
        source = ((positions + 0.5) * (in_size / out_size) - 0.5).clamp(min=0)
    left = source.floor().long().clamp(max=in_size - 1)
    right = (left + 1).clamp(max=in_size - 1)
    return Axis(left, right, torch.where(right > left, source - left, 0.0))
