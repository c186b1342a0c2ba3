"""Convolution layers."""

import torch
from torch import Tensor, nn

from mmseg_resnest.ops import dilated_conv2d
from mmseg_resnest.registry import MODELS

# From here on cuDNN has no Hopper kernels; ASPP's least dilation, and no stage of a backbone's.
WIDE = 12


@MODELS.register_module()
class DilatedConv2d(nn.Conv2d):
    """``torch.nn.Conv2d``, where a wide 3x3 dilation in half precision is compiled as matrix products on a GPU.

    For a head's ``conv_cfg=dict(type='mmseg_resnest.DilatedConv2d')``: mmsegmentation's ASPPHead makes all of its
    convolutions of it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, O, H', W')."""
        if self._is_wide() and torch.compiler.is_compiling() and x.is_cuda and _in_half_precision(x):
            out = dilated_conv2d(x, self.weight, self.dilation[0])
            return out if self.bias is None else out + self.bias[:, None, None]
        return super().forward(x)

    def _is_wide(self) -> bool:
        dilation = self.dilation[0]
        plain = (self.kernel_size, self.stride, self.groups) == ((3, 3), (1, 1), 1)
        return plain and dilation >= WIDE and self.dilation == self.padding == (dilation, dilation)


def _in_half_precision(x: Tensor) -> bool:
    if torch.is_autocast_enabled('cuda'):
        return torch.get_autocast_dtype('cuda') in (torch.bfloat16, torch.float16)
    return x.dtype in (torch.bfloat16, torch.float16)
