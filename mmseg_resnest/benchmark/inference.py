"""How fast a config predicts and evaluates, beside mmsegmentation or segmentation_models.pytorch.

Both sides have random weights with settled batch norm, and generated pictures. ``compare`` runs each in a fresh
process, ``python -m mmseg_resnest.benchmark.inference SPEC``.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import METRICS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest.benchmark.alone import fields, hand_over, run_alone
from mmseg_resnest.benchmark.peers import drop_hooks, mmseg_pipeline, smp_model, take_mmseg_model
from mmseg_resnest.cli import drop_absent_hooks

# Width and height -> share of a generated set: made up after ADE20K's validation images, mostly of short side 512.
ADE_SIZES = {
    (683, 512): 0.45, (512, 683): 0.1, (768, 512): 0.1, (512, 512): 0.05, (910, 512): 0.05, (1600, 1200): 0.1,
    (1024, 768): 0.05, (600, 450): 0.05, (2048, 1536): 0.05,
}  # fmt: skip


DIFFERENT = 16  # images of a size in a generated set


@dataclass(frozen=True)
class Spec:
    """One measurement of one side.

    Attributes:
        task: ``'latency'`` (image on the device to label map, batch 1), ``'after_network'`` (logits to label map and
            metric, on the CPU), ``'test'`` (a data set, from its files) or ``'tta'`` (the same, augmented).
        side: ``'ours'``, ``'mmseg'`` or ``'smp'``.
        config: Path of the config.
        size: Height and width of the images; of the data set, None: ADE20K's mix.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``; of mmsegmentation by autocast.
        compile: Whether ours is compiled; smp always is.
        repeats: Runs of which the median is taken, or images of the data set.
        options: Overrides of the config.
    """

    task: str
    side: str
    config: str
    size: tuple[int, int] | None
    dtype: str = 'float32'
    compile: bool = False
    repeats: int = 20
    options: dict | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: a measurement, and how many times faster than whom ours should be."""

    name: str
    task: str
    against: str
    size: tuple[int, int] | None
    bar: float
    aim: float
    repeats: int


ROWS = (
    Row('latency, batch 1, 512x683', 'latency', 'mmseg', (512, 683), 4.2, 5.0, 50),
    Row('latency, batch 1, 1024x2048', 'latency', 'mmseg', (1024, 2048), 2.0, 2.6, 50),
    Row('latency, batch 1, 512x683', 'latency', 'smp', (512, 683), 1.0, 1.4, 50),
    Row('latency, batch 1, 1024x2048', 'latency', 'smp', (1024, 2048), 1.25, 1.4, 50),
    Row("test end to end, ADE20K's mix", 'test', 'mmseg', None, 4.0, 6.0, 2000),
    Row('test end to end, 1024x2048', 'test', 'mmseg', (1024, 2048), 2.5, 4.0, 500),
    Row('TTA, six scales, flip, end to end', 'tta', 'mmseg', None, 3.0, 5.0, 200),
    Row('after the network, two cores, 512x683', 'after_network', 'mmseg', (512, 683), 3.0, 5.0, 7),
)


def compare(row: Row, config: str | Path, options: dict | None = None) -> dict:
    """Measures ours and the peer at its best, and returns what was measured.

    Returns:
        ``name``, ``against``, ``ours`` and ``theirs`` (each the spec and ``ms`` an image), ``ratio``, ``bar``, ``aim``.
    """
    spec = Spec(row.task, 'ours', str(config), row.size, repeats=row.repeats, options=options)
    theirs = replace(spec, side=row.against)
    if row.task == 'after_network':
        sides = [[spec], [theirs]]
    elif row.against == 'smp':
        sides = [[replace(spec, dtype='float16', compile=True)], [replace(theirs, dtype=d) for d in HALVES]]
    else:
        ours = replace(spec, dtype='float16', compile=row.task == 'latency')
        sides = [[ours], [theirs, replace(theirs, dtype='float16')]]
    best = [min(map(measure_alone, side), key=lambda result: result['ms']) for side in sides]
    ratio = best[1]['ms'] / best[0]['ms']
    return dict(name=row.name, against=row.against, ours=best[0], theirs=best[1], ratio=ratio, bar=row.bar, aim=row.aim)


def measure_alone(spec: Spec) -> dict:
    """Returns the spec's fields, and what ``measure`` gives in a fresh process."""
    return asdict(spec) | run_alone('mmseg_resnest.benchmark.inference', spec)


HALVES = ('bfloat16', 'float16')


