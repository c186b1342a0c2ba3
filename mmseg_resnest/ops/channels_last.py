"""When the kernels of prediction run: without gradients, in half precision, channels-last, and not compiled.

What is compiled, torch fuses by itself.
"""

import torch
from torch import Tensor

TILE = 64, 64  # pixels and channels of a program: one for all sizes, so that a kernel is compiled once


def predicts_in_half(*tensors: Tensor) -> bool:
    """Whether tensors are in half precision on a GPU, and gradients off."""
    halves = torch.bfloat16, torch.float16
    return not torch.is_grad_enabled() and all(tensor.is_cuda and tensor.dtype in halves for tensor in tensors)


def runs_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels run on tensors of this device and dtype."""
    return not torch.compiler.is_compiling() and predicts_in_half(*tensors)


def is_by_pixel(x: Tensor) -> bool:
    """Whether the channels of a pixel of (N, C, H, W) lie side by side, and its pixels at one distance."""
    height, width = x.shape[2:]
    pixel = x.stride(3)
    return x.stride() == (height * width * pixel, 1, width * pixel, pixel)
