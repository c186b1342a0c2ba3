"""Key tables: what is converted computes what its source computes; what is not known is an error."""

import argparse
import hashlib
import itertools
import shlex
from pathlib import Path

import mmpretrain.models
import mmseg.datasets
import mmseg.models
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest import ResNeSt
from mmseg_resnest.checkpoints import OFFICIAL, ORIGIN, check_options, load_pretrained_backbone, load_strictly
from mmseg_resnest.key_maps import (
    ENCODING,
    SOURCES,
    TIMM,
    clue_of_hash,
    clue_of_name,
    convert,
    model_options,
    needed_options,
    recognise,
)
from mmseg_resnest.variants import ARCHITECTURES, VARIANTS, fitting_variants, read_architecture

TOLERANCE = 1e-9
CLASSES = 5
# mmsegmentation's and mmpretrain's arguments for an output stride.
LAYOUTS = {
    8: dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    32: dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
}
output_strides = pytest.mark.parametrize('output_stride', LAYOUTS)


def cases(names, quick):
    """Every name at every output stride; what is not among the quick ones is slow."""
    marks = {case: [] if case in quick else [pytest.mark.slow] for case in itertools.product(names, LAYOUTS)}
    return pytest.mark.parametrize(
        ('name', 'output_stride'), [pytest.param(*case, marks=marks[case]) for case in marks]
    )


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


def converted_backbone(state, source, output_stride, **architecture):
    """Our backbone in the source's graph, with its weights, and the keys that were dropped."""
    weights, dropped = convert(state, source)
    backbone = ResNeSt(output_stride=output_stride, graph=SOURCES[source].graph, **architecture).double().eval()
    backbone.load_state_dict(weights, strict=True)
    return backbone, dropped


# --------------------------------------------------------------------------------------------------------------------
# Backbones
# --------------------------------------------------------------------------------------------------------------------


@cases(['resnest26d', 'resnest50d_4s2x40d', 'resnest50d_1s4x24d'], quick=[('resnest26d', 8)])
@torch.no_grad()
def test_timm(name, output_stride):
    images = make_images()
    theirs = randomise(timm.create_model(name, num_classes=CLASSES, output_stride=output_stride), lambda m: m(images))
    ours, dropped = converted_backbone(theirs.state_dict(), 'timm', output_stride, **VARIANTS[TIMM[name]])
    assert dropped == ['fc.weight', 'fc.bias']
    assert_same(ours(images), theirs.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True))


@pytest.mark.slow
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
    ours, dropped = converted_backbone(theirs.state_dict(), 'mmseg', output_stride, depth=50)
    assert dropped == []
    assert_same(ours(images), theirs(images))


@pytest.mark.slow
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
    ours, dropped = converted_backbone(theirs.state_dict(), 'mmpretrain', output_stride, depth=50)
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


def converted_model(state, source, variant, output_stride):
    """The model that the source's tables describe, with its weights; and the keys dropped."""
    weights, dropped = convert(state, source)
    cfg = Config()
    options = model_options(source, variant, weights)
    assert options['backbone.output_stride'] == 8  # the source's own
    cfg.merge_from_dict(options | {'backbone.output_stride': output_stride})
    model = MODELS.build(cfg).double().eval()
    model.load_state_dict(weights, strict=True)
    return model, dropped


@pytest.mark.slow
@output_strides
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
    ours, dropped = converted_model(theirs.state_dict(), f'mmseg-{name}', 'resnest50', output_stride)
    assert dropped == []
    assert_same(logits(ours, images), logits(theirs, images))


