"""A widely dilated 3x3 convolution as matrix products, which skip the taps that fall outside of the image."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmseg_resnest.ops.channels_last import runs_kernels


def dilated_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """``conv2d(x, weight, bias, padding=dilation, dilation=dilation)`` with a 3x3 weight.

    ``out[y] = sum_i sum_j W[i, j] @ x[y + dilation * (i - 1), x + dilation * (j - 1)]``: one matrix product for each
    row i of taps, on the rows of the image where it falls inside, and a sum of shifted products. cuDNN has no fast
    kernels for wide dilations on Hopper GPUs, and multiplies with the zeros outside too: of ASPP's taps at dilation 36
    on 64 x 64, three fifths. The shifted sums are one kernel: a compiler's or, in half precision where gradients are
    off, our own. The products are rounded to the dtype before they are added: in float16 each must stay below 65504.

    Args:
        x: (N, C, H, W), any strides; fastest in channels-last.
        weight: (O, C, 3, 3).
        bias: (O,).
        dilation: At least 1.

    Returns:
        (N, O, H, W), in channels-last.
    """
    if runs_kernels(x, weight):
        from mmseg_resnest.ops.dilated_conv2d_triton import dilated_conv

        return dilated_conv(x, weight, bias, dilation)
    images, channels, height, width = x.shape
    rows = x.permute(2, 0, 3, 1).contiguous()  # (H, N, W, C): any range of rows is one matrix
    out = rows.new_zeros(())
    for taps, dy in zip(weight.unbind(2), (-dilation, 0, dilation), strict=True):
        if abs(dy) >= height:
            continue
        matrix = taps.permute(1, 2, 0).reshape(channels, -1)  # (C, 3 * O)
        read = rows[max(dy, 0) : height + min(dy, 0)]
        products = (read.reshape(-1, channels) @ matrix).view(len(read), images, width, 3, -1)
        for product, dx in zip(products.unbind(3), (-dilation, 0, dilation), strict=True):
            if abs(dx) < width:
                inside = product[:, :, max(dx, 0) : width + min(dx, 0)]
                out = out + F.pad(inside, (0, 0, max(-dx, 0), max(dx, 0), 0, 0, max(-dy, 0), max(dy, 0)))
    out = out.permute(1, 3, 0, 2).contiguous(memory_format=torch.channels_last)
    return out if bias is None else out + bias[:, None, None]
