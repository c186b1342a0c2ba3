"""tools/demo.py: the whole chain of `make demo`, with a short training."""

import json
import subprocess
import sys

import cv2
import pytest
from tiny import ROOT

from mmseg_resnest.work_dir import claim, release


def test_a_demo_that_is_running_keeps_what_it_has(tmp_path):
    folder = tmp_path / 'work_dirs' / 'demo'
    claim(folder)
    try:
        (folder / 'iter_9.pth').write_bytes(b'')
        command = [sys.executable, ROOT / 'tools' / 'demo.py']
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    finally:
        release(folder)
    assert done.returncode == 1
    assert 'error: ' in done.stderr
    assert 'another run is training here' in done.stderr
    assert (folder / 'iter_9.pth').exists()
    assert not (tmp_path / 'data').exists()


@pytest.mark.slow
def test_the_demo_leaves_figures_and_pictures(tmp_path):
    short = ['--cfg-options', 'train_cfg.max_iters=25', 'train_cfg.val_interval=99', 'param_scheduler.0.end=25']
    command = [sys.executable, ROOT / 'tools' / 'demo.py', *short, 'default_hooks.checkpoint.interval=25']
    folder = tmp_path / 'work_dirs' / 'demo'
    folder.mkdir(parents=True)
    (folder / 'iter_9000.pth').write_bytes(b'of an earlier demo')
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.glob('iter_*.pth')] == ['iter_25.pth']
    result = json.loads((folder / 'result.json').read_text())
    assert result['mIoU'] > 8  # one class for all would give at most 2: already here it learns
    assert len(result['classes']) == 12
    assert len(list((folder / 'labels').glob('*.png'))) == 32
    for name in ('predictions.png', 'classes.png'):
        assert cv2.imread(str(folder / name)).std() > 20
    assert 'Done in ' in done.stdout
