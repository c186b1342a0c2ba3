"""tools/benchmark.py measures whole training steps."""

import contextlib
import json
import re
import runpy
import sys
import types

import pytest
from tiny import CAMVID, OPTIONS, ROOT, run_tool

from mmseg_resnest import cli

TINY = [option for option in OPTIONS if option.startswith(('model.', 'train_dataloader.batch_size'))]


def measure(config, folder, *arguments, options=(), tiny=TINY):
    """Returns the figures of each side, and the output."""
    arguments = ('train', config, '--steps', '2', '--json', 'new/folder/speed.json', *arguments)
    done = run_tool('benchmark', *arguments, '--cfg-options', *tiny, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / 'new/folder/speed.json').read_text())[config.stem], done.stdout


def test_training_speed(tmp_path):
    for _ in range(3):  # the ceiling is measured apart: other work may fall on it alone
        sides, output = measure(CAMVID, tmp_path)
        if sides['ours']['ceiling_share'] < 1:
            break
    assert list(sides) == ['ours']
    speed = sides['ours']
    assert speed['images_per_s'] == pytest.approx(2 / speed['ms'] * 1000)  # batch 2
    assert speed['steps'] == 2
    assert 0 < speed['ceiling_share'] < 1
    assert speed['gib'] is None  # of a GPU
    assert 'OneDL' not in output  # mmsegmentation's debug lines
    assert re.match(r'CPU, torch \S+\nA large matrix product runs at \d+ TFLOP/s\n', output)
    assert re.search(rf'{CAMVID.stem} +ours +{speed["images_per_s"]:.1f} images/s', output)


@pytest.mark.slow
def test_against_mmsegmentation(tmp_path):
    config = ROOT / 'configs' / 'pspnet_resnest101_ade20k.py'
    # mmsegmentation's ResNeSt begins at depth 50; the heads are those of its model zoo.
    options = ['model.backbone.depth=50', 'model.data_preprocessor.size=(48,64)', 'train_dataloader.batch_size=2']
    sides, output = measure(config, tmp_path, '--against', 'mmseg', options=options, tiny=())
    assert list(sides) == ['ours', 'ours-eager', 'mmseg-fp16', 'mmseg-bf16']
    for name in ('mmseg-fp16', 'mmseg-bf16'):
        ratio = sides['ours']['images_per_s'] / sides[name]['images_per_s']
        assert f'ours is {ratio:.2f} times as fast' in output
        assert sides[name]['tflop'] == pytest.approx(sides['ours']['tflop'])