class Authors:
    """The authors' networks and PyTorch-Encoding's heads on them, in plain functions.

    A layer draws its weights, and batch norm its statistics around its input's own, in the first run.
    """

    def __init__(self, prefix, depth=26, radix=2, groups=1, base_width=64, avd_first=False, classes=CLASSES):
        self.prefix, self.depth, self.classes = prefix, depth, classes
        self.radix, self.groups, self.base_width, self.avd_first = radix, groups, base_width, avd_first
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
        radix, groups = self.radix, self.groups
        x = self.conv(x, f'{name}.conv', radix * width, 3, groups=groups * radix, dilation=dilation)
        splits = F.relu(self.norm(x, f'{name}.bn0')).chunk(radix, 1)
        pooled = sum(splits).mean((2, 3), keepdim=True)
        hidden = self.conv(pooled, f'{name}.fc1', max(width * radix // 4, 32), bias=True, groups=groups)
        hidden = F.relu(self.norm(hidden, f'{name}.bn1'))
        attention = self.conv(hidden, f'{name}.fc2', radix * width, bias=True, groups=groups)
        if radix == 1:
            return attention.sigmoid() * splits[0]
        attention = attention.view(len(x), groups, radix, -1).softmax(2)
        return sum(attention[:, :, r].reshape(len(x), width, 1, 1) * split for r, split in enumerate(splits))

    def block(self, x, name, planes, stride, dilation, blur):
        width = planes * self.base_width // 64 * self.groups
        out = F.relu(self.norm(self.conv(x, f'{name}.conv1', width), f'{name}.bn1'))
        if blur and self.avd_first:
            out = F.avg_pool2d(out, 3, stride, padding=1)
        out = self.split_attention(out, f'{name}.conv2', width, dilation)
        if blur and not self.avd_first:
            out = F.avg_pool2d(out, 3, stride, padding=1)
        if name.endswith('.0'):
            x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
            x = self.norm(self.conv(x, f'{name}.downsample.1', 4 * planes), f'{name}.downsample.2')
        return F.relu(x + self.norm(self.conv(out, f'{name}.conv3', 4 * planes), f'{name}.bn3'))

    def features(self, x, output_stride):
        """The four stages."""
        blocks, stem_width = ARCHITECTURES[self.depth]
        for conv, norm, channels, stride in (
            ('conv1.0', 'conv1.1', stem_width, 2),
            ('conv1.3', 'conv1.4', stem_width, 1),
            ('conv1.6', 'bn1', 2 * stem_width, 1),
        ):
            x = F.relu(self.norm(self.conv(x, self.prefix + conv, channels, 3, stride=stride), self.prefix + norm))
        x = F.max_pool2d(x, 3, 2, padding=1)
        strides, dilations = {8: ((1, 2, 1, 1), (1, 1, 1, 2, 4)), 32: ((1, 2, 2, 2), (1, 1, 1, 1, 1))}[output_stride]
        stages = []
        for i, stride in enumerate(strides):
            name = f'{self.prefix}layer{i + 1}'
            x = self.block(x, f'{name}.0', 64 * 2**i, stride, dilations[i], blur=i > 0)
            for j in range(1, blocks[i]):
                x = self.block(x, f'{name}.{j}', 64 * 2**i, 1, dilations[i + 1], blur=False)
            stages.append(x)
        return stages

    def conv_norm_relu(self, x, name, places, channels, kernel, dilation=1):
        conv, norm = (f'{name}.{place}' for place in places)
        return F.relu(self.norm(self.conv(x, conv, channels, kernel, dilation=dilation), norm))

    def fcn(self, x, name):
        hidden = self.conv_norm_relu(x, f'{name}.conv5', (0, 1), x.shape[1] // 4, 3)
        return self.conv(hidden, f'{name}.conv5.4', self.classes, bias=True)

    def deeplabv3(self, x, name):
        branches = [self.conv_norm_relu(x, f'{name}.aspp.b0', (0, 1), 256, 1)]
        for i, rate in enumerate((12, 24, 36), 1):
            branches.append(self.conv_norm_relu(x, f'{name}.aspp.b{i}', (0, 1), 256, 3, rate))
        pooled = self.conv_norm_relu(F.adaptive_avg_pool2d(x, 1), f'{name}.aspp.b4.gap', (1, 2), 256, 1)
        branches.append(F.interpolate(pooled, x.shape[2:], mode='bilinear', align_corners=True))
        x = self.conv_norm_relu(torch.cat(branches, 1), f'{name}.aspp.project', (0, 1), 256, 1)
        hidden = self.conv_norm_relu(x, f'{name}.block', (0, 1), 256, 3)
        return self.conv(hidden, f'{name}.block.4', self.classes, bias=True)

    def segment(self, images, head, output_stride):
        *_, c3, c4 = self.features(images, output_stride)
        outputs = getattr(self, head)(c4, 'head'), self.fcn(c3, 'auxlayer')
        return [F.interpolate(x, images.shape[2:], mode='bilinear', align_corners=True) for x in outputs]


@cases(
    ['resnest26', *(name for name in VARIANTS if 'fast' in name)],
    quick=[('resnest26', 8), ('resnest50_fast_4s2x40d', 8)],
)
@torch.no_grad()
def test_authors_backbone(name, output_stride):
    """The fast variants with the depth of 26."""
    source = 'official' if output_stride == 8 else 'encoding'  # they share a table, as the first line shows
    assert SOURCES['official'].rules is SOURCES['encoding'].rules
    images = make_images()
    architecture = {key: value for key, value in VARIANTS[name].items() if key != 'depth'}
    authors = Authors('', **architecture)
    authors.features(images, output_stride)
    state = authors.state | {'fc.weight': torch.randn(CLASSES, 2048), 'fc.bias': torch.randn(CLASSES)}
    ours, dropped = converted_backbone(state, source, output_stride, depth=26, **architecture)
    assert dropped == ['fc.weight', 'fc.bias']
    assert_same(ours(images), authors.features(images, output_stride))


@cases(['deeplabv3', 'fcn'], quick=[('fcn', 8)])
@torch.no_grad()
def test_encoding_model(name, output_stride):
    images = make_images()
    authors = Authors('pretrained.')
    authors.segment(images, name, output_stride)
    state = authors.state | {'pretrained.fc.weight': torch.randn(1000, 2048), 'pretrained.fc.bias': torch.randn(1000)}
    assert recognise(state) == [f'encoding-{name}']
    ours, dropped = converted_model(state, f'encoding-{name}', 'resnest26', output_stride)
    assert dropped == ['pretrained.fc.weight', 'pretrained.fc.bias']
    assert_same(logits(ours, images), authors.segment(images, name, output_stride))


CONFIGS = Path(__file__).parents[1] / 'configs'
DATA_SETS = dict(ade=('ade20k', 150), pcontext=('pascal_context', 59))


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name == 'fcn_resnest50_ade' else pytest.mark.slow) for name in ENCODING]
)
def test_the_authors_configs_take_every_published_file_as_it_is(name):
    """At full depth, without memory: the names and shapes are the reference's."""
    head, variant, data = name.split('_')
    head = dict(fcn='fcn', deeplab='deeplabv3')[head]
    folder, classes = DATA_SETS[data]
    with torch.device('meta'):
        authors = Authors('pretrained.', depth=VARIANTS[variant]['depth'], classes=classes)
        authors.segment(torch.empty(2, 3, 33, 49), head, 8)
    (source,) = recognise(authors.state)
    weights, dropped = convert(authors.state, source)
    assert dropped == []
    cfg = Config.fromfile(CONFIGS / f'{head}_{variant}_{folder}_authors.py')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    model.data_preprocessor = MODELS.build(cfg.model.data_preprocessor)
    load_strictly(model, weights, name)
    origin = dict(source=source, variant=variant, options=needed_options(source, variant, weights))
    check_options(dict(meta={ORIGIN: origin}), model, name)
    described = Config()
    described.merge_from_dict(model_options(source, variant, weights))
    for part in ('decode_head', 'auxiliary_head', 'test_cfg'):
        own = cfg.model[part].to_dict()
        assert {key: own[key] for key in described[part] if key != 'norm_cfg'} == {
            key: value for key, value in described[part].items() if key != 'norm_cfg'
        }
    data_set = DATASETS.get(cfg.test_dataloader.dataset.type)
    assert len(data_set.METAINFO['classes']) == classes == len(weights['decode_head.conv_seg.bias'])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus'])
