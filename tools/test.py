"""Evaluate a checkpoint: mIoU, mAcc, aAcc, and a table of the classes.

  python tools/test.py configs/deeplabv3_resnest101_ade20k.py CHECKPOINT
  python tools/test.py CONFIG CHECKPOINT --tta --json result.json --out predictions/
  python tools/test.py CONFIG CHECKPOINT --tta authors
  python tools/test.py CONFIG CHECKPOINT --exact
  torchrun --nproc-per-node 4 tools/test.py CONFIG CHECKPOINT

The launcher is detected; a GPU is used where there is one. Images of one size make a batch, batch
norm is folded, and on a GPU the network runs in float16 and, where a size repeats, from CUDA
graphs; docs/prediction.md says what each changes.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import nn

from mmseg_resnest import cli, launch
from mmseg_resnest.checkpoints import check_options, compare_classes, load_strictly, model_weights, read_checkpoint
from mmseg_resnest.dataset_check import add_skip_option, check_before_run
from mmseg_resnest.datasets import check_classes, check_folders, datasets_of
from mmseg_resnest.network import DTYPES, Speed, default_speed, speed_up
from mmseg_resnest.resnest import ResNeSt
from mmseg_resnest.segmentor import EncoderDecoder


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file of tools/train.py')
    cli.add_allow_pickle(parser)
    add_skip_option(parser)
    parser.add_argument(
        '--tta',
        nargs='?',
        const='openmmlab',
        choices=('openmmlab', 'authors'),
        help="multi-scale and flip: OpenMMLab's (the config's tta_pipeline), or as the authors of ResNeSt evaluate",
    )
    add_speed(parser)
    parser.add_argument('--out', metavar='DIR', help='write the predicted label maps there, as PNG')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of truth and prediction there')
    parser.add_argument('--json', metavar='FILE', type=Path, help='write the figures there, those of each class too')
    return parser


def add_speed(parser: argparse.ArgumentParser) -> None:
    """Adds the switches of fast evaluation."""
    group = parser.add_argument_group('speed, each a switch')
    group.add_argument(
        '--exact',
        action='store_true',
        help="all of it off: batch 1, float32 without TF32, batch norm as it is, eager; mmsegmentation's own confusion "
        'matrix, to the last pixel',
    )
    group.add_argument('--batch-size', type=int, metavar='N', help="images of a batch (default: the config's)")
    group.add_argument('--dtype', choices=DTYPES, help='number format (default: float16 on a GPU, float32 on a CPU)')
    group.add_argument('--no-tf32', action='store_true', help="float32 of 24 bits on a GPU, too, not TF32's 11")
    group.add_argument('--no-fold', action='store_true', help='leave batch norm as it is')
    group.add_argument('--no-graphs', action='store_true', help='run no size from a CUDA graph')
    group.add_argument('--compile', action='store_true', help='compile sizes that repeat, one to two minutes each')


def check_speed(args: argparse.Namespace) -> None:
    """Refuses switches that are no use, or that --exact would ignore."""
    for name, value in (('--batch-size', args.batch_size), ('--dtype', args.dtype), ('--compile', args.compile)):
        if args.exact and value:
            raise cli.UsageError(
                f'{name}: expected not with --exact, which switches off all that makes evaluation fast; drop one'
            )
    if args.batch_size is not None and args.batch_size < 1:
        raise cli.UsageError(f'--batch-size {args.batch_size}: expected 1 or more')


def set_exact(cfg: Config) -> None:
    """Switches all of it off."""
    if _is_a(cfg.model.type, EncoderDecoder):  # mmsegmentation's own has no such switch
        cfg.model.channels_last = False
    backbone = cfg.model.get('backbone') or {}
    if _is_a(backbone.get('type'), ResNeSt):
        backbone.radix_conv = 'grouped'  # as mmsegmentation's own has it
    cfg.model.test_cfg.upsample_argmax = 'exact'
    cfg.test_dataloader.pop('batch_sampler', None)
    cfg.test_dataloader.batch_size = 1


def _is_a(name: str | type | None, kind: type) -> bool:
    found = name if isinstance(name, type | None) else MODELS.get(name)
    return isinstance(found, type) and issubclass(found, kind)


def make_fast(model: nn.Module, args: argparse.Namespace) -> None:
    """Makes the model predict as the switches say; mmsegmentation's own EncoderDecoder stays as it is."""
    if args.exact or not isinstance(model, EncoderDecoder):
        return
    default = default_speed(next(model.parameters()).device)
    dtype = args.dtype or default.dtype
    speed_up(model, Speed(fold=not args.no_fold, dtype=dtype, graphs=not args.no_graphs, compile=args.compile))


