"""Bilinear upsampling of logits fused with the softmax, added up: what test-time augmentation averages."""

import torch
from torch import Tensor

from mmseg_resnest.ops.placement import Placement, check_placement, place
from mmseg_resnest.ops.upsample_argmax import IMPLEMENTATIONS


def upsample_softmax(logits: Tensor, placement: Placement, total: Tensor, *, impl: str | None = None) -> None:
    """``total += softmax(place(logits, placement), 1)``, in place; for one channel the sigmoid.

    On a GPU full-resolution logits are never stored: a kernel reads the low-resolution ones twice.

    Args:
        logits: (N, C, h, w), any strides and dtype. Computed in float32.
        placement: How the logits come to lie on the image.
        total: (N, C, H, W), contiguous, float32.
        impl: As of ``upsample_argmax``; all but ``'triton'`` are torch's own interpolation and softmax. None: Triton on
            a GPU.

    Raises:
        ValueError: ``total``, the placement or ``impl`` is not as above.
    """
    check_placement(placement)
    if impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(f'upsample_softmax: impl={impl!r}; expected one of {IMPLEMENTATIONS} or None')
    shape = (*logits.shape[:2], *placement.size)
    if total.shape != shape or total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f'upsample_softmax: total {tuple(total.shape)}, {total.dtype}, strides {total.stride()}; expected {shape}, '
            'torch.float32, contiguous'
        )
    if impl == 'triton' or (impl is None and logits.is_cuda):
        from mmseg_resnest.ops.upsample_softmax_triton import add_probabilities

        add_probabilities(logits, placement, total)
        return
    placed = place(logits.detach().float(), placement)
    total.add_(placed.softmax(1) if placed.shape[1] > 1 else placed.sigmoid())
