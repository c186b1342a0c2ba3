"""How fast a config trains, beside mmsegmentation or segmentation_models.pytorch: whole steps on one batch.

``python -m mmseg_resnest.benchmark.training SPEC`` measures one side in a process of its own.
A step is preprocessing, forward pass, losses, gradient and optimiser; the data pipeline is not in it.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor
from torch.nn import functional as F

from mmseg_resnest.benchmark.alone import fields, hand_over
from mmseg_resnest.benchmark.peers import mmseg_config, smp_model
from mmseg_resnest.resnest import SplitAttentionConv2d
from mmseg_resnest.segmentor import widen_labels
from mmseg_resnest.training_pass import held_by_graphs

OURS = ('ours', 'ours-eager')
PEERS = {
    'mmseg': (*OURS, 'mmseg-fp16', 'mmseg-bf16'),
    # the smaller architecture that segmentation_models.pytorch has, in both
    'smp': ('ours-smp', 'ours-smp-eager', 'smp'),
}
# Part of a kernel's name -> kind of work; the first that fits.
KINDS = {
    'nccl': 'communication',
    'triton_poi': 'compiled elementwise work',
    'triton_red': 'compiled reductions',
    'triton_per': 'compiled reductions',
    'softmax_kernel': 'fused losses',
    'gradient_kernel': 'fused losses',
    'gather_kernel': 'fused losses',
    'upsample': 'upsampling of logits',
    'topk': 'top-k of logits',
    'bn_': 'batch norm',
    'batch_norm': 'batch norm',
    'nchwtonhwc': 'layout conversions',
    'nhwctonchw': 'layout conversions',
    'multi_tensor': 'optimiser',
    'nvjet': 'convolutions and matrix products',
    'gemm': 'convolutions and matrix products',
    'conv': 'convolutions and matrix products',
    'cutlass': 'convolutions and matrix products',
    'cudnn': 'convolutions and matrix products',
    'memcpy': 'copies',
    'memset': 'copies',
    'copy': 'copies',
    '': 'other elementwise work',
}


@dataclass(frozen=True)
class Spec:
    """One measurement of one side.

    Attributes:
        side: One of those in ``PEERS``, or ``'ceiling'``: the rate of a large matrix product.
        config: Path of the config.
        steps: Measured steps, after three others.
        options: Overrides of the config.
    """

    side: str
    config: str
    steps: int = 10
    options: dict | None = None


def measure(spec: Spec) -> dict:
    """Measures in this process.

    Returns:
        ``images_per_s`` and ``ms`` of the median step; ``gib``, the peak from the first step on of what tensors have
        and CUDA graphs keep; ``first_step_s``; ``tflop`` a step; ``steps``; ``graphs`` and ``graph_breaks`` of
        torch.compile; on a GPU ``kinds``: the milliseconds of a step by kind of work. Of the ceiling only
        ``tflop_per_s``.
    """
    if spec.side == 'ceiling':
        return dict(tflop_per_s=matrix_ceiling())
    start = time.perf_counter()
    step, images, flop = prepare(spec)
    first = time.perf_counter() - start
    return dict(first_step_s=first, tflop=flop / 1e12, **time_steps(step, images, spec.steps))


def matrix_ceiling() -> float:
    """Returns how many TFLOP/s a large matrix product reaches in the format that trains there, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if _device() == 'cuda' else (512, torch.float32)
    a, b = (torch.randn(size, size, device=_device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b, 10) / 1e12


def prepare(spec: Spec) -> tuple[Callable[[], object], int, float]:
    """Builds a side and takes its first steps.

    Returns:
        Its step, the images and the floating-point operations of one.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    init_default_scope('mmseg')
    cfg = Config.fromfile(spec.config)
    cfg.merge_from_dict(spec.options or {})
    batch = make_batch(cfg, _device())
    if not spec.side.startswith('ours'):
        widen_labels(batch['data_samples'])
    build = dict(smp=_smp_step).get(spec.side, _segmentor_step)
    step = build(spec.side, cfg.copy(), batch)
    images = len(batch['inputs'])
    for _ in range(3):
        step()
    return step, images, images * training_flop(spec.side, cfg)


def make_batch(cfg: Config, device: str) -> dict:
    """Returns a batch as our loaders give it: uint8 images and labels of the config's crop and batch size."""
    height, width = cfg.model.data_preprocessor.size
    classes = cfg.model.decode_head.num_classes
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(cfg.train_dataloader.batch_size):
        inputs.append(torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8).to(device))
        label = torch.randint(classes, (1, height, width), generator=generator, dtype=torch.uint8).to(device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(img_shape=(height, width))))
    return dict(inputs=inputs, data_samples=samples)


def time_steps(step: Callable[[], object], images: int, steps: int) -> dict:
    """Returns the figures of a prepared step; see ``measure``."""
    from torch._dynamo.utils import counters

    first = torch.cuda.max_memory_allocated()
    if _device() == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = _median_seconds(step, steps)
    figures = dict(images_per_s=images / seconds, ms=seconds * 1000, gib=float('nan'), steps=steps)
    figures |= dict(graphs=counters['stats']['unique_graphs'], graph_breaks=sum(counters['graph_break'].values()))
    if _device() == 'cuda':
        # While graphs are captured, tensors have what the graphs hold afterwards.
        gib = max(first, torch.cuda.max_memory_allocated() + held_by_graphs().total()) / 2**30
        figures |= dict(gib=gib, kinds=profile(step))
    return figures


