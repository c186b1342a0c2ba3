"""Key tables: what is converted computes what its source computes; what is not known is an error."""

from pathlib import Path

import mmpretrain.models
import mmseg.models
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest import ResNeSt
from mmseg_resnest.key_maps import SOURCES, convert, recognise

TOLERANCE = 1e-9
CLASSES = 5
# mmsegmentation's and mmpretrain's arguments for an output stride.
LAYOUTS = {
    8: dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    32: dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
}
output_strides = pytest.mark.parametrize('output_stride', LAYOUTS)


def make_images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 33, 49, dtype=torch.float64)


@torch.no_grad()
def randomise(model, run):
    """Draws weights and batch norm's affines and statistics, the last near the activations' own in ``run(model)``."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for m in model.double().modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight, nonlinearity='relu')
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.3)
    for m in norms:
        nn.init.uniform_(m.weight, 0.7, 1.3)
        nn.init.normal_(m.bias, 0, 0.2)
        m.momentum = 1
    model.train()  # mmsegmentation's backbones return None
    run(model)
    for m in norms:
        m.running_mean += 0.2 * m.running_var.sqrt() * torch.randn_like(m.running_mean)
        m.running_var *= torch.empty_like(m.running_var).uniform_(0.7, 1.3)
    model.eval()
    return model


def assert_same(ours, theirs):
    """Equal to 1e-9 of the largest value, which is finite; and telling images and places apart."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        scale = b.abs().max()
        assert torch.isfinite(scale)
        assert (b[0] - b[1]).abs().max() > 0.05 * scale
        assert b.std((2, 3)).max() > 0.01 * scale
        assert (a - b).abs().max() <= TOLERANCE * scale


def converted_backbone(state, source, depth, output_stride):
    """Our backbone in the source's graph, with its weights, and the keys that were dropped."""
    weights, dropped = convert(state, source)
    graph = SOURCES[source].options['backbone.graph']
    backbone = ResNeSt(depth, output_stride=output_stride, graph=graph).double().eval()
    backbone.load_state_dict(weights, strict=True)
    return backbone, dropped


# --------------------------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------------------------


@output_strides
@torch.no_grad()
def test_timm(output_stride):
    images = make_images()
    theirs = randomise(
        timm.create_model('resnest26d', num_classes=CLASSES, output_stride=output_stride), lambda m: m(images)
    )
    ours, dropped = converted_backbone(theirs.state_dict(), 'timm', 26, output_stride)
    assert dropped == ['fc.weight', 'fc.bias']
    assert_same(ours(images), theirs.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True))


@output_strides
@torch.no_grad()
def test_mmseg_backbone(output_stride):
    images = make_images()
    theirs = mmseg.models.ResNeSt(
        depth=50,
        stem_channels=64,
        norm_cfg=dict(type='BN'),
        base_width=64,
        contract_dilation=True,
        **LAYOUTS[output_stride],
    )
    randomise(theirs, lambda m: m(images))
    ours, dropped = converted_backbone(theirs.state_dict(), 'mmseg', 50, output_stride)
    assert dropped == []
    assert_same(ours(images), theirs(images))


