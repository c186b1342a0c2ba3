"""From low-resolution logits to a number or a label map, and what layers run on; one public function a file."""

from mmseg_resnest.ops.avg_pool2d import avg_pool2d
from mmseg_resnest.ops.conv_relu import conv_relu
from mmseg_resnest.ops.dilated_conv2d import dilated_conv2d
from mmseg_resnest.ops.placement import Placement, place
from mmseg_resnest.ops.upsample_argmax import upsample_argmax
from mmseg_resnest.ops.upsample_cross_entropy import upsample_cross_entropy
from mmseg_resnest.ops.upsample_softmax import upsample_softmax
from mmseg_resnest.ops.weighted_sum import weighted_sum

__all__ = [
    'Placement',
    'avg_pool2d',
    'conv_relu',
    'dilated_conv2d',
    'place',
    'upsample_argmax',
    'upsample_cross_entropy',
    'upsample_softmax',
    'weighted_sum',
]
