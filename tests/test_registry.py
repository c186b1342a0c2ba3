"""The registries: found by name from any OpenMMLab library, and mmsegmentation's names inherited with ours."""

import subprocess
import sys

import cv2
import mmcv.transforms
import mmengine.optim
import mmpretrain.registry
import mmseg.datasets
import mmseg.engine
import mmseg.models
import mmseg.registry
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope, Registry, root
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

import mmseg_resnest.registry
from mmseg_resnest import (
    ResNeSt,
    checkpointing,
    conv,
    heads,
    hooks,
    log_processor,
    metrics,
    norm,
    optim,
    randomness,
    sampler,
    segmentor,
    signals,
    transforms,
    tta,
    watch,
)

KINDS = {name: value for name, value in vars(root).items() if isinstance(value, Registry)}
OURS = {
    'MODELS': [
        ResNeSt,
        conv.DilatedConv2d,
        heads.AuthorsDeepLabV3Head,
        heads.AuthorsFCNHead,
        norm.SyncBatchNorm,
        segmentor.EncoderDecoder,
        tta.AuthorsTTAModel,
        tta.TTAModel,
    ],
    'OPTIM_WRAPPERS': [optim.AutocastOptimWrapper],
    'HOOKS': [
        checkpointing.CheckpointHook,
        hooks.BatchNormCheckHook,
        hooks.NonFiniteHook,
        hooks.ProgressBarHook,
        hooks.RuntimeInfoHook,
        hooks.SampleCheckHook,
        randomness.RandomnessHook,
        signals.SignalHook,
        watch.WatchHook,
    ],
    'METRICS': [metrics.IoUMetric],
    'LOG_PROCESSORS': [log_processor.LogProcessor],
    'DATA_SAMPLERS': [sampler.EqualSizeBatchSampler],
    'TRANSFORMS': [
        transforms.ImageTestTimeAug,
        transforms.PackByteLabels,
        transforms.PhotoMetricDistortion,
        transforms.RandomCrop,
    ],
}


def ours(kind):
    return getattr(mmseg_resnest.registry, kind)


def test_mmengines_kinds_are_known():
    assert len(KINDS) >= 23
    assert {'MODELS', 'TRANSFORMS', 'STRATEGIES', 'FUNCTIONS'} <= KINDS.keys()


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_has_a_child(kind):
    registry = ours(kind)
    assert KINDS[kind].children['mmseg_resnest'] is registry
    assert registry.parent is KINDS[kind]
    assert registry.scope == 'mmseg_resnest'
    assert registry.build_func is KINDS[kind].build_func
    assert registry._locations  # explicit: without any, MMEngine imports `mmseg_resnest.utils`, which is not there
    registry.import_from_location()
    assert set(registry.module_dict.values()) == set(OURS.get(kind, []))


# Every library asks in a process of its own, which has imported that library and not us.
FRESH = """
import importlib
import multiprocessing
import sys

import mmpretrain.models
import mmseg.models

def ask(library):
    registry = importlib.import_module(f'{library}.registry')
    assert not any(name.startswith('mmseg_resnest') for name in sys.modules)
    backbone = registry.MODELS.build(dict(type='mmseg_resnest.ResNeSt', depth=14, out_indices=(3,)))
    found = [
        type(backbone),
        registry.MODELS.get('mmseg_resnest.AuthorsDeepLabV3Head'),
        registry.OPTIM_WRAPPERS.get('mmseg_resnest.AutocastOptimWrapper'),
        registry.HOOKS.get('mmseg_resnest.BatchNormCheckHook'),
        registry.METRICS.get('mmseg_resnest.IoUMetric'),
    ]
    return [f'{cls.__module__}.{cls.__name__}' for cls in found] + [str(backbone.out_indices)]

with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
    for library, found in zip(LIBRARIES, pool.map(ask, LIBRARIES, chunksize=1)):
        print('found', library, *found)
"""


