"""The fused upsampling and argmax, each implementation, against mmsegmentation's steps with torch's own operations.

On a machine without a GPU the kernel runs in Triton's interpreter (conftest.py).
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmseg_resnest.ops import Placement, place, upsample_argmax
from mmseg_resnest.ops.placement import row_taps

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
IMPLEMENTATIONS = ('triton', 'exact') if DEVICE == 'cuda' else ('torch', 'triton', 'exact')


def make_logits(shape, dtype=torch.float32, seed=0):
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def mmseg_logits(logits, placement):
    """Returns what predict_by_feat and postprocess_result make of the logits, both resizes always done."""
    size, via, (left, right, top, bottom), flip, align_corners = placement
    via = via or size
    z = F.interpolate(logits, via, mode='bilinear', align_corners=align_corners)
    z = z[:, :, top : via[0] - bottom, left : via[1] - right]
    if flip == 'horizontal':
        z = z.flip(dims=(3,))
    if flip == 'vertical':
        z = z.flip(dims=(2,))
    return F.interpolate(z, size, mode='bilinear', align_corners=align_corners)


def assert_right(labels, logits, placement, impl, margin=1e-4):
    """The label map is the argmax's, but where another logit is as high up to rounding."""
    z = mmseg_logits(logits.float(), placement)
    truth = z.argmax(1)
    if impl == 'exact':
        assert torch.equal(labels.long(), truth)
        return
    assert (labels == truth).float().mean() > 0.999
    chosen = z.gather(1, labels.long()[:, None])[:, 0]
    assert (z.amax(1) - chosen).max() <= margin


PLACEMENTS = {
    'once': ((2, 5, 4, 6), Placement((32, 48))),
    'no integer factor': ((1, 19, 5, 3), Placement((13, 17))),
    'aligned corners': ((1, 7, 5, 6), Placement((33, 41), align_corners=True)),
    'smaller': ((1, 4, 9, 9), Placement((4, 5))),
    'nothing to resize': ((1, 5, 12, 7), Placement((12, 7))),
    'to another size': ((1, 6, 4, 6), Placement((45, 70), via=(32, 48))),
    'to a smaller size': ((1, 6, 4, 6), Placement((11, 23), via=(32, 48))),
    'padded': ((1, 6, 4, 6), Placement((30, 41), via=(32, 48), padding=(0, 7, 0, 2))),
    'padded on all sides, resized': ((1, 6, 4, 6), Placement((37, 50), via=(32, 48), padding=(3, 1, 2, 5))),
    'mirrored': ((2, 6, 4, 6), Placement((32, 48), flip='horizontal')),
    'upside down, padded, resized': ((1, 6, 4, 6), Placement((20, 90), (32, 48), (5, 0, 0, 3), 'vertical', True)),
    'one row': ((1, 3, 1, 7), Placement((1, 61))),
    'one pixel': ((1, 3, 1, 1), Placement((5, 6))),
}


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', PLACEMENTS)
def test_equals_mmsegmentation(case, impl):
    shape, placement = PLACEMENTS[case]
    logits = make_logits(shape)
    labels, confidence = upsample_argmax(logits, placement, impl=impl)
    assert labels.dtype == torch.uint8
    assert labels.shape == (shape[0], *placement.size)
    assert confidence is None
    assert_right(labels, logits, placement, impl)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@settings(deadline=None, max_examples=12)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 24)] * 4),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    flip=st.sampled_from(['horizontal', 'vertical', None]),
    align_corners=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_mmsegmentation_for_any_size(impl, sizes, padding, flip, align_corners, seed):
    h, w, height, width, inner_height, inner_width = sizes
    via = (inner_height + padding[2] + padding[3], inner_width + padding[0] + padding[1])
    placement = Placement((height, width), via, padding, flip, align_corners)
    logits = make_logits((1, 4, h, w), seed=seed)
    z = mmseg_logits(logits, placement)
    labels, _ = upsample_argmax(logits, placement, impl=impl)
    assert (z.amax(1) - z.gather(1, labels.long()[:, None])[:, 0]).max() <= 2e-4


@pytest.mark.skipif(DEVICE == 'cuda', reason='the plain path is for CPUs')
@pytest.mark.parametrize('flip', ['horizontal', None])
def test_plain_path_is_torchs_to_the_bit(flip):
    """Of 524,288 pixels, where rounding alone would decide some; resized once, as most images are."""
    logits = make_logits((1, 19, 64, 128)) / 1000
    placement = Placement((512, 1024), flip=flip)
    assert torch.equal(upsample_argmax(logits, placement, impl='torch')[0], mmseg_logits(logits, placement).argmax(1))


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('placement', [Placement((24, 40)), Placement((29, 31), via=(24, 40), flip='vertical')])
def test_confidence(placement, impl):
    logits = make_logits((2, 9, 3, 5))
    labels, confidence = upsample_argmax(logits, placement, confidence=True, impl=impl)
    truth, _ = mmseg_logits(logits.double(), placement).softmax(1).max(1)
    assert confidence.dtype == torch.float32
    assert (confidence - truth).abs().max() < 1e-5
    assert_right(labels, logits, placement, impl)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('threshold', [0.3, 0.5])
