"""The configs: what each leaf says, which classes it means, that all ways in mean the same, and that it trains."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.model import PretrainedInit
from mmengine.optim import PolyLR, build_optim_wrapper
from mmengine.registry import DefaultScope, root
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.structures import PixelData
from mmseg.datasets import (
    ADE20KDataset,
    BaseSegDataset,
    CityscapesDataset,
    PascalContextDataset59,
)
from mmseg.models import (
    ASPPHead,
    CrossEntropyLoss,
    DepthwiseSeparableASPPHead,
    FCNHead,
    PSPHead,
    SegDataPreProcessor,
)
from mmseg.structures import SegDataSample

import mmseg_resnest
from mmseg_resnest import ResNeSt, demo
from mmseg_resnest.checkpointing import CheckpointHook
from mmseg_resnest.conv import DilatedConv2d
from mmseg_resnest.datasets import check_classes
from mmseg_resnest.heads import AuthorsDeepLabV3Head, AuthorsFCNHead
from mmseg_resnest.hooks import BatchNormCheckHook, ProgressBarHook
from mmseg_resnest.log_processor import LogProcessor
from mmseg_resnest.metrics import IoUMetric
from mmseg_resnest.optim import AutocastOptimWrapper
from mmseg_resnest.prepare import PASCAL_CONTEXT_IDS
from mmseg_resnest.segmentor import EncoderDecoder
from mmseg_resnest.transforms import PackByteLabels, PhotoMetricDistortion
from mmseg_resnest.tta import TTAModel

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
FLAT = Path(mmseg_resnest.__file__).parent / 'configs'

SETS = ('ade20k', 'cityscapes')
LEAVES = sorted(
    [
        f'{head}_resnest{d}_{s}'
        for head in ('fcn', 'pspnet', 'deeplabv3', 'deeplabv3plus')
        for d in (50, 101)
        for s in SETS
    ]
    + [f'{head}_resnest{depth}_{s}' for head in ('pspnet', 'deeplabv3') for depth in (200, 269) for s in SETS]
    + [f'deeplabv3_resnest{d}_{s}_authors' for d in (50, 101, 200, 269) for s in ('ade20k', 'pascal_context')]
    + [f'fcn_resnest50_{s}_authors' for s in ('ade20k', 'pascal_context')]
    + ['pspnet_resnest50_camvid']
)
DEMO = 'pspnet_resnest14_demo'

# mIoU and mIoU with multi-scale and flip: mmsegmentation's model zoo, S-101-D8.
PUBLISHED_BY_MMSEG = {
    'fcn_resnest101_cityscapes': ('77.56', '78.98'),
    'pspnet_resnest101_cityscapes': ('78.57', '79.19'),
    'deeplabv3_resnest101_cityscapes': ('79.67', '80.51'),
    'deeplabv3plus_resnest101_cityscapes': ('79.62', '80.27'),
    'fcn_resnest101_ade20k': ('45.62', '46.16'),
    'pspnet_resnest101_ade20k': ('45.44', '46.28'),
    'deeplabv3_resnest101_ade20k': ('45.71', '46.59'),
    'deeplabv3plus_resnest101_ade20k': ('46.47', '47.27'),
}
# Pixel accuracy and mIoU with multi-scale and flip: the authors' model zoo. Then the epochs of their recipe.
PUBLISHED_BY_AUTHORS = {
    'fcn_resnest50_ade20k_authors': ('80.18', '42.94', 120),
    'deeplabv3_resnest50_ade20k_authors': ('81.17', '45.12', 120),
    'deeplabv3_resnest101_ade20k_authors': ('82.07', '46.91', 180),
    'deeplabv3_resnest200_ade20k_authors': ('82.45', '48.36', 180),
    'deeplabv3_resnest269_ade20k_authors': ('82.62', '47.60', 120),
    'fcn_resnest50_pascal_context_authors': ('79.19', '51.98', 80),
    'deeplabv3_resnest50_pascal_context_authors': ('80.41', '53.19', 80),
    'deeplabv3_resnest101_pascal_context_authors': ('81.91', '56.49', 80),
    'deeplabv3_resnest200_pascal_context_authors': ('82.50', '58.37', 80),
    'deeplabv3_resnest269_pascal_context_authors': ('83.06', '58.92', 80),
}
NUM_CLASSES = {'ade20k': 150, 'cityscapes': 19, 'camvid': 11, 'pascal': 59}
RATES = {'pascal': 0.001}  # at batch 16; elsewhere 0.01
SIZES = {'ade20k': (512, 512), 'cityscapes': (512, 1024), 'camvid': (360, 480), 'authors': (480, 480)}

# Under which key a typed dict stands, and the kind of registry that its type is looked up in.
KINDS = {
    'MODELS': 'model data_preprocessor backbone decode_head auxiliary_head loss_decode norm_cfg conv_cfg tta_model '
    'authors_tta_model',
    'WEIGHT_INITIALIZERS': 'init_cfg',
    'DATASETS': 'dataset',
    'DATA_SAMPLERS': 'sampler batch_sampler',
    'TRANSFORMS': 'pipeline train_pipeline test_pipeline tta_pipeline transforms',
    'METRICS': 'val_evaluator test_evaluator',
    'OPTIM_WRAPPERS': 'optim_wrapper',
    'OPTIMIZERS': 'optimizer',
    'PARAM_SCHEDULERS': 'param_scheduler',
    'LOOPS': 'train_cfg val_cfg test_cfg',
    'VISUALIZERS': 'visualizer',
    'VISBACKENDS': 'vis_backends',
    'LOG_PROCESSORS': 'log_processor',
}
KIND_OF = {key: kind for kind, keys in KINDS.items() for key in keys.split()}


def leaf_path(leaf: str) -> Path:
    return CONFIGS / f'{leaf}.py'


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()), clean=False)


def data_of(leaf: str) -> str:
    return leaf.split('_')[2]


def typed_dicts(node, path=(), scope=None):
    """Yields (path, type, scope) of every dict with a type; an inherited dict's ``_scope_`` holds for what is in it."""
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        if 'type' in node:
            yield path, node['type'], scope
        for key, value in node.items():
            yield from typed_dicts(value, (*path, key), scope)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from typed_dicts(value, (*path, i), scope)


