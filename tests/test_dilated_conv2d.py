"""The dilated convolution as matrix products against torch's own, in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels_last import HALVES, MAPS, feature_map, rounding_of_kernels
from torch.nn import functional as F

from mmseg_resnest.ops import dilated_conv2d
from mmseg_resnest.ops.dilated_conv2d_triton import dilated_conv

LAYOUTS = ('contiguous', 'channels_last', 'sliced')


def assert_equal(x, weight, dilation):
    truth = F.conv2d(x, weight, padding=dilation, dilation=dilation)
    found = dilated_conv2d(x, weight, None, dilation)
    gradient = torch.randn_like(truth)
    assert torch.allclose(found, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), gradient) for y in (found, truth)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    return found


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    outputs=st.integers(1, 4),
    dilation=st.integers(1, 12),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1000),
)
def test_equals_torch(shape, outputs, dilation, layout, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == 'sliced':
        x = torch.cat([x, x], 3)[..., ::2]
    weight = torch.randn(outputs, shape[1], 3, 3, dtype=torch.float64)
    assert_equal(x.requires_grad_(), weight.requires_grad_(), dilation)


def test_output_is_channels_last():
    x, weight = torch.randn(2, 3, 20, 16).double(), torch.randn(4, 3, 3, 3).double()
    found = assert_equal(x.requires_grad_(), weight.requires_grad_(), 12)
    assert found.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=20)
@given(
    shape=MAPS,
    outputs=st.integers(1, 9),
    dilation=st.integers(1, 13),
    bias=st.booleans(),
    dtype=st.sampled_from(HALVES),
)
def test_the_kernel(shape, outputs, dilation, bias, dtype):
    """Products are rounded to the dtype, their sum in float32 to it once more."""
    x = feature_map(*shape, dtype=dtype)
    torch.manual_seed(1)
    weight = torch.randn(outputs, shape[1], 3, 3).to(x)
    bias = torch.randn(outputs).to(x) if bias else None
    padded = dict(padding=dilation, dilation=dilation)
    doubles = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    truth = F.conv2d(*doubles, **padded)
    magnitude = F.conv2d(*(None if tensor is None else tensor.abs() for tensor in doubles), **padded)
    found = dilated_conv(x, weight, bias, dilation)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    roundings = torch.finfo(dtype).eps / 2 + rounding_of_kernels(dtype)
    assert ((found.double() - truth).abs() <= roundings * magnitude + 1e-6).all()
    assert torch.allclose(dilated_conv2d(*doubles, dilation), truth, rtol=1e-12, atol=1e-12)
