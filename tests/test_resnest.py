"""The backbone: its block against the paper, its outputs against timm, mmseg and mmpretrain, and its options."""

import copy
import io
import math
import pickle
from functools import partial

import mmpretrain.models
import mmseg.models
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.model import PretrainedInit
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest import ResNeSt
from mmseg_resnest.resnest import GRAPHS, SplitAttentionConv2d

TOLERANCE = 1e-9
SIZE = (33, 49)
LARGE = (65, 97)
slow = partial(pytest.param, marks=pytest.mark.slow)

# --------------------------------------------------------------------------------------------------------------------
# The split-attention convolution
# --------------------------------------------------------------------------------------------------------------------


class CardinalGroup(nn.Module):
    """One cardinal group as the paper draws it: a convolution a split, and an attention of its own over the splits."""

    def __init__(self, in_width, width, hidden, radix, stride, dilation):
        super().__init__()
        self.splits = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_width, width, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for _ in range(radix)
        )
        self.dense = nn.Linear(width, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.attention = nn.ModuleList(nn.Linear(hidden, width) for _ in range(radix))

    def forward(self, inputs):
        splits = [split(x) for split, x in zip(self.splits, inputs, strict=True)]
        statistics = sum(splits).mean((2, 3))
        hidden = F.relu(self.norm(self.dense(statistics)))
        logits = torch.stack([attend(hidden) for attend in self.attention])
        weights = logits.softmax(0) if len(splits) > 1 else logits.sigmoid()
        return sum(weight[:, :, None, None] * split for weight, split in zip(weights, splits, strict=True))


class CardinalityMajor(nn.Module):
    """The paper's block: the input's channels are ordered by cardinal group, and within a group by split."""

    def __init__(self, channels, radix, groups, stride, dilation):
        super().__init__()
        hidden = max(channels * radix // 4, 32) // groups
        width = channels // groups
        self.groups = nn.ModuleList(
            CardinalGroup(width // radix, width, hidden, radix, stride, dilation) for _ in range(groups)
        )

    def forward(self, x):
        slices = x.chunk(len(self.groups), 1)
        return torch.cat([g(s.chunk(len(g.splits), 1)) for g, s in zip(self.groups, slices, strict=True)], 1)


def radix_major_state(paper):
    """The state dict of the radix-major convolution: splits vary slowest where ours come first, groups elsewhere."""
    groups, radix = paper.groups, len(paper.groups[0].splits)
    by_radix = [groups[k].splits[r] for r in range(radix) for k in range(len(groups))]
    by_group = [groups[k].attention[r] for k in range(len(groups)) for r in range(radix)]
    state = {'conv.weight': torch.cat([split[0].weight for split in by_radix])}
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        state[f'bn0.{name}'] = torch.cat([getattr(split[1], name) for split in by_radix])
        state[f'bn1.{name}'] = torch.cat([getattr(group.norm, name) for group in groups])
    for name, layers in (('fc1', [group.dense for group in groups]), ('fc2', by_group)):
        state[f'{name}.weight'] = torch.cat([layer.weight for layer in layers])[:, :, None, None]
        state[f'{name}.bias'] = torch.cat([layer.bias for layer in layers])
    return state | {f'{bn}.num_batches_tracked': torch.tensor(0) for bn in ('bn0', 'bn1')}


def scramble_norms(module):
    """Gives batch norms affines and running statistics that no implementation can leave out unseen."""
    for m in module.modules():
        if isinstance(m, _BatchNorm):
            nn.init.uniform_(m.weight, 0.7, 1.3)
            nn.init.normal_(m.bias, 0, 0.3)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])),
    multiple=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    training=st.booleans(),
)
def test_radix_major_equals_the_papers_cardinality_major(shape, multiple, stride, dilation, training):
    radix, groups = shape
    channels = 4 * radix * groups * multiple
    torch.manual_seed(channels)
    paper = CardinalityMajor(channels, radix, groups, stride, dilation).double()
    scramble_norms(paper)
    ours = SplitAttentionConv2d(channels, radix, groups, stride, dilation, nn.BatchNorm2d).double()
    ours.load_state_dict(radix_major_state(paper))
    paper.train(training)
    ours.train(training)
    x = torch.randn(3, channels, 7, 9, dtype=torch.float64)
    x_radix_major = x.unflatten(1, (groups, radix, -1)).transpose(1, 2).flatten(1, 3)
    expected = paper(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(x_radix_major), expected, rtol=TOLERANCE, atol=1e-12)
    # Training's running statistics are the same too.
    for name, value in radix_major_state(paper).items():
        if 'running' in name:
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_radix_1_is_squeeze_and_excitation_within_each_group(groups):
    torch.manual_seed(groups)
    channels = 32
    ours = SplitAttentionConv2d(channels, 1, groups, 1, 1, nn.BatchNorm2d).double().eval()
    scramble_norms(ours)
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64)
    features = F.relu(ours.bn0(ours.conv(x)))
    fc1, fc2 = (layer.weight.flatten(1).chunk(groups) for layer in (ours.fc1, ours.fc2))
    bias1, bias2 = (layer.bias.chunk(groups) for layer in (ours.fc1, ours.fc2))
    scale, shift = ours.bn1.weight / (ours.bn1.running_var + ours.bn1.eps).sqrt(), ours.bn1.bias
    mean = ours.bn1.running_mean.chunk(groups)
    expected = []
    for k, group in enumerate(features.chunk(groups, 1)):
        squeezed = group.mean((2, 3)) @ fc1[k].T + bias1[k]
        hidden = F.relu((squeezed - mean[k]) * scale.chunk(groups)[k] + shift.chunk(groups)[k])
        gate = torch.sigmoid(hidden @ fc2[k].T + bias2[k])
        expected.append(group * gate[:, :, None, None])
    torch.testing.assert_close(ours(x), torch.cat(expected, 1), rtol=TOLERANCE, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------------
# The whole network
# --------------------------------------------------------------------------------------------------------------------

PARAMETERS = {
    14: 10_611_688,
    26: 17_069_448,
    50: 27_483_240,
    101: 48_275_016,
    200: 70_201_544,
    269: 110_929_480,
}


@pytest.mark.parametrize('depth', PARAMETERS)
def test_parameter_count(depth):
    with torch.device('meta'):
        modules = ResNeSt(depth), nn.Linear(2048, 1000)
    assert sum(p.numel() for module in modules for p in module.parameters()) == PARAMETERS[depth]


@torch.no_grad()
def network(*, size=SIZE, batch=2, seed=0, **options):
    """A backbone in float64 in which nothing is neutral, and images for it.

    Weights, BN's affines and its running statistics are random; the last stay near the activations' own, so that
    features of deep networks are neither zero nor huge in evaluation.
    """
    torch.manual_seed(seed)
    with torch.device('meta'):  # the default initialisation of a deep network takes longer than running it
        backbone = ResNeSt(**options).double()
    backbone.to_empty(device='cpu')
    images = torch.randn(batch, options.get('in_channels', 3), *size, dtype=torch.float64)
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    for m in backbone.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight, nonlinearity='relu')
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.3)
    for m in norms:
        m.reset_running_stats()
        nn.init.uniform_(m.weight, 0.7, 1.3)
        nn.init.normal_(m.bias, 0, 0.2)
        m.momentum = 1
    backbone.train()(images)
    for m in norms:
        m.momentum = 0.1
        m.running_mean += 0.2 * m.running_var.sqrt() * torch.randn_like(m.running_mean)
        m.running_var *= torch.empty_like(m.running_var).uniform_(0.7, 1.3)
    return backbone, images


