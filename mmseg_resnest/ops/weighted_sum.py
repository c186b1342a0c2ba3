"""The weighted sum of split attention, in one pass over memory where torch's operations take three."""

from collections.abc import Sequence

from torch import Tensor

from mmseg_resnest.ops.channels_last import is_by_pixel, runs_kernels


def weighted_sum(splits: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """``sum_r weights[r] * splits[r]``.

    Two splits in half precision on a GPU take one kernel, where gradients are off: it adds in float32, rounds once.

    Args:
        splits: R tensors (N, C, H, W), any strides; fastest in channels-last.
        weights: R tensors (N, C, 1, 1).

    Returns:
        (N, C, H, W).
    """
    if len(splits) == 2 and runs_kernels(*splits, *weights) and all(map(is_by_pixel, splits)):
        from mmseg_resnest.ops.weighted_sum_triton import weighted_sum_of_two

        return weighted_sum_of_two(*splits, *weights)
    weighted = [weight * split for weight, split in zip(weights, splits, strict=True)]
    return sum(weighted[1:], weighted[0])