def test_wrong_path(tmp_path):
    done = run_tool('benchmark', 'train', 'nowhere.py', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'benchmark.py: error: nowhere.py: there is no such config file; see configs/\n'


NO_SMP = f'{CAMVID}: --against smp needs segmentation_models.pytorch: pip install segmentation-models-pytorch'


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('train --steps 0', '--steps 0: expected 1 or more'),
        ('scale --steps -1', '--steps -1: expected 1 or more'),
        ('scale --cfg-options nosuch.key=1', '--cfg-options nosuch.key: nothing reads nosuch at the top of a config;'),
        ('train --cfg-options model.backbone.depth.x=1', '--cfg-options model.backbone.depth.x: the config has no'),
        ('test --cfg-options test_dataloader=None', f'{CAMVID}: the config has no test_dataloader;'),
        ('train --json .', '--json .: a folder; name a file in it'),
        ('train --against mmseg', f'{CAMVID}: mmsegmentation has no ResNeSt config of PSPHead on this data set'),
        (
            'train --against mmseg --cfg-options model.decode_head.num_classes=19',
            f"{CAMVID}: mmsegmentation's ResNeSt has no depth 14, but 50, 101, 200",
        ),
        (
            'train --against mmseg --cfg-options model.decode_head.num_classes=19 model.backbone.depth=50 '
            'model.backbone.output_stride=16',
            f'{CAMVID}: model.backbone.output_stride=16: the other side would not get it; expected 8',
        ),
        (
            'train --against mmseg --cfg-options model.decode_head.num_classes=19 model.backbone.depth=50',
            '--cfg-options model.decode_head.channels: not one that --against mmseg compares; expected one of train_',
        ),
        ('learn --seeds 0', '--seeds 0: expected 1 or more'),
        ('learn --against smp', 'learn --against smp: expected mmseg, or nothing'),
        ('learn --data-root nowhere', '--data-root nowhere: no such folder'),
        ('learn --against mmseg', f"{CAMVID}: mmsegmentation's ResNeSt has no depth 14"),
        ('train --against smp', NO_SMP),
        ('test --against smp', NO_SMP),
        ('test --cfg-options model.backbone.depth=50', f'{NO_SMP}; or give --against mmseg'),
        ('test', f"{CAMVID}: mmsegmentation's ResNeSt has no depth 14, but 50, 101, 200; or give --against smp"),
        (
            'test --against mmseg --cfg-options model.backbone.depth=50 model.backbone.with_cp=True',
            f'{CAMVID}: model.backbone.with_cp=True: the other side would not get it; expected False',
        ),
        (
            'train --against smp --cfg-options model.backbone.with_cp=True',
            f'{CAMVID}: model.backbone.with_cp=True: the other side would not get it; expected False',
        ),
        (
            'learn --against mmseg --cfg-options model.backbone.depth=152',
            f'{CAMVID}: model.backbone.depth=152: expected',
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(words, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    tool = runpy.run_path(str(ROOT / 'tools' / 'benchmark.py'))
    task, *options = words.split()
    args = tool['make_parser']().parse_args([task, str(CAMVID), '--cfg-options', *TINY, *options])
    with pytest.raises(cli.UsageError) as error:
        tool['benchmark'](args)
    assert str(error.value).startswith(message)
    assert '\n' not in str(error.value)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('config', 'options', 'message'),
    [
        (
            'pspnet_resnest50_camvid',
            [],
            "type='PSPHead', .*: segmentation_models.pytorch's side is DeepLabV3",
        ),
        ('deeplabv3_resnest50_ade20k', ['model.test_cfg.mode=slide'], "mode='slide': segmentation_models"),
        ('deeplabv3_resnest50_ade20k_authors', [], "mode='slide': segmentation_models"),
        ('deeplabv3_resnest50_ade20k_authors', ['model.test_cfg.mode=whole'], ''),
        ('deeplabv3_resnest269_ade20k', [], ''),
    ],
)
def test_smps_side_is_deeplabv3(config, options, message, monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', types.ModuleType('smp'))
    tool = runpy.run_path(str(ROOT / 'tools' / 'benchmark.py'))
    words = ['test', str(ROOT / 'configs' / f'{config}.py'), '--against', 'smp']
    words += ['--cfg-options', 'model.backbone.init_cfg=None', *options]
    context = pytest.raises(cli.UsageError, match=message) if message else contextlib.nullcontext()
    with context:
        tool['check'](tool['make_parser']().parse_args(words))


def test_two_configs_of_one_name_are_refused():
    tool = runpy.run_path(str(ROOT / 'tools' / 'benchmark.py'))
    with pytest.raises(cli.UsageError, match='two configs of one name'):
        tool['check'](tool['make_parser']().parse_args(['train', str(CAMVID), f'other/{CAMVID.name}']))


def test_a_measurement_is_not_refused_for_a_peer_that_it_does_without(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    tool = runpy.run_path(str(ROOT / 'tools' / 'benchmark.py'))
    for words in ('data', 'scale', 'train', 'test --against mmseg'):
        task, *options = words.split()
        tool['check'](tool['make_parser']().parse_args([task, str(CAMVID), *options]))


def test_override_that_is_no_pair_is_a_usage_error(tmp_path):
    done = run_tool('benchmark', 'train', CAMVID, '--cfg-options', 'foo', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith('benchmark.py: error: argument --cfg-options: expected KEY=VALUE; got foo\n')