def assert_same_features(ours, theirs):
    """Equal to 1e-9 of the largest feature, finite, and telling images and places apart."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        scale = b.abs().max()
        assert torch.isfinite(scale)
        assert (b > 0.01 * scale).double().mean() > 0.1
        assert (b[0] - b[1]).abs().max() > 0.1 * scale
        assert (a - b).abs().max() <= TOLERANCE * scale


# A prefix of our key -> the prefix of theirs.
TIMM_KEYS = {}
MMSEG_KEYS = {'conv1.': 'stem.', 'bn1.': 'stem.7.'}
MMPRETRAIN_KEYS = {
    'conv1.0.': 'stem.0.conv.',
    'conv1.1.': 'stem.0.bn.',
    'conv1.3.': 'stem.1.conv.',
    'conv1.4.': 'stem.1.bn.',
    'conv1.6.': 'stem.2.conv.',
    'bn1.': 'stem.2.bn.',
    'layer1.0.downsample.1.': 'layer1.0.downsample.0.',
    'layer1.0.downsample.2.': 'layer1.0.downsample.1.',
}


def renamed(state, prefixes):
    def name(key):
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), '')
        return prefixes.get(old, '') + key.removeprefix(old)

    return {name(key): value for key, value in state.items()}


@torch.no_grad()
def assert_same_network(ours, theirs, their_features, keys, images):
    """The same features in training and, after that step, in evaluation; and the same running statistics.

    ``theirs`` may come from the meta device: it has no weights of its own, but a copy of ours.
    """
    copied = {key: value.clone() for key, value in renamed(ours.state_dict(), keys).items()}
    theirs.load_state_dict(copied, assign=True)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        assert_same_features(ours(images), their_features(images))
    their_state = theirs.state_dict()
    for key, value in renamed(ours.state_dict(), keys).items():
        torch.testing.assert_close(value, their_state[key], rtol=TOLERANCE, atol=1e-12)


def assert_equals_timm(name, ours_options, theirs_options=None, *, size=SIZE):
    ours, images = network(size=size, **ours_options)
    with torch.device('meta'):
        theirs = timm.create_model(name, num_classes=0, **theirs_options or {})

    def features(x):
        return theirs.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)

    assert_same_network(ours, theirs, features, TIMM_KEYS, images)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('resnest14d', dict(depth=14)),
        ('resnest26d', dict(depth=26)),
        ('resnest50d', dict(depth=50)),
        ('resnest50d_4s2x40d', dict(depth=50, radix=4, groups=2, base_width=40, avd_first=True)),
        ('resnest50d_1s4x24d', dict(depth=50, radix=1, groups=4, base_width=24, avd_first=True)),
        slow('resnest101e', dict(depth=101)),
        slow('resnest200e', dict(depth=200)),
        slow('resnest269e', dict(depth=269)),
    ],
)
def test_equals_timm(name, options):
    assert_equals_timm(name, options)


@pytest.mark.parametrize(('depth', 'size'), [(26, SIZE), slow(50, LARGE)])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_equals_timm_dilated(output_stride, depth, size):
    options = dict(depth=depth, graph='timm', output_stride=output_stride)
    assert_equals_timm(f'resnest{depth}d', options, dict(output_stride=output_stride), size=size)


# The other variants of the paper's ablation; of depth 14, since depth is tested above.
@pytest.mark.parametrize(
    ('radix', 'groups', 'base_width'), [(1, 1, 64), (2, 1, 64), (4, 1, 64), (1, 2, 40), (2, 2, 40)]
)
def test_fast_variants_equal_timm(radix, groups, base_width):
    block_args = dict(radix=radix, avd=True, avd_first=True)
    theirs = dict(cardinality=groups, base_width=base_width, block_args=block_args)
    assert_equals_timm(
        'resnest14d', dict(depth=14, radix=radix, groups=groups, base_width=base_width, avd_first=True), theirs
    )


# The strides and dilations of mmseg's own configs, at which the first block of a stage keeps the dilation before it.
MMSEG_LAYOUTS = {
    8: dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True),
    32: dict(strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), contract_dilation=True),
}


class MMSegResNeSt(mmseg.models.ResNeSt):
    """mmseg's, with a small depth beside its own."""

    arch_settings = mmseg.models.ResNeSt.arch_settings | {26: (mmseg.models.backbones.resnest.Bottleneck, (2, 2, 2, 2))}


