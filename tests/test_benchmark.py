"""tools/benchmark.py measures whole training steps."""

import json
import re

import pytest
from tiny import CAMVID, OPTIONS, run_tool


def test_training_speed(tmp_path):
    options = [option for option in OPTIONS if option.startswith(('model.', 'train_dataloader.batch_size'))]
    arguments = ('train', CAMVID, '--steps', '3', '--json', 'speed.json', '--cfg-options', *options)
    done = run_tool('benchmark', *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    speed = json.loads((tmp_path / 'speed.json').read_text())[CAMVID.stem]
    assert speed['images_per_s'] == pytest.approx(2 / speed['ms'] * 1000)  # batch 2
    assert speed['steps'] == 3
    assert 'OneDL' not in done.stdout  # mmsegmentation's debug lines
    assert re.search(rf'{CAMVID.stem} +{speed["images_per_s"]:.1f} images/s', done.stdout)


def test_wrong_path(tmp_path):
    done = run_tool('benchmark', 'train', 'nowhere.py', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'benchmark.py: error: nowhere.py: there is no such config file; see configs/\n'
