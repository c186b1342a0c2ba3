"""Average pooling of channels-last feature maps, at the speed of memory."""

from torch import Tensor
from torch.nn import functional as F

from mmseg_resnest.ops.channels_last import is_by_pixel, runs_kernels


def avg_pool2d(
    x: Tensor,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``.

    In half precision on a GPU a kernel computes it, where gradients are off; torch's own for channels-last divides for
    each value to find its place.

    Args:
        x: (N, C, H, W), any strides; fastest in channels-last.
        kernel_size: Side of a window.
        stride: From a window to the next.
        padding: Zeros at each side.
        ceil_mode: Whether a last window may look over the border.
        count_include_pad: Whether zeros of the padding count.

    Returns:
        (N, C, H', W').
    """
    is_plain = not (ceil_mode and count_include_pad)  # then the last window's divisor is another one again
    fits = 2 * padding <= kernel_size <= min(x.shape[2:]) + 2 * padding
    if is_plain and fits and runs_kernels(x) and is_by_pixel(x):
        from mmseg_resnest.ops.avg_pool2d_triton import pooled

        return pooled(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
    return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
