"""The authors' heads against plain networks with their layers, their names and their dropout."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_resnest.conv import DilatedConv2d
from mmseg_resnest.heads import AuthorsDeepLabV3Head, AuthorsFCNHead

CHANNELS = (8, 12, 20, 24)
DILATIONS = (2, 3, 4)


def conv_norm_relu(inputs, outputs, kernel_size, dilation=1):
    padding = dilation if kernel_size == 3 else 0
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=padding, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class Pooling(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), *conv_norm_relu(inputs, outputs, 1))

    def forward(self, x):
        return F.interpolate(self.gap(x), x.shape[2:], mode='bilinear', align_corners=True)


class PlainASPP(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.b0 = nn.Sequential(*conv_norm_relu(inputs, outputs, 1))
        self.b1 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, DILATIONS[0]))
        self.b2 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, DILATIONS[1]))
        self.b3 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, DILATIONS[2]))
        self.b4 = Pooling(inputs, outputs)
        self.project = nn.Sequential(*conv_norm_relu(5 * outputs, outputs, 1), nn.Dropout2d(0.5))

    def forward(self, x):
        return self.project(torch.cat((self.b0(x), self.b1(x), self.b2(x), self.b3(x), self.b4(x)), 1))


class PlainDeepLabV3(nn.Module):
    def __init__(self, inputs, channels, classes):
        super().__init__()
        self.aspp = PlainASPP(inputs, channels)
        self.block = nn.Sequential(
            *conv_norm_relu(channels, channels, 3), nn.Dropout(0.1), nn.Conv2d(channels, classes, 1)
        )

    def forward(self, x):
        return self.block(self.aspp(x))


class PlainFCN(nn.Module):
    def __init__(self, inputs, channels, classes):
        super().__init__()
        self.conv5 = nn.Sequential(
            *conv_norm_relu(inputs, channels, 3), nn.Dropout(0.1), nn.Conv2d(channels, classes, 1)
        )

    def forward(self, x):
        return self.conv5(x)


COMMON = dict(channels=16, num_classes=5, align_corners=True)
# name -> (our head, the plain one, the stage it reads, the place of the classifier among the plain one's names)
HEADS = {
    'DeepLabV3': (
        lambda **kw: AuthorsDeepLabV3Head(in_channels=24, in_index=3, dilations=DILATIONS, **COMMON | kw),
        lambda: PlainDeepLabV3(24, 16, 5),
        3,
        'block.4.',
    ),
    'FCN': (
        lambda **kw: AuthorsFCNHead(in_channels=20, in_index=2, **COMMON | kw),
        lambda: PlainFCN(20, 16, 5),
        2,
        'conv5.4.',
    ),
}


@pytest.fixture(params=HEADS)
def heads(request):
    """Our head and the plain one with the same weights, in float64, and the feature maps of a backbone."""
    make_ours, make_plain, stage, classifier = HEADS[request.param]
    torch.manual_seed(0)
    plain = make_plain().double()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.7, 1.3)
            nn.init.normal_(m.bias, 0.3, 0.3)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.1, 0.3)
    ours = make_ours().double()
    weights = {
        key.replace(classifier, 'conv_seg.') if key.startswith(classifier) else key: value
        for key, value in plain.state_dict().items()
    }
    ours.load_state_dict(weights, strict=True)
    # A multiple of the align_corners grid nowhere: odd sizes.
    features = [torch.randn(3, c, 7, 11, dtype=torch.float64) for c in CHANNELS]
    return ours, plain, features, stage


@pytest.mark.parametrize('training', [False, True])
def test_equals_the_plain_network(heads, training):
    ours, plain, features, stage = heads
    ours.train(training)
    plain.train(training)
    torch.manual_seed(1)  # the same dropout, if it is of the same kind in the same order
    expected = plain(features[stage])
    torch.manual_seed(1)
    logits = ours(features)
    assert logits.shape == (3, 5, 7, 11)
    assert expected.std() > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)


def test_gradients_reach_every_parameter_and_the_stage_that_is_read(heads):
    ours, plain, features, stage = heads
    for feature in features:
        feature.requires_grad_()
    torch.manual_seed(1)
    ours(features).square().mean().backward()
    (ours_gradient,) = [feature.grad for feature in features if feature.grad is not None]
    gradients = [p.grad.clone() for p in ours.parameters()]
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(plain(features[stage]).square().mean(), features[stage])
    torch.testing.assert_close(ours_gradient, expected, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_names():
    make_ours = HEADS['DeepLabV3'][0]
    branches = {f'aspp.b{i}.{layer}' for i in range(4) for layer in (0, 1)}
    layers = branches | {'aspp.b4.gap.1', 'aspp.b4.gap.2', 'aspp.project.0', 'aspp.project.1', 'block.0', 'block.1'}
    assert {key.rpartition('.')[0] for key in make_ours().state_dict()} == layers | {'conv_seg'}
    assert {key.rpartition('.')[0] for key in HEADS['FCN'][0]().state_dict()} == {'conv5.0', 'conv5.1', 'conv_seg'}


def test_authors_sizes():
    """The parameters of DeepLabV3's head on 2048 channels and of the FCN heads, counted from the layers."""

    def count(head):
        return sum(p.numel() for p in head.parameters())

    with torch.device('meta'):
        deeplab = AuthorsDeepLabV3Head(in_channels=2048, channels=256, num_classes=150)
        fcn = AuthorsFCNHead(in_channels=1024, channels=256, num_classes=150)
    branches = 2 * 2048 * 256 + 3 * 9 * 2048 * 256
    norms = 2 * 256
    classifier = 256 * 150 + 150
    assert count(deeplab) == branches + 5 * 256 * 256 + 9 * 256 * 256 + 7 * norms + classifier
    assert count(fcn) == 9 * 1024 * 256 + norms + classifier
    dilations = [deeplab.aspp.get_submodule(f'b{i}.0').dilation for i in (1, 2, 3)]
    assert dilations == [(12, 12), (24, 24), (36, 36)]


