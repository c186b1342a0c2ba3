"""Training steps of several processes, on a CPU here."""

import pytest
from tiny import CAMVID, run_tool

from mmseg_resnest.benchmark.scaling import Spec, measure_alone

TINY = {
    'model.backbone.depth': 14,
    'model.decode_head.channels': 8,
    'model.data_preprocessor.size': (48, 64),
    'train_dataloader.batch_size': 2,
}


@pytest.mark.slow
@pytest.mark.parametrize('side', ['bn', 'sync_bn'])
def test_two_processes(side):
    result = measure_alone(Spec(side, str(CAMVID), 2, steps=2, options=TINY))
    assert result['steps'] == 2
    assert result['images_per_s'] == pytest.approx(2 * 2 / result['ms'] * 1000)  # two images in each of two


@pytest.mark.slow
def test_failure_is_said():
    with pytest.raises(RuntimeError, match='nowhere'):
        measure_alone(Spec('bn', 'nowhere.py', 2))


def test_one_process_does_not_scale(tmp_path):
    done = run_tool('benchmark', 'scale', CAMVID, '--processes', '1', cwd=tmp_path)
    assert done.returncode == 2
    assert '--processes 1: expected 2 or more, one a GPU' in done.stderr
