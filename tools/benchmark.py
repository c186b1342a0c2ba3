"""Measure how fast configs train, predict, evaluate, make samples, train on several GPUs, and whether they learn.

  python tools/benchmark.py train configs/deeplabv3_resnest101_ade20k.py --against mmseg
  python tools/benchmark.py train configs/*.py --json speeds.json
  python tools/benchmark.py test configs/deeplabv3_resnest101_ade20k.py --against smp
  python tools/benchmark.py scale configs/deeplabv3_resnest101_ade20k.py --processes 2
  python tools/benchmark.py data configs/deeplabv3_resnest101_cityscapes.py
  python tools/benchmark.py learn configs/pspnet_resnest50_camvid.py --data-root DIR --against mmseg

Each side runs in a fresh process, one after the other, on the same work; of data in turn, file by file.
On a CPU all sides train in float32.
train: images/s, peak memory and the kinds of work in whole training steps on a random batch, without
the data pipeline; the first steps, which compile, take minutes.
test: milliseconds an image, from images or generated files.
scale: training steps on one GPU and on several, with plain and with synchronised batch norm.
data: samples a second that one core makes of generated files, beside mmsegmentation's transforms.
learn: whole runs from scratch, several seeds: mIoU, seconds and losses, beside mmsegmentation's own model of the same
initial weights and graph, or beside the eager float32 path.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config

from mmseg_resnest import cli
from mmseg_resnest.benchmark import data, inference, learning, scaling
from mmseg_resnest.benchmark.alone import run_alone
from mmseg_resnest.benchmark.peers import check_options, check_peer
from mmseg_resnest.benchmark.training import PEERS, Spec


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=['train', 'test', 'scale', 'data', 'learn'])
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument(
        '--against',
        choices=PEERS,
        help="beside mmsegmentation's own model under AMP, or segmentation_models.pytorch's, compiled, which must be "
        'installed (default: train: alone; test: both)',
    )
    parser.add_argument(
        '--steps', type=int, default=10, help='measured training steps, after three others (default: 10)'
    )
    parser.add_argument(
        '--processes', type=int, default=max(torch.cuda.device_count(), 2), help='of scale (default: one a GPU)'
    )
    parser.add_argument('--seeds', type=int, default=3, help='of learn: how many runs a side (default: 3)')
    parser.add_argument(
        '--data-root', metavar='DIR', help='of learn: where the data set is, if not where the config says'
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    cli.add_overrides(parser)
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures the configs one after the other and prints a line a side, or a row."""
    check(args)
    print(f'{torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}, torch {torch.__version__}')
    tasks = dict(
        train=benchmark_training,
        test=benchmark_inference,
        scale=benchmark_scaling,
        data=benchmark_data,
        learn=benchmark_learning,
    )
    run = tasks[args.task]
    results = {}
    for path in args.configs:
        for name, result in run(path, args):
            # JSON has no NaN, which a GPU's memory is on a CPU.
            figures = {key: None if value != value else value for key, value in result.items()}
            results.setdefault(path.stem, {})[name] = figures
            if args.json:
                args.json.write_text(json.dumps(results, indent=1, allow_nan=False) + '\n')


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured or written before anything is measured, which takes minutes.

    Raises:
        UsageError: An option is not one, a config is none, or a peer is not there or has no such model.
    """
    for name in ('steps', 'seeds'):
        if getattr(args, name) < 1:
            raise cli.UsageError(f'--{name} {getattr(args, name)}: expected 1 or more')
    if len({path.stem for path in args.configs}) < len(args.configs):
        raise cli.UsageError(f'{" ".join(map(str, args.configs))}: two configs of one name, by which figures are told')
    for path in args.configs:
        cfg = cli.read_config(path, args.cfg_options, 'test_dataloader' if args.task == 'test' else 'train_dataloader')
        if args.task == 'learn':
            check_learning(path, cfg, args)
        for peer in peers_of(args):
            try:
                check_peer(cfg, args.task, peer)
            except (ImportError, ValueError) as error:
                other = next(name for name in PEERS if name != peer)
                way_out = '' if args.against else f'; or give --against {other}'
                raise cli.UsageError(f'{path}: {error}{way_out}') from error
    if args.task == 'train' and args.against:
        try:
            check_options(args.cfg_options, args.against)
        except ValueError as error:
            raise cli.UsageError(str(error)) from error
    if args.json:
        cli.make_room(args.json)


def peers_of(args: argparse.Namespace) -> list[str]:
    """Returns the peers that a task compares with."""
    if args.task in ('scale', 'data'):
        return []
    if args.against:
        return [args.against]
    return list(PEERS) if args.task == 'test' else []


def check_learning(path: Path, cfg: Config, args: argparse.Namespace) -> None:
    """Refuses runs that cannot be compared.

    Raises:
        UsageError: The peer is none, the schedule counts epochs, or the data set's folder is not there.
    """
    if args.against == 'smp':
        raise cli.UsageError('learn --against smp: expected mmseg, or nothing')
    if 'max_iters' not in cfg.train_cfg:
        raise cli.UsageError(f'{path}: its schedule counts epochs; expected iterations (train_cfg.max_iters)')
    if args.data_root and not Path(args.data_root).is_dir():
        raise cli.UsageError(f'--data-root {args.data_root}: no such folder')


def benchmark_training(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yields the sides and their figures."""
    module = 'mmseg_resnest.benchmark.training'
    ceiling = run_alone(module, Spec('ceiling', ''))['tflop_per_s']
    print(f'A large matrix product runs at {ceiling:.0f} TFLOP/s')
    sides = {}
    for side in PEERS.get(args.against, ('ours',)):
        sides[side] = result = run_alone(module, Spec(side, str(path), args.steps, args.cfg_options))
        result['ceiling_share'] = result['tflop'] / result['ms'] * 1000 / ceiling
        print_side(path.stem, side, result, sides)
        yield side, result


