"""A convolution, its bias, a shortcut and ReLU as one kernel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmseg_resnest.ops.channels_last import predicts_in_half

Pair = tuple[int, int]


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    shortcut: Tensor | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight, bias) + shortcut)``.

    In half precision on a GPU cuDNN computes it in one kernel, where gradients are off: the sum is rounded once. What
    comes after a plain convolution takes longer than a 1x1 convolution itself: it is bound by memory.

    Args:
        x: (N, C, H, W), any strides; fastest in channels-last.
        weight: (O, C / groups, k, k).
        bias: (O,).
        stride: As the other numbers, of ``torch.nn.functional.conv2d``.
        padding: Zeros at each side.
        dilation: Steps between taps.
        groups: Of channels.
        shortcut: (N, O, H', W'), added before ReLU.

    Returns:
        (N, O, H', W').
    """
    if _has_kernel(x, weight, groups):
        if torch.compiler.is_compiling():
            return _compiled_fused(x, weight, bias, shortcut, stride, padding, dilation)
        if shortcut is None and bias is not None and weight.shape[2:] == stride == (1, 1) and padding == (0, 0):
            return _product(x, weight, bias)
        return _fused(x, weight, bias, shortcut, stride, padding, dilation)
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(out if shortcut is None else out + shortcut, inplace=True)


def _has_kernel(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether cuDNN is sure to have it: its half precision kernels go by eight channels, and count in 32 bits."""
    outputs, inputs = weight.shape[:2]
    in_eights = groups == 1 and inputs % 8 == outputs % 8 == 0
    countable = x.numel() // inputs * max(inputs, outputs) < 2**31  # torch's plain convolution takes more apart
    return predicts_in_half(x, weight) and x.dtype == weight.dtype and in_eights and countable


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution as cuBLAS computes it, for which it need not plan; cuDNN takes some 5 ms for each new size."""
    pixels = x.permute(0, 2, 3, 1)
    out = torch._addmm_activation(bias, pixels.reshape(-1, pixels.shape[3]), weight.flatten(1).t())
    return out.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def _fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    if shortcut is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, 1)
    shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, stride, padding, dilation, 1)


# torch's compiler does not know cuDNN's two: it calls this one as it is.
_compiled_fused = torch.library.custom_op('mmseg_resnest::conv_relu', _fused, mutates_args=())


@_compiled_fused.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shortcut: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding, dilation)
    return torch.empty_like(out, memory_format=torch.channels_last)