def test_found_by_libraries_that_never_heard_of_us(tmp_path):
    libraries = ['mmengine', 'mmseg', 'mmpretrain']
    command = [sys.executable, '-W', 'ignore', '-c', FRESH.replace('LIBRARIES', str(libraries))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        'mmseg_resnest.resnest.ResNeSt',
        'mmseg_resnest.heads.AuthorsDeepLabV3Head',
        'mmseg_resnest.optim.AutocastOptimWrapper',
        'mmseg_resnest.hooks.BatchNormCheckHook',
        'mmseg_resnest.metrics.IoUMetric',
        '(3,)',
    ]
    found = [line for line in done.stdout.splitlines() if line.startswith('found')]
    assert found == [' '.join(['found', library, *expected]) for library in libraries]


@pytest.mark.slow
def test_found_where_only_mmengine_is_imported(tmp_path):
    script = """
import sys
from mmengine.registry import MODELS
print('mmseg' in sys.modules, MODELS.get('mmseg_resnest.ResNeSt'))
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False <class 'mmseg_resnest.resnest.ResNeSt'>", done.stderr


def stamped(kind, cfg):
    """Builds as MMEngine builds a part of an inherited text config, in which the default scope is mmseg."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        return KINDS[kind].build(dict(cfg, _scope_='mmseg_resnest'))


@pytest.mark.parametrize(
    ('kind', 'cfg', 'expected'),
    [
        ('TRANSFORMS', dict(type='PackSegInputs'), mmseg.datasets.PackSegInputs),
        ('MODELS', dict(type='SegDataPreProcessor', size=(8, 8)), mmseg.models.SegDataPreProcessor),
        # Registered by mmcv too, where it knows no label maps.
        ('TRANSFORMS', dict(type='LoadAnnotations'), mmseg.datasets.transforms.LoadAnnotations),
        ('TRANSFORMS', dict(type='Resize', scale=(8, 8)), mmseg.registry.TRANSFORMS.get('Resize')),
        ('TRANSFORMS', dict(type='LoadImageFromFile'), mmcv.transforms.LoadImageFromFile),
        ('MODELS', dict(type='ResNeSt', depth=14), ResNeSt),
        ('MODELS', dict(type='mmseg_resnest.ResNeSt', depth=14), ResNeSt),
        ('MODELS', dict(type='mmseg.ResNeSt', depth=50), mmseg.models.ResNeSt),
        ('METRICS', dict(type='IoUMetric'), metrics.IoUMetric),
    ],
)
def test_names_in_an_inherited_text_config(kind, cfg, expected):
    assert type(stamped(kind, cfg)) is expected


def test_other_kinds_of_names():
    assert ours('HOOKS').get('SegVisualizationHook') is mmseg.engine.SegVisualizationHook
    assert ours('DATASETS').get('ADE20KDataset') is mmseg.datasets.ADE20KDataset
    assert ours('PARAM_SCHEDULERS').get('PolyLR') is mmengine.optim.PolyLR
    assert ours('OPTIM_WRAPPERS').get('OptimWrapper') is OptimWrapper
    assert ours('MODELS').get('torch.nn.Linear') is torch.nn.Linear


@pytest.mark.parametrize('kind', KINDS)
def test_every_name_of_mmsegmentation_means_the_same_here(kind):
    theirs = getattr(mmseg.registry, kind, KINDS[kind])
    theirs.import_from_location()
    names = {*theirs.module_dict, *KINDS[kind].module_dict} - ours(kind).module_dict.keys()
    assert {name for name in names if ours(kind).get(name) is not theirs.get(name)} == set()


@pytest.mark.parametrize(
    'name', ['NoSuchThing', 'mmseg_resnest.NoSuchThing', 'mmseg.NoSuchThing', 'nowhere.NoSuchThing']
)
@pytest.mark.parametrize('kind', ['MODELS', 'TRANSFORMS', 'STRATEGIES'])
def test_unknown_name(kind, name):
    assert ours(kind).get(name) is None
    with pytest.raises(KeyError, match=name):
        ours(kind).build(dict(type=name, _scope_='mmseg_resnest'))


