"""Folded batch norm: the same output, and which norms fold."""

import copy

import pytest
import torch
from mmseg.registry import MODELS
from test_segmentor import HEADS, make_config
from torch import nn

from mmseg_resnest.fold import fold_batch_norms
from mmseg_resnest.resnest import EXECUTIONS, ResNeSt, SplitAttentionConv2d


def settled(module, x):
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
    with torch.no_grad():
        module.train()(x)
    return module.eval()


@pytest.mark.parametrize('head', HEADS)
def test_segmentors(head):
    torch.manual_seed(0)
    model = MODELS.build(make_config(head, dict(type='CrossEntropyLoss'), None)).double()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    model = settled(model, x)
    with torch.no_grad():
        truth = model._forward(x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert norms > 25
    assert fold_batch_norms(model, lambda: model._forward(x[:1])) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    shortcuts = [block.downsample[1] for block in model.modules() if getattr(block, 'downsample', None) is not None]
    assert [shortcut.bias for shortcut in shortcuts] == [None] * 4  # their blocks' last convolutions add them
    with torch.no_grad():
        assert (model._forward(x) - truth).abs().max() < 1e-10 * truth.abs().max()


class TwoReaders(nn.Module):
    """Gives a convolution's output with and without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x), x


def test_each_output_is_compared():
    """The second one reads the convolution past its norm."""
    x = torch.randn(2, 3, 8, 8)
    model = settled(TwoReaders(), x)
    with pytest.raises(ValueError, match='folding 1 batch norms changed the output by'):
        fold_batch_norms(model, lambda: model(x))


@pytest.mark.parametrize('execution', EXECUTIONS)
@pytest.mark.parametrize('options', [dict(radix=1), dict(radix=2, groups=2, base_width=32), dict(avd_first=True)])
def test_radix_convolutions(options, execution):
    """However they are executed, every norm of the backbone is folded, and the execution stays."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = settled(ResNeSt(14, output_stride=8, radix_conv=execution, **options).double(), x)
    with torch.no_grad():
        truth = model(x)[-1]
        assert fold_batch_norms(model, lambda: model(x)[-1]) == 3 + 4 * 4 + 4  # stem, blocks, shortcuts
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert (model(x)[-1] - truth).abs().max() < 1e-10 * truth.abs().max()
    assert all(block.conv2.execution == execution for block in (model.layer1[0], model.layer4[0]))


def test_the_fastest_execution_is_that_of_the_norm_which_was_folded():
    model = ResNeSt(14, output_stride=8).eval()
    convs = [module for module in model.modules() if isinstance(module, SplitAttentionConv2d)]
    before = [conv.execution_on(torch.device('cuda')) for conv in convs]
    x = torch.randn(1, 3, 64, 64)
    fold_batch_norms(model, lambda: model(x)[-1])
    assert [conv.execution_on(torch.device('cuda')) for conv in convs] == before
    assert set(before) == {'dense', 'split'}


def test_what_does_not_fold_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.shared, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.alone, self.batch = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x):
            x = self.norm(self.conv(x)).relu()
            x = self.first(self.shared(x)).relu()
            return self.alone(self.second(self.shared(x)).relu())

    x = torch.randn(2, 3, 8, 8).double()
    model = settled(Model().double(), x)
    truth = model(x)
    assert fold_batch_norms(model, lambda: model(x)) == 1
    assert isinstance(model.norm, nn.Identity)
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in (model.first, model.second, model.alone))
    assert torch.allclose(model(x), truth, atol=1e-10)


def test_what_is_changed_in_place_before_the_norm_does_not_fold():
    """It is the convolution's own output still."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    model = settled(model, x)
    truth = model(x)
    with torch.inference_mode():
        assert fold_batch_norms(model, lambda: model(x)) == 0
    assert torch.equal(model(x), truth)


def test_a_convolution_with_two_readers_is_refused():
    x = torch.randn(2, 3, 8, 8)
    model = settled(TwoReaders(), x)
    with pytest.raises(ValueError, match=r'folding 1 batch norms changed the output by .*Predict without folding'):
        fold_batch_norms(model, lambda: sum(model(x)))
    damaged = settled(copy.deepcopy(TwoReaders()), x)
    damaged.norm.running_mean[0] = float('nan')
    with pytest.raises(ValueError, match='not finite'):
        fold_batch_norms(damaged, lambda: sum(damaged(x)))
