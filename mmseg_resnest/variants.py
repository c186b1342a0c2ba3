"""The architectures of ResNeSt: what a depth and a published name mean, and how weights tell them."""

from collections.abc import Iterable, Mapping

from torch import Tensor

# depth -> (blocks of the four stages, width of the stem)
ARCHITECTURES = {
    14: ((1, 1, 1, 1), 32),
    26: ((2, 2, 2, 2), 32),
    50: ((3, 4, 6, 3), 32),
    101: ((3, 4, 23, 3), 64),
    200: ((3, 24, 36, 3), 64),
    269: ((3, 30, 48, 8), 64),
}
# The paper's ablation: radix, groups, base_width. All are 50 deep and pool before the convolution.
_FAST = ((1, 1, 64), (2, 1, 64), (4, 1, 64), (1, 2, 40), (2, 2, 40), (4, 2, 40), (1, 4, 24))
# Published name -> ResNeSt's arguments.
VARIANTS = {
    f'resnest{depth}': dict(depth=depth, radix=2, groups=1, base_width=64, avd_first=False) for depth in ARCHITECTURES
} | {
    f'resnest50_fast_{radix}s{groups}x{width}d': dict(
        depth=50, radix=radix, groups=groups, base_width=width, avd_first=True
    )
    for radix, groups, width in _FAST
}


def backbone_options(variant: str, graph: str) -> dict[str, str | int | float | bool]:
    """Returns the options of ``model`` in a config that make its backbone a variant in somebody's graph."""
    options = VARIANTS[variant] | {'graph': graph, 'norm_cfg.eps': 1e-5}
    return {f'backbone.{name}': value for name, value in options.items()}


def read_architecture(weights: Mapping[str, Tensor]) -> dict[str, int | tuple[int, ...]]:
    """Reads what the shapes tell of an architecture: ``blocks`` of the stages, ``stem_width``, ``radix``, ...

    Args:
        weights: A backbone's, under our names.

    Raises:
        ValueError: A convolution that tells it is not there.
    """
    telling = ('conv1.0.weight', 'layer1.0.conv1.weight', 'layer1.0.conv2.conv.weight')
    missing = [key for key in telling if key not in weights or weights[key].ndim != 4]
    if missing:
        raise ValueError(f'no weights of a ResNeSt: there is no convolution {", ".join(missing)}')
    stem, reduction, splits = (weights[key].shape for key in telling)
    width = reduction[0]
    radix = splits[0] // width
    groups = width // max(splits[1] * radix, 1)
    stages = [{key.split('.')[1] for key in weights if key.startswith(f'layer{i}.')} for i in range(1, 5)]
    return dict(
        blocks=tuple(map(len, stages)),
        stem_width=stem[0],
        radix=radix,
        groups=groups,
        base_width=width // max(groups, 1),
    )


def fitting_variants(architecture: Mapping[str, int | tuple[int, ...]], names: Iterable[str]) -> list[str]:
    """Returns which of the named variants have an architecture; pools have no weights, so there may be several."""
    fitting = []
    for name in names:
        variant = VARIANTS[name]
        blocks, stem_width = ARCHITECTURES[variant['depth']]
        own = {key: variant[key] for key in ('radix', 'groups', 'base_width')}
        if dict(blocks=blocks, stem_width=stem_width) | own == architecture:
            fitting.append(name)
    return fitting