def test_mmpretrains_classifier_takes_a_training_step():
    torch.manual_seed(0)
    cfg = dict(
        type='ImageClassifier',
        data_preprocessor=dict(type='ClsDataPreprocessor', mean=[128.0] * 3, std=[64.0] * 3),
        backbone=dict(type='mmseg_resnest.ResNeSt', depth=14, out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=2048, loss=dict(type='CrossEntropyLoss')),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = mmpretrain.registry.MODELS.build(cfg)
    assert type(model.backbone) is ResNeSt
    model.init_weights()
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    data = dict(inputs=list(images), data_samples=[DataSample().set_gt_label(i % 3) for i in range(4)])
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train().train_step(data, wrapper)
    assert losses['loss'].isfinite()
    assert losses['loss'] > 0
    # The batch norm behind a bias takes away what it adds.
    unchanged = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert all(name.endswith('fc1.bias') for name in unchanged)
    predictions = model.eval().test_step(data)
    assert torch.stack([sample.pred_score for sample in predictions]).sum(1).tolist() == pytest.approx([1] * 4)


DOWNSTREAM = """
_base_ = 'mmseg_resnest::resnest/pspnet_resnest50_camvid.py'

data = dict(data_root={root!r}, metainfo=dict(classes=('road', 'sky'), palette=[[0, 0, 0], [255, 255, 255]]))
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(96, 64))
train_pipeline[3].update(crop_size=(64, 64))
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(96, 64))
loading = dict(num_workers=0, persistent_workers=False)

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(depth=14, init_cfg=None),
    decode_head=dict(num_classes=2, channels=64),
    auxiliary_head=dict(num_classes=2),
)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline, **data), **loading)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data), **loading)
train_cfg = dict(max_iters=2, val_interval=2)
"""


def write_images(root):
    random = np.random.default_rng(0)
    for split, count in (('training', 4), ('validation', 2)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = (np.arange(64)[:, None] > random.integers(20, 44)) * np.ones((1, 96), np.uint8)
            image = np.clip(label[..., None] * 120 + random.normal(60, 20, (64, 96, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / 'images' / split / f'{i}.jpg'), image)
            cv2.imwrite(str(root / 'annotations' / split / f'{i}.png'), label.astype(np.uint8))


def test_training_from_a_downstream_text_config(tmp_path):
    write_images(tmp_path / 'data')
    (tmp_path / 'config.py').write_text(DOWNSTREAM.format(root=str(tmp_path / 'data')))
    cfg = Config.fromfile(tmp_path / 'config.py')
    cfg.work_dir = str(tmp_path / 'out')
    cfg.experiment_name = 'test_registry'
    cfg.randomness = dict(seed=0)
    runner = Runner.from_cfg(cfg)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    assert runner.iter == 2
    assert type(runner.model) is segmentor.EncoderDecoder
    assert type(runner.model.backbone) is ResNeSt
    assert type(runner.model.decode_head) is mmseg.models.PSPHead
    assert type(runner.optim_wrapper) is optim.AutocastOptimWrapper
    assert {hooks.BatchNormCheckHook, hooks.ProgressBarHook, mmseg.engine.SegVisualizationHook} <= {
        type(hook) for hook in runner.hooks
    }
    dataset = runner.train_dataloader.dataset
    assert type(dataset) is mmseg.datasets.BaseSegDataset
    assert [type(transform).__module__.split('.')[0] for transform in dataset.pipeline.transforms] == [
        'mmcv', 'mmseg', 'mmcv', 'mmseg_resnest', 'mmseg', 'mmseg_resnest', 'mmseg_resnest'
    ]  # fmt: skip
    assert type(dataset.pipeline.transforms[2].resize) is mmseg.registry.TRANSFORMS.get('Resize')
    assert dataset[0]['data_samples'].gt_sem_seg.data.unique().tolist() == [0, 1]
    (metric,) = runner.val_evaluator.metrics
    assert type(metric) is metrics.IoUMetric
    assert list(metric.per_class) == ['road', 'sky']
    unchanged = {name for name, p in runner.model.named_parameters() if torch.equal(p, before[name])}
    assert not [name for name in unchanged if not name.endswith('fc1.bias')]
    checkpoint = torch.load(tmp_path / 'out' / 'iter_2.pth', weights_only=False)
    assert checkpoint['state_dict'].keys() == runner.model.state_dict().keys()
