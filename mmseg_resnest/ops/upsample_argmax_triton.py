"""The kernel of ``upsample_argmax``.

A program owns pixels of one row and loops over the classes: it gathers the logits around each pixel, four where they
are resized once, interpolates them in float32 and keeps the highest. Neighbouring pixels share their logits, which
come from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from mmseg_resnest.ops.placement import Placement, Taps, column_taps, label_type, row_taps

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4e38)
BLOCK = 128


@triton.jit
def argmax_kernel(
    logits,  # (N, C, h, w), by strides
    row_index,  # (H, ROWS) int64
    row_weight,  # (H, ROWS) float32
    column_index,  # (W, COLUMNS) int64, COLUMNS a power of two
    column_weight,  # (W, COLUMNS) float32
    labels,  # (N, H, W)
    confidences,  # (N, H, W) float32
    C,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BINARY: tl.constexpr,
    CONFIDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    pixel = x < W
    tap = tl.arange(0, COLUMNS)[:, None] + x[None, :] * COLUMNS
    columns = tl.load(column_index + tap, mask=pixel[None, :], other=0) * stride_w
    shares = tl.load(column_weight + tap, mask=pixel[None, :], other=0.0)
    plane = logits + n * stride_n
    best = tl.full((BLOCK,), LOWEST, tl.float32)
    label = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum over c of exp(z[c] - best)
    for c in range(C):
        z = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(ROWS):
            row = plane + tl.load(row_index + y * ROWS + i) * stride_h
            v = tl.load(row + columns, mask=pixel[None, :], other=0.0).to(tl.float32)
            z = tl.fma(tl.sum(v * shares, axis=0), tl.load(row_weight + y * ROWS + i), z)
        plane += stride_c
        better = z > best
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


def _even(taps: Taps) -> Taps:
    """Repeats the last tap without weight, so that there are a power of two."""
    count = taps.index.shape[1]
    missing = triton.next_power_of_2(count) - count
    if not missing:
        return taps
    index = torch.cat([taps.index, taps.index[:, -1:].expand(-1, missing)], 1)
    return Taps(index, F.pad(taps.weight, (0, missing)))


def labels_and_confidence(
    logits: Tensor, placement: Placement, threshold: float | None, confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """The labels and their confidence; the contract is that of ``upsample_argmax``."""
    logits = logits.detach()
    (N, C, h, w), (H, W) = logits.shape, placement.size
    rows = row_taps(h, placement, torch.float32, logits.device)
    columns = _even(column_taps(w, placement, torch.float32, logits.device))
    labels = torch.empty((N, H, W), dtype=label_type(C), device=logits.device)
    sureness = torch.empty((N, H, W) if confidence else (0,), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        argmax_kernel[triton.cdiv(W, BLOCK), H, N](
            logits, *rows, *columns, labels, sureness, C, W, *logits.stride(), threshold or 0.0,
            ROWS=rows.index.shape[1], COLUMNS=columns.index.shape[1], BINARY=threshold is not None,
            CONFIDENCE=confidence, BLOCK=BLOCK, num_warps=BLOCK // 32,
        )  # fmt: skip
    return labels, sureness if confidence else None