def classes_of(cfg: Config) -> dict[str, type | None]:
    """Returns path -> class of every typed dict, found as MMEngine's ``build`` finds it."""
    found = {}
    with DefaultScope.overwrite_default_scope('mmseg'):
        for path, name, scope in typed_dicts(cfg.to_dict()):
            key = next(part for part in reversed(path) if isinstance(part, str))
            kind = 'HOOKS' if path[0] in ('default_hooks', 'custom_hooks') else KIND_OF[key]
            with getattr(root, kind).switch_scope_and_registry(scope) as registry:
                found['.'.join(map(str, path))] = registry.get(name)
    return found


def main_classes(leaf: str) -> dict[str, type]:
    """What the reader of a leaf takes its main parts for."""
    head, _, data, *authors = leaf.split('_')
    heads = dict(fcn=FCNHead, pspnet=PSPHead, deeplabv3=ASPPHead, deeplabv3plus=DepthwiseSeparableASPPHead)
    if authors:
        heads = dict(fcn=AuthorsFCNHead, deeplabv3=AuthorsDeepLabV3Head)
    data_set = dict(
        ade20k=ADE20KDataset, cityscapes=CityscapesDataset, camvid=BaseSegDataset, pascal=PascalContextDataset59
    )[data]
    return {
        'model': EncoderDecoder,
        'model.data_preprocessor': SegDataPreProcessor,
        'model.backbone': ResNeSt,
        'model.backbone.norm_cfg': torch.nn.BatchNorm2d,
        'model.backbone.init_cfg': PretrainedInit,
        'model.decode_head': heads[head],
        'model.decode_head.loss_decode': CrossEntropyLoss,
        'model.auxiliary_head': AuthorsFCNHead if authors else FCNHead,
        **({'model.decode_head.conv_cfg': DilatedConv2d} if head == 'deeplabv3' and not authors else {}),
        'tta_model': TTAModel,
        'train_dataloader.dataset': data_set,
        'val_dataloader.dataset': data_set,
        'test_dataloader.dataset': data_set,
        'train_dataloader.dataset.pipeline.6' if authors else 'train_dataloader.dataset.pipeline.5': (
            PackByteLabels if authors else PhotoMetricDistortion
        ),
        'train_dataloader.sampler': DefaultSampler if authors else InfiniteSampler,
        'test_dataloader.sampler': DefaultSampler,
        'val_evaluator': IoUMetric,
        'test_evaluator': IoUMetric,
        'optim_wrapper': AutocastOptimWrapper,
        'optim_wrapper.optimizer': torch.optim.SGD,
        'param_scheduler.0': PolyLR,
        'train_cfg': EpochBasedTrainLoop if authors else IterBasedTrainLoop,
        'default_hooks.checkpoint': CheckpointHook,
        'custom_hooks.0': BatchNormCheckHook,
        'custom_hooks.1': ProgressBarHook,
        'log_processor': LogProcessor,
    }


