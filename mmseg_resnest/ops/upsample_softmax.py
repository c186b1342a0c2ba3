"""Bilinear upsampling of logits fused with the softmax, added up: what test-time augmentation averages."""

import torch
from torch import Tensor

from mmseg_resnest.ops.placement import Placement, place


def upsample_softmax(logits: Tensor, placement: Placement, total: Tensor, *, exact: bool = False) -> None:
    """``total += softmax(place(logits, placement), 1)``, in place; for one channel the sigmoid.

    On a GPU full-resolution logits are never stored: a kernel reads the low-resolution ones twice.

    Args:
        logits: (N, C, h, w), any strides and dtype. Computed in float32.
        placement: How the logits come to lie on the image.
        total: (N, C, H, W), contiguous, float32.
        exact: Whether torch's own interpolation and softmax compute it on a GPU too.

    Raises:
        ValueError: ``total`` is not as above.
    """
    shape = (*logits.shape[:2], *placement.size)
    if total.shape != shape or total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f'upsample_softmax: total {tuple(total.shape)}, {total.dtype}, strides {total.stride()}; expected {shape}, '
            'torch.float32, contiguous'
        )
    if logits.is_cuda and not exact:
        from mmseg_resnest.ops.upsample_softmax_triton import add_probabilities

        add_probabilities(logits, placement, total)
        return
    placed = place(logits.detach().float(), placement)
    total.add_(placed.softmax(1) if placed.shape[1] > 1 else placed.sigmoid())