def test_our_configs_take_mmsegs_published_models_in_their_graph(name):
    """mmsegmentation's own S-101-D8, whole but without memory, in ours with ``model.backbone.graph=mmseg``."""
    config = Path(mmseg.__file__).parent / f'.mim/configs/resnest/resnest_s101-d8_{name}_4xb4-160k_ade20k-512x512.py'
    cfg = Config.fromfile(CONFIGS / f'{name}_resnest101_ade20k.py').model
    cfg.backbone.graph = 'mmseg'
    with torch.device('meta'):
        state = MODELS.build(Config.fromfile(config).model | dict(pretrained=None)).state_dict()
        model = MODELS.build(cfg)
    model.data_preprocessor = MODELS.build(cfg.data_preprocessor)
    source = f'mmseg-{name}'
    weights, _ = convert(state, source)
    load_strictly(model, weights, name)
    content = dict(meta={ORIGIN: dict(source=source, options=needed_options(source, 'resnest101', weights))})
    check_options(content, model, name)
    model.backbone.graph = 'authors'
    with pytest.raises(ValueError, match=r'--cfg-options model\.backbone\.graph=mmseg$'):
        check_options(content, model, name)


# --------------------------------------------------------------------------------------------------------------------
# Recognition
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


def put(folder, name, content=b'content'):
    (folder / name).write_bytes(content)
    return folder / name


