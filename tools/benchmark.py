"""Measure how fast configs train: images/s, peak memory and the kinds of work in whole training steps.

  python tools/benchmark.py train configs/deeplabv3_resnest101_ade20k.py --against mmseg
  python tools/benchmark.py train configs/deeplabv3_resnest101_ade20k.py --against smp --json speeds.json
  python tools/benchmark.py train configs/*.py

Each side runs in a fresh process, one after the other, on the same random batch. The data pipeline is not in it. The
first steps, which compile, take minutes.
"""

import argparse
import json
from pathlib import Path

import torch
from mmengine.config import DictAction

from mmseg_resnest import cli
from mmseg_resnest.benchmark.training import PEERS, Spec, run_alone


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=['train'])
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument(
        '--against',
        choices=PEERS,
        help="beside mmsegmentation's own model under AMP, or segmentation_models.pytorch's, compiled (default: alone)",
    )
    parser.add_argument('--steps', type=int, default=10, help='measured steps, after three others (default: 10)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures the configs one after the other and prints a line a side."""
    for path in args.configs:
        cli.existing_file(path, 'config file', 'see configs/')
    print(f'{torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}, torch {torch.__version__}')
    ceiling = run_alone(Spec('ceiling', ''))['tflop_per_s']
    print(f'A large matrix product in bfloat16 runs at {ceiling:.0f} TFLOP/s')
    results = {}
    for path in args.configs:
        results[path.stem] = {}
        for side in PEERS.get(args.against, ('ours',)):
            result = run_alone(Spec(side, str(path), args.steps, args.cfg_options))
            result['ceiling_share'] = result['tflop'] / result['ms'] * 1000 / ceiling
            results[path.stem][side] = result
            print_side(path.stem, side, result, results[path.stem])
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + '\n')


def print_side(config: str, side: str, result: dict, sides: dict) -> None:
    """Prints the figures of a side, those relative to the config's first side, and its kinds of work."""
    print(
        '{:38s} {:14s} {images_per_s:8.1f} images/s {ms:9.1f} ms {gib:6.2f} GiB; {:4.1%} of the matrix rate; '
        'first steps {first_step_s:.0f} s, {graphs} compiled graphs, {graph_breaks} breaks'.format(
            config, side, result['ceiling_share'], **result
        )
    )
    first, ours = next(iter(sides.items()))
    if side != first:
        speed = ours['images_per_s'] / result['images_per_s']
        print(f'    {first} is {speed:.2f} times as fast, in {ours["gib"] / result["gib"]:.2f} of its memory')
    for kind, ms in result.get('kinds', {}).items():
        print(f'    {ms:8.2f} ms  {kind}')


if __name__ == '__main__':
    cli.run(benchmark, make_parser())