def test_one_channel(threshold, impl):
    logits = make_logits((2, 1, 3, 5))
    placement = Placement((29, 31), via=(24, 40))
    labels, confidence = upsample_argmax(logits, placement, threshold=threshold, confidence=True, impl=impl)
    positive = mmseg_logits(logits, placement).sigmoid()[:, 0]
    near = (positive - threshold).abs() < 1e-6
    assert torch.equal(labels[~near], (positive > threshold)[~near].byte())
    assert (confidence - torch.where(labels == 1, positive, 1 - positive)).abs().max() < 1e-5


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'sliced'])
def test_formats(layout, dtype, impl):
    logits = make_logits((2, 4, 3, 6), dtype)
    if layout == 'channels_last':
        logits = logits.contiguous(memory_format=torch.channels_last)
    if layout == 'sliced':
        logits = torch.cat([logits, logits], 3)[..., 1:7]
    placement = Placement((12, 48))
    assert_right(upsample_argmax(logits, placement, impl=impl)[0], logits, placement, impl)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('flip', ['horizontal', 'vertical', None])
def test_an_infinite_logit_stays_where_it_is(flip, impl):
    """Pixels that it is no part of are as ever; some of them have fewer neighbours than others."""
    logits, placement = make_logits((1, 4, 4, 4)), Placement((15, 17), via=(16, 16), flip=flip)
    share = torch.zeros_like(logits[:, :1])
    share[0, 0, 0, 0] = 1
    far = place(share, placement)[:, 0] == 0
    assert far.sum() > 100
    logits[0, 2, 0, 0] = float('inf')
    labels, _ = upsample_argmax(logits, placement, impl=impl)
    assert torch.equal(labels[far].long(), place(logits, placement).argmax(1)[far])


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('classes', [[1], [1, 2], [0, 1, 2]])
def test_nan_is_the_highest_logit_as_it_is_to_torch(classes, impl):
    logits = make_logits((1, 3, 4, 4))
    logits[:, classes] = torch.nan
    labels, _ = upsample_argmax(logits, Placement((4, 4)), impl=impl)
    assert torch.equal(labels.long(), logits.argmax(1))
    assert labels.unique().tolist() == classes[:1]


def test_nan_is_the_highest_where_classes_come_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(sys.modules[upsample_argmax.__module__], 'CHUNK', 4 * 64)
    logits = make_logits((1, 40, 4, 4))
    logits[:, [17, 30]] = torch.nan
    for nans in ([17, 30], [30]):
        logits[:, [i for i in (17, 30) if i not in nans]] = 9
        assert upsample_argmax(logits, Placement((8, 8)), impl='exact')[0].unique().tolist() == nans[:1]


def test_taps_without_weight_lie_beside_the_others():
    taps = row_taps(4, Placement((15, 17), via=(16, 16)), torch.float32, torch.device('cpu'))
    dense = place(torch.eye(4)[None, :, :, None], Placement((15, 1), via=(16, 1)))[0, :, :, 0].T
    assert torch.equal(torch.zeros_like(dense).scatter_add_(1, *taps), dense)
    assert (taps.weight == 0).any()
    assert (dense.gather(1, taps.index) != 0).all()
    assert (taps.index.diff(dim=1) >= 0).all()


@pytest.mark.parametrize('flip', ['vertical', None])
@pytest.mark.parametrize('padding', [(0, 0, 0, 0), (1, 2, 3, 4)])
def test_nothing_resized_is_one_tap(padding, flip):
    size = 1_000_000  # whose matrix would be 4 TB
    placement = Placement((size - sum(padding[2:]), 5), (size, 5 + sum(padding[:2])), padding, flip)
    index, weight = row_taps(size, placement, torch.float32, torch.device('cpu'))
    rows = torch.arange(size).float()[None, None, :, None].expand(-1, -1, -1, placement.via[1])
    assert torch.equal(index.float(), place(rows, placement)[0, 0, :, :1])
    assert torch.equal(weight, torch.ones_like(index, dtype=torch.float32))


def test_taps_are_no_inference_tensors():
    """They are remembered, and the next call may be in no inference mode."""
    with torch.inference_mode():
        for placement in (Placement((33, 44)), Placement((9, 9))):
            assert not any(part.is_inference() for part in row_taps(9, placement, torch.float32, torch.device('cpu')))


