"""Compute again a training step whose loss or gradient was not finite, and say where that begins.

  python tools/reproduce_step.py work_dirs/NAME/CONFIG.py work_dirs/NAME/nonfinite_iter_N.pth

A run that stops at such a step prints this command. Exit code: 1 if something is not finite again, 0 if all is finite.
One process computes what one rank saw: with synchronised batch norm its losses differ from the run's.
"""

import argparse
import sys

from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmseg_resnest import cli
from mmseg_resnest.checkpoints import load_strictly
from mmseg_resnest.steps import FirstNonFinite, files_of, read_step, set_random_state


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('step', help='the nonfinite_iter_N.pth that the run has written')
    return parser


def reproduce(args: argparse.Namespace) -> None:
    """Builds the config's model, takes the step again and prints its losses beside the run's."""
    cfg = cli.load_config(args, 'optim_wrapper')
    weights, step = read_step(cli.existing_file(args.step, 'step', 'a run that stops writes it to its work dir'))
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    device = get_device()
    if 'mmseg_resnest.EncoderDecoder' in str(cfg.model.type):  # the hooks below see every module only in eager mode
        cfg.model.update(compiled=False, cuda_graphs=False)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device)
    load_strictly(model, weights, args.step)
    model.train()
    cfg.optim_wrapper.update(type='mmseg_resnest.AutocastOptimWrapper', dtype=step['dtype'], autocast_cpu=True)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    wrapper.raises = False
    wrapper.initialize_count_status(model, 0, len(step['batches']))
    if step['loss_scaler']:
        wrapper.loss_scaler.load_state_dict(step['loss_scaler'])
    first = FirstNonFinite(model)
    print(f'Iteration {step["iteration"]} in {step["dtype"]} on {device} (in the run: {step["device"]})')
    for batch in step['batches']:
        print(f'Images: {", ".join(files_of(batch["batch"]))}')
        set_random_state(batch['random'])
        losses = model.train_step(batch['batch'], wrapper)
        for name, value in losses.items():
            print(f'  {name} {value.item()!r} (in the run: {batch["losses"][name]!r})')
    check = wrapper.last_check
    print(f'Gradient norm {check.grad_norm!r} (in the run: {step["grad_norm"]!r})')
    print(f'First output that is not finite: {first.output}\nFirst gradient that is not finite: {first.gradient}')
    sys.exit(0 if check.finite else 1)


if __name__ == '__main__':
    cli.run(reproduce, make_parser())