def mmseg_network(depth, output_stride, **options):
    with torch.device('meta'):
        return MMSegResNeSt(
            depth=depth,
            stem_channels=64 if depth <= 50 else 128,
            norm_cfg=dict(type='BN'),
            **{'base_width': 64, **MMSEG_LAYOUTS[output_stride], **options},
        )


@pytest.mark.parametrize('output_stride', [8, 32])
@pytest.mark.parametrize(('depth', 'size'), [(50, SIZE), slow(50, LARGE), slow(101, LARGE), slow(200, SIZE)])
def test_equals_mmseg(depth, size, output_stride):
    ours, images = network(depth=depth, graph='mmseg', output_stride=output_stride, size=size)
    theirs = mmseg_network(depth, output_stride)
    assert_same_network(ours, theirs, theirs, MMSEG_KEYS, images)


def test_equals_mmseg_with_groups():
    variant = dict(radix=2, groups=2, base_width=40)
    ours, images = network(depth=26, graph='mmseg', output_stride=8, **variant)
    theirs = mmseg_network(26, 8, **variant)
    assert_same_network(ours, theirs, theirs, MMSEG_KEYS, images)


def test_authors_graph_is_mmsegs_with_a_blur_in_dilated_stages():
    ours, images = network(depth=26, output_stride=8)
    theirs = mmseg_network(26, 8)
    for stage in (theirs.layer3, theirs.layer4):
        stage[0].avg_down_stride = True
        stage[0].avd_layer = nn.AvgPool2d(3, stride=1, padding=1)
    assert_same_network(ours, theirs, theirs, MMSEG_KEYS, images)


@pytest.mark.parametrize('depth', [50, slow(101), slow(200), slow(269)])
def test_equals_mmpretrain(depth):
    ours, images = network(depth=depth)
    theirs = mmpretrain.models.ResNeSt(
        depth=depth,
        stem_channels=64 if depth == 50 else 128,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='BN'),
    )
    assert_same_network(ours, theirs, theirs, MMPRETRAIN_KEYS, images)