def benchmark_inference(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yields the rows of the table and their figures."""
    for row in inference.ROWS:
        if args.against in (None, row.against):
            result = inference.compare(row, path, args.cfg_options)
            print(inference.line(result), flush=True)
            yield f'{row.name}, {row.against}', result


def benchmark_scaling(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yields the figures of one process, and of several with both kinds of batch norm."""
    if args.processes < 2 or 0 < torch.cuda.device_count() < args.processes:
        raise cli.UsageError(
            f'--processes {args.processes}: expected 2 or more, one a GPU; there are {torch.cuda.device_count()} GPUs'
        )
    one = None
    for side, processes in (('bn', 1), *((norm, args.processes) for norm in scaling.NORMS)):
        result = scaling.measure_alone(scaling.Spec(side, str(path), processes, args.steps, args.cfg_options))
        one = one or result
        result['efficiency'] = one['ms'] / result['ms']
        print(
            '{:38s} {:8s} {} processes {images_per_s:8.1f} images/s {ms:9.1f} ms {gib:6.2f} GiB each; '
            'efficiency {efficiency:.1%}'.format(path.stem, side, processes, **result),
            flush=True,
        )
        print_kinds(result)
        yield f'{side}, {processes}', result


def benchmark_data(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yields the sides and their figures."""
    sides = data.measure(path, options=args.cfg_options)
    for side, result in sides.items():
        transforms = ', '.join(f'{name} {ms:.1f}' for name, ms in result['transforms'].items())
        print('{:38s} {:8s} {images_per_s:8.1f} images/s a core {ms:7.1f} ms'.format(path.stem, side, **result))
        print(f'    {transforms}')
        yield side, result
    print(f'    ours is {sides["mmseg"]["ms"] / sides["ours"]["ms"]:.2f} times as fast, with the same samples')


def benchmark_learning(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yields the runs of both sides, and how the sides differ."""
    sides = {side: [] for side in learning.SIDES[args.against]}
    for seed in range(args.seeds):
        for side, runs in sides.items():
            spec = learning.Spec(side, str(path), seed, args.data_root, args.cfg_options)
            runs.append(run_alone('mmseg_resnest.benchmark.learning', spec))
            print('{:38s} {:10s} seed {}: mIoU {mIoU:.2f}, {seconds:.0f} s'.format(path.stem, side, seed, **runs[-1]))
            yield f'{side}, {seed}', runs[-1]
    found = learning.summary(*sides.values())
    print(
        '    {} - {}: mIoU {mIoU:+.2f} (standard deviation over seeds {mIoU_spread:.2f}), '
        'loss {loss:.4f} apart ({loss_spread:.4f})'.format(*sides, **found)
    )
    yield 'difference', found


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
    print_kinds(result)


def print_kinds(result: dict) -> None:
    """Prints the kinds of work of a GPU in a step."""
    for kind, ms in result.get('kinds', {}).items():
        print(f'    {ms:8.2f} ms  {kind}', flush=True)


if __name__ == '__main__':
    cli.run(benchmark, make_parser())
