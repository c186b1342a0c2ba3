"""The kernel of ``dilated_conv2d``: the sum of the shifted products.

A program owns a tile of pixels and channels; it adds in float32 and rounds once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.channels_last import TILE


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
