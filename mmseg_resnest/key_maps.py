"""How the sources of ResNeSt checkpoints name their weights, and what those are called here.

A source is a table. Its rules map the whole name of a layer, a pattern, to our name; the first that matches counts, and
what none matches is an error. Pools have no weights: a checkpoint whose every key fits may still belong to another
graph, so a source also says which options of the config go with it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

PARAMETERS = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


@dataclass(frozen=True)
class Source:
    """Whose checkpoints, and how they become ours.

    Attributes:
        description: What the checkpoint holds.
        signature: Layers whose presence, all together, tells the source.
        rules: Pattern of a layer's whole name -> our name for it, in the order in which they are tried.
        options: The options of ``model`` in the config without which the weights compute something else.
        dropped: Pattern of the layers that have no place here: the classifier of images.
    """

    description: str
    signature: tuple[str, ...]
    rules: Mapping[str, str]
    options: Mapping[str, str | int | bool]
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


def _within(theirs: str, ours: str, rules: Mapping[str, str]) -> dict[str, str]:
    """Returns the rules of a part of a model whose names begin with ``theirs`` there and with ``ours`` here."""
    return {re.escape(theirs) + pattern: ours + name for pattern, name in rules.items()}


def _encoding(model: str, head: str, rules: Mapping[str, str], signature: str) -> Source:
    """Returns a segmentation model of PyTorch-Encoding from its head's rules and the layer that tells that head."""
    return Source(
        f"PyTorch-Encoding's {model}",
        ('pretrained.conv1.6', f'pretrained.{_ATTENTION}', f'head.{signature}'),
        _within('pretrained.', 'backbone.', _AUTHORS)
        | _within('head.', 'decode_head.', rules)
        | _within('auxlayer.', 'auxiliary_head.', _FCN_HEAD),
        {
            'backbone.graph': 'authors',
            'backbone.output_stride': 8,
            'decode_head.type': f'mmseg_resnest.{head}',
            'decode_head.align_corners': True,
            'auxiliary_head.type': 'mmseg_resnest.AuthorsFCNHead',
            'auxiliary_head.align_corners': True,
        },
        dropped=r'pretrained\.fc',
    )


def _mmseg(model: str, head: str, modules: str, signature: str) -> Source:
    """Returns a segmentation model of mmsegmentation from its head's modules, whose names stay, and one of them."""
    kept = rf'(?:decode_head\.(?:{modules})|auxiliary_head\.convs\.0)\.(?:conv|bn)|(?:decode|auxiliary)_head\.conv_seg'
    return Source(
        f"mmsegmentation's {model} (S-101-D8)",
        ('backbone.stem.7', f'backbone.{_ATTENTION}', f'decode_head.{signature}.conv'),
        _within('backbone.', 'backbone.', _MMSEG) | {f'({kept})': r'\1'},
        {
            'backbone.graph': 'mmseg',
            'backbone.output_stride': 8,
            'decode_head.type': head,
            'decode_head.align_corners': False,
            'auxiliary_head.type': 'FCNHead',
            'auxiliary_head.align_corners': False,
        },
        dropped=r'backbone\.fc',
    )


# The first three share their keys: only the file's hash or name, or the user, tells them apart.
SOURCES: dict[str, Source] = {
    'official': Source('zhanghang1989/ResNeSt', _AUTHORS_SIGNATURE, _AUTHORS, {'backbone.graph': 'authors'}),
    'encoding': Source("PyTorch-Encoding's backbone", _AUTHORS_SIGNATURE, _AUTHORS, {'backbone.graph': 'authors'}),
    'timm': Source('timm', _AUTHORS_SIGNATURE, _AUTHORS, {'backbone.graph': 'timm'}),
    'mmseg': Source(
        "mmsegmentation's or mmdetection's backbone", ('stem.7', _ATTENTION), _MMSEG, {'backbone.graph': 'mmseg'}
    ),
    'mmpretrain': Source(
        "mmpretrain's classifier",
        ('backbone.stem.2.bn', f'backbone.{_ATTENTION}'),
        _within('backbone.', '', _MMPRETRAIN),
        {'backbone.graph': 'mmseg'},
        dropped=r'head\.fc',
    ),
    'encoding-deeplabv3': _encoding('DeepLabV3', 'AuthorsDeepLabV3Head', _DEEPLABV3_HEAD, 'aspp.project.0'),
    'encoding-fcn': _encoding('FCN', 'AuthorsFCNHead', _FCN_HEAD, 'conv5.0'),
    'mmseg-fcn': _mmseg('FCN', 'FCNHead', r'convs\.[01]|conv_cat', 'convs.0'),
    'mmseg-pspnet': _mmseg('PSPNet', 'PSPHead', r'psp_modules\.[0-3]\.1|bottleneck', 'psp_modules.0.1'),
    'mmseg-deeplabv3': _mmseg(
        'DeepLabV3', 'ASPPHead', r'image_pool\.1|aspp_modules\.[0-3]|bottleneck', 'aspp_modules.1'
    ),
    'mmseg-deeplabv3plus': _mmseg(
        'DeepLabV3+',
        'DepthwiseSeparableASPPHead',
        rf'image_pool\.1|aspp_modules\.(?:0|[1-3]\.{_SEPARABLE})|(?:c1_)?bottleneck|sep_bottleneck\.[01]\.{_SEPARABLE}',
        'sep_bottleneck.0.depthwise_conv',
    ),
}


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
    table = SOURCES[source]
    dropped = [key for key in state_dict if re.fullmatch(table.dropped, key.rpartition('.')[0])]
    names = {key: _our_name(key, table.rules) for key in state_dict if key not in dropped}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(f'{source} ({table.description}) has no rule for {len(unknown)} keys: {", ".join(unknown)}')
    times = Counter(names.values())
    clashes = [f'{key} -> {name}' for key, name in names.items() if times[name] > 1]
    if clashes:
        raise ValueError(f'{source} ({table.description}): several keys become the same one: {", ".join(clashes)}')
    return {name: state_dict[key] for key, name in names.items()}, dropped


def _our_name(key: str, rules: Mapping[str, str]) -> str | None:
    layer, _, parameter = key.rpartition('.')
    for pattern, name in rules.items():
        match = re.fullmatch(pattern, layer)
        if match and parameter in PARAMETERS:
            return f'{match.expand(name)}.{parameter}'
    return None
