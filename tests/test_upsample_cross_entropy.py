"""The fused upsampling and cross-entropy, both implementations, against torch's own in float64.

On a machine without a GPU the kernels run in Triton's interpreter (conftest.py).
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmseg_resnest.ops import upsample_cross_entropy
from mmseg_resnest.ops.bilinear import bilinear_axis

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
IMPLEMENTATIONS = ('torch', 'triton')
EPSILON = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make_case(shape, size, dtype=torch.float32, label_type=torch.int64, ignored=0.2, seed=0):
    """Returns logits (N, C, h, w) and labels (N, H, W), a share of which is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(0, min(shape[1], 250), (shape[0], *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return logits.to(DEVICE, dtype), labels.to(DEVICE, label_type)


def expected(logits, labels, weight=None, smoothing=0.0, align_corners=False, average='all'):
    """Returns loss, accuracy and gradient of interpolate + cross_entropy in float64."""
    x = logits.detach().double().requires_grad_()
    weight = torch.ones(x.shape[1], device=x.device) if weight is None else weight
    z = F.interpolate(x, labels.shape[1:], mode='bilinear', align_corners=align_corners)
    labels = labels.long()
    valid = labels != 255
    total = F.cross_entropy(z, labels, weight.double(), ignore_index=255, reduction='sum', label_smoothing=smoothing)
    weights = weight.double()[labels.where(valid, 0)] * valid
    loss = total / (labels.numel() if average == 'all' else weights.sum())
    loss.backward()
    return loss.detach(), 100 * ((z.argmax(1) == labels) & valid).sum() / valid.sum(), x.grad


def compute(logits, labels, **options):
    x = logits.detach().requires_grad_()
    loss, accuracy = upsample_cross_entropy(x, labels, **options)
    loss.backward()
    return loss.detach(), accuracy, x.grad


def assert_equal(found, truth, dtype):
    assert torch.isclose(found[0].double(), truth[0], rtol=1e-6, atol=3e-6)
    assert torch.isclose(found[1].double(), truth[1].double(), atol=1e-4)
    assert found[2].dtype == dtype
    # Where the prediction is all but certain, the loss and the gradient p - 1 have float32's absolute error.
    assert (found[2].double() - truth[2]).norm() <= EPSILON[dtype] * truth[2].norm() + 3e-7


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('average', ['all', 'valid'])
@pytest.mark.parametrize(
    ('shape', 'size'),
    [
        ((2, 5, 4, 6), (32, 48)),  # a factor of 8, as in training
        ((1, 3, 4, 4), (16, 12)),
        ((1, 19, 5, 3), (13, 17)),  # no integer factor
        ((1, 4, 9, 9), (4, 5)),  # smaller
        ((2, 3, 3, 5), (3, 5)),  # the same size
        ((1, 2, 1, 1), (6, 5)),
        ((1, 6, 7, 1), (61, 1)),
    ],
)
def test_equals_torch(shape, size, average, align_corners, impl):
    logits, labels = make_case(shape, size)
    truth = expected(logits, labels, align_corners=align_corners, average=average)
    assert_equal(compute(logits, labels, align_corners=align_corners, average=average, impl=impl), truth, logits.dtype)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@settings(deadline=None, max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 20)] * 2),
    classes=st.integers(2, 12),
    align_corners=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_torch_for_any_size(impl, sizes, classes, align_corners, smoothing, weighted, seed):
    logits, labels = make_case((1, classes, *sizes[:2]), sizes[2:], seed=seed)
    labels[0, 0, 0] = 0  # at least one counts
    weight = torch.linspace(0.5, 2, classes, device=DEVICE) if weighted else None
    options = dict(align_corners=align_corners, average='valid')
    truth = expected(logits, labels, weight, smoothing, **options)
    found = compute(logits, labels, class_weight=weight, label_smoothing=smoothing, impl=impl, **options)
    assert_equal(found, truth, logits.dtype)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('label_type', [torch.uint8, torch.int64])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'sliced'])
def test_formats(layout, label_type, dtype, impl):
    logits, labels = make_case((2, 4, 3, 6), (12, 48), dtype, label_type)
    if layout == 'channels_last':
        logits = logits.contiguous(memory_format=torch.channels_last)
    if layout == 'sliced':
        logits, labels = torch.cat([logits, logits], 3)[..., 1:7], torch.cat([labels, labels], 2)[..., ::2]
    found = compute(logits, labels, impl=impl)
    assert_equal(found, expected(logits, labels), dtype)
    assert found[2].stride() == torch.empty_like(logits).stride()


