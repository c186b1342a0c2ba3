"""mmseg_resnest.benchmark.data: both sides of a pipeline on the same work; its times are for real machines."""

import json

import pytest
from mmengine.registry import init_default_scope
from tiny import ROOT, run_tool

from mmseg_resnest import transforms
from mmseg_resnest.benchmark.data import SIDES, measure

CONFIG = ROOT / 'configs' / 'pspnet_resnest50_ade20k.py'


def test_both_sides_take_the_same_transforms():
    init_default_scope('mmseg')
    sides = measure(CONFIG, images=3)
    names = ['LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip']
    packs = dict(ours='PackByteLabels', mmseg='PackSegInputs')
    assert tuple(sides) == SIDES
    for side, figures in sides.items():
        assert list(figures['transforms']) == [*names, 'PhotoMetricDistortion', packs[side]]
        assert figures['ms'] == pytest.approx(sum(figures['transforms'].values()))
        assert figures['images_per_s'] == pytest.approx(1000 / figures['ms'])


def test_sides_that_differ_do_not_compare(monkeypatch):
    init_default_scope('mmseg')
    monkeypatch.setattr(transforms.PhotoMetricDistortion, 'convert', lambda self, img, alpha=1, beta=0: img)
    with pytest.raises(ValueError, match='the two pipelines make different samples'):
        measure(CONFIG, images=4)


@pytest.mark.slow
def test_command(tmp_path):
    done = run_tool('benchmark', 'data', CONFIG, '--json', 'data.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sides = json.loads((tmp_path / 'data.json').read_text())[CONFIG.stem]
    assert f'ours is {sides["mmseg"]["ms"] / sides["ours"]["ms"]:.2f} times as fast' in done.stdout
