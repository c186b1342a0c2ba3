"""The kernel of ``upsample_softmax``.

Logits are resized along the height first; a program owns pixels of one row, whose logits are then sums of few values of
that row, and loops over the classes twice: for the highest logit and the sum of the exponentials, and to add the
probabilities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.placement import Placement, column_taps, place
from mmseg_resnest.ops.taps_triton import BLOCK, LOG2E, LOWEST, along_row, four_taps


@triton.jit(do_not_specialize=['C', 'W', 'width'])
def softmax_kernel(
    logits,  # (N, C, H, width) float32
    index,  # (W, COLUMNS) int64
    weight,  # (W, COLUMNS) float32
    total,  # (N, C, H, W) float32
    C,
    W,
    width,
    COLUMNS: tl.constexpr,  # up to 4
    BINARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, H = tl.program_id(1), tl.num_programs(1)
    n = tl.program_id(2).to(tl.int64)
    pixel = x < W
    x0, x1, x2, x3, w0, w1, w2, w3 = four_taps(index, weight, x, pixel, COLUMNS)
    row = logits + (n * C * H + y) * width
    plane = (H * width).to(tl.int64)  # from a class to the next
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    exponentials = tl.zeros((BLOCK,), tl.float32)  # sum over c of exp(z[c] - best)
    if not BINARY:
        for c in range(C):
            z = along_row(row + c * plane, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS)
            highest = tl.maximum(best, z)
            exponentials = exponentials * tl.exp2((best - highest) * LOG2E) + tl.exp2((z - highest) * LOG2E)
            best = highest

    place = total + (n * C * H + y) * W + x
    for c in range(C):
        z = along_row(row + c * plane, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS)
        probability = 1 / (1 + tl.exp2(-z * LOG2E)) if BINARY else tl.exp2((z - best) * LOG2E) / exponentials
        tl.store(place, tl.load(place, mask=pixel) + probability, mask=pixel)
        place += H * W


def add_probabilities(logits: Tensor, placement: Placement, total: Tensor) -> None:
    """Adds the probabilities; the contract is that of ``upsample_softmax``."""
    logits = _along_height(logits.detach().float().contiguous(), placement)
    N, C, H, W = total.shape
    columns = column_taps(logits.shape[3], placement, torch.float32, logits.device)
    with torch.cuda.device_of(logits):
        softmax_kernel[triton.cdiv(W, BLOCK), H, N](
            logits, *columns, total, C, W, logits.shape[3], COLUMNS=columns.index.shape[1], BINARY=C == 1, BLOCK=BLOCK,
            num_warps=BLOCK // 32,
        )  # fmt: skip


def _along_height(logits: Tensor, placement: Placement) -> Tensor:
    """Maps (N, C, h, w) to (N, C, H, w): the part of a placement that acts along the height."""
    width = logits.shape[3]
    via = placement.via and (placement.via[0], width)
    flip = placement.flip if placement.flip == 'vertical' else None
    along = Placement((placement.size[0], width), via, (0, 0, *placement.padding[2:]), flip, placement.align_corners)
    return place(logits, along).contiguous()
