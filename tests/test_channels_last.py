"""The kernels of prediction over channels-last feature maps, against torch's own operations in float64.

On a machine without a GPU the kernels run in Triton's interpreter (conftest.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmseg_resnest.conv import AvgPool2d
from mmseg_resnest.ops import avg_pool2d, dilated_conv2d, weighted_sum
from mmseg_resnest.ops.channels_last import is_by_pixel, runs_kernels
from mmseg_resnest.ops.channels_last_triton import dilated_conv, pooled, weighted_sum_of_two

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALVES = [torch.float16, torch.bfloat16]


def feature_map(*shape, dtype=torch.float16, seed=0, part=False):
    """Returns a channels-last feature map or, of one of twice the channels, the second half."""
    images, channels, height, width = shape
    x = torch.randn(images, height, width, channels * 2, generator=torch.Generator().manual_seed(seed))
    x = x.to(DEVICE, dtype).permute(0, 3, 1, 2)
    return x[:, channels:] if part else x[:, :channels].contiguous(memory_format=torch.channels_last)


def assert_rounded_once(found, truth, dtype, slack=1.01):
    assert found.dtype == dtype
    assert found.shape == truth.shape
    error = (found.double() - truth).abs()
    if DEVICE == 'cpu' and dtype == torch.bfloat16:
        slack *= 2  # Triton's interpreter cuts digits off
    assert (error <= slack * torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6).all()


maps = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None, max_examples=15)
@given(shape=maps, parts=st.booleans(), dtype=st.sampled_from(HALVES), seed=st.integers(0, 99))
def test_weighted_sum(shape, parts, dtype, seed):
    splits = [feature_map(*shape, dtype=dtype, seed=seed + i, part=parts) for i in range(2)]
    weights = list(torch.rand(shape[0], 2, shape[1], 1, 1, device=DEVICE).to(dtype).unbind(1))
    truth = sum(weight.double() * split.double() for weight, split in zip(weights, splits, strict=True))
    for found in (weighted_sum_of_two(*splits, *weights), weighted_sum_of_two(*splits, *[w.clone() for w in weights])):
        # the sum may cancel: its error is that of float32's products
        assert_rounded_once(found, truth, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last)
    splits, weights = ([tensor.double() for tensor in tensors] for tensors in (splits, weights))
    assert torch.allclose(weighted_sum(splits, weights), truth, rtol=1e-14)
    assert torch.equal(weighted_sum(splits[:1], weights[:1]), splits[0] * weights[0])


@settings(deadline=None, max_examples=20)
@given(
    shape=maps,
    pool=st.sampled_from([(3, 1, 1), (3, 2, 1), (2, 2, 0), (2, 1, 0)]),
    ceil_mode=st.booleans(),
    counts_padding=st.booleans(),
    part=st.booleans(),
    dtype=st.sampled_from(HALVES),
)
def test_avg_pool2d(shape, pool, ceil_mode, counts_padding, part, dtype):
    x = feature_map(*shape, dtype=dtype, part=part)
    if min(x.shape[2:]) + 2 * pool[2] < pool[0]:
        return
    options = (*pool, ceil_mode, counts_padding)
    truth = F.avg_pool2d(x.double(), *options)
    assert torch.equal(avg_pool2d(x.double(), *options), truth)
    if not (ceil_mode and counts_padding):
        assert_rounded_once(pooled(x, *options), truth, dtype)
    with torch.no_grad():
        assert_rounded_once(avg_pool2d(x.float(), *options).to(dtype), truth, dtype, slack=1.1)


@settings(deadline=None, max_examples=20)
@given(
    shape=maps,
    outputs=st.integers(1, 9),
    dilation=st.integers(1, 13),
    bias=st.booleans(),
    dtype=st.sampled_from(HALVES),
)
def test_dilated_conv(shape, outputs, dilation, bias, dtype):
    """Products are rounded to the dtype, their sum in float32 to it once more."""
    x = feature_map(*shape, dtype=dtype)
    weight = torch.randn(outputs, shape[1], 3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if bias else None
    padded = dict(padding=dilation, dilation=dilation)
    doubles = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    truth = F.conv2d(*doubles, **padded)
    magnitude = F.conv2d(*(None if tensor is None else tensor.abs() for tensor in doubles), **padded)
    found = dilated_conv(x, weight, bias, dilation)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert ((found.double() - truth).abs() <= torch.finfo(dtype).eps * magnitude + 1e-6).all()
    assert torch.allclose(dilated_conv2d(*doubles, dilation), truth, rtol=1e-12, atol=1e-12)


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


@pytest.mark.gpu
@torch.no_grad()
def test_operations_on_a_gpu_are_the_kernels():
    """Large ones, of the network's shapes, and compiled, where they are torch's."""
    splits = feature_map(8, 512, 60, 85).chunk(2, 1)
    weights = torch.rand(8, 2, 256, 1, 1, device='cuda').half().unbind(1)
    for split in splits:
        for pool in (AvgPool2d(3, 2, padding=1), AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)):
            assert_rounded_once(pool(split), pool.double()(split.double()), torch.float16)
            compiled = torch.compile(pool, dynamic=False)(split)
            assert torch.allclose(compiled.float(), pool(split).float(), atol=2e-3)
    truth = sum(weight.double() * split.double() for weight, split in zip(weights, splits, strict=True))
    assert_rounded_once(weighted_sum(splits, weights), truth, torch.float16)
    compiled = torch.compile(weighted_sum, dynamic=False)(splits, weights)
    assert (compiled.double() - truth).abs().max() <= 1e-2
