"""The options of a model that change what it computes and that no key or shape of its weights tells."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Where a built part shows an option that it does not keep under the option's own name.
_SHOWN: dict[str, Callable[[nn.Module], object]] = {
    'norm_cfg.eps': lambda part: next((m.eps for m in part.modules() if isinstance(m, _BatchNorm)), None),
    'act_cfg.type': lambda head: (head.act_cfg or {}).get('type'),
    'dilation': lambda head: head.convs[0].conv.dilation[0],  # FCNHead
    'mean': lambda preprocessor: preprocessor.mean.flatten().tolist(),
    'std': lambda preprocessor: preprocessor.std.flatten().tolist(),
    'bgr_to_rgb': lambda preprocessor: preprocessor._channel_conversion,
}

# What a trained model's checkpoint says of it. Not its dilations: to go on at another output stride is common practice.
_OWN = {
    'data_preprocessor': ('mean', 'std', 'bgr_to_rgb'),
    'backbone': ('depth', 'radix', 'groups', 'base_width', 'avd_first', 'graph', 'norm_cfg.eps'),
    'decode_head': ('align_corners', 'pool_scales'),
}


def built_options(model: nn.Module) -> dict[str, object]:
    """Returns the options that a segmentation model was built with, as ``differing_options`` compares them."""
    options = {
        f'{part}.{name}': _as_built(getattr(model, part, None), name) for part, names in _OWN.items() for name in names
    }
    return {key: value for key, value in options.items() if value is not None}


def differing_options(module: nn.Module, needed: Mapping[str, object], part: str = '') -> dict[str, object]:
    """Returns what a model was built with where that is not what is needed.

    Args:
        module: A segmentation model, or one part of it.
        needed: Options of ``model`` in the config, as ``{'backbone.graph': 'authors', 'decode_head.dilations': ...}``.
            Those of parts that there are not do not count: keys tell which parts there are.
        part: Which part the module is, as ``'backbone'``; empty: the whole. The output stride of a backbone alone does
            not count: a pretrained one may change it.
    """
    needed = dict(needed)
    if part:
        needed.pop('backbone.output_stride', None)
    differing = {}
    for key, value in needed.items():
        owner, name = key.split('.', 1)
        built = module if part == owner else None if part else getattr(module, owner, None)
        if built is None or (name == 'graph' and getattr(built, 'output_stride', None) == 32):  # there they are one
            continue
        found = _as_built(built, name)
        if not (_is_a(built, value) if name == 'type' else _same(found, value)):
            differing[key] = found
    return differing


def command_line(options: Mapping[str, object]) -> str:
    """Returns options of ``model`` as a shell's ``--cfg-options``."""
    texts = [
        f'model.{key}={list(value) if isinstance(value, tuple) else value}'.replace(', ', ',')
        for key, value in options.items()
    ]
    return f'--cfg-options {shlex.join(texts)}'


def _as_built(part: nn.Module, name: str) -> object:
    if name == 'type':
        return type(part).__name__
    try:
        return _SHOWN[name](part) if name in _SHOWN else getattr(part, name)
    except (AttributeError, TypeError):
        return None


def _is_a(part: nn.Module, name: str) -> bool:
    return name.rpartition('.')[2] in [cls.__name__ for cls in type(part).__mro__]


def _same(found: object, needed: object) -> bool:
    if isinstance(needed, Sequence) and not isinstance(needed, str):
        return isinstance(found, Sequence) and len(found) == len(needed) and all(map(_same, found, needed))
    if isinstance(needed, float):
        return isinstance(found, int | float) and math.isclose(found, needed, rel_tol=1e-5)
    return found == needed
