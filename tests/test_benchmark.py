"""tools/benchmark.py measures whole training steps."""

import json
import re

import pytest
from tiny import CAMVID, OPTIONS, ROOT, run_tool

TINY = [option for option in OPTIONS if option.startswith(('model.', 'train_dataloader.batch_size'))]


def measure(config, folder, *arguments, options=()):
    """Returns the figures of each side, and the output."""
    arguments = ('train', config, '--steps', '2', '--json', 'speed.json', *arguments)
    done = run_tool('benchmark', *arguments, '--cfg-options', *TINY, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / 'speed.json').read_text())[config.stem], done.stdout


def test_training_speed(tmp_path):
    sides, output = measure(CAMVID, tmp_path)
    assert list(sides) == ['ours']
    speed = sides['ours']
    assert speed['images_per_s'] == pytest.approx(2 / speed['ms'] * 1000)  # batch 2
    assert speed['steps'] == 2
    assert 0 < speed['ceiling_share'] < 1
    assert 'OneDL' not in output  # mmsegmentation's debug lines
    assert re.match(r'CPU, torch \S+\nA large matrix product in bfloat16 runs at \d+ TFLOP/s\n', output)
    assert re.search(rf'{CAMVID.stem} +ours +{speed["images_per_s"]:.1f} images/s', output)


@pytest.mark.slow
def test_against_mmsegmentation(tmp_path):
    config = ROOT / 'configs' / 'pspnet_resnest101_ade20k.py'
    options = ['model.backbone.depth=50']  # mmsegmentation's ResNeSt begins there
    sides, output = measure(config, tmp_path, '--against', 'mmseg', options=options)
    assert list(sides) == ['ours', 'ours-eager', 'mmseg-fp16', 'mmseg-bf16']
    for name in ('mmseg-fp16', 'mmseg-bf16'):
        ratio = sides['ours']['images_per_s'] / sides[name]['images_per_s']
        assert f'ours is {ratio:.2f} times as fast' in output
        assert sides[name]['tflop'] == pytest.approx(sides['ours']['tflop'])


def test_wrong_path(tmp_path):
    done = run_tool('benchmark', 'train', 'nowhere.py', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'benchmark.py: error: nowhere.py: there is no such config file; see configs/\n'
