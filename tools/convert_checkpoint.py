"""Give somebody else's ResNeSt checkpoint our names.

  python tools/convert_checkpoint.py fcn_s101-d8.pth converted.pth
  python tools/convert_checkpoint.py resnest50d.safetensors backbone.pth
  python tools/convert_checkpoint.py mine.pth backbone.pth --source encoding --variant resnest50

The source is told by the keys, the architecture by the shapes. The backbones of the authors, of PyTorch-Encoding and of
timm share their keys, and a fast variant may have the shapes of its sibling; there the hash of a published file tells
it, or timm's file name, and otherwise it has to be said. What the config must say to fit the weights is printed and
stored in the file: loading compares it with the model.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor

from mmseg_resnest import cli
from mmseg_resnest.checkpoints import ORIGIN, check_fit, check_options, model_weights, origin_of, read_checkpoint
from mmseg_resnest.key_maps import (
    SOURCES,
    Clue,
    clue_of_hash,
    clue_of_name,
    convert,
    model_options,
    needed_options,
    our_names,
    recognise,
)
from mmseg_resnest.registry import MODELS
from mmseg_resnest.variants import VARIANTS, fitting_variants, read_architecture

# Kinds of layers, by our names.
KINDS = {
    'stem': r'(backbone\.)?(conv1|bn1)\..*',
    'shortcuts': r'(backbone\.)?layer.*\.downsample\..*',
    'blocks': r'(backbone\.)?layer.*',
    'decode head': r'decode_head\..*',
    'auxiliary head': r'auxiliary_head\..*',
}


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', metavar='IN', help='checkpoint file; it is read without running code')
    parser.add_argument('output', metavar='OUT', help='the converted file')
    parser.add_argument('--source', choices=SOURCES, help='whose it is, where its keys cannot tell')
    parser.add_argument('--variant', choices=VARIANTS, help='its architecture, where its shapes cannot tell')
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    cli.add_allow_pickle(parser)
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def find_source(keys: Mapping[str, Tensor], given: str | None, by_hash: Clue | None, by_name: Clue | None) -> Clue:
    """Returns whose weights these are and how that is known; a clue's architecture is '' where it says nothing of it.

    Raises:
        UsageError: Nothing tells the source, or ``--source`` contradicts what does.
    """
    possible = recognise(keys)
    if given:
        if possible and given not in possible:
            raise cli.UsageError(f'--source {given}: the keys are those of {" or ".join(possible)}')
        if by_hash and SOURCES[given].graph != SOURCES[by_hash.source].graph:
            raise cli.UsageError(f'--source {given}: the file is told by {by_hash.how}; leave --source out')
        return Clue(given, by_hash.variant, f'--source and {by_hash.how}') if by_hash else Clue(given, '', '--source')
    for clue in (by_hash, by_name):
        if clue and clue.source in possible:
            return clue
    if len(possible) == 1:
        return Clue(possible[0], '', 'its keys')
    if not possible:
        raise cli.UsageError(f'no known source has these keys ({", ".join(list(keys)[:4])}, ...); --source names one')
    meanings = ''.join(f'\n  --source {name:10s} {SOURCES[name].description}' for name in possible)
    raise cli.UsageError(f'the keys do not tell whose weights these are; say it:{meanings}')


def find_variant(weights: Mapping[str, Tensor], given: str | None, clue: Clue) -> tuple[str, str]:
    """Returns the architecture of converted weights, a name in ``VARIANTS``, and how it is known.

    Raises:
        ValueError: No architecture of the source, or not the one that the file's hash or name says, has their shapes.
        UsageError: Their shapes do not tell it, or ``--variant`` contradicts what does.
    """
    backbone = {key.removeprefix('backbone.'): value for key, value in weights.items()}
    found = read_architecture(backbone)
    possible = fitting_variants(found, SOURCES[clue.source].variants)
    text = ', '.join(f'{name} {value}' for name, value in found.items())
    if not possible:
        raise ValueError(
            f'no architecture of {SOURCES[clue.source].description} has these weights ({text}); '
            f'expected one of {", ".join(SOURCES[clue.source].variants)}'
        )
    if clue.variant:
        if clue.variant not in possible:
            raise ValueError(f'{clue.how}, but the weights ({text}) are those of {" or ".join(possible)}')
        possible = [clue.variant]
    if given and given not in possible:
        raise cli.UsageError(f'--variant {given}: the weights ({text}) are those of {" or ".join(possible)}')
    if clue.variant:
        return clue.variant, clue.how
    if given:
        return given, '--variant'
    if len(possible) == 1:
        return possible[0], 'its shapes'
    choices = ''.join(f'\n  --variant {name}' for name in possible)
    raise cli.UsageError(f'the shapes do not tell the architecture; say it (they differ in their pools):{choices}')


def check_output(args: argparse.Namespace) -> Path:
    """Returns where to write.

    Raises:
        UsageError: That is the input, a folder, or a file that is there, without ``--force``.
    """
    path = Path(args.output)
    if path.is_dir():
        raise cli.UsageError(f'{path}: a folder; name a file in it')
    if path.suffix == '.safetensors':
        raise cli.UsageError(f'{path}: what is written is a file of torch.save; name it {path.stem}.pth')
    if path.exists() and path.samefile(args.input):
        raise cli.UsageError(f'{path}: the input itself; name another file')
    if path.exists() and not args.force:
        raise cli.UsageError(f'{path}: is there already; name another file, or overwrite it with --force')
    return path


def dataset_meta(meta: Mapping, weights: Mapping[str, Tensor]) -> dict[str, list]:
    """Returns the classes, and their colours, that mmsegmentation wrote beside the weights, if the head has as many."""
    old = dict(classes=meta.get('CLASSES'), palette=meta.get('PALETTE'))  # before mmsegmentation 1.0
    found = meta.get('dataset_meta') or old
    classes, palette = found.get('classes'), found.get('palette')
    head = weights.get('decode_head.conv_seg.bias')
    if head is None or not classes or len(classes) != len(head) or not all(isinstance(name, str) for name in classes):
        return {}
    kept = dict(classes=list(classes))
    if palette and len(palette) == len(classes):
        kept['palette'] = [[int(value) for value in colour] for colour in palette]
    return kept


def fitting_config(options: Mapping[str, object], weights: Mapping[str, Tensor], meta: Mapping, name: str) -> Config:
    """Returns the config of the model that the options describe, once the weights have proved to fit it."""
    config = Config()
    config.merge_from_dict({f'model.{key}': value for key, value in options.items()})
    whole = 'type' in config.model
    with DefaultScope.overwrite_default_scope('mmseg'):
        with torch.device('meta'):
            model = MODELS.build(config.model if whole else config.model.backbone)
        if whole:
            model.data_preprocessor = MODELS.build(config.model.data_preprocessor)  # its values are compared
    check_fit(model, weights, name)
    check_options(dict(meta=meta), model, name, '' if whole else 'backbone')
    return config


def describe(names: Mapping[str, str], dropped: list[str]) -> str:
    """Returns a line for each kind of layer: how many tensors of it, how many renamed, and an example."""
    kinds = {key: next(kind for kind, layers in KINDS.items() if re.fullmatch(layers, names[key])) for key in names}
    counts = Counter(kinds.values())
    lines = []
    for kind in filter(counts.get, KINDS):
        renamed = [key for key in names if kinds[key] == kind and key != names[key]]
        example = f'{len(renamed)} renamed, as {renamed[0]} -> {names[renamed[0]]}' if renamed else 'their names stay'
        lines.append(f'  {kind}: {counts[kind]} tensors, {example}')
    return '\n'.join([*lines, f'  dropped: {", ".join(dropped) or "none"}'])


def convert_file(args: argparse.Namespace) -> None:
    """Reads, converts, proves that the weights fit the model that they are for, writes, and says what it did."""
    path = Path(cli.existing_file(args.input, 'checkpoint', 'name the file to convert'))
    output = check_output(args)
    content = read_checkpoint(path)
    origin = origin_of(content)
    if origin:
        raise cli.UsageError(f'{path}: has our names already, from {origin.get("source")}; it needs no conversion')
    weights = model_weights(content)
    if all(key.startswith('module.') for key in weights):  # saved from a distributed wrapper
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    clue = find_source(weights, args.source, clue_of_hash(path), clue_of_name(path))
    converted, dropped = convert(weights, clue.source)
    variant, how = find_variant(converted, args.variant, clue)
    origin = dict(source=clue.source, variant=variant, options=needed_options(clue.source, variant, converted))
    meta = {ORIGIN: origin}
    config = fitting_config(model_options(clue.source, variant, converted), converted, meta, str(path))
    if classes := dataset_meta(content.get('meta') or {}, converted):
        meta['dataset_meta'] = classes
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f'{output.name}.part')  # a conversion that is cut off leaves no half file
    torch.save(dict(state_dict=converted, meta=meta), part)
    os.replace(part, output)
    if 'type' not in config.model:
        config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(output))
    print(f'{path}: {SOURCES[clue.source].description} ({clue.source}), told by {clue.how}')
    print(f'  architecture: {variant}, told by {how}')
    print(describe(our_names(weights, clue.source), dropped))
    print(f'{output}: {len(converted)} tensors. The model that they fit, for a config:\n')
    print(config.pretty_text)


if __name__ == '__main__':
    cli.run(convert_file, make_parser())
