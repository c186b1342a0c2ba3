"""mmseg_resnest.benchmark.inference, each task in a tiny size; its figures are for real machines."""

import json
import sys
from dataclasses import replace

import cv2
import pytest
import torch
from mmseg.registry import MODELS
from tiny import CAMVID, ROOT

from mmseg_resnest.benchmark.inference import (
    ADE_SIZES,
    DIFFERENT,
    ROWS,
    Row,
    Spec,
    _config,
    compare,
    line,
    measure,
    measure_alone,
    sizes_of,
    write_data_set,
)

CONFIG = str(ROOT / 'configs' / 'pspnet_resnest50_ade20k.py')
TINY = {'model.backbone.depth': 50, 'model.decode_head.channels': 8, 'model.auxiliary_head.channels': 8}
TINY |= {'model.decode_head.num_classes': 5, 'model.auxiliary_head.num_classes': 5}
TINY |= {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False}


@pytest.mark.slow
@pytest.mark.parametrize('side', ['ours', 'mmseg'])
@pytest.mark.parametrize('task', ['latency', 'test', 'tta'])
def test_each_task(task, side):
    result = measure_alone(Spec(task, side, CONFIG, (40, 56), repeats=2, options=TINY))
    assert result['ms'] > 0
    assert result['task'] == task


@pytest.mark.parametrize('task', ['latency', 'after_network'])
def test_ours_does_not_take_mmsegmentations_path(task, monkeypatch):
    def postprocess_result(*args):
        raise AssertionError

    threads = torch.get_num_threads()
    monkeypatch.setattr('mmseg.models.segmentors.EncoderDecoder.postprocess_result', postprocess_result)
    spec = Spec(task, 'ours', CONFIG, (40, 56), repeats=1, options=TINY)
    try:
        assert measure(spec)['ms'] > 0
        with pytest.raises(AssertionError):
            measure(replace(spec, side='mmseg'))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_after_the_network_ours_is_faster():
    row = Row('after', 'after_network', 'mmseg', (256, 344), 3, 5, 3)
    for _ in range(3):  # other work may fall on one side
        result = compare(row, CONFIG)
        assert result['ratio'] == result['theirs']['ms'] / result['ours']['ms']
        if result['ratio'] > 1:
            break
    assert result['ratio'] > 1
    assert line(result).startswith('after ')


def test_the_mix_of_sizes():
    sizes = sizes_of(Spec('test', 'ours', CONFIG, None, repeats=1000))
    assert set(sizes) == set(ADE_SIZES)
    assert 400 < sizes.count((683, 512)) < 500
    assert sizes_of(Spec('test', 'ours', CONFIG, (1024, 2048), repeats=2)) == [(2048, 1024)] * 2
    assert len({(row.name, row.against) for row in ROWS}) == len(ROWS)


def test_generated_images_of_a_size_are_links_to_some_of_it(tmp_path):
    write_data_set(tmp_path, [(40, 24), (24, 40)] * 20, classes=5)
    assert len(list(tmp_path.glob('images/*.jpg'))) == 40
    for folder in ('images', 'annotations'):
        files = sorted(tmp_path.glob(f'{folder}/*'))
        assert len({file.stat().st_ino for file in files}) == 2 * DIFFERENT
        assert [cv2.imread(str(file)).shape[:2] for file in files] == [(24, 40), (40, 24)] * 20


def test_without_smp_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(ImportError, match=r'--against smp needs .*: pip install segmentation-models-pytorch'):
        measure(Spec('latency', 'smp', CONFIG, (40, 56)))


def test_a_side_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r'(?s)mmseg: .*nowhere\.py'):
        measure_alone(Spec('test', 'mmseg', 'nowhere.py', (40, 56)))


@pytest.mark.parametrize('head', ['fcn_resnest50_ade20k_authors', 'deeplabv3_resnest50_ade20k_authors'])
def test_their_side_of_our_heads_has_torchs_convolutions(head):
    model = MODELS.build(_config(Spec('latency', 'mmseg', CONFIG.replace('pspnet_resnest50_ade20k', head), None)).model)
    convolutions = {type(module) for module in model.modules() if isinstance(module, torch.nn.Conv2d)}
    assert convolutions == {torch.nn.Conv2d}


@pytest.mark.parametrize('head', ['pspnet', 'deeplabv3'])
def test_their_side_has_the_label_of_each_augmentation_and_nothing_of_ours(head):
    options = {'model.compiled': False, 'default_hooks.nonfinite': None}
    cfg = _config(Spec('tta', 'mmseg', CONFIG.replace('pspnet', head), None, options=options))
    MODELS.build(cfg.model)
    assert None not in cfg.default_hooks.values()
    keys = ('model', 'tta_model', 'test_dataloader', 'test_evaluator', 'default_hooks', 'custom_hooks', 'tta_pipeline')
    assert 'type' not in cfg.log_processor
    assert 'mmseg_resnest.' not in json.dumps([cfg.to_dict()[key] for key in keys])
    load, augment = cfg.tta_pipeline
    assert (load.type, augment.type) == ('LoadImageFromFile', 'TestTimeAug')
    assert [len(choices) for choices in augment.transforms] == [6, 2, 1, 1]
    assert [choices[0].type for choices in augment.transforms[2:]] == ['LoadAnnotations', 'PackSegInputs']
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline[2:]] == ['LoadAnnotations', 'PackSegInputs']


def test_their_side_of_a_config_without_augmentation():
    cfg = _config(Spec('test', 'mmseg', str(CAMVID), None))
    assert 'tta_pipeline' not in cfg
    assert cfg.test_dataloader.dataset.pipeline[-1].type == 'PackSegInputs'
