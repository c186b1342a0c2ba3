"""The memory that the log tells is what the run needs."""

import itertools
import re

import pytest
import torch
from mmengine.runner import log_processor
from test_hooks import config_runner, log_of, no_stale_log  # noqa: F401  (a fixture)
from tiny import write_data_set

from mmseg_resnest.training_pass import held_by_graphs


def memory_of(work_dir):
    """The memory at each iteration."""
    return [int(memory) for memory in re.findall(r'Iter\(train\).* memory: (\d+)', log_of(work_dir))]


def test_the_largest_so_far(tmp_path, monkeypatch):
    peaks = itertools.chain([50, 8, 8, 70], itertools.repeat(8))  # of a GPU, since the last line
    held = itertools.chain([45, 45, 0], itertools.repeat(0))  # a graph is given up before the last line
    monkeypatch.setattr(log_processor, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(log_processor, 'get_max_cuda_memory', lambda device: next(peaks))
    monkeypatch.setattr('mmseg_resnest.log_processor.held_by_graphs', lambda: next(held) * 2**20)
    config_runner(tmp_path, write_data_set(tmp_path / 'data')).train()
    assert memory_of(tmp_path) == [50, 53, 53, 70]


@pytest.mark.gpu
def test_what_graphs_hold_is_counted(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    runner = config_runner(tmp_path, write_data_set(tmp_path / 'data'), 'model.compiled=False')
    runner.train()
    memory = memory_of(tmp_path)  # the first line has what was allocated for the capture
    assert memory == sorted(memory)
    assert held_by_graphs() > 0  # for as long as there is the runner
    del runner
