"""Check the files of a config's data sets: every image and label map is decoded.

  python tools/check_dataset.py configs/deeplabv3_resnest101_ade20k.py
  python tools/check_dataset.py CONFIG --data-root DIR --json findings.json

It prints the findings, each with its fix, and how often each class occurs. Exit code 1 if there are errors.
tools/train.py and tools/test.py do the quick part of it before they start.
"""

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmseg_resnest import cli
from mmseg_resnest.dataset_check import Histogram, Report, check, count, listing
from mmseg_resnest.datasets import check_folders

SPLITS = ('train', 'val', 'test')
SHOWN = 10  # findings of a kind; --json has them all


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        '--splits', nargs='+', choices=SPLITS, default=SPLITS, metavar='S', help='of train, val, test (default: all)'
    )
    parser.add_argument('--json', metavar='FILE', type=Path, help='write all findings and the histograms there')
    return parser


def check_dataset(args: argparse.Namespace) -> None:
    """Checks, prints and writes; exits with 1 if there are errors."""
    cfg = cli.load_config(args, f'{args.splits[0]}_dataloader')
    if args.json:
        cli.make_room(args.json)
    loaders = [loader for split in args.splits if cfg.get(loader := f'{split}_dataloader')]
    for loader in loaders:
        check_folders(loader, cfg[loader].dataset)
    report = check(cfg, loaders, whole=True)
    if args.json:
        args.json.write_text(json.dumps(as_json(report, args.config), indent=1) + '\n')
    show(report)
    sys.exit(1 if report.of('error') else 0)


def as_json(report: Report, config: str) -> dict:
    """Returns the findings and the histograms as JSON has them."""
    splits = {
        name: dict(
            pairs=histogram.of,
            ignored=histogram.ignored,
            out_of_range=histogram.out_of_range,
            classes={
                label: dict(pixels=int(pixels), images=int(images))
                for label, pixels, images in zip(histogram.classes, histogram.pixels, histogram.images, strict=True)
            },
        )
        for name, histogram in report.histograms.items()
    }
    return dict(config=config, findings=[asdict(finding) for finding in report.findings], splits=splits)


def show(report: Report) -> None:
    """Prints the findings, a table for each list of classes, and a summary."""
    if report.findings:
        print(listing(report.findings, SHOWN), end='\n\n')
    for classes in dict.fromkeys(histogram.classes for histogram in report.histograms.values()):
        columns = {n: h for n, h in report.histograms.items() if h.classes == classes and h.label_maps}
        if columns:
            Console().print(class_table(classes, columns))
    pairs = ', '.join(f'{len(split.pairs):,} in {short(split.name)}' for split in report.splits)
    print(f'Pairs: {pairs}\n{count(report.of("error"), "error")}, {count(report.of("warning"), "warning")}')


def short(name: str) -> str:
    """Returns a split's name without what all of them have."""
    return name.replace('_dataloader.dataset', '')


def class_table(classes: tuple[str, ...], histograms: dict[str, Histogram]) -> Table:
    """Returns a row a class: its share of each split's labelled pixels, and how many label maps have it."""
    table = Table('class')
    for name in map(short, histograms):
        table.add_column(f'{name}: pixels', justify='right')
        table.add_column('images', justify='right')
    for i, label in enumerate(classes):
        cells = ((percent(h.pixels[i], h.pixels.sum()), f'{h.images[i]:,}') for h in histograms.values())
        table.add_row(label, *itertools.chain(*cells))
    table.add_section()
    for title, what in (('ignored, of all', 'ignored'), ('out of range, of all', 'out_of_range')):
        counts = [(getattr(h, what), h.pixels.sum() + h.ignored + h.out_of_range) for h in histograms.values()]
        if what == 'ignored' or any(count for count, _ in counts):
            table.add_row(title, *itertools.chain(*((percent(count, of), '') for count, of in counts)))
    return table


def percent(part: int, whole: int) -> str:
    """Returns a share as text."""
    return f'{100 * part / max(1, whole):.3f} %'


if __name__ == '__main__':
    cli.run(check_dataset, make_parser())