# --------------------------------------------------------------------------------------------------------------------
# Output stride and graph
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('graph', GRAPHS)
def test_shapes(graph, output_stride):
    with torch.device('meta'), torch.no_grad():
        backbone = ResNeSt(14, output_stride=output_stride, graph=graph).eval()
        features = backbone(torch.rand(1, 3, *SIZE))
    expected = []
    for stage, stride in enumerate((4, 8, 16, 32)):
        stride = min(stride, output_stride)
        expected.append((1, 256 * 2**stage, math.ceil(SIZE[0] / stride), math.ceil(SIZE[1] / stride)))
    assert [tuple(feature.shape) for feature in features] == expected


# output stride -> (dilation of the first block, dilation of the rest) of the four stages
DILATIONS = {
    8: [(1, 1), (1, 1), (1, 2), (2, 4)],
    16: [(1, 1), (1, 1), (1, 1), (1, 2)],
    32: [(1, 1), (1, 1), (1, 1), (1, 1)],
}


@pytest.mark.parametrize('output_stride', DILATIONS)
@pytest.mark.parametrize('graph', GRAPHS)
def test_dilations(graph, output_stride):
    with torch.device('meta'):
        backbone = ResNeSt(50, output_stride=output_stride, graph=graph)
    for i, (first, rest) in enumerate(DILATIONS[output_stride], start=1):
        blocks = list(getattr(backbone, f'layer{i}'))
        convolutions = [block.conv2.conv for block in blocks]
        assert [c.dilation for c in convolutions] == [(first, first)] + [(rest, rest)] * (len(blocks) - 1)
        assert [c.padding for c in convolutions] == [c.dilation for c in convolutions]
        assert {c.stride for c in convolutions} == {(1, 1)}


# (graph, output stride) -> block -> stride of its average pool; 32 is the same for all graphs
POOLS = {
    ('authors', 8): {'layer2.0': 2, 'layer3.0': 1, 'layer4.0': 1},
    ('authors', 16): {'layer2.0': 2, 'layer3.0': 2, 'layer4.0': 1},
    ('mmseg', 8): {'layer2.0': 2},
    ('mmseg', 16): {'layer2.0': 2, 'layer3.0': 2},
    ('timm', 8): {'layer2.0': 2},
    ('timm', 16): {'layer2.0': 2, 'layer3.0': 2},
    **{(graph, 32): {'layer2.0': 2, 'layer3.0': 2, 'layer4.0': 2} for graph in GRAPHS},
}


@pytest.mark.parametrize('avd_first', [False, True])
@pytest.mark.parametrize(('graph', 'output_stride'), POOLS)
def test_average_pools(graph, output_stride, avd_first):
    with torch.device('meta'):
        backbone = ResNeSt(26, output_stride=output_stride, graph=graph, avd_first=avd_first)
    place, other = ('avd_first', 'avd_last') if avd_first else ('avd_last', 'avd_first')
    blocks = {f'layer{i}.{j}': b for i in range(1, 5) for j, b in enumerate(getattr(backbone, f'layer{i}'))}
    pools = {name: getattr(block, place) for name, block in blocks.items()}
    assert {name: pool.stride for name, pool in pools.items() if pool is not None} == POOLS[graph, output_stride]
    assert {(pool.kernel_size, pool.padding) for pool in pools.values() if pool is not None} == {(3, 1)}
    assert not any(getattr(block, other) for block in blocks.values())


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_graphs_differ_where_a_stage_dilates_and_nowhere_else(output_stride):
    ours, images = network(depth=14, output_stride=output_stride)
    ours.eval()
    features = {'authors': ours(images)}
    for graph in ('mmseg', 'timm'):
        other = ResNeSt(14, output_stride=output_stride, graph=graph).double().eval()
        other.load_state_dict(ours.state_dict())
        features[graph] = other(images)
    first_dilated = {8: 2, 16: 3, 32: 4}[output_stride]
    for stage in range(4):
        for graph, other in (('authors', 'mmseg'), ('authors', 'timm'), ('mmseg', 'timm')):
            a, b = features[graph][stage], features[other][stage]
            if stage < first_dilated:
                assert torch.equal(a, b)
            else:
                assert (a - b).abs().max() > 0.01 * a.abs().max()