def configure(cfg: Config, args: argparse.Namespace) -> None:
    """Sets what the command line asks of the test."""
    if args.exact:
        set_exact(cfg)
    if args.exact or args.no_tf32:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if args.batch_size is not None:
        cfg.test_dataloader.batch_size = args.batch_size
        cfg.test_dataloader.setdefault('batch_sampler', dict(type='mmseg_resnest.EqualSizeBatchSampler'))
    if args.tta == 'openmmlab':
        if 'tta_pipeline' not in cfg or 'tta_model' not in cfg:
            raise cli.UsageError(f'--tta: {args.config} has no tta_pipeline and tta_model')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    if args.tta == 'authors':
        for dataset in datasets_of(cfg.test_dataloader.dataset):
            dataset.pipeline = [step for step in dataset.pipeline if not _name(step).startswith('Resize')]
        options = dict(type='mmseg_resnest.AuthorsTTAModel') | cfg.get('authors_tta_model', {})
        cfg.model = dict(**options, module=cfg.model)
    if args.out:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        first = next((e for e in evaluators if _name(e).endswith('IoUMetric')), evaluators[0])
        first.output_dir = args.out
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
        cfg.default_hooks.visualization.draw = True


def _name(part: ConfigDict) -> str:
    return part.type.rpartition('.')[2] if isinstance(part.type, str) else part.type.__name__


def test(args: argparse.Namespace) -> None:
    """Builds the runner that the command line asks for, loads the checkpoint strictly and tests."""
    cfg = cli.load_config(args, 'test_dataloader')
    cli.existing_checkpoint(args.checkpoint)
    check_speed(args)
    if args.json:
        cli.make_room(args.json)
    check_classes('test_dataloader', cfg)
    if not args.skip_data_check:
        check_before_run(cfg, ['test_dataloader'])
    configure(cfg, args)
    cfg.load_from, cfg.resume = None, False  # the Runner would load over the named checkpoint
    launch.set_launcher(cfg)
    runner = cli.build_runner(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model = model.module if args.tta else model
    checkpoint = read_checkpoint(args.checkpoint)
    load_strictly(model, model_weights(checkpoint), args.checkpoint)
    check_options(checkpoint, model, args.checkpoint)  # parts that a model lacks are told by the keys
    make_fast(model, args)
    try:
        loader = runner.test_dataloader
    except ValueError:  # as MMEngine's of an empty data set, which names no folder
        check_folders('test_dataloader', cfg.test_dataloader.dataset)
        raise
    compare_classes(checkpoint, loader.dataset.metainfo, args.checkpoint)
    metrics = runner.test()
    if runner.rank == 0:
        report(metrics, runner, args)


FIRST = ('mIoU', 'mAcc', 'aAcc')


def _order(name: str) -> int:
    name = name.rpartition('/')[2]  # what comes before is the metric's prefix
    return FIRST.index(name) if name in FIRST else len(FIRST)


def report(metrics: dict, runner: Runner, args: argparse.Namespace) -> None:
    """Prints the figures, or where the files are, and writes the figures to ``--json``."""
    figures = {name: float(metrics[name]) for name in sorted(metrics, key=_order)}
    if figures:
        print('  '.join(f'{name} {value:.2f}' for name, value in figures.items()))
    for metric in runner.test_evaluator.metrics:
        if getattr(metric, 'format_only', False):
            print(f'format_only: no figures, the label maps are in {metric.output_dir}')
    if args.json:
        write_json(args.json, figures, runner, args)


def write_json(path: Path, figures: dict[str, float], runner: Runner, args: argparse.Namespace) -> None:
    """Writes the figures, those of each class, and the confusion matrix."""
    metric = next((m for m in runner.test_evaluator.metrics if hasattr(m, 'confusion')), None)
    per_class, confusion = getattr(metric, 'per_class', {}), getattr(metric, 'confusion', None)
    classes = {  # JSON has no nan: a class that does not occur gets null
        name: {metric: None if math.isnan(value) else value for metric, value in values.items()}
        for name, values in per_class.items()
    }
    content = dict(figures, classes=classes, config=args.config, checkpoint=args.checkpoint, tta=args.tta)
    if confusion is not None:
        content['confusion'] = confusion.tolist()  # a row a label, a column a prediction
    path.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    cli.run(test, make_parser())
