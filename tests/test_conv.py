"""DilatedConv2d is torch's Conv2d, and on a GPU, compiled, as near to the truth as cuDNN."""

import pytest
import torch
from mmcv.cnn import build_conv_layer
from torch import nn

from mmseg_resnest.conv import DilatedConv2d

WIDE = dict(kernel_size=3, padding=12, dilation=12, bias=False)


def make_pair(*args, **kwargs):
    theirs = nn.Conv2d(*args, **kwargs)
    ours = build_conv_layer(dict(type='mmseg_resnest.DilatedConv2d'), *args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize('options', [WIDE, dict(kernel_size=1), dict(kernel_size=3, padding=2, dilation=2, groups=2)])
def test_equals_torch(options):
    theirs, ours = make_pair(4, 6, **options)
    x = torch.randn(2, 4, 16, 20)
    assert type(ours) is DilatedConv2d
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    'change',
    [
        dict(stride=2),
        dict(groups=2),
        dict(dilation=11, padding=11),
        dict(padding=0),
        dict(dilation=(12, 24), padding=(12, 24)),
    ],
)
def test_others_are_left_to_cudnn(change):
    assert DilatedConv2d(4, 6, **WIDE)._is_wide()
    assert DilatedConv2d(4, 6, **WIDE | dict(bias=True))._is_wide()  # as folded batch norm leaves it
    assert not DilatedConv2d(4, 6, **WIDE | change)._is_wide()


@pytest.mark.gpu
@pytest.mark.parametrize('bias', [False, True], ids=['', 'of a folded norm'])
def test_error_is_that_of_cudnn(bias):
    theirs, ours = (conv.cuda() for conv in make_pair(256, 64, **WIDE | dict(bias=bias)))
    x = torch.randn(2, 256, 40, 48, device='cuda').to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(2, 64, 40, 48, device='cuda')

    def run(conv, x, gradient):
        y = conv(x)
        return y, *torch.autograd.grad(y, (x, *conv.parameters()), gradient.to(y))

    with torch.autocast('cuda', torch.bfloat16):
        found = run(torch.compile(ours, dynamic=False), x, gradient)
        peer = run(theirs, x, gradient)
    truth = run(theirs.double(), x.detach().double().requires_grad_(), gradient.double())
    for a, b, c in zip(found, peer, truth, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(('dilation', 'height', 'width'), [(12, 64, 86), (24, 60, 85), (36, 9, 40)])
def test_error_of_predictions_without_a_compiler_is_that_of_cudnn(dilation, height, width, dtype):
    """The last one's taps but the middle row fall outside."""
    options = dict(kernel_size=3, padding=dilation, dilation=dilation, bias=True)
    theirs, ours = (conv.to('cuda', dtype) for conv in make_pair(256, 72, **options))
    x = torch.randn(3, 256, height, width, device='cuda').to(dtype, memory_format=torch.channels_last)
    found, peer = ours(x), theirs(x)
    truth = theirs.double()(x.double())
    assert found.dtype == dtype
    assert (found.double() - truth).norm() <= 2 * (peer.double() - truth).norm()
