"""The kernel of ``avg_pool2d``.

A program owns a tile of pixels and channels; it adds in float32 and rounds once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.channels_last import TILE


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
