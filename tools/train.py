"""Train a segmentation model.

  python tools/train.py configs/deeplabv3_resnest101_ade20k.py
  torchrun --nproc-per-node 4 tools/train.py CONFIG --cfg-options train_dataloader.batch_size=4
  python tools/train.py CONFIG --fine-tune work_dirs/other/iter_160000.pth
  srun -n 8 --ntasks-per-node 8 python tools/train.py CONFIG

The launcher is detected; a GPU is used where there is one.
"""

import argparse
from pathlib import Path

from mmengine.config import Config

from mmseg_resnest import cli, launch
from mmseg_resnest.checkpointing import agreed_checkpoint, check_agreement, earlier_checkpoint, goes_on_from
from mmseg_resnest.checkpoints import StrictLoading
from mmseg_resnest.dataset_check import add_skip_option, check_before_run
from mmseg_resnest.datasets import check_classes
from mmseg_resnest.work_dir import claim

DTYPES = {'bf16': 'bfloat16', 'fp16': 'float16', 'off': 'float32'}


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        metavar='PATH',
        help='go on from PATH, or from the newest whole checkpoint in the work dir; a run that torchrun or Slurm has '
        'restarted does so by itself',
    )
    parser.add_argument(
        '--fine-tune',
        metavar='PATH',
        help='start from a segmentor trained for other classes: all must fit but the classifiers, which start fresh; '
        'with --resume only where there is nothing yet to go on from',
    )
    cli.add_allow_pickle(parser)
    add_skip_option(parser)
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


def set_start(cfg: Config, args: argparse.Namespace) -> list[str]:
    """Sets what the run starts from, on all processes: the command line's checkpoint, else the config's, or none.

    Returns:
        For the log: which newer checkpoints were skipped and why, or that there is none to go on from.

    Raises:
        UsageError: A new run would replace the checkpoints of an earlier one, or is asked to start from two.
    """
    # As MMEngine has it, resume=True in a config goes on from load_from, if that is set.
    resume = args.resume or (cfg.get('resume') and (cfg.get('load_from') or True))
    if args.fine_tune and isinstance(resume, str):
        raise cli.UsageError(
            f'--fine-tune starts a run, and {"--resume" if args.resume else "the config (resume, load_from)"} goes on '
            f'with that of {resume}; give one of them'
        )
    remarks = []
    if resume is True or launch.is_restarted():
        newest, skipped = agreed_checkpoint(cfg.work_dir)
        remarks = [f'Not resumed from: {reason}' for reason in skipped]
        if isinstance(resume, str) and newest and not goes_on_from(newest, resume):
            remarks = [f'Started again before it saved: from {resume} again, not from {newest}']
            newest = None
        resume = newest or (None if resume is True else resume)
        if not resume:
            remarks.append(f'No checkpoint in {cfg.work_dir} to go on from: a new run')
    elif not resume and (earlier := agreed_checkpoint(cfg.work_dir)[0] or _earlier_checkpoint(cfg)):
        raise cli.UsageError(
            f'{earlier}: found an earlier run, whose checkpoints a new one would replace; expected a work dir without '
            'any. Go on with that run by --resume, name another folder with --work-dir, or move its checkpoints away'
        )
    cfg.resume = bool(resume)
    if cfg.resume:
        if isinstance(resume, str):  # named, by the command line or the config
            check_agreement(resume)
        cfg.load_from = cli.existing_checkpoint(resume)
    elif args.fine_tune:
        cfg.load_from = cli.existing_checkpoint(args.fine_tune)
    return remarks


def _earlier_checkpoint(cfg: Config) -> Path | None:
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    return earlier_checkpoint(cfg.work_dir, hook.get('out_dir'))


def keep_alive(cfg: Config) -> None:
    """Gives a config that comes from elsewhere the hooks of ``configs/_base_/runtime.py`` that no run should lack."""
    hooks = cfg.setdefault('default_hooks', {})
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook'))
    if checkpoint and checkpoint.get('type') == 'CheckpointHook':
        checkpoint.type = 'mmseg_resnest.CheckpointHook'
    present = {hook.get('type') for hook in [*(cfg.get('custom_hooks') or []), *hooks.values()] if hook}
    missing = [name for name in ('RandomnessHook', 'SignalHook', 'WatchHook') if f'mmseg_resnest.{name}' not in present]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *(dict(type=f'mmseg_resnest.{name}') for name in missing)]


def train(args: argparse.Namespace) -> None:
    """Builds the runner that the command line asks for and trains."""
    cfg = cli.load_config(args, 'train_dataloader')
    loaders = [loader for loader in ('train_dataloader', 'val_dataloader') if cfg.get(loader)]
    for loader in loaders:
        check_classes(loader, cfg)
    if not args.skip_data_check:
        check_before_run(cfg, loaders)
    if args.amp:
        set_amp(cfg, args.amp)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=args.seed)
    launch.set_launcher(cfg)
    claim(cfg.work_dir)  # before it is read, and written to
    remarks = set_start(cfg, args)
    keep_alive(cfg)
    runner = cli.build_runner(cfg)
    for remark in remarks:
        runner.logger.warning(remark)
    fine_tune = bool(args.fine_tune) and not cfg.resume
    runner.register_hook(StrictLoading(cfg.get('load_from'), cfg.resume, fine_tune))
    runner.train()
    if runner.rank == 0:
        print(f'Trained {runner.iter} iterations; checkpoints and the log are in {runner.work_dir}')


if __name__ == '__main__':
    cli.run(train, make_parser())