# --------------------------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_out_indices_choose_and_order():
    backbone, images = network(depth=14, size=(32, 32))
    features = backbone.eval()(images)
    backbone.out_indices = (3, 0)
    chosen = ResNeSt(14, out_indices=[3, 0]).double().eval()
    chosen.load_state_dict(backbone.state_dict())
    assert [torch.equal(a, b) for a, b in zip(chosen(images), (features[3], features[0]), strict=True)] == [True] * 2


@torch.no_grad()
def test_memory_format_does_not_matter():
    backbone, images = network(depth=14, output_stride=8, radix=2, groups=2)
    backbone.eval()
    expected = backbone(images)
    strided = torch.stack([images, torch.randn_like(images)], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert_same_features(backbone(strided), expected)
    assert_same_features(backbone(images.contiguous(memory_format=torch.channels_last)), expected)
    backbone.to(memory_format=torch.channels_last)
    assert_same_features(backbone(images.contiguous(memory_format=torch.channels_last)), expected)


def test_group_norm_sees_one_image_as_it_sees_it_in_a_batch():
    torch.manual_seed(0)
    backbone = ResNeSt(14, norm_cfg=dict(type='GN', num_groups=16)).double()
    backbone.init_weights()
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm)]
    # stem 3, and per block 2 of the bottleneck, 2 of the split attention, 1 of the shortcut
    assert len(norms) == 3 + 4 * 5
    assert {m.num_groups for m in norms} == {16}
    assert not any(isinstance(m, _BatchNorm) for m in backbone.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = backbone.train()(images)
    alone = backbone(images[:1])
    for a, b in zip(alone, features, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b[:1], rtol=TOLERANCE, atol=1e-9)
    sum(feature.mean() for feature in features).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_in_channels():
    backbone, images = network(depth=14, in_channels=5, size=(32, 32))
    assert backbone.conv1[0].weight.shape == (32, 5, 3, 3)
    assert backbone.eval()(images)[3].shape == (2, 2048, 1, 1)


def norm_statistics(module):
    return {key: value.clone() for key, value in module.state_dict().items() if 'running' in key or 'tracked' in key}


def rebuilt(backbone, **options):
    """A backbone of depth 14 with other options and the same weights."""
    other = ResNeSt(14, **options).double()
    other.load_state_dict(backbone.state_dict())
    return other


def test_norm_eval_keeps_the_statistics_and_trains_the_weights():
    plain, images = network(depth=14, size=(32, 32))
    backbone = rebuilt(plain, norm_eval=True)
    before = norm_statistics(backbone)
    backbone.train()
    assert backbone.training
    assert not any(m.training for m in backbone.modules() if isinstance(m, _BatchNorm))
    assert all(m.training for m in backbone.modules() if not isinstance(m, _BatchNorm))
    features = backbone(images)
    assert all(torch.equal(value, before[key]) for key, value in norm_statistics(backbone).items())
    sum(feature.mean() for feature in features).backward()
    assert all(p.grad.abs().max() > 0 for p in (backbone.bn1.weight, backbone.layer4[0].conv2.bn1.weight))
    # As in evaluation, one image at a time does what a batch does.
    torch.testing.assert_close(backbone(images[:1])[3], features[3][:1], rtol=TOLERANCE, atol=1e-9)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
def test_frozen_stages(frozen_stages):
    plain, images = network(depth=14, size=(32, 32))
    backbone = rebuilt(plain, frozen_stages=frozen_stages)
    stages = (('conv1', 'bn1'), ('layer1',), ('layer2',), ('layer3',), ('layer4',))
    frozen = {name for stage in stages[: frozen_stages + 1] for name in stage}
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.eval()
    backbone.train()  # as the training loop calls it at the start of every epoch
    for name, child in backbone.named_children():
        is_frozen = name in frozen
        assert all(p.requires_grad != is_frozen for p in child.parameters()), name
        if name not in ('relu', 'maxpool'):
            assert {m.training for m in child.modules()} == {not is_frozen}, name
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or [torch.zeros(1)], lr=0.1)
    features = backbone(images)
    if frozen_stages < 4:
        sum(feature.square().mean() for feature in features).backward()
        optimizer.step()
    else:
        assert not any(feature.requires_grad for feature in features)
    for key, value in backbone.state_dict().items():
        changed = not torch.equal(value, before[key])
        if not key.endswith('fc1.bias'):  # the batch norm that follows takes away what it adds
            assert changed != (key.split('.')[0] in frozen), key


def train_twice(backbone, images):
    """Two forward passes before one backward pass, twice; returns losses, gradients and BN's statistics."""
    losses = []
    backbone.zero_grad()
    for _ in range(2):
        features = [*backbone(images), *backbone(images.flip(0, 3) * 2)]
        loss = sum((feature.square() * (i + 1)).mean() for i, feature in enumerate(features))
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return losses, gradients, norm_statistics(backbone)