# ---------------------------------------------------------------------------------------------------- what is there


def test_the_leaves_are_those_promised():
    assert {path.stem for path in CONFIGS.glob('*.py')} - {DEMO} == set(LEAVES)


@pytest.mark.parametrize('leaf', LEAVES)
def test_two_levels_of_inheritance(leaf):
    bases = re.findall(r"'(_base_/\w+\.py)'", leaf_path(leaf).read_text())
    assert bases
    for base in bases:
        assert '_base_ =' not in (CONFIGS / base).read_text()


@pytest.mark.parametrize('leaf', LEAVES)
def test_docstring_tells_commands_cost_and_what_is_published(leaf):
    text = docstring(leaf_path(leaf))
    assert f'    python tools/train.py configs/{leaf}.py' in text
    assert f'    python tools/test.py configs/{leaf}.py CHECKPOINT' in text
    assert set(re.findall(r'configs/(\w+)\.py', text)) == {leaf}
    assert re.search(r'^GPU hours: (not measured|\d)', text, re.M)
    published = re.search(r'^Published: .*(\n.*)*', text, re.M)[0]
    if leaf in PUBLISHED_BY_MMSEG:
        single, multi = PUBLISHED_BY_MMSEG[leaf]
        assert published.startswith(f'Published: mIoU {single}, with multi-scale and flip {multi} (mmsegmentation')
    elif leaf in PUBLISHED_BY_AUTHORS:
        accuracy, miou, _ = PUBLISHED_BY_AUTHORS[leaf]
        assert published.startswith(
            f'Published: pixel accuracy {accuracy}, mIoU {miou}, multi-scale and flip (model zoo'
        )
        assert 'zhanghang1989/PyTorch-Encoding' in published
    else:
        assert published.startswith('Published: nothing')
        assert not re.search(r'\d\d\.\d\d', published.partition('Measured')[0])


@pytest.mark.parametrize('leaf', LEAVES)
def test_docstring_offers_tta_where_it_is_there(leaf):
    assert ('[--tta]' in docstring(leaf_path(leaf))) == ('tta_pipeline' in Config.fromfile(leaf_path(leaf)))


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if data_of(leaf) != 'camvid'])
def test_title_is_the_recipe_below(leaf):
    cfg = Config.fromfile(leaf_path(leaf))
    name, depth = re.match(r'(\S+) with ResNeSt-(\d+) on ', docstring(leaf_path(leaf))).groups()
    crop, batch, length, unit = re.search(
        r'(\d+x\d+), batch (\d+), (\d+)(k iterations| epochs)', docstring(leaf_path(leaf))
    ).groups()
    assert name.lower().replace('+', 'plus') == leaf.split('_')[0]
    assert cfg.model.backbone.depth == int(depth)
    assert cfg.model.backbone.init_cfg.checkpoint == f'resnest://resnest{depth}'
    assert cfg.train_dataloader.batch_size == int(batch)
    (cropping,) = (part for part in cfg.train_dataloader.dataset.pipeline if part.type.endswith('RandomCrop'))
    assert crop == 'x'.join(map(str, cropping.crop_size))
    assert tuple(cfg.model.data_preprocessor['size']) == tuple(cropping.crop_size)
    iterations = unit == 'k iterations'
    assert cfg.train_cfg['max_iters' if iterations else 'max_epochs'] == int(length) * (1000 if iterations else 1)
    assert cfg.param_scheduler[0].end == int(length) * (1000 if iterations else 1)