def line(result: dict) -> str:
    """Returns a comparison as a line of the table."""
    return '{name:40s} {ours[ms]:9.2f} ms {theirs[ms]:9.2f} ms ({against}) {ratio:6.2f}x  bar {bar}, aim {aim}'.format(
        **result
    )


def measure(spec: Spec) -> dict:
    """Measures in this process; returns ``ms`` an image."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = _searches(spec)
    init_default_scope('mmseg')
    tasks = dict(latency=_latency, after_network=_after_network, test=_end_to_end, tta=_end_to_end)
    return dict(ms=tasks[spec.task](spec))


def _searches(spec: Spec) -> bool:
    """Whether cuDNN tries its algorithms for a peer, as is best for it: not where there are many sizes."""
    return spec.size is not None


def _device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def _timed(run: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a run in ms, after six others."""
    seconds = []
    for i in range(-6 if _device().type == 'cuda' else -1, repeats):
        start = time.perf_counter()
        run()
        if _device().type == 'cuda':
            torch.cuda.synchronize()
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def _config(spec: Spec) -> Config:
    """Returns the config as the side has it."""
    cfg = Config.fromfile(spec.config)
    cfg.merge_from_dict(spec.options or {})
    cfg.model.backbone.init_cfg = None
    drop_absent_hooks(cfg)
    ours = spec.side == 'ours'
    cfg.tta_model = dict(type='mmseg_resnest.TTAModel' if ours else 'mmseg.SegTTAModel')
    if not ours:
        take_mmseg_model(cfg.model)
        cfg.test_dataloader.pop('batch_sampler', None)
        cfg.test_dataloader.batch_size = 1
        cfg.test_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'])
        cfg.test_dataloader.dataset.pipeline = mmseg_pipeline(cfg.test_dataloader.dataset.pipeline)
        if 'tta_pipeline' in cfg:
            cfg.tta_pipeline = mmseg_pipeline(cfg.tta_pipeline)
        drop_hooks(cfg)
        cfg.test_cfg.fp16 = spec.dtype == 'float16'
        cfg.env_cfg.cudnn_benchmark = _searches(spec)
    return cfg


def _settled(model: nn.Module, run: Callable[[Tensor], object]) -> nn.Module:
    """Gives random batch norms the statistics of smooth images, so that nothing overflows.

    Far from what its statistics are of, as of two images or of noise, a random network makes much of rounding.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()
        coarse = 2 * torch.randn(16, 3, 4, 4, device=next(model.parameters()).device)
        run(F.interpolate(coarse, (64, 64), mode='bilinear'))
    return model.eval()


def _segmentor(spec: Spec, cfg: Config) -> nn.Module:
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = _settled(model.to(_device()), model._forward)
    if spec.side == 'ours':
        _speed_up(model, spec)
    return model


def _speed_up(model: nn.Module, spec: Spec) -> None:
    from mmseg_resnest.network import Speed, speed_up  # here: the peers' processes do without it

    speed_up(model, Speed(dtype=spec.dtype, compile=spec.compile))


def _latency(spec: Spec) -> float:
    if spec.side == 'smp':
        return _smp_latency(spec)
    model = _segmentor(spec, _config(spec))
    image = torch.randint(256, (3, *spec.size), dtype=torch.uint8, device=_device())
    meta = dict(ori_shape=spec.size, img_shape=spec.size, pad_shape=spec.size)
    autocast = spec.side == 'mmseg' and spec.dtype == 'float16'

    def run() -> None:
        with torch.no_grad(), torch.autocast(_device().type, torch.float16, enabled=autocast):
            model.test_step(dict(inputs=[image], data_samples=[SegDataSample(metainfo=meta)]))

    return _timed(run, spec.repeats)


def _smp_latency(spec: Spec) -> float:
    """Its DeepLabV3 on timm's ResNeSt, compiled with CUDA graphs, resizing and argmax in the graph; padded to 8."""
    cfg = Config.fromfile(spec.config)
    cfg.merge_from_dict(spec.options or {})
    model = smp_model(cfg, channels=cfg.model.decode_head.channels)
    dtype = getattr(torch, spec.dtype)
    model = _settled(model.to(_device()), model).to(dtype=dtype, memory_format=torch.channels_last)
    height, width = spec.size
    mean, std = (torch.tensor(cfg.model.data_preprocessor[key], device=_device()) for key in ('mean', 'std'))

    @torch.compile(mode='reduce-overhead', dynamic=False)
    def labels(image: Tensor) -> Tensor:
        x = ((image.float() - mean[:, None, None]) / std[:, None, None])[None]
        x = F.pad(x, (0, -width % 8, 0, -height % 8)).to(dtype, memory_format=torch.channels_last)
        return model(x)[..., :height, :width].argmax(1)

    image = torch.randint(256, (3, height, width), dtype=torch.uint8, device=_device())

    def run() -> None:
        with torch.no_grad():
            labels(image)

    return _timed(run, spec.repeats)


