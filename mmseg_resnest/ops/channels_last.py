"""When the kernels of prediction run: without gradients, in half precision, channels-last, and not compiled.

What is compiled, torch fuses by itself.
"""

import torch
from torch import Tensor


def runs_kernels(*tensors: Tensor) -> bool:
    """Whether they run on tensors of this device and dtype."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return all(tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors)


def is_by_pixel(x: Tensor) -> bool:
    """Whether the channels of a pixel of (N, C, H, W) lie side by side, and its pixels at one distance."""
    height, width = x.shape[2:]
    pixel = x.stride(3)
    return x.stride() == (height * width * pixel, 1, width * pixel, pixel)
