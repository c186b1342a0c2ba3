"""Whether the fast path learns what others learn on the same data and schedule: whole runs, several seeds.

Beside mmsegmentation's own model under AMP float16, both with its graph and its initial weights of the seed; or, alone,
beside the eager float32 path. ``python -m mmseg_resnest.benchmark.learning SPEC`` is one run.
"""

import copy
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from torch import Tensor

from mmseg_resnest.benchmark.alone import fields, hand_over
from mmseg_resnest.benchmark.peers import SWITCHES, drop_hooks, mmseg_pipeline, take_mmseg_model
from mmseg_resnest.checkpoints import guarded_loading
from mmseg_resnest.cli import drop_absent_hooks
from mmseg_resnest.datasets import set_data_root
from mmseg_resnest.key_maps import convert, recognise

SIDES = {None: ('ours', 'ours-eager'), 'mmseg': ('ours-mmseg', 'mmseg')}


@dataclass(frozen=True)
class Spec:
    """One run of one side.

    Attributes:
        side: ``'ours'``; ``'ours-eager'``: in float32, nothing fused or compiled; ``'mmseg'``: mmsegmentation's own;
            ``'ours-mmseg'``: ours with its graph and its initial weights.
        config: Path of the config.
        seed: Of the initial weights, the order and the augmentation.
        data_root: Where the data set is, if not where the config says.
        options: Overrides of the config.
    """

    side: str
    config: str
    seed: int
    data_root: str | None = None
    options: dict | None = None


def measure(spec: Spec) -> dict:
    """Trains in this process.

    Returns:
        ``mIoU`` at the end, in percent; ``seconds``, compiling and evaluation included; ``loss`` of each log entry.
    """
    register_all_modules()
    with tempfile.TemporaryDirectory() as folder, guarded_loading():
        runner = Runner.from_cfg(prepare(spec, Path(folder)))
        start = time.perf_counter()
        runner.train()
        seconds = time.perf_counter() - start
        scalars = Path(runner.log_dir, 'vis_data/scalars.json').read_text().splitlines()
    entries = [json.loads(line) for line in scalars]
    loss = [entry['loss'] for entry in entries if 'loss' in entry]
    return dict(mIoU=[entry['mIoU'] for entry in entries if 'mIoU' in entry][-1], seconds=seconds, loss=loss)


def prepare(spec: Spec, folder: Path) -> Config:
    """Returns the config of a run; what it writes, and the weights that it begins with, are in the folder."""
    cfg = Config.fromfile(spec.config)
    cfg.merge_from_dict(spec.options or {})
    drop_absent_hooks(cfg)
    if spec.data_root:
        set_data_root(cfg, spec.data_root)
    cfg.model.backbone.init_cfg = None
    cfg.randomness = dict(seed=spec.seed)
    cfg.work_dir = str(folder)
    if spec.side == 'ours-eager':
        cfg.model.update(dict.fromkeys(SWITCHES, False))
        cfg.optim_wrapper.dtype = 'float32'
    if spec.side in SIDES['mmseg']:
        theirs = copy.deepcopy(cfg)
        take_mmsegmentations(theirs)
        weights = initial_weights(theirs.model, spec.seed)
        if spec.side == 'mmseg':
            cfg = theirs
        else:
            cfg.model.backbone.graph = 'mmseg'
            weights, _ = convert(weights, recognise(weights)[0])
        cfg.load_from = str(folder / 'initial.pth')
        torch.save(dict(state_dict=weights, meta={}), cfg.load_from)
    return cfg


def initial_weights(model: dict, seed: int) -> dict[str, Tensor]:
    """Returns the weights that a model begins with."""
    torch.manual_seed(seed)
    model = MODELS.build(model)
    model.init_weights()
    return model.state_dict()


def take_mmsegmentations(cfg: Config) -> None:
    """Puts mmsegmentation's and MMEngine's own model, transforms, metric, optimiser wrapper and hooks in a config."""
    take_mmseg_model(cfg.model)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.pipeline = mmseg_pipeline(loader.dataset.pipeline)
    cfg.val_dataloader.pop('batch_sampler', None)
    cfg.val_dataloader.batch_size = 1
    cfg.val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    optimizer = {key: value for key, value in cfg.optim_wrapper.optimizer.items() if key != 'fused'}
    amp = dict(type='AmpOptimWrapper', loss_scale='dynamic') if torch.cuda.is_available() else dict(type='OptimWrapper')
    others = {key: value for key, value in cfg.optim_wrapper.items() if key not in ('type', 'dtype', 'autocast_cpu')}
    cfg.optim_wrapper = others | dict(amp, optimizer=optimizer)
    drop_hooks(cfg)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=cfg.train_cfg.max_iters)
    cfg.sync_bn = None


def summary(first: list[dict], second: list[dict]) -> dict[str, float]:
    """Compares two sides.

    Args:
        first: What ``measure`` gives for each seed.
        second: Likewise, the same seeds.

    Returns:
        ``mIoU``: the difference of the sides' means, and ``mIoU_spread``, the mean of the two standard deviations over
        seeds; ``loss`` and ``loss_spread``: the same of each log entry's loss, absolute, and averaged over entries.
    """
    miou = [[run['mIoU'] for run in side] for side in (first, second)]
    losses = [list(zip(*(run['loss'] for run in side), strict=True)) for side in (first, second)]
    pairs = list(zip(*losses, strict=True))
    return dict(
        mIoU=statistics.mean(miou[0]) - statistics.mean(miou[1]),
        mIoU_spread=statistics.mean(map(_spread, miou)),
        loss=statistics.mean(abs(statistics.mean(a) - statistics.mean(b)) for a, b in pairs),
        loss_spread=statistics.mean(_spread(side) for pair in pairs for side in pair),
    )


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else float('nan')


if __name__ == '__main__':
    hand_over(measure(Spec(**fields())))
