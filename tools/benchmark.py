"""Measure how fast a config trains: images/s and peak memory of whole training steps on random data.

  python tools/benchmark.py train configs/deeplabv3_resnest101_ade20k.py
  python tools/benchmark.py train configs/*.py --json speeds.json

The data pipeline is not in it; the step is the Runner's own: preprocessing, forward, loss, backward, optimiser.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmseg_resnest import cli


def make_batch(cfg: Config, device: str) -> dict:
    """Returns a batch as a data loader gives it: uint8 images and labels of the config's crop and batch size."""
    height, width = cfg.model.data_preprocessor.size
    classes = cfg.model.decode_head.num_classes
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(cfg.train_dataloader.batch_size):
        inputs.append(torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8).to(device))
        label = torch.randint(classes, (1, height, width), generator=generator).to(device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(img_shape=(height, width))))
    return dict(inputs=inputs, data_samples=samples)


def benchmark_training(cfg: Config, steps: int, device: str) -> dict[str, float]:
    """Trains on one batch again and again.

    Returns:
        ``images_per_s`` and ``ms`` of the median step, ``gib`` at the peak, ``steps``.
    """
    init_default_scope(cfg.default_scope)
    torch.backends.cudnn.benchmark = True
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).to(device).train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = make_batch(cfg, device)
    seconds = []
    for step in range(-3, steps):
        if step == 0 and device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        model.train_step(batch, optim_wrapper)
        if device == 'cuda':
            torch.cuda.synchronize()
        if step >= 0:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device == 'cuda' else float('nan')
    return dict(images_per_s=len(batch['inputs']) / median, ms=median * 1000, gib=gib, steps=steps)


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=['train'])
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument('--steps', type=int, default=10, help='measured steps, after three others (default: 10)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Measures the configs one after the other and prints a line each."""
    for path in args.configs:
        cli.existing_file(path, 'config file', 'see configs/')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(f'{torch.cuda.get_device_name() if device == "cuda" else "CPU"}, torch {torch.__version__}')
    results = {}
    for path in args.configs:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(args.cfg_options)
        results[path.stem] = result = benchmark_training(cfg, args.steps, device)
        print('{:45s} {images_per_s:8.1f} images/s {ms:9.1f} ms {gib:7.1f} GiB'.format(path.stem, **result))
        sys.stdout.flush()
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    cli.run(benchmark, make_parser())
