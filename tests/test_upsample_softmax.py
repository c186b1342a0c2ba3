"""The fused upsampling and softmax, added up, against mmsegmentation's steps with torch's own operations.

On a machine without a GPU the kernel runs in Triton's interpreter (conftest.py).
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_upsample_argmax import DEVICE, PLACEMENTS, make_logits, mmseg_logits

from mmseg_resnest.ops import Placement, upsample_softmax
from mmseg_resnest.ops.upsample_softmax_triton import add_probabilities


def truth_of(logits, placement):
    z = mmseg_logits(logits.double(), placement)
    return z.softmax(1) if z.shape[1] > 1 else z.sigmoid()


def both(logits, placement, start=0.5):
    """Yields what the op, and what the kernel, add to a total."""
    for add in {upsample_softmax, add_probabilities}:
        total = torch.full((*logits.shape[:2], *placement.size), start, device=logits.device)
        add(logits, placement, total)
        yield total - start


@pytest.mark.parametrize('case', PLACEMENTS)
def test_adds_mmsegmentations_probabilities(case):
    shape, placement = PLACEMENTS[case]
    logits = make_logits(shape)
    for added in both(logits, placement):
        assert (added - truth_of(logits, placement)).abs().max() <= 1e-5


@settings(deadline=None, max_examples=8)
@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 4),
    via=st.none() | st.tuples(st.integers(1, 12), st.integers(1, 12)),
    flip=st.sampled_from(['horizontal', 'vertical', None]),
    align_corners=st.booleans(),
    classes=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_for_any_size(sizes, via, flip, align_corners, classes, seed):
    placement = Placement(sizes[:2], via, flip=flip, align_corners=align_corners)
    logits = make_logits((1, classes, *sizes[2:]), seed=seed)
    for added in both(logits, placement):
        assert (added - truth_of(logits, placement)).abs().max() <= 1e-5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'sliced'])
def test_formats(layout, dtype):
    logits = make_logits((2, 7, 5, 6), dtype)
    if layout == 'channels_last':
        logits = logits.contiguous(memory_format=torch.channels_last)
    if layout == 'sliced':
        logits = torch.cat([logits, logits], 3)[..., ::2]
    placement = Placement((13, 27), via=(20, 24))
    for added in both(logits, placement):
        assert (added - truth_of(logits, placement)).abs().max() <= 1e-5


@pytest.mark.parametrize('scale', [30, 1000])
def test_sure_predictions_do_not_overflow(scale):
    logits = scale * make_logits((1, 7, 4, 4))
    for added in both(logits, Placement((9, 9)), start=0.0):
        assert (added - truth_of(logits, Placement((9, 9)))).abs().max() <= 1e-6 * scale
        assert (added.sum(1) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize('impl', ['exact', 'torch'])
@pytest.mark.parametrize('classes', [1, 6])
def test_exactly_it_is_torchs_to_the_bit(classes, impl):
    logits, placement = make_logits((1, classes, 4, 6), torch.float16), Placement((20, 31), via=(32, 48))
    total = torch.zeros(1, classes, 20, 31, device=DEVICE)
    upsample_softmax(logits, placement, total, impl=impl)
    z = mmseg_logits(logits.float(), placement)
    assert torch.equal(total, z.softmax(1) if classes > 1 else z.sigmoid())


@pytest.mark.parametrize(
    ('placement', 'impl', 'message'),
    [
        (Placement((8, 8), flip='diagonal'), None, "flip='diagonal'; expected one of"),
        (Placement((8, 8), padding=(-1, 0, 0, 0)), None, 'expected a picture inside of the padding'),
        (Placement((8, 8)), 'exakt', "impl='exakt'; expected one of"),
    ],
)
def test_bad_arguments(placement, impl, message):
    with pytest.raises(ValueError, match=message):
        upsample_softmax(make_logits((1, 3, 4, 4)), placement, torch.zeros(1, 3, 8, 8, device=DEVICE), impl=impl)


def test_another_total_is_refused():
    logits = make_logits((1, 3, 4, 4))
    zeros = partial(torch.zeros, device=DEVICE)
    for total in (zeros(1, 3, 8, 9), zeros(1, 3, 8, 8).double(), zeros(1, 3, 8, 16)[..., ::2]):
        with pytest.raises(
            ValueError, match=r'upsample_softmax: total .*; expected \(1, 3, 8, 8\), torch.float32, cont'
        ):
            upsample_softmax(logits, Placement((8, 8)), total)
