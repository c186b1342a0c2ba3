"""How the sources of ResNeSt checkpoints name their weights, and what those are called here.

A source is a table. Its rules map the whole name of a layer, a pattern, to our name; the first that matches counts, and
what none matches is an error. Pools have no weights: a checkpoint whose every key fits may still belong to another
graph, so a source also says which options of the config go with it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mmseg_resnest.checkpoints import official_name
from mmseg_resnest.variants import VARIANTS, backbone_options

PARAMETERS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
Option = str | int | float | bool | tuple


@dataclass(frozen=True)
class Source:
    """Whose checkpoints, and how they become ours.

    Attributes:
        description: What the checkpoint holds.
        signature: Layers whose presence, all together, tells the source.
        rules: Pattern of a layer's whole name -> our name for it, in the order in which they are tried.
        graph: Whose graph its backbone computes, as ``ResNeSt`` names it.
        variants: The architectures that its code builds.
        options: The options of ``model`` in the config, beside the backbone's architecture, without which the weights
            compute something else though every key and shape fits.
        structure: The other options of the model that the published weights belong to; keys and shapes tell them.
        dropped: Pattern of the layers that have no place here: the classifier of images.
    """

    description: str
    signature: tuple[str, ...]
    rules: Mapping[str, str]
    graph: str
    variants: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    structure: Mapping[str, Option] = field(default_factory=dict)
    dropped: str = 'fc'


_BLOCKS = {
    r'(layer[1-4]\.\d+\.(?:conv[13]|bn[13]|conv2\.(?:conv|bn0|fc1|bn1|fc2)))': r'\1',
    r'(layer[1-4]\.0\.downsample\.[12])': r'\1',
}
_AUTHORS = {r'(conv1\.[01346]|bn1)': r'\1'} | _BLOCKS
_MMSEG = {r'stem\.([01346])': r'conv1.\1', r'stem\.7': 'bn1'} | _BLOCKS
_MMPRETRAIN = {
    r'stem\.0\.conv': 'conv1.0',
    r'stem\.0\.bn': 'conv1.1',
    r'stem\.1\.conv': 'conv1.3',
    r'stem\.1\.bn': 'conv1.4',
    r'stem\.2\.conv': 'conv1.6',
    r'stem\.2\.bn': 'bn1',
    r'layer1\.0\.downsample\.0': 'layer1.0.downsample.1',  # no pool before it where the stride is 1
    r'layer1\.0\.downsample\.1': 'layer1.0.downsample.2',
} | _BLOCKS
_ATTENTION = 'layer1.0.conv2.fc1'  # a ResNet has the same stems, but not this
_AUTHORS_SIGNATURE = ('conv1.6', _ATTENTION)
_FCN_HEAD = {r'conv5\.([01])': r'conv5.\1', r'conv5\.4': 'conv_seg'}
_DEEPLABV3_HEAD = {
    r'aspp\.((?:b[0-3]|project)\.[01]|b4\.gap\.[12])': r'aspp.\1',
    r'block\.([01])': r'block.\1',
    r'block\.4': 'conv_seg',
}
_SEPARABLE = r'(?:depthwise|pointwise)_conv'
_ALL = tuple(VARIANTS)
_POOL_LAST = tuple(name for name, variant in VARIANTS.items() if not variant['avd_first'])
# timm's names, which nobody else uses, and what they are.
TIMM = {f'resnest{name}': f'resnest{name[:-1]}' for name in ('14d', '26d', '50d', '101e', '200e', '269e')} | {
    f'resnest50d_{name}': f'resnest50_fast_{name}' for name in ('4s2x40d', '1s4x24d')
}
# PyTorch-Encoding's segmentation checkpoints: name -> first 8 digits of the file's SHA-1.
ENCODING = {
    'fcn_resnest50_ade': '4aba491a',
    'deeplab_resnest50_ade': '2225f09d',
    'deeplab_resnest101_ade': '06ca799c',
    'deeplab_resnest200_ade': '7b9e7d3e',
    'deeplab_resnest269_ade': '0074dd10',
    'fcn_resnest50_pcontext': '77a2161d',
    'deeplab_resnest50_pcontext': '08dccbc4',
    'deeplab_resnest101_pcontext': 'faf58418',
    'deeplab_resnest200_pcontext': 'fe76a265',
    'deeplab_resnest269_pcontext': 'b661fd26',
}


def _of(part: str, **options: Option) -> dict[str, Option]:
    return {f'{part}.{name}': value for name, value in options.items()}


# What the segmentation models share.
_HEADS = {f'{head}.norm_cfg.eps': 1e-5 for head in ('decode_head', 'auxiliary_head')}
_SEGMENTOR = (
    {'backbone.output_stride': 8}
    | _HEADS
    | _of('data_preprocessor', mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bgr_to_rgb=True)
)
_SEGMENTOR_STRUCTURE = (
    {'type': 'EncoderDecoder'}
    | _of('data_preprocessor', type='SegDataPreProcessor', pad_val=0, seg_pad_val=255)
    | {'decode_head.norm_cfg.type': 'BN', 'auxiliary_head.norm_cfg.type': 'BN'}
    | _of('decode_head', in_channels=2048, in_index=3)
    | _of('auxiliary_head', in_channels=1024, in_index=2)
)


def _within(theirs: str, ours: str, rules: Mapping[str, str]) -> dict[str, str]:
    """Returns the rules of a part of a model whose names begin with ``theirs`` there and with ``ours`` here."""
    return {re.escape(theirs) + pattern: ours + name for pattern, name in rules.items()}


def _encoding(model: str, rules: Mapping[str, str], signature: str, **options: Option) -> Source:
    """Returns a segmentation model of PyTorch-Encoding from its head's rules, the layer that tells it, and options."""
    return Source(
        f"PyTorch-Encoding's {model}",
        ('pretrained.conv1.6', f'pretrained.{_ATTENTION}', f'head.{signature}'),
        _within('pretrained.', 'backbone.', _AUTHORS)
        | _within('head.', 'decode_head.', rules)
        | _within('auxlayer.', 'auxiliary_head.', _FCN_HEAD),
        'authors',
        _ALL,
        _SEGMENTOR
        | _of('decode_head', align_corners=True, **options)
        | _of('auxiliary_head', type='mmseg_resnest.AuthorsFCNHead', align_corners=True),
        _SEGMENTOR_STRUCTURE | _of('test_cfg', mode='slide', crop_size=(480, 480), stride=(320, 320)),
        dropped=r'pretrained\.fc',
    )