@pytest.mark.parametrize('leaf', LEAVES)
def test_recipe(leaf):
    cfg = Config.fromfile(leaf_path(leaf))
    authors = leaf.endswith('authors')
    heads = (cfg.model.decode_head, cfg.model.auxiliary_head)
    schedule = cfg.param_scheduler[0]
    crop = SIZES['authors' if authors else data_of(leaf)]
    assert cfg.optim_wrapper.optimizer == dict(
        type='SGD', lr=RATES.get(data_of(leaf), 0.01), momentum=0.9, weight_decay=1e-4 if authors else 5e-4, fused=True
    )
    assert (schedule.power, schedule.eta_min) == ((0.9, 0) if authors else (0.9, 1e-4))
    assert [head.loss_decode.loss_weight for head in heads] == [1.0, 0.2 if authors else 0.4]
    assert [head.loss_decode.get('avg_non_ignore', False) for head in heads] == [authors, authors]
    assert [head.align_corners for head in heads] == [authors, authors]
    assert tuple(cfg.model.data_preprocessor['size']) == crop
    assert cfg.model.backbone.output_stride == 8
    assert 'graph' not in cfg.model.backbone  # the authors'
    if authors:
        assert cfg.train_cfg.max_epochs == PUBLISHED_BY_AUTHORS[leaf][2]
        assert cfg.model.test_cfg == dict(mode='slide', crop_size=(480, 480), stride=(320, 320))
        multipliers = cfg.optim_wrapper.paramwise_cfg.custom_keys
        assert multipliers == dict(decode_head=dict(lr_mult=10.0), auxiliary_head=dict(lr_mult=10.0))
    else:
        assert cfg.model.test_cfg == dict(mode='whole')
        assert 'paramwise_cfg' not in cfg.optim_wrapper
        length = {'ade20k': 160_000, 'cityscapes': 80_000}.get(data_of(leaf), schedule.end)
        assert cfg.train_cfg.max_iters == schedule.end == length


@pytest.mark.parametrize('leaf', LEAVES)
def test_heads_and_data_agree_on_the_classes(leaf):
    cfg = Config.fromfile(leaf_path(leaf))
    classes = classes_of(cfg)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        meta = cfg[loader].dataset.get('metainfo', classes[f'{loader}.dataset'].METAINFO)
        assert len(set(meta['classes'])) == len(meta['classes']) == len(meta['palette']) == NUM_CLASSES[data_of(leaf)]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == NUM_CLASSES[data_of(leaf)]


def test_pascal_contexts_classes_are_in_the_order_of_its_ids():
    """In the order of the authors: theirs are the places of the sorted ids, of names that are sorted, too."""
    classes = PascalContextDataset59.METAINFO['classes']
    assert list(classes) == sorted(classes)
    assert list(PASCAL_CONTEXT_IDS) == sorted(PASCAL_CONTEXT_IDS)
    ids = dict(zip(classes, PASCAL_CONTEXT_IDS, strict=True))
    assert (ids['aeroplane'], ids['grass'], ids['person'], ids['tree'], ids['wood']) == (2, 187, 284, 420, 458)


# ------------------------------------------------------------------------------------------------------- inheritance


@pytest.mark.parametrize('leaf', LEAVES)
def test_every_type_is_the_class_that_it_is_taken_for(leaf, tmp_path):
    text, pure = tmp_path / 'text.py', tmp_path / 'pure.py'
    text.write_text(f"_base_ = 'mmseg_resnest::resnest/{leaf}.py'\n")
    pure.write_text(
        f'from mmengine.config import read_base\n\nwith read_base():\n    from mmseg_resnest.configs.{leaf} import *\n'
    )
    direct = classes_of(Config.fromfile(leaf_path(leaf)))
    assert not [path for path, found in direct.items() if found is None]
    expected = main_classes(leaf)
    assert {path: direct[path] for path in expected} == expected
    assert Config.fromfile(text).model['_scope_'] == 'mmseg_resnest'
    assert classes_of(Config.fromfile(text)) == direct
    assert classes_of(Config.fromfile(pure)) == direct


def test_no_flat_copy_is_missing_or_left_over():
    leaves = {path.name for path in CONFIGS.glob('*.py')}
    assert {path.name for path in FLAT.glob('*.py')} == leaves | {'__init__.py'}


@pytest.mark.parametrize('leaf', sorted(path.stem for path in CONFIGS.glob('*.py')))
def test_flat_copy_is_fresh(leaf):
    flat = FLAT / f'{leaf}.py'
    assert Config.fromfile(flat).to_dict() == Config.fromfile(leaf_path(leaf)).to_dict(), 'stale: run `make configs`'
    note = f'\nGenerated from configs/{leaf}.py by `make configs`; edit that file.\n'
    assert docstring(flat) == docstring(leaf_path(leaf)) + note
    assert '_base_' not in flat.read_text()


