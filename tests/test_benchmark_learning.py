"""Whole runs of two sides: what they begin with, and what is said of how they differ."""

import json
import statistics

import pytest
import torch
from mmseg.models.segmentors import EncoderDecoder as MMSegEncoderDecoder
from mmseg.registry import MODELS
from tiny import CAMVID, OPTIONS, run_tool, write_data_set

from mmseg_resnest.benchmark.learning import Spec, prepare, summary


def test_both_sides_begin_with_one_network(tmp_path):
    """Of mmsegmentation's graph and initial weights: the same logits."""
    models = []
    for side in ('ours-mmseg', 'mmseg'):
        cfg = prepare(Spec(side, str(CAMVID), seed=1, data_root='d'), tmp_path)
        assert cfg.train_dataloader.dataset.data_root == cfg.val_dataloader.dataset.data_root == 'd'
        models.append(MODELS.build(cfg.model).double().eval())
        models[-1].load_state_dict(torch.load(cfg.load_from)['state_dict'])
    ours, theirs = models
    assert type(theirs) is MMSegEncoderDecoder is not type(ours)
    image = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        assert torch.allclose(ours._forward(image), theirs._forward(image), rtol=1e-9, atol=1e-12)


def test_their_side_has_nothing_of_ours(tmp_path):
    options = {'model.compiled': False, 'default_hooks.nonfinite': None, 'default_hooks.timer': None}
    options |= {'optim_wrapper.clip_grad': dict(max_norm=1), 'optim_wrapper.accumulative_counts': 2}
    cfg = prepare(Spec('mmseg', str(CAMVID), seed=0, options=options), tmp_path)
    assert [name for name, hook in cfg.default_hooks.items() if hook is None] == ['timer']  # which MMEngine drops
    keys = ('model', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'optim_wrapper', 'default_hooks')
    assert 'mmseg_resnest.' not in json.dumps([cfg.to_dict()[key] for key in (*keys, 'custom_hooks', 'sync_bn')])
    assert cfg.train_cfg.max_iters == 1000
    assert 'type' not in cfg.log_processor
    assert (cfg.optim_wrapper.clip_grad, cfg.optim_wrapper.accumulative_counts) == (dict(max_norm=1), 2)
    assert 'autocast_cpu' not in cfg.optim_wrapper


def test_the_eager_side_has_no_switch_on(tmp_path):
    cfg = prepare(Spec('ours-eager', str(CAMVID), seed=0), tmp_path)
    switches = ('fused_loss', 'channels_last', 'compiled', 'cuda_graphs')
    assert [cfg.model[switch] for switch in switches] == [False] * 4
    assert cfg.optim_wrapper.dtype == 'float32'
    assert cfg.get('load_from') is None


def test_summary():
    first = [dict(mIoU=50, loss=[2, 1]), dict(mIoU=54, loss=[4, 1])]
    second = [dict(mIoU=49, loss=[3, 2]), dict(mIoU=51, loss=[3, 4])]
    found = summary(first, second)
    root2 = 2**0.5
    assert found['mIoU'] == 2
    assert found['mIoU_spread'] == pytest.approx((4 / root2 + 2 / root2) / 2)
    assert found['loss'] == 1  # the means are 3, 1 and 3, 3
    assert found['loss_spread'] == pytest.approx(statistics.mean([root2, 0, 0, root2]))


@pytest.mark.slow
def test_fast_and_eager_learn_the_same(tmp_path):
    """On a CPU they differ in how the loss is computed: by rounding."""
    write_data_set(tmp_path / 'data')
    arguments = ['--seeds', '2', '--data-root', tmp_path / 'data', '--json', 'l.json', '--cfg-options', *OPTIONS]
    done = run_tool('benchmark', 'learn', CAMVID, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / 'l.json').read_text())[CAMVID.stem]
    assert list(runs) == ['ours, 0', 'ours-eager, 0', 'ours, 1', 'ours-eager, 1', 'difference']
    for seed in '01':
        assert runs[f'ours, {seed}']['loss'] == pytest.approx(runs[f'ours-eager, {seed}']['loss'], rel=1e-3)
    assert runs['ours, 0']['loss'] != runs['ours, 1']['loss']
    assert runs['difference']['loss'] < 0.01 < runs['difference']['loss_spread']
    assert 'ours - ours-eager: mIoU' in done.stdout