def _mmseg(
    model: str, modules: str, signature: str, options: Mapping[str, Option], structure: Mapping[str, Option]
) -> Source:
    """Returns a segmentation model of mmsegmentation from its head's modules, whose names stay, and one of them."""
    kept = rf'(?:decode_head\.(?:{modules})|auxiliary_head\.convs\.0)\.(?:conv|bn)|(?:decode|auxiliary)_head\.conv_seg'
    shared = {'align_corners': False, 'act_cfg.type': 'ReLU'}
    return Source(
        f"mmsegmentation's {model} (S-101-D8)",
        ('backbone.stem.7', f'backbone.{_ATTENTION}', f'decode_head.{signature}.conv'),
        _within('backbone.', 'backbone.', _MMSEG) | {f'({kept})': r'\1'},
        'mmseg',
        _POOL_LAST,
        _SEGMENTOR
        | _of('decode_head', **shared, **options)
        | _of('auxiliary_head', **shared, type='FCNHead', dilation=1),
        _SEGMENTOR_STRUCTURE
        | _of('decode_head', **structure)
        | _of('auxiliary_head', num_convs=1, concat_input=False)
        | _of('test_cfg', mode='whole'),
        dropped=r'backbone\.fc',
    )


# The first three share their keys: only the file's hash or name, or the user, tells them apart.
SOURCES: dict[str, Source] = {
    'official': Source('zhanghang1989/ResNeSt', _AUTHORS_SIGNATURE, _AUTHORS, 'authors', _ALL),
    'encoding': Source("PyTorch-Encoding's backbone", _AUTHORS_SIGNATURE, _AUTHORS, 'authors', _ALL),
    'timm': Source('timm', _AUTHORS_SIGNATURE, _AUTHORS, 'timm', tuple(TIMM.values())),
    'mmseg': Source("mmsegmentation's or mmdetection's backbone", ('stem.7', _ATTENTION), _MMSEG, 'mmseg', _POOL_LAST),
    'mmpretrain': Source(
        "mmpretrain's classifier",
        ('backbone.stem.2.bn', f'backbone.{_ATTENTION}'),
        _within('backbone.', '', _MMPRETRAIN),
        'mmseg',
        _POOL_LAST,
        dropped=r'head\.fc',
    ),
    'encoding-deeplabv3': _encoding(
        'DeepLabV3',
        _DEEPLABV3_HEAD,
        'aspp.project.0',
        type='mmseg_resnest.AuthorsDeepLabV3Head',
        dilations=(12, 24, 36),
    ),
    'encoding-fcn': _encoding('FCN', _FCN_HEAD, 'conv5.0', type='mmseg_resnest.AuthorsFCNHead'),
    'mmseg-fcn': _mmseg(
        'FCN',
        r'convs\.[01]|conv_cat',
        'convs.0',
        dict(type='FCNHead', dilation=1),
        dict(num_convs=2, concat_input=True),
    ),
    'mmseg-pspnet': _mmseg(
        'PSPNet',
        r'psp_modules\.[0-3]\.1|bottleneck',
        'psp_modules.0.1',
        dict(type='PSPHead', pool_scales=(1, 2, 3, 6)),
        {},
    ),
    'mmseg-deeplabv3': _mmseg(
        'DeepLabV3',
        r'image_pool\.1|aspp_modules\.[0-3]|bottleneck',
        'aspp_modules.1',
        dict(type='ASPPHead', dilations=(1, 12, 24, 36)),
        {},
    ),
    'mmseg-deeplabv3plus': _mmseg(
        'DeepLabV3+',
        rf'image_pool\.1|aspp_modules\.(?:0|[1-3]\.{_SEPARABLE})|(?:c1_)?bottleneck|sep_bottleneck\.[01]\.{_SEPARABLE}',
        'sep_bottleneck.0.depthwise_conv',
        dict(type='DepthwiseSeparableASPPHead', dilations=(1, 12, 24, 36)),
        dict(c1_in_channels=256, c1_channels=48),
    ),
}


