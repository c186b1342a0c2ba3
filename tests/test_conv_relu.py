"""conv_relu is relu(conv2d + shortcut): plainly on a CPU, by cuDNN's kernels on a GPU, compiled too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmseg_resnest.fold import fold_batch_norms
from mmseg_resnest.ops import conv_relu
from mmseg_resnest.ops.conv_relu import _compiled_fused, _has_kernel
from mmseg_resnest.resnest import ResNeSt

# channels in, out, kernel, stride, dilation, groups, height, width; the padding keeps what the stride leaves
SHAPES = [
    (64, 256, 1, 1, 1, 1, 17, 23),
    (16, 24, 3, 1, 2, 1, 9, 33),
    (8, 8, 3, 2, 1, 1, 15, 16),
    (3, 32, 3, 2, 1, 1, 31, 30),
    (12, 20, 3, 1, 1, 1, 7, 5),
    (16, 32, 3, 1, 1, 2, 8, 8),
]


def make(shape, bias=True, images=2, device='cpu', dtype=torch.float32):
    """Returns x, weight, bias, conv2d's numbers, and a shortcut."""
    inputs, outputs, kernel, stride, dilation, groups, height, width = shape
    torch.manual_seed(0)
    options = dict(device=device, dtype=dtype)
    x = torch.randn(images, inputs, height, width, **options).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel, **options) / (inputs * kernel**2) ** 0.5
    padding = dilation * (kernel // 2)
    steps = tuple((number, number) for number in (stride, padding, dilation))
    tensors = x, weight, torch.randn(outputs, **options) if bias else None
    return tensors, (*steps, groups), torch.randn_like(F.conv2d(*tensors, *steps, groups))


def truth_of(tensors, steps, shortcut):
    out = F.conv2d(*(None if tensor is None else tensor.double() for tensor in tensors), *steps)
    return (out if shortcut is None else out + shortcut.double()).relu()


@pytest.mark.parametrize('with_shortcut', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_is_its_formula(shape, bias, with_shortcut):
    tensors, steps, shortcut = make(shape, bias)
    kept = shortcut.clone()
    found = conv_relu(*tensors, *steps, shortcut=shortcut if with_shortcut else None)
    assert torch.allclose(found.double(), truth_of(tensors, steps, kept if with_shortcut else None), atol=1e-5)
    assert found.min() == 0
    assert torch.equal(shortcut, kept)


def test_gradients_flow():
    """Also with half precision on a GPU, where the kernels have none."""
    tensors, steps, shortcut = make((3, 4, 3, 1, 2, 1, 5, 4), dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (*tensors, shortcut)]
    assert torch.autograd.gradcheck(lambda x, w, b, z: conv_relu(x, w, b, *steps, z), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('with_shortcut', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_are_as_near_the_truth_as_plain_ones(shape, bias, with_shortcut, dtype):
    """Eagerly and compiled, for parts of a tensor and contiguous ones."""
    tensors, steps, shortcut = make(shape, bias, device='cuda', dtype=dtype)
    shortcut = shortcut if with_shortcut else None
    x, *parameters = tensors
    truth = truth_of(tensors, steps, shortcut)
    plain = F.conv2d(*tensors, *steps)
    plain = (plain if shortcut is None else plain + shortcut).relu()
    bound = 1.1 * (plain.double() - truth).norm() + 1e-6
    part = torch.cat([x, x], 1).chunk(2, 1)[1]
    compiled = torch.compile(conv_relu, dynamic=False)
    with torch.no_grad():
        for run in (conv_relu, compiled):
            for y in (x, x.contiguous(), part):
                found = run(y, *parameters, *steps, shortcut=shortcut)
                assert found.dtype == dtype
                assert (found.double() - truth).norm() <= bound


@pytest.mark.gpu
def test_the_kernels_are_used_where_they_are():
    x, weight = torch.zeros(1, 16, 4, 4, device='cuda').half(), torch.zeros(8, 16, 1, 1, device='cuda').half()
    with torch.no_grad():
        assert _has_kernel(x, weight, 1)
        assert not _has_kernel(x.float(), weight.float(), 1)
        assert not _has_kernel(x, weight[:5], 1)
        assert not _has_kernel(x, weight[:, :8], 2)
        assert not _has_kernel(x.expand(1 << 23, -1, -1, -1), weight, 1)
    assert not _has_kernel(x, weight, 1)
    weight.requires_grad_()
    assert conv_relu(x, weight, None).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize('with_shortcut', [False, True])
def test_the_compiler_is_told_the_truth(with_shortcut):
    """Shapes, strides and dtypes of what it does not see."""
    (x, weight, bias), steps, shortcut = make(SHAPES[1], device='cuda', dtype=torch.float16)
    steps = [list(step) for step in steps[:3]]
    with torch.no_grad():
        torch.library.opcheck(_compiled_fused, (x, weight, bias, shortcut if with_shortcut else None, *steps))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_folded_networks_predict_the_same(dtype):
    """Every block of a backbone, against float64; the plain path is this project's with gradients on."""
    torch.manual_seed(0)
    model = ResNeSt(14, output_stride=8)
    model.init_weights()
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.momentum = 1
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        # Of two images the attention's batch norm, over one value each, makes rounding a quarter larger or smaller.
        model.train()(torch.randn(16, 3, 65, 97))
        model.eval()
        truth = [features.cuda() for features in model.double()(images.double())]
        fold_batch_norms(model, lambda: model(images.double()))
    model.to('cuda', getattr(torch, dtype), memory_format=torch.channels_last)
    images = images.to('cuda', getattr(torch, dtype), memory_format=torch.channels_last)
    plain = [features.detach() for features in model(images)]
    with torch.no_grad():
        fused = model(images)
    for found, peer, true in zip(fused, plain, truth, strict=True):
        assert (found.double() - true).norm() <= 1.2 * (peer.double() - true).norm()
