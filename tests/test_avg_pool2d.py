"""Average pooling, and its kernel, against torch's own in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels_last import HALVES, MAPS, assert_rounded_once, feature_map
from torch.nn import functional as F

from mmseg_resnest.conv import AvgPool2d
from mmseg_resnest.ops import avg_pool2d
from mmseg_resnest.ops.avg_pool2d_triton import pooled


@settings(deadline=None, max_examples=20)
@given(
    shape=MAPS,
    pool=st.sampled_from([(3, 1, 1), (3, 2, 1), (2, 2, 0), (2, 1, 0)]),
    ceil_mode=st.booleans(),
    counts_padding=st.booleans(),
    part=st.booleans(),
    dtype=st.sampled_from(HALVES),
)
def test_avg_pool2d(shape, pool, ceil_mode, counts_padding, part, dtype):
    x = feature_map(*shape, dtype=dtype, part=part)
    options = (*pool, ceil_mode, counts_padding)
    side, stride, padding = pool
    room = min(x.shape[2:]) + 2 * padding - side
    if room + (stride - 1) * ceil_mode < 0:  # not one window
        with pytest.raises(RuntimeError, match='too small'):
            avg_pool2d(x.float(), *options)
        return
    truth = F.avg_pool2d(x.double(), *options)
    assert torch.equal(avg_pool2d(x.double(), *options), truth)
    if not (ceil_mode and counts_padding):
        assert_rounded_once(pooled(x, *options), truth, dtype)
    with torch.no_grad():
        assert_rounded_once(avg_pool2d(x.float(), *options).to(dtype), truth, dtype, slack=1.1)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize('options', [dict(stride=2, padding=1), dict(stride=1, padding=1)], ids=['2', '1'])
def test_large_ones_and_compiled_ones(options):
    """Of the network's shapes; compiled it is torch's."""
    x = feature_map(8, 256, 60, 85)
    pool = AvgPool2d(3, **options)
    assert_rounded_once(pool(x), pool(x.double()), torch.float16)
    assert torch.allclose(torch.compile(pool, dynamic=False)(x).float(), pool(x).float(), atol=2e-3)
