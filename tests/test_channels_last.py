"""Which tensors the kernels of prediction are for; tests of the kernels are those of the operations.

On a machine without a GPU they run in Triton's interpreter (conftest.py).
"""

import pytest
import torch
from hypothesis import strategies as st

from mmseg_resnest.ops import avg_pool2d
from mmseg_resnest.ops.channels_last import is_by_pixel, runs_kernels

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALVES = [torch.float16, torch.bfloat16]


def feature_map(*shape, dtype=torch.float16, seed=0, part=False):
    """Returns a channels-last feature map or, of one of twice the channels, the second half."""
    images, channels, height, width = shape
    x = torch.randn(images, height, width, channels * 2, generator=torch.Generator().manual_seed(seed))
    x = x.to(DEVICE, dtype).permute(0, 3, 1, 2)
    return x[:, channels:] if part else x[:, :channels].contiguous(memory_format=torch.channels_last)


def rounding_of_kernels(dtype):
    """Returns the relative error of a result's rounding."""
    cuts = DEVICE == 'cpu' and dtype == torch.bfloat16  # digits off, as Triton's interpreter does
    return torch.finfo(dtype).eps / (1 if cuts else 2)


def assert_rounded_once(found, truth, dtype, slack=1.01):
    assert found.dtype == dtype
    assert found.shape == truth.shape
    error = (found.double() - truth).abs()
    assert (error <= slack * rounding_of_kernels(dtype) * truth.abs() + 1e-6).all()


MAPS = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))


def test_which_tensors_are_by_pixel():
    x = feature_map(2, 8, 5, 6)
    assert is_by_pixel(x)
    assert is_by_pixel(feature_map(2, 8, 5, 6, part=True))
    assert not is_by_pixel(x.contiguous())
    assert not is_by_pixel(x[:, :, 1:])
    assert not is_by_pixel(x[..., :3])
    assert is_by_pixel(x[..., ::2])  # all of them twice as far from each other
    assert not is_by_pixel(x[:, ::2])


@pytest.mark.gpu
def test_kernels_run_in_prediction_alone():
    x = feature_map(1, 8, 4, 4)
    with torch.no_grad():
        assert runs_kernels(x, x.bfloat16())
        assert not runs_kernels(x, x.float())
    assert not runs_kernels(x)
    assert avg_pool2d(x.requires_grad_(), 3, 1, 1).requires_grad