def kept(module, x):
    """Whether each value of x came through a dropout, as (B, C, H * W)."""
    return (module(x) != 0).flatten(2)


@pytest.mark.parametrize(('name', 'dropout'), [('DeepLabV3', 'block.3'), ('FCN', 'conv5.3')])
def test_the_classifiers_dropout_is_of_single_values(name, dropout):
    torch.manual_seed(0)
    head = HEADS[name][0]().train()
    values = kept(head.get_submodule(dropout), torch.ones(8, 16, 20, 20))
    assert 1 - values.float().mean() == pytest.approx(0.1, abs=0.01)
    assert values.any(2).all()
    assert not values.all(2).any()
    assert head.dropout is None  # mmsegmentation's own, of whole channels


def test_aspps_dropout_is_of_whole_channels():
    torch.manual_seed(0)
    head = HEADS['DeepLabV3'][0]().train()
    values = kept(head.get_submodule('aspp.project.3'), torch.ones(64, 16, 5, 5))
    assert torch.equal(values.any(2), values.all(2))
    assert values.float().mean() == pytest.approx(0.5, abs=0.05)


def test_image_level_branch_is_the_same_everywhere(heads):
    ours, _, features, stage = heads
    if stage == 3:
        branch = ours.eval().aspp.b4(features[3])
        assert torch.equal(branch, branch[:, :, :1, :1].expand_as(branch))
        assert branch[:, :, 0, 0].std() > 0.05


def samples(labels):
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('name', HEADS)
def test_loss_interpolates_and_ignores(name, align_corners):
    torch.manual_seed(0)
    loss_decode = dict(type='CrossEntropyLoss', loss_weight=0.2, avg_non_ignore=True)
    head = HEADS[name][0](align_corners=align_corners, loss_decode=loss_decode).double().eval()
    nn.init.normal_(head.conv_seg.weight)
    features = [torch.randn(2, c, 7, 11, dtype=torch.float64) for c in CHANNELS]
    labels = torch.randint(0, 5, (2, 50, 83))
    labels[:, 10:30] = 255
    losses = head.loss(features, samples(labels), train_cfg={})
    logits = F.interpolate(head(features), labels.shape[1:], mode='bilinear', align_corners=align_corners)
    expected = 0.2 * F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(losses['loss_ce'], expected, rtol=1e-9, atol=0)
    accuracy = (logits.argmax(1) == labels)[labels != 255].double().mean() * 100
    assert losses['acc_seg'].item() == pytest.approx(accuracy.item(), rel=1e-5)


@pytest.mark.parametrize('name', HEADS)
def test_conv_cfg_chooses_the_convolutions_of_the_same_head(name):
    torch.manual_seed(0)
    ours, plain = (HEADS[name][0](**options).eval() for options in ({}, dict(conv_cfg=None)))
    plain.load_state_dict(ours.state_dict(), strict=True)
    features = [torch.randn(2, c, 7, 11) for c in CHANNELS]
    torch.testing.assert_close(ours(features), plain(features), rtol=0, atol=0)
    for head, kind in ((ours, DilatedConv2d), (plain, nn.Conv2d)):
        convs = {type(m) for key, m in head.named_modules() if isinstance(m, nn.Conv2d) and key != 'conv_seg'}
        assert convs == {kind}


def test_norm_cfg_reaches_every_layer_and_the_classifier_starts_as_torchs():
    group_norm = dict(type='GN', num_groups=4)
    for make_ours, *_ in HEADS.values():
        head = make_ours(norm_cfg=group_norm)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())
        assert sum(isinstance(m, nn.GroupNorm) for m in head.modules()) == (7 if hasattr(head, 'aspp') else 1)
        before = {key: value.clone() for key, value in head.state_dict().items()}
        head.init_weights()
        assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
        assert head.conv_seg.weight.std() > 0.1  # mmsegmentation's would be 0.01