def profile(step: Callable[[], object]) -> dict[str, float]:
    """Returns kind of work -> its milliseconds on the GPU in a step; of communication also what is not covered."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kinds, spans = Counter(), []
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name = event.name.lower()
            kind = next(kind for part, kind in KINDS.items() if part in name)
            kinds[kind] += event.self_device_time_total / 1000
            spans.append((event.time_range.start, event.time_range.end, kind))
    if 'communication' in kinds:
        others = [span for span in spans if span[2] != 'communication']
        kinds['communication, not overlapped'] = _covered(spans) - _covered(others)
    return dict(kinds.most_common())


def _covered(spans: list[tuple[float, float, str]]) -> float:
    """Returns the milliseconds in which at least one of the spans, in microseconds, runs."""
    covered, until = 0.0, float('-inf')
    for start, end, _ in sorted(spans):
        covered += max(end - max(start, until), 0)
        until = max(until, end)
    return covered / 1000


def training_flop(side: str, cfg: Config) -> float:
    """Returns the floating-point operations of an image: three times the forward pass's, 2 a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = cfg.copy()
    _configure(side, cfg)
    with torch.device('meta'):
        model = MODELS.build(cfg.model).eval()
        for module in model.modules():
            if isinstance(module, SplitAttentionConv2d):
                module.execution = 'grouped'  # a dense one multiplies zeros too
        image = torch.empty(1, 3, *cfg.model.data_preprocessor.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.extract_feat(image)
        for head in (model.decode_head, model.auxiliary_head) if model.with_auxiliary_head else (model.decode_head,):
            head(features)
    return 3 * counter.get_total_flops()


def _configure(side: str, cfg: Config) -> None:
    """Sets what a side of this package has, or what stands in for one in counting operations."""
    cfg.model.backbone.init_cfg = None
    if side.endswith('eager'):
        cfg.model.update(compiled=False, cuda_graphs=False)
    if 'smp' in side:
        head = cfg.model.decode_head
        options = dict(channels=256, dilations=(12, 24, 36), in_channels=2048, in_index=3, norm_cfg=dict(type='BN'))
        loss = dict(type='CrossEntropyLoss', avg_non_ignore=True)
        cfg.model.decode_head = dict(
            type='mmseg_resnest.AuthorsDeepLabV3Head', num_classes=head.num_classes, loss_decode=loss, **options
        )
        cfg.model.auxiliary_head = None
        cfg.model.backbone.graph = 'timm'


def _segmentor_step(side: str, cfg: Config, batch: dict) -> Callable[[], object]:
    wrapper = cfg.optim_wrapper
    if side.startswith('mmseg'):
        cfg = mmseg_config(cfg)
        dtype = dict(fp16='float16', bf16='bfloat16')[side[-4:]]
        scale = dict(loss_scale='dynamic') if dtype == 'float16' else {}
        wrapper = dict(type='AmpOptimWrapper', dtype=dtype, optimizer=cfg.optim_wrapper.optimizer, **scale)
        if _device() == 'cpu':  # where AMP is refused; ours does without it too
            wrapper = dict(type='OptimWrapper', optimizer=wrapper['optimizer'])
    else:
        _configure(side, cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(_device()).train()
    if side == 'mmseg-bf16':
        model = model.to(memory_format=torch.channels_last)
        forward = model.data_preprocessor.forward

        def channels_last(*args) -> dict:
            data = forward(*args)
            return data | dict(inputs=data['inputs'].to(memory_format=torch.channels_last))

        model.data_preprocessor.forward = channels_last
    optim_wrapper = build_optim_wrapper(model, wrapper)
    return lambda: model.train_step(batch, optim_wrapper)


def _smp_step(side: str, cfg: Config, batch: dict) -> Callable[[], object]:
    """Its DeepLabV3 on timm's ResNeSt, bfloat16, channels-last, network and loss compiled together."""
    preprocessor = cfg.model.data_preprocessor
    model = smp_model(cfg, channels=256)
    model = model.to(_device(), memory_format=torch.channels_last).train()
    options = {key: value for key, value in cfg.optim_wrapper.optimizer.items() if key != 'type'}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    mean, std = (torch.tensor(preprocessor[key], device=_device())[:, None, None] for key in ('mean', 'std'))

    @torch.compile(dynamic=False)
    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, ignore_index=255)

    def step() -> None:
        images = ((torch.stack(batch['inputs']).float() - mean) / std).to(memory_format=torch.channels_last)
        labels = torch.cat([sample.gt_sem_seg.data for sample in batch['data_samples']])
        with torch.autocast(_device(), torch.bfloat16):
            loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for i in range(-1, repeats):
        start = time.perf_counter()
        run()
        if _device() == 'cuda':
            torch.cuda.synchronize()
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


if __name__ == '__main__':
    hand_over(measure(Spec(**fields())))