def assert_no_worse_than_float32_upsampling(logits, labels, impl, weight=None):
    truth = expected(logits, labels, weight)
    x = logits.float().requires_grad_()
    z = F.interpolate(x, labels.shape[1:], mode='bilinear')
    loss = F.cross_entropy(z, labels, weight, ignore_index=255, reduction='sum') / labels.numel()
    loss.backward()
    eager = (x.grad.to(logits.dtype).double() - truth[2]).norm()
    found = compute(logits, labels, class_weight=weight, impl=impl)
    assert (found[2].double() - truth[2]).norm() <= 1.2 * eager + 1e-10
    assert (found[0].double() - truth[0]).abs() <= (loss.detach().double() - truth[0]).abs() + 1e-7


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_that_of_float32_upsampling(dtype, impl):
    assert_no_worse_than_float32_upsampling(*make_case((1, 9, 6, 6), (48, 48), dtype), impl)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize(('scale', 'offset'), [(5, 0), (25, 0), (0.25, 100), (0.25, 1000), (7, 500)])
def test_error_is_no_larger_for_sure_and_for_shifted_logits(scale, offset, impl):
    """Of a trained network, nearly all of whose pixels are right; in bfloat16's values, the gradient in float32."""
    logits, labels = make_case((1, 12, 6, 6), (48, 48), ignored=0)
    logits = (logits * scale + offset).bfloat16().float()
    right = F.interpolate(logits.double(), labels.shape[1:], mode='bilinear').argmax(1)
    labels = torch.where(labels < 11, right, labels)
    assert_no_worse_than_float32_upsampling(logits, labels, impl)
    assert_no_worse_than_float32_upsampling(logits, right, impl)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('weight', [0.7, 50])
@pytest.mark.parametrize('gap', [8, 12, 25])
def test_error_is_no_larger_for_sure_pixels_of_weighted_classes(gap, weight, impl):
    """All of one class and right: an error of each pixel's weight would add up."""
    logits, labels = make_case((1, 12, 6, 6), (48, 48))
    logits, labels = 0.5 * logits, torch.full_like(labels, 3)
    logits[:, 3] += gap
    weights = torch.full((12,), float(weight), device=DEVICE)
    assert_no_worse_than_float32_upsampling(logits, labels, impl, weights)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_a_second_derivative_is_refused(impl):
    """Else a penalty of the gradient would be one of a constant."""
    logits, labels = make_case((1, 5, 4, 6), (16, 24))
    x = logits.requires_grad_()
    loss, _ = upsample_cross_entropy(x, labels, impl=impl)
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_many_classes(impl):
    logits, labels = make_case((1, 1000 if impl == 'torch' or DEVICE == 'cuda' else 300, 1, 2), (3, 5))
    assert_equal(compute(logits, labels, impl=impl), expected(logits, labels), logits.dtype)


