"""Train a segmentation model.

  python tools/train.py configs/deeplabv3_resnest101_ade20k.py
  torchrun --nproc-per-node 4 tools/train.py CONFIG --cfg-options train_dataloader.batch_size=4
  srun -n 8 --ntasks-per-node 8 python tools/train.py CONFIG

The launcher is detected; a GPU is used where there is one.
"""

import argparse

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, find_latest_checkpoint

from mmseg_resnest import cli, launch
from mmseg_resnest.checkpoints import load_strictly, model_weights, read_checkpoint
from mmseg_resnest.datasets import check_classes, check_folders

DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'off': 'float32'}


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        metavar='PATH',
        help='go on from PATH, or from the newest checkpoint in the work dir',
    )
    parser.add_argument(
        '--amp', choices=DTYPES, help='number format of the forward pass (default: bf16 on a GPU, off on a CPU)'
    )
    parser.add_argument('--seed', type=int, metavar='N', help='seed of weights, order and augmentation')
    return parser


def set_amp(cfg: Config, amp: str) -> None:
    """Sets the number format, whichever of OpenMMLab's optimiser wrappers the config has; it holds on a CPU too."""
    for stock in ('loss_scale', 'use_fsdp'):
        cfg.optim_wrapper.pop(stock, None)
    cfg.optim_wrapper.update(type='mmseg_resnest.AutocastOptimWrapper', dtype=DTYPES[amp], autocast_cpu=True)


def check_resumable(runner: Runner, path: str) -> None:
    """Reads a checkpoint safely and strictly before MMEngine does, which is neither."""
    checkpoint = read_checkpoint(path)
    missing = {'meta', 'optimizer'} - checkpoint.keys()
    if missing:
        raise ValueError(f'{path}: no checkpoint of a training run: it has no {", no ".join(sorted(missing))}')
    if 'config' in checkpoint['meta']:  # never written by MMEngine, and run by it as Python
        raise ValueError(f'{path}: its meta.config is code, which MMEngine would run; no training run writes it')
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    load_strictly(model, model_weights(checkpoint), path)


def train(args: argparse.Namespace) -> None:
    """Builds the runner that the command line asks for and trains."""
    cfg = cli.load_config(args, 'train_dataloader')
    for loader in ('train_dataloader', 'val_dataloader'):
        if cfg.get(loader):
            check_folders(loader, cfg[loader].dataset)
            check_classes(loader, cfg)
    if args.amp:
        set_amp(cfg, args.amp)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    if args.resume:
        cfg.resume = True
        newest = find_latest_checkpoint(cfg.work_dir) if args.resume is True else args.resume
        cfg.load_from = newest and cli.existing_checkpoint(newest)
    launch.set_launcher(cfg)
    runner = Runner.from_cfg(cfg)
    if args.resume and cfg.load_from:
        check_resumable(runner, cfg.load_from)
    runner.train()
    if runner.rank == 0:
        print(f'Trained {runner.iter} iterations; checkpoints and the log are in {runner.work_dir}')


if __name__ == '__main__':
    cli.run(train, make_parser())