@output_strides
@torch.no_grad()
def test_mmpretrain(output_stride):
    """The weights of a classifier, which has output stride 32, in its backbone at 32 and dilated."""
    images = make_images()
    backbone = dict(type='ResNeSt', depth=50, out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN'))
    head = dict(type='LinearClsHead', num_classes=CLASSES, in_channels=2048)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = mmpretrain.models.ImageClassifier(backbone, head=head)
        dilated = mmpretrain.models.build_backbone(backbone | LAYOUTS[output_stride])
    randomise(theirs, lambda m: m.backbone(images))
    ours, dropped = converted_backbone(theirs.state_dict(), 'mmpretrain', 50, output_stride)
    assert dropped == ['head.fc.weight', 'head.fc.bias']
    dilated.double().eval()
    # Without a pool the shortcut's layers move up by one place; their order stays.
    dilated.load_state_dict(dict(zip(dilated.state_dict(), theirs.backbone.state_dict().values(), strict=True)))
    for stage, dilation in zip((dilated.layer3, dilated.layer4), LAYOUTS[output_stride]['dilations'][2:], strict=True):
        first = stage[0].conv2.conv  # mmpretrain cannot keep the dilation of the stage before, mmsegmentation can
        first.dilation = first.padding = (max(dilation // 2, 1),) * 2
    assert_same(ours(images), dilated(images))


# --------------------------------------------------------------------------------------------------------------------
# Segmentation models
# --------------------------------------------------------------------------------------------------------------------


def logits(model, images):
    """The heads' logits at the size of the image."""
    features = model.extract_feat(images)
    metas = [dict(img_shape=images.shape[2:])] * len(images)
    return [head.predict(features, metas, model.test_cfg) for head in (model.decode_head, model.auxiliary_head)]


def converted_model(state, source, cfg, depth, output_stride):
    """The config's model with our backbone, the options of the source and its weights; and the keys dropped."""
    options = dict(SOURCES[source].options)
    if output_stride != 8:  # the source's own
        options['backbone.output_stride'] = output_stride
    cfg = Config(cfg | dict(backbone=dict(type='mmseg_resnest.ResNeSt', depth=depth)))
    cfg.merge_from_dict(options)
    model = MODELS.build(cfg.to_dict()).double().eval()
    weights, dropped = convert(state, source)
    model.load_state_dict(weights, strict=True)
    return model, dropped


@pytest.mark.parametrize('output_stride', [8, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus'])
@torch.no_grad()
def test_mmseg_model(name, output_stride):
    """mmsegmentation's own config of S-101-D8, but for 50 layers and small heads."""
    images = make_images()
    config = Path(mmseg.__file__).parent / f'.mim/configs/resnest/resnest_s101-d8_{name}_4xb4-160k_ade20k-512x512.py'
    cfg = Config.fromfile(config).model.to_dict() | dict(pretrained=None)
    cfg['backbone'] |= dict(depth=50, stem_channels=64, norm_cfg=dict(type='BN'), **LAYOUTS[output_stride])
    for head in ('decode_head', 'auxiliary_head'):
        cfg[head] |= dict(channels=16, num_classes=CLASSES, norm_cfg=dict(type='BN'))
    theirs = randomise(MODELS.build(cfg), lambda m: logits(m, images))
    assert recognise(theirs.state_dict()) == [f'mmseg-{name}']
    ours, dropped = converted_model(theirs.state_dict(), f'mmseg-{name}', cfg, 50, output_stride)
    assert dropped == []
    assert_same(logits(ours, images), logits(theirs, images))


class Authors:
    """The authors' networks and PyTorch-Encoding's heads on them, in plain functions.

    A layer draws its weights, and batch norm its statistics around its input's own, in the first run.
    """

    def __init__(self, prefix):
        self.prefix = prefix
        self.state = {}

    def conv(self, x, name, channels, kernel=1, bias=False, **options):
        width = x.shape[1] // options.get('groups', 1)
        weight = self.state.get(f'{name}.weight')
        if weight is None:
            weight = torch.randn(channels, width, kernel, kernel, dtype=x.dtype) * (2 / width / kernel**2) ** 0.5
            self.state[f'{name}.weight'] = weight
            if bias:
                self.state[f'{name}.bias'] = 0.3 * torch.randn(channels, dtype=x.dtype)
        padding = options.get('dilation', 1) * (kernel // 2)
        return F.conv2d(x, weight, self.state.get(f'{name}.bias'), padding=padding, **options)

    def norm(self, x, name):
        if f'{name}.weight' not in self.state:
            variance, mean = torch.var_mean(x, (0, 2, 3))
            self.state |= {
                f'{name}.weight': torch.empty_like(mean).uniform_(0.7, 1.3),
                f'{name}.bias': 0.2 * torch.randn_like(mean),
                f'{name}.running_mean': mean + 0.2 * variance.sqrt() * torch.randn_like(mean),
                f'{name}.running_var': variance * torch.empty_like(mean).uniform_(0.7, 1.3),
                f'{name}.num_batches_tracked': torch.tensor(7),
            }
        keys = ('running_mean', 'running_var', 'weight', 'bias')
        return F.batch_norm(x, *(self.state[f'{name}.{key}'] for key in keys))

    def split_attention(self, x, name, width, dilation):
        splits = F.relu(
            self.norm(self.conv(x, f'{name}.conv', 2 * width, 3, groups=2, dilation=dilation), f'{name}.bn0')
        )
        pooled = (splits[:, :width] + splits[:, width:]).mean((2, 3), keepdim=True)
        hidden = F.relu(self.norm(self.conv(pooled, f'{name}.fc1', max(width // 2, 32), bias=True), f'{name}.bn1'))
        attention = self.conv(hidden, f'{name}.fc2', 2 * width, bias=True).chunk(2, 1)
        return sum(a * split for a, split in zip(torch.stack(attention).softmax(0), splits.chunk(2, 1), strict=True))

    def block(self, x, name, width, stride, dilation, blur):
        out = F.relu(self.norm(self.conv(x, f'{name}.conv1', width), f'{name}.bn1'))
        out = self.split_attention(out, f'{name}.conv2', width, dilation)
        if blur:
            out = F.avg_pool2d(out, 3, stride, padding=1)
        if name.endswith('.0'):
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = self.norm(self.conv(x, f'{name}.downsample.1', 4 * width), f'{name}.downsample.2')
        return F.relu(x + self.norm(self.conv(out, f'{name}.conv3', 4 * width), f'{name}.bn3'))

    def features(self, x, output_stride):
        """The four stages of ResNeSt-26."""
        for conv, norm, channels, stride in (
            ('conv1.0', 'conv1.1', 32, 2),
            ('conv1.3', 'conv1.4', 32, 1),
            ('conv1.6', 'bn1', 64, 1),
        ):
            x = F.relu(self.norm(self.conv(x, self.prefix + conv, channels, 3, stride=stride), self.prefix + norm))
        x = F.max_pool2d(x, 3, 2, padding=1)
        strides, dilations = {8: ((1, 2, 1, 1), (1, 1, 1, 2, 4)), 32: ((1, 2, 2, 2), (1, 1, 1, 1, 1))}[output_stride]
        stages = []
        for i, stride in enumerate(strides):
            name = f'{self.prefix}layer{i + 1}'
            x = self.block(x, f'{name}.0', 64 * 2**i, stride, dilations[i], blur=i > 0)
            x = self.block(x, f'{name}.1', 64 * 2**i, 1, dilations[i + 1], blur=False)
            stages.append(x)
        return stages

    def conv_norm_relu(self, x, name, places, channels, kernel, dilation=1):
        conv, norm = (f'{name}.{place}' for place in places)
        return F.relu(self.norm(self.conv(x, conv, channels, kernel, dilation=dilation), norm))

    def fcn(self, x, name):
        hidden = self.conv_norm_relu(x, f'{name}.conv5', (0, 1), x.shape[1] // 4, 3)
        return self.conv(hidden, f'{name}.conv5.4', CLASSES, bias=True)

    def deeplabv3(self, x, name):
        branches = [self.conv_norm_relu(x, f'{name}.aspp.b0', (0, 1), 256, 1)]
        for i, rate in enumerate((12, 24, 36), 1):
            branches.append(self.conv_norm_relu(x, f'{name}.aspp.b{i}', (0, 1), 256, 3, rate))
        pooled = self.conv_norm_relu(F.adaptive_avg_pool2d(x, 1), f'{name}.aspp.b4.gap', (1, 2), 256, 1)
        branches.append(F.interpolate(pooled, x.shape[2:], mode='bilinear', align_corners=True))
        x = self.conv_norm_relu(torch.cat(branches, 1), f'{name}.aspp.project', (0, 1), 256, 1)
        hidden = self.conv_norm_relu(x, f'{name}.block', (0, 1), 256, 3)
        return self.conv(hidden, f'{name}.block.4', CLASSES, bias=True)

    def segment(self, images, head, output_stride):
        *_, c3, c4 = self.features(images, output_stride)
        outputs = getattr(self, head)(c4, 'head'), self.fcn(c3, 'auxlayer')
        return [F.interpolate(x, images.shape[2:], mode='bilinear', align_corners=True) for x in outputs]


@output_strides
@pytest.mark.parametrize('source', ['official', 'encoding'])
@torch.no_grad()
def test_authors_backbone(source, output_stride):
    images = make_images()
    authors = Authors('')
    authors.features(images, output_stride)
    state = authors.state | {'fc.weight': torch.randn(CLASSES, 2048), 'fc.bias': torch.randn(CLASSES)}
    ours, dropped = converted_backbone(state, source, 26, output_stride)
    assert dropped == ['fc.weight', 'fc.bias']
    assert_same(ours(images), authors.features(images, output_stride))


@output_strides
@pytest.mark.parametrize('head', ['deeplabv3', 'fcn'])
@torch.no_grad()
def test_encoding_model(head, output_stride):
    images = make_images()
    authors = Authors('pretrained.')
    authors.segment(images, head, output_stride)
    state = authors.state | {'pretrained.fc.weight': torch.randn(1000, 2048), 'pretrained.fc.bias': torch.randn(1000)}
    assert recognise(state) == [f'encoding-{head}']
    cfg = Config.fromfile(Path(__file__).parents[1] / f'configs/_base_/{head}_authors.py').model.to_dict()
    for part in ('decode_head', 'auxiliary_head'):
        cfg[part] |= dict(num_classes=CLASSES)
    ours, dropped = converted_model(state, f'encoding-{head}', cfg, 26, output_stride)
    assert dropped == ['pretrained.fc.weight', 'pretrained.fc.bias']
    assert_same(logits(ours, images), authors.segment(images, head, output_stride))


# --------------------------------------------------------------------------------------------------------------------
# Recognition and errors
# --------------------------------------------------------------------------------------------------------------------

AMBIGUOUS = ['official', 'encoding', 'timm']


def backbone_state():
    with torch.device('meta'):
        return ResNeSt(14).state_dict()


def test_recognises_the_backbones_that_their_keys_tell():
    assert recognise(mmseg.models.ResNeSt(depth=50).state_dict()) == ['mmseg']
    theirs = mmpretrain.models.ResNeSt(50).state_dict()
    assert recognise(f'backbone.{key}' for key in theirs) == ['mmpretrain']


def test_backbones_with_the_same_keys_are_ambiguous():
    assert recognise(backbone_state()) == AMBIGUOUS
    assert recognise(timm.create_model('resnest14d').state_dict()) == AMBIGUOUS
    # What is left over does not hide the source: converting names it.
    assert recognise([*backbone_state(), 'extra.weight']) == AMBIGUOUS


def test_what_is_not_resnest_is_not_recognised():
    assert recognise([]) == []
    assert recognise(timm.create_model('resnet26d').state_dict()) == []  # the same stem
    assert recognise(mmseg.models.ResNetV1d(depth=50).state_dict()) == []
    assert recognise(f'backbone.{key}' for key in backbone_state()) == []  # ours needs no converting


def test_a_source_that_is_not_known():
    with pytest.raises(ValueError, match=r"source 'gluon': not known; expected one of official, encoding, timm, mmseg"):
        convert(backbone_state(), 'gluon')


@pytest.mark.parametrize('source', AMBIGUOUS)
@pytest.mark.parametrize(
    'key', ['layer1.0.conv4.weight', 'layer5.0.conv1.weight', 'conv1.0.mask', 'stem.0.weight', 'ema']
)
def test_keys_left_over(source, key):
    with pytest.raises(ValueError, match=rf'{source} \(.*\) has no rule for 2 keys: {key}, head.bias'):
        convert(backbone_state() | {key: torch.zeros(1), 'head.bias': torch.zeros(1)}, source)


def test_the_wrong_source_is_an_error():
    with pytest.raises(ValueError, match=r'has no rule for 18 keys: conv1.0.weight, conv1.1.weight'):
        convert(backbone_state(), 'mmseg')


def test_keys_that_become_the_same():
    """A file in which mmpretrain's shortcut without a pool stands beside one with a pool."""
    names = [f'backbone.layer1.0.downsample.{i}.weight' for i in (1, 2)]
    clash = (
        rf'several keys become the same one: {names[0]} -> layer1.0.downsample.2.weight, '
        rf'{names[1]} -> layer1.0.downsample.2.weight$'
    )
    with pytest.raises(ValueError, match=clash):
        convert({name: torch.zeros(1) for name in names}, 'mmpretrain')


def test_tensors_are_kept_as_they_are_and_the_input_unchanged():
    state = backbone_state() | {'fc.bias': torch.zeros(3)}
    keys = list(state)
    weights, dropped = convert(state, 'official')
    assert list(state) == keys
    assert dropped == ['fc.bias']
    assert list(weights) == keys[:-1]
    assert all(weights[key] is state[key] for key in weights)
    assert any(key.endswith('num_batches_tracked') for key in weights)
