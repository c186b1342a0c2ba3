"""Prepare an official data set: fetch, verify, unpack and convert its archives, and check what came out.

  python tools/prepare_dataset.py ade20k
  python tools/prepare_dataset.py cityscapes --archives ~/Downloads
  python tools/prepare_dataset.py pascal_context --archives ~/Downloads --data-root /data/VOC2010

An archive that is not in the archives' folder is downloaded into it; Cityscapes' need a login and have to be there.
A run that was interrupted is run again and goes on. docs/datasets.md says what the licences are and what disk it takes.
"""

import argparse
from pathlib import Path

from mmseg_resnest import cli
from mmseg_resnest.prepare import OFFICIAL, prepare


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=OFFICIAL)
    parser.add_argument(
        '--data-root', type=Path, metavar='DIR', help='where it goes, if not where the configs expect it'
    )
    parser.add_argument(
        '--archives',
        type=Path,
        default=Path('data/archives'),
        metavar='DIR',
        help='where the archives are, or are downloaded to (default: %(default)s)',
    )
    parser.add_argument(
        '--mirror', default='', metavar='URL', help='download from URL/NAME, not from the official places'
    )
    parser.add_argument(
        '--subset',
        action='store_true',
        help='take archives that are not the published ones: neither their SHA-1 nor the counts have to agree',
    )
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def prepare_dataset(args: argparse.Namespace) -> None:
    """Prepares and checks."""
    dataset = OFFICIAL[args.dataset]
    prepare(dataset, args.data_root or dataset.root, args.archives, args.mirror, args.subset)


if __name__ == '__main__':
    cli.run(prepare_dataset, make_parser())
