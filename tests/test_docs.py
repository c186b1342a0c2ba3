"""The pages of docs/: what they quote is what the package has."""

import re

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmseg.models.backbones import ResNeSt as MMSegResNeSt
from mmseg.registry import MODELS
from tiny import OPTIONS, ROOT

from mmseg_resnest import ResNeSt
from mmseg_resnest.checkpoints import OFFICIAL
from mmseg_resnest.conv import DilatedConv2d
from mmseg_resnest.key_maps import ENCODING, TIMM
from mmseg_resnest.segmentor import why_not_fused

DOCS = ROOT / 'docs'


def test_the_configs_of_the_page_for_mmsegmentations_users(tmp_path):
    """One has mmsegmentation's backbone and the other ours, and all else is the same; the third is fast."""
    texts = re.findall(r'```python\n(.*?)```', (DOCS / 'from_mmsegmentation.md').read_text(), re.DOTALL)
    configs = {}
    for name, text in zip(('before', 'after', 'fast'), texts, strict=True):
        (tmp_path / f'{name}.py').write_text(text)
        configs[name] = Config.fromfile(tmp_path / f'{name}.py')
    fast = configs.pop('fast')
    fast.model.backbone.init_cfg = None
    segmentor = MODELS.build(fast.model)
    assert [why_not_fused(head) for head in segmentor._heads().values()] == ['', '']
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in segmentor.modules())
    assert (fast.sync_bn, fast.optim_wrapper.type) == ('mmseg_resnest.SyncBN', 'mmseg_resnest.AutocastOptimWrapper')
    assert fast.optim_wrapper.optimizer == configs['after'].optim_wrapper.optimizer
    backbones = [MODELS.build(config.model.backbone) for config in configs.values()]
    assert [type(backbone) for backbone in backbones] == [MMSegResNeSt, ResNeSt]
    theirs, ours = (sorted((tuple(p.shape) for p in backbone.parameters()), key=str) for backbone in backbones)
    assert theirs == ours
    assert backbones[1].layer4[1].conv2.conv.dilation == backbones[0].layer4[1].conv2.conv.dilation == (4, 4)
    for config in configs.values():
        del config.model['backbone'], config.model['pretrained']
    assert configs['before'].to_dict() == configs['after'].to_dict()


@pytest.mark.parametrize('config', ['deeplabv3_resnest101_ade20k', 'pspnet_resnest50_cityscapes'])
def test_half_the_batch_doubles_all_that_counts_iterations(config):
    page = (DOCS / 'training_speed.md').read_text()
    (overrides,) = re.findall(rf'\| `\*_{config.split("_")[2]}` \| `(.*)` \|', page)
    before, after = (Config.fromfile(ROOT / 'configs' / f'{config}.py') for _ in range(2))
    for override in overrides.split():
        key, _, value = override.partition('=')
        after.merge_from_dict({key: DictAction._parse_int_float_bool(value)})
    assert after.optim_wrapper.accumulative_counts == 2
    assert before.train_dataloader.batch_size == 2 * after.train_dataloader.batch_size
    numbers = [
        [*cfg.train_cfg.values(), cfg.default_hooks.checkpoint.interval, *(scale.end for scale in cfg.param_scheduler)]
        for cfg in (before, after)
    ]
    assert [2 * n for n in numbers[0] if isinstance(n, int)] == [n for n in numbers[1] if isinstance(n, int)]


@pytest.mark.parametrize('page', ['from_mmsegmentation.md', 'model_zoo.md', 'operations.md'])
def test_every_file_of_ours_that_a_page_names_is_there(page):
    text = (DOCS / page).read_text()
    names = re.findall(r'(?:tools|configs)/\w+\.py', text)
    assert not [name for name in names if not (ROOT / name).is_file()]
    assert len(names) >= 4


def test_every_test_that_the_page_on_long_runs_names_is_there():
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', (DOCS / 'operations.md').read_text())
    assert len(named) >= 14
    assert [(file, test) for file, test in named if f'def {test}(' not in (ROOT / 'tests' / file).read_text()] == []


def test_the_model_zoo_lists_every_file_that_is_recognised():
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in (DOCS / 'model_zoo.md').read_text().splitlines()
        if line.startswith('| ')
    ]
    hashes = {row[0]: row[1] for row in rows}
    assert {name: hashes.get(name) for name in OFFICIAL | ENCODING} == OFFICIAL | ENCODING
    assert hashes.keys() >= TIMM.keys()


def option(text):
    """KEY=VALUE as --cfg-options takes it."""
    key, value = text.split('=')
    return {key: DictAction._parse_iterable(value)}


@pytest.mark.parametrize(
    ('switch', 'default'),
    [
        ('model.fused_loss=False', lambda model: model.fused_loss),
        ('model.channels_last=False', lambda model: model.channels_last),
        ('model.compiled=False', lambda model: model.compiled),
        ('model.cuda_graphs=False', lambda model: model.cuda_graphs),
        ('model.backbone.radix_conv=grouped', lambda model: model.backbone.layer1[0].conv2.execution is None),
        ('model.backbone.recompute_conv3=False', lambda model: model.backbone.layer1[0].recompute_conv3),
        ('model.decode_head.conv_cfg=None', lambda model: any(isinstance(m, DilatedConv2d) for m in model.modules())),
    ],
)
def test_each_switch_of_training_speed_switches(switch, default):
    assert f'`{switch}`' in (DOCS / 'training_speed.md').read_text()
    init_default_scope('mmseg')
    cfg = Config.fromfile(ROOT / 'configs' / 'deeplabv3_resnest101_ade20k.py')
    for tiny in OPTIONS[:4]:
        cfg.merge_from_dict(option(tiny))
    assert default(MODELS.build(cfg.model))
    cfg.merge_from_dict(option(switch))
    assert not default(MODELS.build(cfg.model))


@pytest.mark.parametrize('page', ['../README.md', *(path.name for path in DOCS.glob('*.md'))])
def test_every_link_leads_somewhere(page):
    links = re.findall(r'\]\(([^)#\s]+)', (DOCS / page).read_text())
    assert [link for link in links if '://' not in link and not (DOCS / page).parent.joinpath(link).exists()] == []
