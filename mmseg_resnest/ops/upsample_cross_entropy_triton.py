"""The kernels of ``upsample_cross_entropy``.

Pixels of a row that lie between the same two columns of logits form groups of at most K. A thread owns a group (in the
first kernel of one row, in the second of all rows, for a few classes) and loops over classes or rows: it interpolates
four logits down a row once, and then across to K pixels, so an interpolated logit costs one multiply-add, one
exponential, and its share of two accumulators. The exponential is of the difference from the pixel's highest logit so
far, and the sum is rescaled where a new one is higher: what is certain is exactly 1, as torch's. Nothing is reduced
across threads, and there are no atomics: the result is deterministic.

    1. softmax_kernel: a row's pixels -> highest logit, log-sum-exp and target (stored), and the sums.
    2. gradient_kernel: -> each group's share of the gradients of its two columns of logits.
    3. torch adds the shares of a column's groups.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.bilinear import bilinear_axis

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4e38)
BLOCK = 128
CLASSES = 8
ROWS = 8
# What ptxas would take is 158 registers a thread, and too few threads to hide the loads behind: 0.81 against 0.54 ms.
SOFTMAX_OPTIONS = {} if torch.version.hip else dict(maxnreg=96)


class Groups(NamedTuple):
    """The pixels of a row, in groups between the same two columns of logits; all on the device, int32 and float32.

    Attributes:
        left: (G,) the left column of a group.
        right: (G,) its right column.
        start: (G + 1,) its first pixel; the last entry is the width.
        weight: (W,) the weight of the right column for each pixel.
        size: K, at least the number of pixels in any group; a power of two.
        from_left: (w + 1,): column j is the left one of the groups ``from_left[j]`` to ``from_left[j + 1]``.
        from_right: (w + 1,): the same for the right one.
        most: The largest number of groups between two entries of either.
    """

    left: Tensor
    right: Tensor
    start: Tensor
    weight: Tensor
    size: int
    from_left: Tensor
    from_right: Tensor
    most: int


class Intervals(NamedTuple):
    """The rows of pixels between the same two rows of logits.

    Attributes:
        start: (h + 2,) int32: pixel rows ``start[i]`` to ``start[i + 1]`` lie between logit rows ``i - 1`` and ``i``.
        weight: (H,) float32, the weight of the lower row for each pixel row.
        top: (H,) int32, the upper row, -1 above the first.
    """

    start: Tensor
    weight: Tensor
    top: Tensor


def _interval(in_size: int, out_size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Returns each pixel's interval, -1 to ``in_size - 1``, and the weight of its right end, in float64."""
    axis = bilinear_axis(in_size, out_size, align_corners)
    if align_corners:
        return axis.left, axis.weight
    before = torch.arange(out_size) * 2 + 1 < out_size / in_size  # the source lies before the first logit
    return torch.where(before, -1, axis.left), torch.where(before, 1.0, axis.weight)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def pixel_groups(in_size: int, out_size: int, align_corners: bool, device: torch.device) -> Groups:
    """Returns the groups of a row."""
    left, weight = _interval(in_size, out_size, align_corners)
    size = min(1 << max((out_size // in_size).bit_length() - 1, 0), 8)
    starts: list[int] = []
    for x in range(out_size):
        if not starts or left[x] != left[starts[-1]] or x - starts[-1] == size:
            starts.append(x)
    start = torch.tensor([*starts, out_size])
    interval = left[start[:-1]]
    first, second = interval.clamp(min=0), (interval + 1).clamp(max=in_size - 1)
    ranges = [torch.searchsorted(column, torch.arange(in_size + 1)) for column in (first, second)]
    most = max(int(part.diff().max()) for part in ranges)
    first, second, start, *ranges = (part.int().to(device) for part in (first, second, start, *ranges))
    return Groups(first, second, start, weight.float().to(device), size, *ranges, most)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def row_intervals(in_size: int, out_size: int, align_corners: bool, device: torch.device) -> Intervals:
    """Returns the intervals of a column."""
    top, weight = _interval(in_size, out_size, align_corners)
    start = torch.searchsorted(top, torch.arange(-1, in_size + 1))
    return Intervals(start.int().to(device), weight.float().to(device), top.int().to(device))


@triton.jit
def _lerp(a, b, weight):
    return tl.fma(b - a, weight, a)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _at(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _interpolate(top_left, top_right, bottom_left, bottom_right, offset, mask, a, b):
    """The logits of K pixels: down a row once, and then across. LOWEST where the mask has none."""
    v0 = tl.where(mask, _lerp(_at(top_left + offset, mask), _at(bottom_left + offset, mask), a), LOWEST)
    v1 = tl.where(mask, _lerp(_at(top_right + offset, mask), _at(bottom_right + offset, mask), a), LOWEST)
    return tl.fma(v1 - v0, b, v0)


@triton.jit
def softmax_kernel(
    logits,  # (N, C, h, w)
    labels,  # (N, H, W)
    class_weight,  # (C,) float32
    left_column,
    right_column,
    start,
    column_weight,
    top_row,
    row_weight,
    highests,  # (N, H, K, G) float32: the highest logit of a pixel
    log_sum_exp,  # (N, H, K, G) float32, base 2, less the highest; inf where ignored
    targets,  # (N, H, K, G) int16, -1 where ignored
    label_weights,  # (N, H, K, G) float32: the weight of a pixel's label, 0 where ignored
    sums,  # (4, programs) float64
    total,  # N * H * G
    C,
    h,
    w,
    H,
    W,
    G,
    ignore_index,
    smoothing,  # label_smoothing / C
    weight_sum,  # of class_weight
    WEIGHTED: tl.constexpr,  # whether any class has another weight than 1
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # All (1, BLOCK) or (K, BLOCK): a conversion between their layouts would go through shared memory, for every class.
    item = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = item < total
    group = (item % G).to(tl.int32)
    row = item // G  # of all images
    n = row // H
    y = (row % H).to(tl.int32)
    k = tl.arange(0, K)[:, None]

    top = tl.load(top_row + y, mask=inside, other=0)
    bottom = tl.minimum(top + 1, h - 1)
    top = tl.maximum(top, 0)
    a = tl.load(row_weight + y, mask=inside, other=0.0)
    left = tl.load(left_column + group, mask=inside, other=0)
    right = tl.load(right_column + group, mask=inside, other=0)
    first = tl.load(start + group, mask=inside, other=0)
    last = tl.load(start + group + 1, mask=inside, other=0)
    x = first + k
    pixel = inside & (x < last)
    b = tl.load(column_weight + x, mask=pixel, other=0.0)

    plane = h * w
    image = logits + n * C * plane
    top_left = image + top * w + left
    top_right = image + top * w + right
    bottom_left = image + bottom * w + left
    bottom_right = image + bottom * w + right

    highest = tl.full((K, BLOCK), LOWEST, tl.float32)
    exponentials = tl.zeros((K, BLOCK), tl.float32)  # sum over c of exp(z[c] - highest)
    smooth = tl.zeros((K, BLOCK), tl.float32)  # sum over c of w[c] * (z[c] - reference)
    reference = _at(top_left, inside)
    for c in range(0, C, 4):  # four at a time: their loads are under way together, and the sum is rescaled once
        in1, in2, in3 = inside & (c + 1 < C), inside & (c + 2 < C), inside & (c + 3 < C)
        z0 = _interpolate(top_left, top_right, bottom_left, bottom_right, c * plane, inside, a, b)
        z1 = _interpolate(top_left, top_right, bottom_left, bottom_right, (c + 1) * plane, in1, a, b)
        z2 = _interpolate(top_left, top_right, bottom_left, bottom_right, (c + 2) * plane, in2, a, b)
        z3 = _interpolate(top_left, top_right, bottom_left, bottom_right, (c + 3) * plane, in3, a, b)
        before, highest = highest, tl.maximum(highest, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
        new = (_exp(z0 - highest) + _exp(z1 - highest)) + (_exp(z2 - highest) + _exp(z3 - highest))
        exponentials = tl.fma(exponentials, _exp(before - highest), new)
        if SMOOTH:
            smooth += tl.load(class_weight + c) * (z0 - reference)
            smooth += tl.load(class_weight + c + 1, mask=c + 1 < C, other=0.0) * (z1 - reference)
            smooth += tl.load(class_weight + c + 2, mask=c + 2 < C, other=0.0) * (z2 - reference)
            smooth += tl.load(class_weight + c + 3, mask=c + 3 < C, other=0.0) * (z3 - reference)

    label = tl.load(labels + row * W + x, mask=pixel, other=0).to(tl.int64)
    valid = pixel & (label != ignore_index)
    known = valid & (label >= 0) & (label < C)
    target = tl.where(known, label, 0).to(tl.int32)
    offset = target * plane
    z = _interpolate(top_left, top_right, bottom_left, bottom_right, offset, known, a, b)
    weight = tl.load(class_weight + target, mask=known, other=0.0)

    log_sum = tl.log2(exponentials)
    loss = weight * tl.fma(log_sum, LN2, highest - z)
    if SMOOTH:
        spread = weight_sum * tl.fma(log_sum, LN2, highest - reference) - smooth
        loss = (1 - smoothing * C) * loss + smoothing * spread
    loss = tl.where(known, loss, tl.where(valid, float('nan'), 0.0))
    right_ones = (known & (z >= highest)).to(tl.float32)

    if GRADIENT:
        place = (row * K + k) * G + group
        tl.store(highests + place, highest, mask=inside)
        tl.store(log_sum_exp + place, tl.where(known, log_sum, float('inf')), mask=inside)
        tl.store(targets + place, tl.where(known, label, -1).to(tl.int16), mask=inside)
        if WEIGHTED:
            tl.store(label_weights + place, weight, mask=inside)
    programs = tl.num_programs(0)
    at = sums + tl.program_id(0)
    # A program has up to 1,024 pixels: in float32 the last additions would each round by 3e-8 of the sum.
    tl.store(at, tl.sum(loss.to(tl.float64)))
    tl.store(at + programs, tl.sum(weight.to(tl.float64)))
    tl.store(at + 2 * programs, tl.sum(right_ones))
    tl.store(at + 3 * programs, tl.sum(valid.to(tl.float32)))


@triton.jit
def gradient_kernel(
    logits,  # (N, C, h, w)
    class_weight,  # (C,) float32
    highests,  # (N, H, K, G), as softmax_kernel stores them
    log_sum_exp,  # (N, H, K, G), likewise
    targets,  # (N, H, K, G)
    label_weights,  # (N, H, K, G); looked up here, by label, they made it 7.3 ms, not 0.9: Triton 3.6 spills
    left_column,
    right_column,
    start,
    column_weight,
    row_start,
    row_weight,
    shares,  # (2, N, C, h, G) float32: the gradients of the group's left and of its right column
    side,  # N * C * h * G: from a left share to its right one
    C,
    h,
    w,
    H,
    G,
    smoothing,  # label_smoothing / C
    weight_sum,  # of class_weight
    WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,  # logit rows a program
    CLASSES: tl.constexpr,  # classes a thread
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first_row = tl.program_id(1) * ROWS
    n = tl.program_id(2).to(tl.int64)
    group = item % G
    c = (item // G * CLASSES)[None, :] + tl.arange(0, CLASSES)[:, None]
    inside = c < C
    k = tl.arange(0, K)[:, None]

    left = tl.load(left_column + group)
    right = tl.load(right_column + group)
    x = tl.load(start + group)[None, :] + k
    b = tl.load(column_weight + x, mask=x < tl.load(start + group + 1)[None, :], other=0.0)[None]
    weight = tl.load(class_weight + c, mask=inside, other=0.0)
    spread = (smoothing * weight)[:, None, :]
    on_target = ((1 - smoothing * C) * weight)[:, None, :]
    plane = (n * C + c) * h
    carried_left = tl.zeros((CLASSES, BLOCK), tl.float32)
    carried_right = tl.zeros((CLASSES, BLOCK), tl.float32)
    for i in range(first_row - 1, tl.minimum(first_row + ROWS, h)):  # between the logit rows i and i + 1
        above = logits + (plane + tl.maximum(i, 0)) * w
        below = logits + (plane + tl.minimum(i + 1, h - 1)) * w
        top_left = tl.load(above + left[None, :], mask=inside, other=0.0).to(tl.float32)
        top_right = tl.load(above + right[None, :], mask=inside, other=0.0).to(tl.float32)
        bottom_left = tl.load(below + left[None, :], mask=inside, other=0.0).to(tl.float32)
        bottom_right = tl.load(below + right[None, :], mask=inside, other=0.0).to(tl.float32)
        upper_left, upper_right = carried_left, carried_right
        carried_left = tl.zeros((CLASSES, BLOCK), tl.float32)
        carried_right = tl.zeros((CLASSES, BLOCK), tl.float32)
        for y in range(tl.load(row_start + i + 1), tl.load(row_start + i + 2)):
            a = tl.load(row_weight + y)
            v0 = _lerp(top_left, bottom_left, a)
            v1 = _lerp(top_right, bottom_right, a)
            z = tl.fma((v1 - v0)[:, None, :], b, v0[:, None, :])
            place = ((n * H + y) * K + k) * G + group[None, :]
            target = tl.load(targets + place)[None]
            g = tl.exp2(tl.fma(z - tl.load(highests + place)[None], LOG2E, -tl.load(log_sum_exp + place)[None]))
            if WEIGHTED:  # not as a term of the exponent: what is certain would not be exactly the weight
                g *= (1 - smoothing * C) * tl.load(label_weights + place)[None] + smoothing * weight_sum
            g -= tl.where(target == c[:, None, :], on_target, 0.0)
            if SMOOTH:
                g -= tl.where(target >= 0, spread, 0.0)
            to_right = tl.sum(g * b, axis=1)
            to_left = tl.sum(g, axis=1) - to_right
            upper_left += (1 - a) * to_left
            upper_right += (1 - a) * to_right
            carried_left += a * to_left
            carried_right += a * to_right
        if i >= first_row:
            share = shares + (plane + i) * G + group[None, :]
            tl.store(share, upper_left, mask=inside)
            tl.store(share + side, upper_right, mask=inside)


@triton.jit
def gather_kernel(
    shares,  # (2, rows, G) float32
    from_left,  # (w + 1,) int32: the groups whose left column is j are from_left[j] to from_left[j + 1]
    from_right,
    gradient,  # (rows, w) float32
    total,
    w,
    G,
    MOST: tl.constexpr,  # groups of a column
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = item < total
    j = (item % w).to(tl.int32)
    row = item // w
    result = tl.zeros((BLOCK,), tl.float32)
    for side in tl.static_range(2):
        table = from_right if side else from_left
        first = tl.load(table + j, mask=inside, other=0)
        last = tl.load(table + j + 1, mask=inside, other=0)
        share = shares + (side * (total // w) + row) * G + first
        for m in tl.static_range(MOST):
            result += tl.load(share + m, mask=inside & (first + m < last), other=0.0)
    tl.store(gradient + item, result, mask=inside)


def sums_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    needs_gradient: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The sums and the gradient of ``upsample_cross_entropy``; its contract is in the module of that name."""
    logits, labels = logits.contiguous(), labels.contiguous()
    (N, C, h, w), (H, W) = logits.shape, labels.shape[1:]
    groups = pixel_groups(w, W, align_corners, logits.device)
    rows = row_intervals(h, H, align_corners, logits.device)
    G, K = len(groups.left), groups.size
    total = N * H * G
    programs = triton.cdiv(total, BLOCK)
    stored = (N, H, K, G) if needs_gradient else (0,)
    log_sum_exp = torch.empty(stored, dtype=torch.float32, device=logits.device)
    highests = torch.empty(stored, dtype=torch.float32, device=logits.device)
    targets = torch.empty(stored, dtype=torch.int16, device=logits.device)
    weighted = weight is not None
    label_weights = torch.empty(stored if weighted else (0,), dtype=torch.float32, device=logits.device)
    weight = weight if weighted else torch.ones(C, dtype=torch.float32, device=logits.device)
    weight_sum = float(weight.sum()) if label_smoothing else 0.0
    sums = torch.empty((4, programs), dtype=torch.float64, device=logits.device)
    with torch.cuda.device_of(logits):
        softmax_kernel[(programs,)](
            logits, labels, weight, *groups[:4], rows.top, rows.weight, highests, log_sum_exp, targets,
            label_weights, sums, total, C, h, w, H, W, G, ignore_index, label_smoothing / C, weight_sum,
            WEIGHTED=weighted, SMOOTH=label_smoothing > 0, GRADIENT=needs_gradient, K=K, BLOCK=BLOCK,
            num_warps=BLOCK // 32, **SOFTMAX_OPTIONS,
        )  # fmt: skip
    sums = tuple(sums.sum(1).unbind())
    if not needs_gradient:
        return sums, None
    shares = torch.empty((2, N, C, h, G), dtype=torch.float32, device=logits.device)
    grid = (triton.cdiv(triton.cdiv(C, CLASSES) * G, BLOCK), triton.cdiv(h, ROWS), N)
    gradient = torch.empty((N, C, h, w), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        gradient_kernel[grid](
            logits, weight, highests, log_sum_exp, targets, label_weights, *groups[:4], rows.start, rows.weight, shares,
            shares[0].numel(), C, h, w, H, G, label_smoothing / C, weight_sum,
            WEIGHTED=weighted, SMOOTH=label_smoothing > 0, ROWS=ROWS, CLASSES=CLASSES, K=K, BLOCK=BLOCK,
            num_warps=BLOCK // 32,
        )  # fmt: skip
        gather_kernel[(triton.cdiv(gradient.numel(), 1024),)](
            shares, groups.from_left, groups.from_right, gradient, gradient.numel(), w, G, MOST=groups.most, BLOCK=1024
        )
    return sums, gradient
