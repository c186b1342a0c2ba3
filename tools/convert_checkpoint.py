"""Give somebody else's ResNeSt checkpoint our names.

  python tools/convert_checkpoint.py fcn_s101-d8.pth converted.pth
  python tools/convert_checkpoint.py resnest101-22405ba7.pth backbone.pth --source official

The source is told from the keys. Where keys cannot tell it (the authors' and timm's backbones share theirs and compute
different things) it has to be said. What the config must say to fit the weights is printed and stored in the file;
tools/test.py and init_cfg compare it with the model.
"""

import argparse
from collections.abc import Iterable

import torch

from mmseg_resnest import cli
from mmseg_resnest.checkpoints import ORIGIN, model_weights, read_checkpoint
from mmseg_resnest.key_maps import SOURCES, convert, recognise


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', metavar='IN', help='checkpoint file; it is read without running code')
    parser.add_argument('output', metavar='OUT', help='the converted file')
    parser.add_argument('--source', choices=SOURCES, help='whose it is, where its keys cannot tell')
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def find_source(keys: Iterable[str], given: str | None) -> str:
    """Returns the source that the user names or, if there is only one, that the keys tell."""
    found = [given] if given else recognise(keys)
    if not found:
        raise cli.UsageError(f'no known source has these keys ({", ".join(list(keys)[:4])}, ...); --source names one')
    if len(found) > 1:
        meanings = ''.join(f'\n  --source {name:10s} {SOURCES[name].description}' for name in found)
        raise cli.UsageError(f'the keys do not tell whose weights these are; say it:{meanings}')
    return found[0]


def convert_file(args: argparse.Namespace) -> None:
    """Reads, converts, says what it did and writes."""
    weights = model_weights(read_checkpoint(cli.existing_file(args.input, 'checkpoint', 'name the file to convert')))
    if all(key.startswith('module.') for key in weights):  # saved from a distributed wrapper
        weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    name = find_source(weights, args.source)
    options = dict(SOURCES[name].options)
    converted, dropped = convert(weights, name)
    torch.save(dict(state_dict=converted, meta={ORIGIN: dict(source=name, options=options)}), args.output)
    print(f'{args.input}: {SOURCES[name].description} ({name})')
    print(f'{args.output}: {len(converted)} tensors; dropped: {", ".join(dropped) or "none"}')
    print('It needs, in the config:')
    for key, value in options.items():
        print(f'  model.{key} = {value!r}')


if __name__ == '__main__':
    cli.run(convert_file, make_parser())
