"""mmseg_resnest.benchmark.training: what it counts; its times are for real machines."""

import sys

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from tiny import ROOT
from torch import nn

from mmseg_resnest.benchmark.training import (
    KINDS,
    Spec,
    _configure,
    _covered,
    make_batch,
    measure,
    training_flop,
)

CONFIG = ROOT / 'configs' / 'deeplabv3_resnest50_ade20k.py'


def config(path=CONFIG, size=(64, 96)):
    init_default_scope('mmseg')
    cfg = Config.fromfile(path)
    cfg.model.data_preprocessor.size = size
    return cfg


def kind_of(kernel):
    return next(kind for part, kind in KINDS.items() if part in kernel.lower())


@pytest.mark.parametrize(
    ('kernel', 'kind'),
    [
        ('triton_poi_fused_add_relu_12', 'compiled elementwise work'),
        ('triton_red_fused_mean_3', 'compiled reductions'),
        ('triton_per_fused_native_batch_norm_backward_1', 'compiled reductions'),
        ('_log_softmax_kernel', 'fused losses'),
        ('void at::native::upsample_bilinear2d_backward_nhwc_out_frame', 'upsampling of logits'),
        ('void cudnn::ops::nchwToNhwcKernel<__half, ...>', 'layout conversions'),
        ('void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>', 'optimiser'),
        ('nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNN', 'convolutions and matrix products'),
        ('sm90_xmma_fprop_implicit_gemm_bf16', 'convolutions and matrix products'),
        ('Memcpy DtoD (Device -> Device)', 'copies'),
        ('void at::native::vectorized_elementwise_kernel<4, AddFunctor>', 'other elementwise work'),
    ],
)
def test_kinds_of_work(kernel, kind):
    assert kind_of(kernel) == kind


def test_operations_are_three_times_those_of_the_forward_pass():
    """Counted by hand for every convolution, which are all that the counter counts."""
    cfg = config(ROOT / 'configs' / 'fcn_resnest50_ade20k.py', size=(64, 64))
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).eval()
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        total += 2 * conv.weight[0].numel() * output.numel()

    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        conv.register_forward_hook(count)
    with torch.no_grad():
        features = model.extract_feat(torch.zeros(1, 3, 64, 64))
        model.decode_head(features)
        model.auxiliary_head(features)
    assert training_flop('ours', cfg) == 3 * total


def test_smps_side_has_smps_architecture():
    """Its head and graph, no auxiliary head, and fewer operations than the whole config's."""
    cfg = config()
    whole = training_flop('ours', cfg)
    assert 0 < training_flop('ours-smp', cfg) == training_flop('smp', cfg) < whole
    _configure('ours-smp', cfg)
    assert (cfg.model.backbone.graph, cfg.model.auxiliary_head) == ('timm', None)


def test_operations_of_another_backbone():
    cfg = config()
    backbone = dict(type='mmseg.ResNetV1c', depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))
    cfg.model.backbone = ConfigDict(backbone)
    assert 0 < training_flop('ours', cfg) < training_flop('ours', config())


def test_the_batch_is_what_a_loader_gives():
    cfg = config()
    cfg.train_dataloader.batch_size = 3
    batch = make_batch(cfg, 'cpu')
    assert [image.shape for image in batch['inputs']] == [(3, 64, 96)] * 3
    assert {batch['inputs'][0].dtype, batch['data_samples'][0].gt_sem_seg.data.dtype} == {torch.uint8}
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch['data_samples']])
    assert labels.shape == (3, 1, 64, 96)
    assert (labels.min(), labels.max()) == (0, 149)
    assert torch.equal(batch['inputs'][0], make_batch(cfg, 'cpu')['inputs'][0])


def test_without_smp_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(ImportError, match=r'--against smp needs .*: pip install segmentation-models-pytorch'):
        measure(Spec('smp', str(CONFIG)))


def test_time_that_spans_cover_counts_once():
    spans = [(0, 1000, 'a'), (500, 1500, 'b'), (3100, 3200, 'd'), (3000, 4000, 'c')]
    assert _covered(spans) == 2.5
    assert _covered([]) == 0
