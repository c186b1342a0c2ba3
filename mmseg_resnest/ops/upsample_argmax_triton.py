"""The kernel of ``upsample_argmax``.

A program owns pixels of one row and loops over the classes: it gathers the logits around each pixel, four where they
are resized once, interpolates them in float32 and keeps the highest. Neighbouring pixels share their logits, which
come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.placement import Placement, column_taps, label_type, row_taps
from mmseg_resnest.ops.taps_triton import BLOCK, LOG2E, LOWEST, along_row, four_taps


@triton.jit(do_not_specialize=['W', 'height', 'width'])
def argmax_kernel(
    logits,  # (N, C, height, width)
    row_index,  # (H, ROWS) int64
    row_weight,  # (H, ROWS) float32
    column_index,  # (W, COLUMNS) int64
    column_weight,  # (W, COLUMNS) float32
    labels,  # (N, H, W)
    confidences,  # (N, H, W) float32
    C,
    W,
    height,
    width,
    threshold,
    ROWS: tl.constexpr,  # up to 4
    COLUMNS: tl.constexpr,  # up to 4
    BINARY: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    pixel = x < W
    x0, x1, x2, x3, w0, w1, w2, w3 = four_taps(column_index, column_weight, x, pixel, COLUMNS)
    y0, y1, y2, y3, v0, v1, v2, v3 = four_taps(row_index, row_weight, y, True, ROWS)
    plane = logits + n * C * height * width
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    label = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum over c of exp(z[c] - best)
    for c in range(C):
        z = along_row(plane + y0 * width, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS) * v0
        if ROWS > 1:
            z = tl.fma(along_row(plane + y1 * width, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS), v1, z)
        if ROWS > 2:
            z = tl.fma(along_row(plane + y2 * width, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS), v2, z)
        if ROWS > 3:
            z = tl.fma(along_row(plane + y3 * width, x0, x1, x2, x3, w0, w1, w2, w3, COLUMNS), v3, z)
        plane += height * width
        better = (z > best) | ((z != z) & (best == best))  # as torch, which takes nan for the highest
        if CONFIDENCE:
            highest = tl.maximum(best, z)
            total = total * tl.exp2((best - highest) * LOG2E) + tl.exp2((z - highest) * LOG2E)
        label = tl.where(better, c, label)
        best = tl.where(better, z, best)

    sure = 1 / total
    if BINARY:
        positive = 1 / (1 + tl.exp2(-best * LOG2E))
        label = (positive > threshold).to(tl.int32)
        sure = tl.where(positive > threshold, positive, 1 - positive)
    place = (n * tl.num_programs(1) + y) * W + x
    tl.store(labels + place, label.to(labels.dtype.element_ty), mask=pixel)
    if CONFIDENCE:
        tl.store(confidences + place, sure, mask=pixel)


def labels_and_confidence(
    logits: Tensor, placement: Placement, threshold: float | None, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """The labels and their confidence; the contract is that of ``upsample_argmax``."""
    logits = logits.detach().contiguous()  # a class's logits side by side: what neighbouring pixels read at a time
    (N, C, h, w), (H, W) = logits.shape, placement.size
    rows = row_taps(h, placement, torch.float32, logits.device)
    columns = column_taps(w, placement, torch.float32, logits.device)
    labels = torch.empty((N, H, W), dtype=label_type(C), device=logits.device)
    sureness = torch.empty((N, H, W) if confidence else (0,), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        argmax_kernel[triton.cdiv(W, BLOCK), H, N](
            logits, *rows, *columns, labels, sureness, C, W, h, w, threshold or 0.0, ROWS=rows.index.shape[1],
            COLUMNS=columns.index.shape[1], BINARY=threshold is not None, CONFIDENCE=confidence, BLOCK=BLOCK,
            num_warps=BLOCK // 32,
        )  # fmt: skip
    return labels, sureness if confidence else None
