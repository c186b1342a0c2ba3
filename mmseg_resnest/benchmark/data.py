"""How fast a config's training pipeline makes samples, beside the same one of mmsegmentation's transforms: one thread.

Both sides take the same generated files in turn, with the same random numbers, and must give the same samples.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmseg.registry import TRANSFORMS

from mmseg_resnest.benchmark.inference import ADE_SIZES, write_data_set
from mmseg_resnest.benchmark.peers import mmseg_pipeline

SIDES = ('ours', 'mmseg')


def measure(config: str | Path, images: int = 40, options: dict | None = None) -> dict[str, dict]:
    """Measures the pipeline of ``train_dataloader``: files to packed sample, the checks of ``CheckedCompose`` left out.

    Pictures are 2048 x 1024 PNG for 19 classes, as in Cityscapes, else JPEG in ADE20K's mix of sizes.

    Args:
        config: Path of the config.
        images: How many files, each taken once by each side.
        options: Overrides of the config.

    Returns:
        A side's ``images_per_s``, of one core; ``ms``, a sample; ``transforms``: name -> its milliseconds, all means.

    Raises:
        ValueError: The sides differ in a sample.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options or {})
    pipeline = cfg.train_dataloader.dataset.pipeline
    sides = {
        'ours': [TRANSFORMS.build(transform) for transform in pipeline],
        'mmseg': [TRANSFORMS.build(transform) for transform in mmseg_pipeline(pipeline)],
    }
    seconds = {side: defaultdict(list) for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for i, sample in enumerate(_files(Path(folder), cfg, images)):
            made = {}
            for side in SIDES if i % 2 else reversed(SIDES):  # the second finds the file in the page cache
                np.random.seed(i)
                made[side] = _run(sides[side], dict(sample, seg_fields=[]), seconds[side])
            _check_equal(*made.values(), sample['img_path'])
    return {side: _figures(taken) for side, taken in seconds.items()}


def _files(root: Path, cfg: Config, images: int) -> list[dict]:
    """Writes the files; returns what a data set gives for each."""
    classes = cfg.model.decode_head.num_classes
    mix = np.random.default_rng(0).choice(len(ADE_SIZES), images, p=list(ADE_SIZES.values()))
    sizes = [(2048, 1024)] * images if classes == 19 else [list(ADE_SIZES)[i] for i in mix]
    suffix = '.png' if classes == 19 else '.jpg'
    write_data_set(root, sizes, classes, suffix)
    common = dict(reduce_zero_label=False, label_map=None)
    return [
        dict(common, img_path=str(path), seg_map_path=str(root / 'annotations' / f'{path.stem}.png'))
        for path in sorted((root / 'images').iterdir())
    ]


def _run(transforms: list, sample: dict, seconds: dict[str, list[float]]) -> dict:
    for transform in transforms:
        start = time.perf_counter()
        sample = transform(sample)
        seconds[type(transform).__name__].append(time.perf_counter() - start)
    return sample


def _check_equal(ours: dict, theirs: dict, path: str) -> None:
    labels = [made['data_samples'].gt_sem_seg.data.long() for made in (ours, theirs)]
    if not (torch.equal(ours['inputs'], theirs['inputs']) and torch.equal(*labels)):
        raise ValueError(f'{path}: the two pipelines make different samples of it; their times do not compare')


def _figures(seconds: dict[str, list[float]]) -> dict:
    transforms = {name: statistics.mean(taken) * 1000 for name, taken in seconds.items()}
    ms = sum(transforms.values())
    return dict(images_per_s=1000 / ms, ms=ms, transforms=transforms)
