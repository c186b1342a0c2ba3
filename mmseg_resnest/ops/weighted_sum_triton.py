"""The kernel of ``weighted_sum``.

A program owns a tile of pixels and channels; it adds in float32 and rounds once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmseg_resnest.ops.channels_last import TILE


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