@pytest.mark.parametrize('options', [dict(), dict(norm_eval=True, frozen_stages=1)])
def test_checkpointing_changes_nothing(options):
    plain, images = network(depth=14, size=(32, 32))
    losses, gradients, statistics = train_twice(rebuilt(plain, **options).train(), images)
    checkpointed = rebuilt(plain, with_cp=True, **options).train()
    losses_cp, gradients_cp, statistics_cp = train_twice(checkpointed, images)
    assert losses == losses_cp
    assert gradients.keys() == gradients_cp.keys()
    assert len(gradients) == sum(p.requires_grad for p in checkpointed.parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_cp[name], gradient, rtol=1e-12, atol=0, msg=lambda m, n=name: f'{n}: {m}')
    assert statistics.keys() == statistics_cp.keys()
    assert all(torch.equal(statistics_cp[key], value) for key, value in statistics.items())
    counted = {int(value) for key, value in statistics_cp.items() if key.startswith('layer4') and 'tracked' in key}
    assert counted == ({1} if options.get('norm_eval') else {5})  # one while the statistics were made, and four here
    assert all(m.track_running_stats for m in checkpointed.modules() if isinstance(m, _BatchNorm))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('avd_first', [False, True])
@pytest.mark.parametrize(('radix', 'groups'), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_execution_of_the_radix_convolution_changes_nothing(radix, groups, avd_first, training):
    """Outputs, gradients of input and weights, and running statistics."""
    torch.manual_seed(0)
    options = dict(radix=radix, groups=groups, avd_first=avd_first, base_width=16, output_stride=8)
    grouped = ResNeSt(14, radix_conv='grouped', **options).double()
    scramble_norms(grouped)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def run(radix_conv):
        backbone = ResNeSt(14, radix_conv=radix_conv, **options).double()
        backbone.load_state_dict(grouped.state_dict())
        x = images.clone().requires_grad_()
        features = backbone.train(training)(x)
        sum(feature.square().mean() for feature in features).backward()
        tensors = dict(images=x.grad, **{f'{name}.grad': p.grad for name, p in backbone.named_parameters()})
        tensors |= {f'feature {i}': feature for i, feature in enumerate(features)} | norm_statistics(backbone)
        assert {m.execution_on(x.device) for m in backbone.modules() if isinstance(m, SplitAttentionConv2d)} == {
            radix_conv or 'grouped'
        }
        return tensors

    truth = run('grouped')
    for radix_conv in ('split', 'dense', None):
        for name, value in run(radix_conv).items():
            error = (value.double() - truth[name].double()).norm()
            # fc1's bias has no gradient where batch norm takes away what it adds: nothing but rounding
            assert error <= 1e-10 * truth[name].double().norm() + 1e-12, (radix_conv, name)


def test_group_norm_is_executed_grouped_or_dense():
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for radix_conv in (None, 'grouped', 'dense'):
        torch.manual_seed(0)
        backbone = ResNeSt(14, norm_cfg=dict(type='GN', num_groups=8), radix_conv=radix_conv).double()
        backbone.init_weights()
        results.append(backbone(images)[-1])
    assert backbone.layer1[0].conv2.execution_on(torch.device('cuda')) == 'dense'
    assert (
        ResNeSt(14, norm_cfg=dict(type='GN', num_groups=8)).layer2[0].conv2.execution_on(torch.device('cuda'))
        == 'grouped'
    )
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_fastest_execution_on_a_gpu():
    """Narrow convolutions gain from one without groups, wide ones from one a split."""
    backbone = ResNeSt(14)
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    found = [stage[0].conv2.execution_on(torch.device('cuda')) for stage in stages]
    assert found == ['dense', 'split', 'split', 'split']
    assert ResNeSt(14, radix=1).layer2[0].conv2.execution_on(torch.device('cuda')) == 'grouped'


def test_call_gets_the_stem_and_every_block_once():
    backbone, images = network(depth=26, size=(32, 32))
    called = []

    def record(part, *args):
        called.append(part)
        return part(*args)

    features = backbone.eval()(images, record)
    blocks = [*backbone.layer1, *backbone.layer2, *backbone.layer3, *backbone.layer4]
    assert called == [backbone._stem, *blocks]
    assert all(torch.equal(a, b) for a, b in zip(features, backbone(images), strict=True))


def stored(module, x):
    """Returns how many numbers a training pass keeps for its gradient."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return total


def test_checkpointing_stores_less():
    images = torch.rand(2, 3, 64, 64)
    assert stored(ResNeSt(14, with_cp=True), images) < 0.5 * stored(ResNeSt(14), images)


# On the GPU's machine too, whose torch may be another one than the tested set's.
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_checkpointing_a_compiled_block(device):
    """What a GPU does by default: the same gradients, statistics that count the batch once, and less is stored."""
    block = ResNeSt(14).layer1[0].to(device, torch.float64).train()
    x = torch.randn(2, 64, 24, 24, dtype=torch.float64, device=device)
    states, sizes = [], []
    for with_cp, recompute_conv3, compiles in (
        (False, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
        (True, True, True),
    ):
        copied = copy.deepcopy(block)
        copied.with_cp, copied.recompute_conv3 = with_cp, recompute_conv3
        # All of torch.compile but what needs a C compiler.
        run = torch.compile(copied, fullgraph=True, backend='aot_eager_decomp_partition') if compiles else copied
        run(x).square().mean().backward()
        states.append(norm_statistics(copied) | {name: p.grad for name, p in copied.named_parameters()})
        sizes.append(stored(run, x))
    for name, value in states[0].items():
        for state in states[1:]:
            error = (state[name].double() - value.double()).norm()
            assert error <= 1e-8 * value.double().norm() + 1e-12, name
    eager, eager_too, everything, without_conv3, inputs = sizes
    assert eager_too == eager
    assert everything - without_conv3 == 2 * 256 * 24 * 24
    assert inputs < 0.5 * without_conv3


def test_what_is_not_recomputed():
    """A convolution with a state of its own would change it twice; an exported graph has no backward pass."""
    block = ResNeSt(14).layer1[0].double().train()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    assert torch.export.export(copy.deepcopy(block), (x,), strict=True).module()(x).shape == (2, 256, 8, 8)
    nn.utils.parametrizations.spectral_norm(block.conv3)
    vectors = []
    for recompute_conv3 in (False, True):
        copied = copy.deepcopy(block)
        copied.recompute_conv3 = recompute_conv3
        torch.compile(copied, backend='aot_eager_decomp_partition')(x).square().mean().backward()
        vectors.append(copied.conv3.parametrizations.weight[0]._u)
    assert torch.equal(*vectors)


def test_copies_compute_the_same():
    backbone, images = network(depth=14, size=(32, 32), with_cp=True, frozen_stages=1, graph='timm', output_stride=8)
    backbone.train()
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    copies = [
        copy.deepcopy(backbone),
        pickle.loads(pickle.dumps(backbone)),
        torch.load(file, weights_only=False),
    ]
    expected = backbone(images)
    for copied in copies:
        assert not copied.layer1.training
        assert all(torch.equal(a, b) for a, b in zip(copied(images), expected, strict=True))
        assert copied.state_dict().keys() == backbone.state_dict().keys()


BAD_OPTIONS = [
    (dict(depth=34), 'ResNeSt: depth=34; expected one of 14, 26, 50, 101, 200, 269'),
    (dict(depth='50'), "ResNeSt: depth='50'; expected one of 14, 26, 50, 101, 200, 269"),
    (dict(output_stride=4), 'ResNeSt: output_stride=4; expected one of 8, 16, 32'),
    (dict(radix_conv='fast'), "ResNeSt: radix_conv='fast'; expected one of None, grouped, split, dense"),
    (
        dict(radix_conv='split', norm_cfg=dict(type='GN', num_groups=8)),
        "ResNeSt: radix_conv='split' normalises splits apart, which GroupNorm does not allow; give it batch norm, or "
        "radix_conv='grouped'",
    ),
    (dict(graph='mmdet'), "ResNeSt: graph='mmdet'; expected one of authors, mmseg, timm"),
    (dict(with_cp='no'), "ResNeSt: with_cp='no'; expected one of False, True"),
    (dict(frozen_stages=5), 'ResNeSt: frozen_stages=5; expected one of -1, 0, 1, 2, 3, 4'),
    (dict(out_indices=(0, 4)), 'ResNeSt: out_indices=4; expected one of 0, 1, 2, 3'),
    (dict(out_indices=(-1,)), 'ResNeSt: out_indices=-1; expected one of 0, 1, 2, 3'),
    (dict(out_indices=()), 'ResNeSt: out_indices=(); expected one of 0, 1, 2, 3'),
    (dict(output_stride=8.0), 'ResNeSt: output_stride=8.0; expected one of 8, 16, 32'),
    (dict(radix=True), 'ResNeSt: radix=True; expected an integer of at least 1'),
    (dict(radix=0), 'ResNeSt: radix=0; expected an integer of at least 1'),
    (dict(groups=1.5), 'ResNeSt: groups=1.5; expected an integer of at least 1'),
    (dict(base_width='64'), "ResNeSt: base_width='64'; expected an integer of at least 1"),
    (
        dict(radix=3),
        'ResNeSt: radix=3 and groups=1 do not divide a stage of 64 channels, 48 in its attention; '
        'another base_width makes it other ones',
    ),
    (
        dict(groups=3, base_width=8),
        'ResNeSt: radix=2 and groups=3 do not divide a stage of 24 channels, 32 in its attention; '
        'another base_width makes it other ones',
    ),
]


@pytest.mark.parametrize(('options', 'message'), BAD_OPTIONS)
def test_bad_option(options, message):
    with pytest.raises(ValueError) as error:
        ResNeSt(**{'depth': 14, **options})
    assert str(error.value) == message


def test_another_base_width_makes_room_for_an_odd_radix():
    backbone, images = network(depth=14, radix=3, base_width=48, size=(32, 32))
    assert backbone.eval()(images)[3].abs().max() > 0


# --------------------------------------------------------------------------------------------------------------------
# Initialisation
# --------------------------------------------------------------------------------------------------------------------


def test_initialisation_is_kaimings_and_repeats_with_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        backbone = ResNeSt(14)
        torch.manual_seed(seed)
        backbone.init_weights()
        states.append(backbone.state_dict())
    same, other = (all(torch.equal(states[0][key], states[i][key]) for key in states[0]) for i in (1, 2))
    assert same
    assert not other
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), name
            assert abs(module.weight.mean()) < 0.1 * module.weight.std(), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, _BatchNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name


def weights(seed=0):
    torch.manual_seed(seed)
    return ResNeSt(14).state_dict()


CLASSIFIER = {'fc.weight': torch.zeros(1000, 2048), 'fc.bias': torch.zeros(1000)}


@pytest.mark.parametrize('container', ['bare', 'state_dict'])
@pytest.mark.parametrize('form', [dict, list, PretrainedInit])
def test_pretrained_weights_are_loaded_and_the_classifier_dropped(tmp_path, form, container):
    file = weights() | CLASSIFIER
    torch.save(file if container == 'bare' else dict(state_dict=file, meta=dict(epoch=1)), tmp_path / 'w.pth')
    init_cfg = dict(type=PretrainedInit if form is PretrainedInit else 'Pretrained', checkpoint=str(tmp_path / 'w.pth'))
    backbone = ResNeSt(14, init_cfg=[init_cfg] if form is list else init_cfg)
    backbone.init_weights()
    assert backbone.is_init
    assert all(torch.equal(value, file[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize('prefix', ['backbone', 'backbone.'])
def test_pretrained_weights_under_a_prefix(tmp_path, prefix):
    file = {f'backbone.{key}': value for key, value in weights().items()} | {
        'decode_head.conv_seg.bias': torch.zeros(2)
    }
    torch.save(dict(state_dict=file), tmp_path / 'w.pth')
    backbone = ResNeSt(14, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), prefix=prefix))
    backbone.init_weights()
    assert all(torch.equal(value, file[f'backbone.{key}']) for key, value in backbone.state_dict().items())


MISFITS = {
    'missing': (
        lambda file: file.pop('layer4.0.conv2.fc2.bias'),
        '1 missing in the file: layer4.0.conv2.fc2.bias',
    ),
    'left over': (
        lambda file: file.update({'layer5.0.conv1.weight': torch.zeros(1)}),
        '1 left over in the file: layer5.0.conv1.weight',
    ),
    'mis-shaped': (
        lambda file: file.update({'bn1.weight': torch.zeros(128)}),
        '1 of another shape: bn1.weight: (128,) in the file, (64,) in the model',
    ),
    # A checkpoint of OpenMMLab's: a loader that is not strict would leave the stem random without a word.
    'other names': (
        lambda file: [
            file.update({f'stem.{key[6:]}': file.pop(key)}) for key in list(file) if key.startswith('conv1.')
        ],
        'missing in the file: conv1.0.weight, ',
    ),
}


@pytest.mark.parametrize('problem', MISFITS)
def test_pretrained_weights_that_do_not_fit(tmp_path, problem):
    spoil, message = MISFITS[problem]
    file = weights()
    spoil(file)
    torch.save(file, tmp_path / 'w.pth')
    backbone = ResNeSt(14, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ValueError) as error:
        backbone.init_weights()
    assert f'{tmp_path / "w.pth"} does not fit ResNeSt' in str(error.value)
    assert message in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_pretrained_file_that_is_not_there(tmp_path):
    path = tmp_path / 'absent.pth'
    backbone = ResNeSt(14, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(FileNotFoundError, match=str(path)):
        backbone.init_weights()