def _after_network(spec: Spec) -> float:
    """From a head's logits to a counted label map, on the CPU."""
    torch.set_num_threads(2)
    cfg = _config(spec)
    cfg.model.backbone.depth = 50  # it does not run
    model = MODELS.build(cfg.model).eval()
    classes = model.num_classes
    height, width = spec.size
    logits = 4 * torch.randn(1, classes, -(-height // 8), -(-width // 8))
    model.decode_head.forward = lambda _: logits
    model.extract_feat = lambda inputs: inputs
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dict(classes=[str(i) for i in range(classes)])
    blocks = torch.randint(classes, (1, 1, -(-height // 16), -(-width // 16))).float()
    label = F.interpolate(blocks, scale_factor=16)[0, :, :height, :width].long()
    meta = dict(ori_shape=spec.size, img_shape=spec.size, pad_shape=spec.size, img_path='a.jpg')
    image = torch.zeros(1, 3, height, width)

    def run() -> None:
        sample = SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label))
        with torch.no_grad():
            samples = model.predict(image, [sample])
        metric.process({}, [sample.to_dict() for sample in samples])

    return _timed(run, spec.repeats)


def write_data_set(root: Path, sizes: list[tuple[int, int]], classes: int, suffix: str = '.jpg') -> None:
    """Writes images of smooth noise and label maps of blocks, in ADE20K's layout; labels begin with 0.

    Of each size there are up to ``DIFFERENT``; the others are links to them.
    """
    random = np.random.default_rng(0)
    for folder in ('images', 'annotations'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f'images/{{:05}}{suffix}', 'annotations/{:05}.png']
    files: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (width, height) in enumerate(sizes):
        same = files[width, height]
        if len(same) >= DIFFERENT:
            for name in names:
                (root / name.format(i)).hardlink_to(root / name.format(same[i % DIFFERENT]))
            continue
        same.append(i)
        coarse = random.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        blocks = random.integers(0, classes, coarse.shape[:2], np.uint8).repeat(16, 0).repeat(16, 1)
        for name, picture in zip(names, (cv2.resize(coarse, (width, height)), blocks[:height, :width]), strict=True):
            cv2.imwrite(str(root / name.format(i)), picture)


def sizes_of(spec: Spec) -> list[tuple[int, int]]:
    """Returns the width and height of each image of the data set."""
    if spec.size:
        return [spec.size[::-1]] * spec.repeats
    shares = np.array(list(ADE_SIZES.values()))
    drawn = np.random.default_rng(0).choice(len(shares), spec.repeats, p=shares / shares.sum())
    return [list(ADE_SIZES)[i] for i in drawn]


def _end_to_end(spec: Spec) -> float:
    """Tests a generated data set, from its files to the figures; the model is built before."""
    from mmengine.runner import Runner

    cfg = _config(spec)
    classes = cfg.model.decode_head.num_classes
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        cfg.randomness = dict(seed=0)
        large = spec.size is not None and spec.size[0] >= 1024
        suffix = '.png' if large else '.jpg'
        write_data_set(Path(folder), sizes_of(spec), classes, suffix)
        metainfo = dict(classes=[str(i) for i in range(classes)])
        prefix = dict(img_path='images', seg_map_path='annotations')
        pipeline = cfg.tta_pipeline if spec.task == 'tta' else cfg.test_dataloader.dataset.pipeline
        for step in pipeline if spec.size else ():
            if step.type == 'Resize':
                step.scale = spec.size[::-1]  # as they are
        cfg.test_dataloader.dataset = dict(
            type='mmseg.BaseSegDataset', data_root=folder, data_prefix=prefix, metainfo=metainfo, img_suffix=suffix,
            seg_map_suffix='.png', pipeline=pipeline,
        )  # fmt: skip
        for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg'):
            cfg[key] = None
        cfg.val_evaluator = cfg.load_from = None
        runner = Runner.from_cfg(cfg)
        model = runner.model
        model.init_weights()
        _settled(model, model._forward)
        if spec.side == 'ours':
            _speed_up(model, spec)
        if spec.task == 'tta':
            runner.model = MODELS.build(dict(cfg.tta_model, module=model))
        start = time.perf_counter()
        runner.test()
        return (time.perf_counter() - start) / spec.repeats * 1000


if __name__ == '__main__':
    hand_over(measure(Spec(**fields())))
