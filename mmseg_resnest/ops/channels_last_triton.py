"""The kernels of prediction over channels-last feature maps: all wait for memory, add in float32 and round once.

A program owns a tile of pixels and channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64, 64  # pixels and channels: one for all sizes, so that a kernel is compiled once


@triton.jit(do_not_specialize=['P'])
def weighted_sum_kernel(
    a,  # (N, P, C), pixels stride_a apart
    b,  # (N, P, C), pixels stride_b apart
    weight_a,  # (N, C), images weight_stride_a apart
    weight_b,  # (N, C), images weight_stride_b apart
    out,  # (N, P, C)
    P,
    C,
    stride_a,
    stride_b,
    weight_stride_a,
    weight_stride_b,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    mask = (p < P) & (c < C)
    wa = tl.load(weight_a + n * weight_stride_a + c, mask=c < C, other=0.0).to(tl.float32)
    wb = tl.load(weight_b + n * weight_stride_b + c, mask=c < C, other=0.0).to(tl.float32)
    va = tl.load(a + (n * P + p) * stride_a + c, mask=mask, other=0.0).to(tl.float32)
    vb = tl.load(b + (n * P + p) * stride_b + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (n * P + p) * C + c, (va * wa + vb * wb).to(out.dtype.element_ty), mask=mask)


def weighted_sum_of_two(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor) -> Tensor:
    """``weight_a * a + weight_b * b``, of ``ops.channels_last.is_by_pixel`` tensors."""
    weight_a, weight_b = (weight.flatten(1) for weight in (weight_a, weight_b))
    weight_a, weight_b = (w if w.stride(1) == 1 else w.contiguous() for w in (weight_a, weight_b))
    images, channels, height, width = a.shape
    out = torch.empty_like(a, memory_format=torch.channels_last)
    with torch.cuda.device_of(a):
        weighted_sum_kernel[triton.cdiv(height * width, TILE[0]), triton.cdiv(channels, TILE[1]), images](
            a, b, weight_a, weight_b, out, height * width, channels, a.stride(3), b.stride(3), weight_a.stride(0),
            weight_b.stride(0), *TILE,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=['H', 'W', 'P', 'out_width', 'step', 'padding'])
def pool_kernel(
    x,  # (N, H, W, C), pixels `stride_x` apart
    out,  # (N, P, C) with P = H' * W'
    H,
    W,
    P,
    out_width,
    C,
    stride_x,
    step,
    padding,
    SIDE: tl.constexpr,
    COUNTS_PADDING: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    top, left = p // out_width * step - padding, p % out_width * step - padding
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    count = tl.zeros((PIXELS,), tl.float32)
    for i in tl.static_range(SIDE):
        for j in tl.static_range(SIDE):
            y, at = top + i, left + j
            inside = (y >= 0) & (y < H) & (at >= 0) & (at < W)
            place = ((n * H + y) * W + at)[:, None] * stride_x + c
            total += tl.load(x + place, mask=(inside & (p < P))[:, None] & (c < C), other=0.0).to(tl.float32)
            count += inside.to(tl.float32)
    mean = total / (SIDE * SIDE if COUNTS_PADDING else count[:, None])
    place = (n * P + p)[:, None] * C + c
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=(p < P)[:, None] & (c < C))


def pooled(x: Tensor, side: int, step: int, padding: int, ceil_mode: bool, count_include_pad: bool) -> Tensor:
    """``avg_pool2d(x, ...)``, of an ``ops.channels_last.is_by_pixel`` tensor."""
    images, channels, height, width = x.shape
    out_height, out_width = (_windows(length, side, step, padding, ceil_mode) for length in (height, width))
    options = dict(dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out = torch.empty(images, channels, out_height, out_width, **options)
    pixels = out_height * out_width
    with torch.cuda.device_of(x):
        pool_kernel[triton.cdiv(pixels, TILE[0]), triton.cdiv(channels, TILE[1]), images](
            x, out, height, width, pixels, out_width, channels, x.stride(3), step, padding, side, count_include_pad,
            *TILE,
        )  # fmt: skip
    return out


def _windows(length: int, side: int, step: int, padding: int, ceil_mode: bool) -> int:
    """Returns how many windows there are; in ceil mode the last begins in the image or in the padding before it."""
    room = length + 2 * padding - side
    if not ceil_mode:
        return room // step + 1
    count = -(-room // step) + 1
    return count - ((count - 1) * step >= length + padding)


@triton.jit(do_not_specialize=['H', 'W', 'dilation'])
def shifted_sum_kernel(
    above,  # (N, rows, W, 3, O), the products of the taps' first row, as all three without the rows that fall outside
    middle,
    below,
    bias,  # (O,)
    out,  # (N, H, W, O)
    H,
    W,
    outputs,
    dilation,
    HAS_BIAS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n, y = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    o = (tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for i in tl.static_range(3):
        products = above if i == 0 else (middle if i == 1 else below)
        dy = (i - 1) * dilation
        row = n * (H - tl.abs(dy)) + y + tl.minimum(dy, 0)
        for j in tl.static_range(3):
            at = x + (j - 1) * dilation
            inside = (y + dy >= 0) & (y + dy < H) & (at >= 0) & (at < W) & (x < W)
            place = ((row * W + at) * 3 + j)[:, None] * outputs + o
            total += tl.load(products + place, mask=inside[:, None] & (o < outputs), other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    place = ((n * H + y) * W + x)[:, None] * outputs + o
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(x < W)[:, None] & (o < outputs))


def dilated_conv(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """``dilated_conv2d(x, weight, bias, dilation)``; images need not lie row by row, as its plain path has them."""
    images, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).contiguous()
    products = []
    for taps, dy in zip(weight.unbind(2), (-dilation, 0, dilation), strict=True):
        rows = x[:, max(dy, 0) : max(height + min(dy, 0), 0)].flatten(1, 2)
        matrix = taps.permute(1, 2, 0).reshape(channels, -1)  # (C, 3 * O)
        products.append(torch.bmm(rows, matrix.expand(images, -1, -1)))
    outputs = len(weight)
    out = products[1].new_empty(images, height, width, outputs)
    with torch.cuda.device_of(x):
        shifted_sum_kernel[images * height, triton.cdiv(width, TILE[0]), triton.cdiv(outputs, TILE[1])](
            *products, products[1] if bias is None else bias, out, height, width, outputs, dilation, bias is not None,
            *TILE,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