def test_float64():
    logits, labels = make_case((2, 5, 4, 6), (32, 48), torch.float64)
    truth = expected(logits, labels)
    found = compute(logits, labels)
    assert torch.isclose(found[0], truth[0], rtol=1e-13)
    assert (found[2] - truth[2]).norm() <= 1e-13 * truth[2].norm()


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_large_logits_neither_overflow_nor_vanish(impl):
    logits, labels = make_case((1, 5, 4, 4), (32, 32))
    logits = logits * 100
    truth = expected(logits, labels)
    assert_equal(compute(logits, labels, impl=impl), truth, logits.dtype)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_corners_far_above_the_pixels_between_them(smoothing, impl):
    """Each corner is sure of another class: half-way no logit comes near the highest of the corners'."""
    logits = torch.zeros(1, 5, 2, 2, device=DEVICE)
    for c, (y, x) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        logits[0, c, y, x] = 300.0
    _, labels = make_case((1, 5, 2, 2), (16, 16))
    between = F.interpolate(logits, (16, 16), mode='bilinear')
    assert (300 - between.amax(1)).max() > 150  # float32's exponential of the difference is zero
    truth = expected(logits, labels, smoothing=smoothing)
    assert_equal(compute(logits, labels, impl=impl, label_smoothing=smoothing), truth, logits.dtype)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype, impl):
    logits, labels = make_case((1, 5, 2, 2), (16, 16))
    truth = compute(logits, labels, impl=impl, label_smoothing=0.1)
    torch.set_default_dtype(dtype)
    try:
        found = compute(logits, labels, impl=impl, label_smoothing=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    for value, true in zip(found, truth, strict=True):
        assert value.dtype == true.dtype
        assert torch.equal(value, true)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('average', ['all', 'valid'])
def test_all_ignored_gives_zero(average, impl):
    logits, labels = make_case((2, 5, 4, 6), (32, 48), ignored=2)
    loss, accuracy, gradient = compute(logits, labels, average=average, impl=impl)
    assert loss == 0
    assert accuracy == 100  # mmsegmentation's
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
@pytest.mark.parametrize('factor', [1, 4, 65536])  # as a float16 loss scaler begins
@pytest.mark.parametrize('ignored', [True, False])  # or all of weight 0
def test_where_nothing_counts_the_gradient_is_zero(ignored, factor, impl):
    logits, labels = make_case((1, 5, 4, 6), (16, 24), ignored=2 if ignored else 0)
    x = logits.requires_grad_()
    weight = None if ignored else torch.zeros(5, device=DEVICE)
    loss, _ = upsample_cross_entropy(x, labels, class_weight=weight, average='valid', impl=impl)
    (factor * loss).backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_gradient_is_scaled_by_what_follows(impl):
    logits, labels = make_case((1, 5, 4, 6), (32, 48))
    truth = expected(logits, labels)[2]
    x = logits.requires_grad_()
    (0.4 * upsample_cross_entropy(x, labels, impl=impl)[0]).backward()
    assert (x.grad.double() - 0.4 * truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_without_gradient(impl):
    logits, labels = make_case((1, 5, 4, 6), (32, 48))
    loss, accuracy = upsample_cross_entropy(logits, labels, impl=impl)
    truth = expected(logits, labels)
    assert not loss.requires_grad
    assert torch.isclose(loss.double(), truth[0], rtol=1e-6)
    assert torch.isclose(accuracy.double(), truth[1].double(), atol=1e-4)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_a_size_seen_in_inference_mode_can_be_trained(impl):
    """Positions and weights are remembered."""
    logits, labels = make_case((1, 3, 5, 7), (37, 39))
    with torch.inference_mode():
        upsample_cross_entropy(logits, labels, impl=impl)
    assert_equal(compute(logits, labels, impl=impl), expected(logits, labels), logits.dtype)


@pytest.mark.parametrize('impl', IMPLEMENTATIONS)
def test_twice_the_same_bits(impl):
    logits, labels = make_case((2, 3, 4, 4), (32, 32))
    first, second = (compute(logits, labels, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_labels_out_of_range_are_refused():
    logits, labels = make_case((1, 5, 4, 6), (32, 48))
    labels[0, 3, 4] = 199
    with pytest.raises(ValueError, match=r'199.*expected 0 to 4, or 255'):
        upsample_cross_entropy(logits, labels, impl='torch')
    assert upsample_cross_entropy(logits, labels, impl='triton')[0].isnan()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(labels=torch.zeros(1, 8, 8, dtype=torch.int32)), 'torch.int32; expected floating point, and uint8'),
        (dict(labels=torch.zeros(8, 8, dtype=torch.int64)), r'labels \(8, 8\); expected'),
        (dict(logits=torch.zeros(1, 5, 4)), r'logits \(1, 5, 4\)'),
        (dict(logits=torch.zeros(0, 5, 4, 4), labels=torch.zeros(0, 8, 8).long()), r'\(0, 5, 4, 4\).*, none empty'),
        (dict(logits=torch.zeros(1, 0, 4, 4)), r'logits \(1, 0, 4, 4\).*, none empty'),
        (dict(labels=torch.zeros(1, 8, 0).long()), r'labels \(1, 8, 0\).*, none empty'),
        (dict(class_weight=torch.ones(4)), 'expected one of 5 classes'),
        (dict(class_weight=torch.tensor([1, 1, -0.5, 1, 1])), 'class_weight from -0.5; expected 0 or more'),
        (dict(class_weight=torch.tensor([1, float('nan'), 1, 1, 1])), 'class_weight from nan; expected 0 or more'),
        (dict(logits=torch.zeros(1, 32768, 1, 1)), '32768 classes; expected at most 32767'),
        (dict(label_smoothing=-0.1), 'label_smoothing=-0.1; expected 0 to 1'),
        (dict(label_smoothing=1.1), 'label_smoothing=1.1; expected 0 to 1'),
        (dict(label_smoothing=float('nan')), 'label_smoothing=nan; expected 0 to 1'),
        (dict(average='mean'), "average='mean'"),
        (dict(impl='cuda'), "impl='cuda'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(logits=torch.zeros(1, 5, 4, 4), labels=torch.zeros(1, 8, 8, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=message):
        upsample_cross_entropy(**arguments)


@pytest.mark.parametrize('align_corners', [False, True])
@settings(deadline=None)
@given(sizes=st.tuples(st.integers(1, 30), st.integers(1, 60)))
def test_axis_equals_torch(align_corners, sizes):
    values = torch.randn(1, 1, sizes[0], dtype=torch.float64)
    axis = bilinear_axis(*sizes, align_corners)
    found = torch.lerp(values[0, 0, axis.left], values[0, 0, axis.right], axis.weight)
    truth = F.interpolate(values, sizes[1], mode='linear', align_corners=align_corners)[0, 0]
    assert torch.allclose(found, truth, atol=1e-12)


def _rank(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    logits, labels = make_case((2, 5, 4, 6), (32, 48))
    labels[0, :20] = 255  # the first rank's image has fewer labels
    _, _, gradient = compute(
        logits[rank : rank + 1].cpu(), labels[rank : rank + 1].cpu(), average='valid', impl='torch'
    )
    torch.save(gradient / 2, f'{folder}/{rank}.pth')  # as DDP takes the mean
    dist.destroy_process_group()


@pytest.mark.slow
def test_valid_pixels_are_counted_over_all_ranks(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    logits, labels = make_case((2, 5, 4, 6), (32, 48))
    labels[0, :20] = 255
    truth = expected(logits, labels, average='valid')[2].cpu()
    found = torch.cat([torch.load(tmp_path / f'{rank}.pth') for rank in range(2)])
    assert (found.double() - truth).norm() <= 2e-6 * truth.norm()