def test_a_published_file_is_told_by_its_hash(tmp_path, monkeypatch):
    content = b'content'
    assert clue_of_hash(put(tmp_path, 'x.pth')) is None
    with monkeypatch.context() as patch:
        patch.setitem(OFFICIAL, 'resnest50_fast_1s4x24d', hashlib.sha256(content).hexdigest()[:8])
        clue = clue_of_hash(put(tmp_path, 'x.pth'))
        assert (clue.source, clue.variant) == ('official', 'resnest50_fast_1s4x24d')
        assert clue.how == "its SHA-256: the authors' resnest50_fast_1s4x24d"
    for name, source, variant in (
        ('fcn_resnest50_pcontext', 'encoding-fcn', 'resnest50'),
        ('deeplab_resnest269_ade', 'encoding-deeplabv3', 'resnest269'),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(ENCODING, name, hashlib.sha1(content).hexdigest()[:8])
            clue = clue_of_hash(put(tmp_path, 'x.pth'))
            assert (clue.source, clue.variant) == (source, variant)
            assert clue.how == f"its SHA-1: PyTorch-Encoding's {name}"


def test_an_official_name_on_another_file_is_an_error(tmp_path):
    found = hashlib.sha256(b'content').hexdigest()[:8]
    with pytest.raises(
        ValueError, match=rf'resnest50-528c19ca.pth: .* begins with {found}, expected 528c19ca\. Get it'
    ):
        clue_of_hash(put(tmp_path, 'resnest50-528c19ca.pth'))
    assert clue_of_hash(put(tmp_path, 'resnest14-528c19ca.pth')) is None  # no name of theirs


def test_published_names_mean_variants():
    assert set(TIMM) == set(timm.list_models('resnest*'))
    assert set(TIMM.values()) <= set(VARIANTS)
    assert [name.split('_')[1] in VARIANTS for name in ENCODING] == [True] * 10
    assert set(OFFICIAL) <= set(VARIANTS)


@pytest.mark.parametrize(
    ('path', 'variant'),
    [
        ('resnest101e.pth', 'resnest101'),
        ('resnest50d_4s2x40d.in1k.safetensors', 'resnest50_fast_4s2x40d'),
        ('a/resnest14d-1234.pth', 'resnest14'),
        ('hub/models--timm--resnest269e.in1k/snapshots/0a1b/model.safetensors', 'resnest269'),
        ('resnest101.pth', None),
        ('my_resnest101e.pth', None),
        ('resnest101e_finetuned.pth', None),
        ('resnest50d/model.safetensors', None),
        ('resnest152d.pth', None),
    ],
)
def test_timms_names_tell(path, variant):
    clue = clue_of_name(Path(path))
    assert (clue and clue.source, clue and clue.variant) == (variant and 'timm', variant)


@pytest.mark.parametrize('name', VARIANTS)
def test_shapes_tell_the_architecture_but_not_the_pools(name):
    with torch.device('meta'):
        found = read_architecture(ResNeSt(**VARIANTS[name]).state_dict())
    same = ['resnest50', 'resnest50_fast_2s1x64d']
    assert fitting_variants(found, VARIANTS) == (same if name in same else [name])
    assert fitting_variants(found, SOURCES['mmseg'].variants) == (
        [] if 'fast' in name and name not in same else ['resnest50'] if name in same else [name]
    )


def test_an_architecture_in_words():
    state = timm.create_model('resnest50d_1s4x24d').state_dict()
    expected = dict(blocks=(3, 4, 6, 3), stem_width=32, radix=1, groups=4, base_width=24)
    assert read_architecture(state) == expected
    with pytest.raises(ValueError, match=r'no weights of a ResNeSt: there is no convolution conv1\.0\.weight$'):
        read_architecture({key: value for key, value in state.items() if key != 'conv1.0.weight'})


# --------------------------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------------------------


def head_weights():
    return {f'{head}.conv_seg.weight': torch.zeros(CLASSES, 16, 1, 1) for head in ('decode_head', 'auxiliary_head')}


def build(source, **changes):
    """The model that the tables describe, small and without memory, with options changed."""
    cfg = Config()
    options = model_options(source, 'resnest14', head_weights())
    assert changes.keys() <= options.keys()
    cfg.merge_from_dict(options | changes)
    with torch.device('meta'):
        model = MODELS.build(cfg if 'type' in cfg else cfg.backbone)
    if 'type' in cfg:
        model.data_preprocessor = MODELS.build(cfg.data_preprocessor)  # with its values
    return model


def content_for(source, change=lambda value: value):
    options = needed_options(source, 'resnest14', head_weights())
    return dict(meta={ORIGIN: dict(source=source, options={key: change(value) for key, value in options.items()})})


@pytest.mark.parametrize('source', SOURCES)
def test_the_model_that_the_tables_describe_has_the_options_that_they_need(source):
    model = build(source)
    assert ('decode_head' in dict(model.named_children())) == ('-' in source)
    if '-' in source:
        check_options(content_for(source), model, 'x.pth')
        lists = content_for(source, lambda value: list(value) if isinstance(value, tuple) else value)
        check_options(lists, model, 'x.pth')  # as from a format without tuples
    else:
        check_options(content_for(source), model, 'x.pth')


# Of every kind of option another value; keys and shapes stay.
OTHERS = {
    'backbone.avd_first': True,
    'backbone.graph': 'timm',
    'backbone.output_stride': 16,
    'backbone.norm_cfg.eps': 1e-3,
    'decode_head.norm_cfg.eps': 1e-3,
    'auxiliary_head.norm_cfg.eps': 1e-3,
    'decode_head.align_corners': None,
    'auxiliary_head.align_corners': None,
    'decode_head.act_cfg.type': 'ReLU6',
    'auxiliary_head.act_cfg.type': 'ReLU6',
    'decode_head.dilation': 2,
    'auxiliary_head.dilation': 6,
    'decode_head.dilations': (1, 6, 12, 18),
    'decode_head.pool_scales': (1, 2, 3, 5),
    'data_preprocessor.mean': (0.0, 0.0, 0.0),
    'data_preprocessor.std': (58.395, 57.12, 57.0),
    'data_preprocessor.bgr_to_rgb': False,
}


@pytest.mark.parametrize('source', [name for name in SOURCES if '-' in name])
def test_every_option_that_no_key_tells_is_compared(source):
    needed = needed_options(source, 'resnest14', head_weights())
    told = {'backbone.depth', 'backbone.radix', 'backbone.groups', 'backbone.base_width'}  # by the shapes
    told |= {'decode_head.type', 'auxiliary_head.type'}  # by the keys
    assert needed.keys() <= OTHERS.keys() | told
    changes = {key: value for key, value in OTHERS.items() if key in needed}
    for head in ('decode_head', 'auxiliary_head'):
        changes[f'{head}.align_corners'] = not needed[f'{head}.align_corners']
    if source == 'encoding-deeplabv3':
        changes['decode_head.dilations'] = (6, 12, 18)
    model, right = build(source, **changes), build(source)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in right.state_dict().items()
    }
    with pytest.raises(ValueError) as error:
        check_options(content_for(source), model, 'x.pth')
    lines = str(error.value).splitlines()
    assert lines[0] == f'x.pth ({source}) is for another model than this, whose outputs would be wrong:'
    assert [line.split(':')[0] for line in lines[1:-1]] == [f'  model.{key}' for key in needed if key in changes]
    assert f"  model.backbone.graph: {needed['backbone.graph']!r} needed, 'timm' found" in lines


