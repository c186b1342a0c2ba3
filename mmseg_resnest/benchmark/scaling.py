"""How training scales from one GPU to several of a machine: whole steps, as ``training`` measures them.

``python -m mmseg_resnest.benchmark.scaling SPEC`` measures one number of processes with one kind of batch norm.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmseg_resnest import launch
from mmseg_resnest.benchmark.alone import fields, hand_over, run_alone
from mmseg_resnest.benchmark.training import make_batch, time_steps
from mmseg_resnest.norm import SyncBatchNorm

NORMS = ('bn', 'sync_bn')


@dataclass(frozen=True)
class Spec:
    """One measurement.

    Attributes:
        side: ``'bn'``, or ``'sync_bn'``: synchronised over the processes.
        config: Path of the config; each process has its batch size.
        processes: One a GPU; on a CPU they share it.
        steps: Measured steps, after three others.
        options: Overrides of the config.
    """

    side: str
    config: str
    processes: int
    steps: int = 10
    options: dict | None = None


def measure_alone(spec: Spec) -> dict:
    """Returns what ``measure`` does, from a fresh process."""
    return run_alone('mmseg_resnest.benchmark.scaling', spec)


def measure(spec: Spec) -> dict:
    """Returns the figures of ``training.time_steps`` of the slowest process, ``images_per_s`` of all together."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (spec, folder), spec.processes)
        results = [json.loads(path.read_text()) for path in Path(folder).glob('*.json')]
    slowest = max(results, key=lambda result: result['ms'])
    return slowest | dict(images_per_s=slowest['images_per_s'] * spec.processes)


def _work(rank: int, spec: Spec, folder: str) -> None:
    gpus = torch.cuda.is_available()
    device = f'cuda:{rank}' if gpus else 'cpu'
    if gpus:
        torch.cuda.set_device(rank)
    if spec.processes > 1:
        backend = 'nccl' if gpus else 'gloo'
        dist.init_process_group(backend, init_method=f'file://{folder}/processes', rank=rank, world_size=spec.processes)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    init_default_scope('mmseg')
    cfg = Config.fromfile(spec.config)
    cfg.merge_from_dict(spec.options or {})
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    model = (SyncBatchNorm.convert(model) if spec.side == 'sync_bn' else model).to(device).train()
    if spec.processes > 1:
        model = MMDistributedDataParallel(model, device_ids=[rank] if gpus else None, **launch.PARALLEL)
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = make_batch(cfg, device)

    def step() -> None:
        model.train_step(batch, optim_wrapper)

    for _ in range(3):
        step()
    (Path(folder) / f'{rank}.json').write_text(json.dumps(time_steps(step, len(batch['inputs']), spec.steps)))
    if spec.processes > 1:
        dist.barrier()
        launch.end(0)


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    hand_over(measure(Spec(**fields())))