@pytest.mark.parametrize('impl', [impl for impl in IMPLEMENTATIONS if impl != 'triton'])
def test_float64(impl):
    logits = make_logits((1, 5, 4, 6), torch.float64)
    placement = Placement((37, 50), via=(32, 48))
    labels, confidence = upsample_argmax(logits, placement, confidence=True, impl=impl)
    z = mmseg_logits(logits, placement)
    assert torch.equal(labels.long(), z.argmax(1))
    assert (confidence - z.softmax(1).amax(1)).abs().max() < 1e-13


def test_the_default_on_other_devices():
    """Neither the plain path, which is NumPy's, nor Triton runs there; meta tensors have no values to compare."""
    labels, _ = upsample_argmax(torch.zeros(1, 5, 4, 6, device='meta'), Placement((8, 12)))
    assert labels.device.type == 'meta'
    assert labels.shape == (1, 8, 12)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_many_classes(impl, monkeypatch):
    monkeypatch.setattr(
        sys.modules[upsample_argmax.__module__], 'CHUNK', 15 * 100
    )  # so that the exact path has several
    logits = make_logits((1, 300, 1, 2))
    logits[0, 290, 0, 1] = 20
    labels, confidence = upsample_argmax(logits, Placement((3, 5)), confidence=True, impl=impl)
    assert labels.dtype == torch.int64
    assert labels.max() > 255
    assert_right(labels, logits, Placement((3, 5)), impl)
    assert (confidence - mmseg_logits(logits, Placement((3, 5))).softmax(1).amax(1)).abs().max() < 1e-5


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_the_first_of_equal_logits_wins(impl):
    logits = torch.ones((1, 5, 2, 2), device=DEVICE)
    assert upsample_argmax(logits, Placement((7, 9)), impl=impl)[0].count_nonzero() == 0


@pytest.mark.skipif(DEVICE == 'cuda', reason='the plain path is for CPUs')
def test_bands_and_segments_give_the_same(monkeypatch):
    logits, placement = make_logits((3, 7, 9, 9)), Placement((300, 40), via=(72, 72))
    truth = upsample_argmax(logits, placement, confidence=True, impl='exact')
    for name, value in dict(BAND=7, SEGMENT=100).items():
        monkeypatch.setattr(sys.modules[upsample_argmax.__module__], name, value)
    labels, confidence = upsample_argmax(logits, placement, confidence=True, impl='torch')
    assert torch.equal(labels, truth[0])
    assert torch.allclose(confidence, truth[1], atol=1e-6)


def test_rows_are_not_shared_among_threads(monkeypatch):
    """They would wait for each other at every row, on a busy machine much longer than they compute."""
    module = sys.modules[upsample_argmax.__module__]
    monkeypatch.setattr(module, '_decide', lambda z, *_: (torch.full((len(z),), torch.get_num_threads()), None))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        labels, _ = upsample_argmax(torch.zeros(1, 5, 4, 4), Placement((8, 8)), impl='torch')
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (labels == 1).all()


def test_callers_in_several_threads_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            with ThreadPoolExecutor(4) as pool:
                list(
                    pool.map(
                        lambda _: upsample_argmax(torch.zeros(1, 5, 9, 9), Placement((60, 60)), impl='torch'), range(8)
                    )
                )
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_other_threads_keep_their_number_of_threads(monkeypatch):
    """Also one that begins while a row is finished."""
    module, found = sys.modules[upsample_argmax.__module__], []

    def decide(z, *_):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(torch.get_num_threads).result())
        return torch.zeros(len(z)), None

    def call():
        upsample_argmax(torch.zeros(1, 5, 4, 4), Placement((2, 8)), impl='torch')
        return torch.get_num_threads()

    monkeypatch.setattr(module, '_decide', decide)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(call).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == [3, 3]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(logits=torch.zeros(1, 5, 4)), r'logits \(1, 5, 4\)'),
        (dict(logits=torch.zeros(1, 5, 4, 0)), r'logits \(1, 5, 4, 0\)'),
        (dict(logits=torch.zeros(1, 5, 4, 4, dtype=torch.int64)), 'torch.int64; expected'),
        (dict(impl='cuda'), "impl='cuda'"),
        (
            dict(logits=torch.zeros(1, 5, 4, 4).double(), impl='triton'),
            "impl='triton', logits torch.float64; expected float32 or less, or impl='exact'",
        ),
        (dict(placement=Placement((8, 8), flip='diagonal')), "flip='diagonal'"),
        (dict(placement=Placement((8, 8), padding=(4, 4, 0, 0))), 'expected a picture inside of the padding'),
        (dict(threshold=0.5), '5 channels, threshold=0.5'),
        (dict(logits=torch.zeros(1, 1, 4, 4)), '1 channels, threshold=None'),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(logits=torch.zeros(1, 5, 4, 4), placement=Placement((8, 8)), impl=None) | change
    with pytest.raises(ValueError, match=message):
        upsample_argmax(**arguments)
