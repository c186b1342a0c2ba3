"""The weighted sum of splits, and its kernel, against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_channels_last import HALVES, MAPS, assert_rounded_once, feature_map

from mmseg_resnest.ops import weighted_sum
from mmseg_resnest.ops.weighted_sum_triton import weighted_sum_of_two


@settings(deadline=None, max_examples=15)
@given(shape=MAPS, parts=st.booleans(), dtype=st.sampled_from(HALVES), seed=st.integers(0, 99))
def test_weighted_sum(shape, parts, dtype, seed):
    torch.manual_seed(seed)
    splits = [feature_map(*shape, dtype=dtype, seed=seed + i, part=parts) for i in range(2)]
    weights = list(torch.rand(shape[0], 2, shape[1], 1, 1, device=splits[0].device).to(dtype).unbind(1))
    truth = sum(weight.double() * split.double() for weight, split in zip(weights, splits, strict=True))
    for found in (weighted_sum_of_two(*splits, *weights), weighted_sum_of_two(*splits, *[w.clone() for w in weights])):
        assert_rounded_once(found, truth, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last)
    splits, weights = ([tensor.double() for tensor in tensors] for tensors in (splits, weights))
    assert torch.allclose(weighted_sum(splits, weights), truth, rtol=1e-14)
    assert torch.equal(weighted_sum(splits[:1], weights[:1]), splits[0] * weights[0])


@pytest.mark.gpu
@torch.no_grad()
def test_large_ones_and_compiled_ones():
    """Of the network's shapes; compiled it is torch's."""
    splits = feature_map(8, 512, 60, 85).chunk(2, 1)
    weights = torch.rand(8, 2, 256, 1, 1, device='cuda').half().unbind(1)
    truth = sum(weight.double() * split.double() for weight, split in zip(weights, splits, strict=True))
    assert_rounded_once(weighted_sum(splits, weights), truth, torch.float16)
    compiled = torch.compile(weighted_sum, dynamic=False)(splits, weights)
    assert (compiled.double() - truth).abs().max() <= 1e-2