def test_what_the_message_says_to_add_repairs_the_model():
    changes = {
        'backbone.avd_first': True,
        'backbone.graph': 'timm',
        'backbone.norm_cfg.eps': 1e-3,
        'decode_head.dilations': (6, 12, 18),
        'decode_head.align_corners': False,
        'data_preprocessor.mean': (0.0, 0.0, 0.0),
    }
    with pytest.raises(ValueError) as error:
        check_options(content_for('encoding-deeplabv3'), build('encoding-deeplabv3', **changes), 'x.pth')
    fix = str(error.value).splitlines()[-1].partition('or add:  ')[2]
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    options = parser.parse_args(shlex.split(fix)).cfg_options
    assert options.keys() == {f'model.{key}' for key in changes}
    repaired = changes | {key.removeprefix('model.'): value for key, value in options.items()}
    check_options(content_for('encoding-deeplabv3'), build('encoding-deeplabv3', **repaired), 'x.pth')


def test_another_head_is_another_type():
    with pytest.raises(ValueError, match=r"decode_head.type: 'ASPPHead' needed, 'PSPHead' found"):
        check_options(content_for('mmseg-deeplabv3'), build('mmseg-pspnet'), 'x.pth')


def test_a_backbone_alone_needs_only_its_own_options():
    with torch.device('meta'):
        check_options(content_for('mmseg-fcn'), ResNeSt(14, output_stride=16, graph='mmseg'), 'x.pth', 'backbone')
        check_options(content_for('timm'), ResNeSt(14, graph='mmseg'), 'x.pth', 'backbone')  # at 32 the graphs are one
        with pytest.raises(ValueError, match=r"backbone.graph: 'timm' needed, 'mmseg' found\n.*graph=timm$"):
            check_options(content_for('timm'), ResNeSt(14, output_stride=8, graph='mmseg'), 'x.pth', 'backbone')


