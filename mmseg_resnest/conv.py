"""Convolution and pooling layers."""

import torch
from torch import Tensor, nn

from mmseg_resnest.ops import avg_pool2d, dilated_conv2d
from mmseg_resnest.ops.channels_last import runs_kernels
from mmseg_resnest.registry import MODELS

# From here on cuDNN has no Hopper kernels; ASPP's least dilation, and no stage of a backbone's.
WIDE = 12


@MODELS.register_module()
class DilatedConv2d(nn.Conv2d):
    """``torch.nn.Conv2d``, where a wide 3x3 dilation in half precision becomes matrix products on a GPU.

    Not in training that is not compiled: their gradient takes a compiler.

    For a head's ``conv_cfg=dict(type='mmseg_resnest.DilatedConv2d')``: mmsegmentation's ASPPHead makes all of its
    convolutions of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, H', W')."""
        compiled = torch.compiler.is_compiling() and x.is_cuda and _in_half_precision(x)
        if self._is_wide() and (compiled or runs_kernels(x, self.weight)):
            return dilated_conv2d(x, self.weight, self.bias, self.dilation[0])
        return super().forward(x)

    def _is_wide(self) -> bool:
        dilation = self.dilation[0]
        plain = (self.kernel_size, self.stride, self.groups) == ((3, 3), (1, 1), 1)
        return plain and dilation >= WIDE and self.dilation == self.padding == (dilation, dilation)


def _in_half_precision(x: Tensor) -> bool:
    if torch.is_autocast_enabled('cuda'):
        return torch.get_autocast_dtype('cuda') in (torch.bfloat16, torch.float16)
    return x.dtype in (torch.bfloat16, torch.float16)


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` of square windows, by ``ops.avg_pool2d``; it has no ``divisor_override``."""

    def __init__(
        self,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H', W')."""
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