@pytest.fixture
def flatten_configs():
    spec = importlib.util.spec_from_file_location('flatten_configs', ROOT / 'tools' / 'flatten_configs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flattening_writes_every_leaf_and_removes_what_has_none(flatten_configs, tmp_path, monkeypatch, capsys):
    package, leaves = tmp_path / 'package', tmp_path / 'leaves'
    (package / 'configs').mkdir(parents=True)
    (package / 'configs' / '__init__.py').write_text('"""Kept."""\n')
    (package / 'configs' / 'gone.py').write_text('a = 1\n')
    leaves.mkdir()
    (leaves / 'base.py').write_text('"""Base."""\na = dict(b=1, c=(2, 3))\n')
    (leaves / 'leaf.py').write_text('"""Leaf.\n\nMore.\n"""\n_base_ = "base.py"\na = dict(b=4)\n')
    monkeypatch.setattr(flatten_configs, 'PACKAGE', package)
    monkeypatch.setattr(flatten_configs, 'LEAVES', leaves)
    flatten_configs.main()
    assert {path.name for path in (package / 'configs').iterdir()} == {'__init__.py', 'base.py', 'leaf.py'}
    names = {}
    exec((package / 'configs' / 'leaf.py').read_text(), names)
    assert names['a'] == dict(b=4, c=(2, 3))
    assert names['__doc__'] == 'Leaf.\n\nMore.\n\nGenerated from configs/leaf.py by `make configs`; edit that file.\n'
    assert (package / 'configs' / '__init__.py').read_text() == '"""Kept."""\n'
    assert 'Wrote 2 files' in capsys.readouterr().out


def test_flat_copy_is_what_the_command_writes(flatten_configs):
    leaf = 'deeplabv3_resnest101_ade20k'
    assert (FLAT / f'{leaf}.py').read_text() == flatten_configs.flatten(leaf_path(leaf))


# ---------------------------------------------------------------------------------------------------- what they do

# Where a data set keeps its files: image, label, and what a label of 1 means to the loss.
LAYOUTS = {
    'pspnet_resnest50_ade20k': ('images/{}/a.jpg', 'annotations/{}/a.png', 'training', 'validation', 0),
    'fcn_resnest50_ade20k_authors': ('images/{}/a.jpg', 'annotations/{}/a.png', 'training', 'validation', 0),
    'fcn_resnest50_pascal_context_authors': ('JPEGImages/a.jpg', 'SegmentationClassContext/a.png', 'train', 'val', 0),
    'pspnet_resnest50_camvid': ('images/{}/a.jpg', 'annotations/{}/a.png', 'training', 'validation', 1),
    'pspnet_resnest50_cityscapes': (
        'leftImg8bit/{}/x/a_leftImg8bit.png',
        'gtFine/{}/x/a_gtFine_labelTrainIds.png',
        'train',
        'val',
        1,
    ),
}


@pytest.mark.parametrize('leaf', LAYOUTS)
def test_pipelines_on_a_file(leaf, tmp_path):
    image, label, training, validation, one = LAYOUTS[leaf]
    for split in (training, validation):
        for name, content in (
            (image, np.full((60, 90, 3), (10, 100, 200), np.uint8)),
            (label, np.repeat(np.uint8([[0], [1], [255]]), 20, 0).repeat(90, 1)),
        ):
            path = tmp_path / name.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), content)
    cfg = Config.fromfile(leaf_path(leaf))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        if 'ann_file' in loader.dataset:
            names = tmp_path / loader.dataset.ann_file
            names.parent.mkdir(parents=True, exist_ok=True)
            names.write_text('a\n')
    with DefaultScope.overwrite_default_scope('mmseg'):
        train, test = (
            root.DATASETS.build(loader.dataset | dict(data_root=str(tmp_path)))
            for loader in (cfg.train_dataloader, cfg.test_dataloader)
        )
        assert len(train) == len(test) == 1
        sample = train[0]
        shape = tuple(sample['inputs'].shape[1:])
        assert sample['data_samples'].gt_sem_seg.shape == shape
        assert all(size <= most for size, most in zip(shape, cfg.model.data_preprocessor['size'], strict=True))
        sample = test[0]
    height, width = sample['inputs'].shape[1:]
    assert abs(width / height - 90 / 60) < 0.01  # resized with its proportions
    blue, green, red = sample['inputs'].float().mean((1, 2)).round().tolist()
    assert (blue, green, red) == pytest.approx((10, 100, 200), abs=3)
    labels = sample['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, 60, 90)  # the original size
    ignored_zero = 255 if data_of(leaf) in ('ade20k', 'pascal') else 0
    assert [int(labels[0, row, 0]) for row in (0, 20, 40)] == [ignored_zero, one, 255]


def batch(num_classes: int) -> dict:
    """Returns a batch of two BGR images of 64x96 that came from images of 40x60."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (2, 1, 64, 96), generator=generator)
    labels[:, :, :8] = 255
    meta = dict(img_shape=(64, 96), ori_shape=(40, 60), pad_shape=(64, 96), scale_factor=(1.6, 1.6), flip=False)
    samples = [SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=label)) for label in labels]
    images = torch.randint(256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


def check_step_and_prediction(cfg: Config, leaf: str) -> None:
    torch.manual_seed(0)
    authors, num_classes = leaf.endswith('authors'), NUM_CLASSES[data_of(leaf)]
    cfg.model.data_preprocessor['size'] = (64, 96)
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = root.MODELS.build(cfg.model)
        model.init_weights()
        optimiser = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(model.backbone) is ResNeSt
    model.train()
    data = model.data_preprocessor(batch(num_classes), training=True)
    assert data['inputs'].shape == (2, 3, 64, 96)
    loss, logged = model.parse_losses(model(**data, mode='loss'))
    assert logged.keys() == {'loss', 'decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce', 'aux.acc_seg'}
    # A network that knows nothing gives each class its share; mmseg's mean counts the ignored eighth as zeros.
    guess = math.log(num_classes) * (1.2 if authors else 1.4 * 7 / 8)
    assert guess * 0.9 < loss.item() < guess * 1.5
    optimiser.backward(loss)
    weights = dict(
        backbone=model.backbone.conv1[0].weight,
        head=model.decode_head.conv_seg.weight,
        auxiliary=model.auxiliary_head.conv_seg.weight,
    )
    before = {name: (weight.detach().clone(), weight.grad.clone()) for name, weight in weights.items()}
    optimiser.step()
    for name, (weight, gradient) in before.items():
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
        rate = RATES.get(data_of(leaf), 0.01) * (10 if authors and name != 'backbone' else 1)
        decay = 1e-4 if authors else 5e-4
        torch.testing.assert_close(weights[name].detach(), weight - rate * (gradient + decay * weight))
    model.eval()
    for sample in model.test_step(batch(num_classes)):
        labels = sample.pred_sem_seg.data
        assert labels.shape == (1, 40, 60)
        assert labels.dtype == torch.uint8
        assert labels.min() >= 0
        assert labels.max() < num_classes
        assert torch.equal(labels, sample.seg_logits.data.argmax(0, keepdim=True))


def test_the_demos_config_fits_its_data_set():
    cfg = Config.fromfile(leaf_path(DEMO))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert cfg[loader].dataset.metainfo == dict(classes=demo.CLASSES, palette=demo.PALETTE)
    assert cfg.model.decode_head.num_classes == len(demo.CLASSES)
    assert cfg.model.data_preprocessor['size'] == demo.SIZE
    classes = classes_of(cfg)
    assert (classes['model.backbone'], classes['model.decode_head']) == (ResNeSt, PSPHead)
    assert (classes['val_evaluator'], classes['train_dataloader.dataset']) == (IoUMetric, BaseSegDataset)


@pytest.mark.parametrize('first', ['    _base_ =', '    from mmengine.config import read_base'])
def test_the_documented_ways_to_inherit(first, tmp_path):
    page = (ROOT / 'docs' / 'custom_dataset.md').read_text()
    lines = page[page.rindex(first) :].splitlines()
    end = next(i for i, line in enumerate(lines) if line and not line.startswith('    '))
    (tmp_path / 'child.py').write_text('\n'.join(line[4:] for line in lines[:end]) + '\n')
    cfg = Config.fromfile(tmp_path / 'child.py')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert tuple(cfg[loader].dataset.metainfo['classes']) == ('road', 'car', 'rest')
        assert cfg[loader].dataset.data_root == 'data/mine'
        assert cfg[loader].dataset.type == 'BaseSegDataset'
        check_classes(loader, cfg)


QUICK = ('deeplabv3_resnest50_ade20k', 'fcn_resnest50_ade20k_authors')


# The other configs for Pascal Context differ from those for ADE20K in the data only.
TRAINED = [leaf for leaf in LEAVES if data_of(leaf) != 'pascal' or leaf.startswith('fcn')]


@pytest.mark.parametrize(
    'leaf', [pytest.param(leaf, marks=[] if leaf in QUICK else pytest.mark.slow) for leaf in TRAINED]
)
def test_training_step_and_prediction(leaf):
    check_step_and_prediction(Config.fromfile(leaf_path(leaf)), leaf)