@dataclass(frozen=True)
class Clue:
    """What a file says of its weights beside their keys: whose, which architecture, and how it says so."""

    source: str
    variant: str
    how: str


def clue_of_hash(path: Path) -> Clue | None:
    """Returns what a file's hash tells: whether it is one that the authors published.

    Raises:
        ValueError: It has the name of one of the authors' backbones and is not that file.
    """
    official = official_name(path)
    if official:
        return Clue('official', official, f"its SHA-256: the authors' {official}")
    with path.open('rb') as file:
        sha1 = hashlib.file_digest(file, 'sha1').hexdigest()
    for name, prefix in ENCODING.items():
        if sha1.startswith(prefix):
            model, variant, _ = name.split('_')
            source = dict(fcn='encoding-fcn', deeplab='encoding-deeplabv3')[model]
            return Clue(source, variant, f"its SHA-1: PyTorch-Encoding's {name}")
    return None


def clue_of_name(path: Path) -> Clue | None:
    """Returns what a file's name tells: a name of timm's, alone or as the folder of the Hugging Face cache."""
    hub = [part.removeprefix('models--timm--') for part in path.parts if part.startswith('models--timm--')]
    for part in [path.name, *hub]:
        name = re.split(r'[.-]', part)[0]
        if name in TIMM:
            return Clue('timm', TIMM[name], f"its name: timm's {name}")
    return None


def recognise(keys: Iterable[str]) -> list[str]:
    """Returns the names of the sources that the keys fit: none, one, or several that keys cannot tell apart."""
    layers = {key.rpartition('.')[0] for key in keys}
    return [name for name, source in SOURCES.items() if layers.issuperset(source.signature)]


def convert(state_dict: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Gives the weights of a source our names.

    Args:
        state_dict: The source's weights.
        source: A name in ``SOURCES``.

    Returns:
        The same tensors under our keys, and the source's keys that were dropped.

    Raises:
        ValueError: The source is not known, it has no rule for a key, or two keys become the same one.
    """
    if source not in SOURCES:
        raise ValueError(f'source {source!r}: not known; expected one of {", ".join(SOURCES)}')
    names = our_names(state_dict, source)
    dropped = [key for key in state_dict if key not in names]
    return {name: state_dict[key] for key, name in names.items()}, dropped


def our_names(keys: Iterable[str], source: str) -> dict[str, str]:
    """Returns our name of each of a source's keys, but for those that are dropped.

    Raises:
        ValueError: The source has no rule for a key, or two keys become the same one.
    """
    table = SOURCES[source]
    names = {
        key: _our_name(key, table.rules) for key in keys if not re.fullmatch(table.dropped, key.rpartition('.')[0])
    }
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(f'{source} ({table.description}) has no rule for {len(unknown)} keys: {", ".join(unknown)}')
    times = Counter(names.values())
    clashes = [f'{key} -> {name}' for key, name in names.items() if times[name] > 1]
    if clashes:
        raise ValueError(f'{source} ({table.description}): several keys become the same one: {", ".join(clashes)}')
    return names


def needed_options(source: str, variant: str, weights: Mapping[str, Tensor]) -> dict[str, Option]:
    """Returns the options of ``model`` in the config that the weights need and that neither keys nor shapes tell.

    Args:
        source: A name in ``SOURCES``.
        variant: A name in ``VARIANTS``.
        weights: Converted ones; a head that is not in them needs nothing.
    """
    table = SOURCES[source]
    return _without_missing_heads(backbone_options(variant, table.graph) | table.options, weights)


def model_options(source: str, variant: str, weights: Mapping[str, Tensor]) -> dict[str, Option]:
    """Returns the options of a whole ``model`` that the weights fit, or of its backbone where they are no more."""
    table = SOURCES[source]
    options = {'backbone.type': 'mmseg_resnest.ResNeSt', 'backbone.norm_cfg.type': 'BN'} | table.structure
    for head in ('decode_head', 'auxiliary_head'):
        if f'{head}.conv_seg.weight' in weights:
            num_classes, channels = weights[f'{head}.conv_seg.weight'].shape[:2]
            options |= _of(head, channels=channels, num_classes=num_classes)
    return _without_missing_heads(options, weights) | needed_options(source, variant, weights)


def _without_missing_heads(options: Mapping[str, Option], weights: Mapping[str, Tensor]) -> dict[str, Option]:
    present = {key.partition('.')[0] for key in weights}
    return {key: value for key, value in options.items() if '_head.' not in key or key.partition('.')[0] in present}


def _our_name(key: str, rules: Mapping[str, str]) -> str | None:
    layer, _, parameter = key.rpartition('.')
    for pattern, name in rules.items():
        match = re.fullmatch(pattern, layer)
        if match and parameter in PARAMETERS:
            return f'{match.expand(name)}.{parameter}'
    return None
