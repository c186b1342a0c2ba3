"""Operations from low-resolution logits to a number or a label map, and convolutions; one public function a file."""

from mmseg_resnest.ops.conv_relu import conv_relu
from mmseg_resnest.ops.dilated_conv2d import dilated_conv2d
from mmseg_resnest.ops.placement import Placement, place
from mmseg_resnest.ops.upsample_argmax import upsample_argmax
from mmseg_resnest.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = ['Placement', 'conv_relu', 'dilated_conv2d', 'place', 'upsample_argmax', 'upsample_cross_entropy']