def test_a_head_alone_needs_its_own_options():
    content = content_for('mmseg-pspnet')
    head = build('mmseg-pspnet').decode_head
    check_options(content, head, 'x.pth', 'decode_head')
    head.pool_scales = (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r'decode_head.pool_scales: \(1, 2, 3, 6\) needed, \(1, 2, 3, 4\) found'):
        check_options(content, head, 'x.pth', 'decode_head')


def test_the_authors_own_names_tell_what_they_need():
    def check(name, **options):
        with torch.device('meta'):
            backbone = ResNeSt(50, **options)
        check_options({}, backbone, f'resnest://{name}', 'backbone')

    check('resnest50')
    check('resnest50', graph='timm')
    check('resnest50_fast_2s1x64d', avd_first=True, output_stride=8)
    with pytest.raises(ValueError, match=r'avd_first: True needed, False found\n.*model.backbone.avd_first=True$'):
        check('resnest50_fast_2s1x64d')
    with pytest.raises(ValueError, match=r'avd_first: False needed, True found'):
        check('resnest50', avd_first=True)
    with pytest.raises(ValueError, match=r"graph: 'authors' needed, 'timm' found"):
        check('resnest50', graph='timm', output_stride=8)


def test_a_backbones_file_is_told_by_its_hash_whatever_its_name(tmp_path, monkeypatch):
    torch.save(ResNeSt(14).state_dict(), tmp_path / 'mine.pth')
    prefix = hashlib.sha256((tmp_path / 'mine.pth').read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(OFFICIAL, 'resnest14', prefix)
    with pytest.raises(ValueError, match=r'mine.pth \(official\) .*\n.*avd_first: False needed, True found'):
        load_pretrained_backbone(ResNeSt(14, avd_first=True), str(tmp_path / 'mine.pth'))
    torch.save(ResNeSt(14).state_dict() | {'layer1.0.bn1.bias': torch.ones(64)}, tmp_path / f'resnest14-{prefix}.pth')
    with pytest.raises(ValueError, match=r'SHA-256 begins with .* Get it again'):
        load_pretrained_backbone(ResNeSt(14), str(tmp_path / f'resnest14-{prefix}.pth'))


def test_a_backbones_file_that_nothing_tells_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    torch.save(ResNeSt(14).state_dict(), tmp_path / 'mine.pth')
    load_pretrained_backbone(ResNeSt(14, graph='timm'), str(tmp_path / 'mine.pth'))
    assert 'mine.pth does not say whose weights it holds' in caplog.text
    assert "'graph': 'timm'" in caplog.text


def test_init_cfg_compares_the_options_of_an_official_file(tmp_path, monkeypatch):
    weights = ResNeSt(14).state_dict()
    torch.save(weights, tmp_path / 'x.pth')
    prefix = hashlib.sha256((tmp_path / 'x.pth').read_bytes()).hexdigest()[:8]
    (tmp_path / 'x.pth').rename(tmp_path / f'resnest14-{prefix}.pth')
    monkeypatch.setitem(OFFICIAL, 'resnest14', prefix)
    monkeypatch.setenv('RESNEST_WEIGHTS', str(tmp_path))
    right = ResNeSt(14, output_stride=8)
    load_pretrained_backbone(right, 'resnest://resnest14')
    assert torch.equal(right.conv1[0].weight, weights['conv1.0.weight'])
    wrong = ResNeSt(14, avd_first=True, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest14'))
    with pytest.raises(ValueError, match=r'resnest://resnest14 \(official\) .*\n.*avd_first: False needed, True found'):
        wrong.init_weights()


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


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
