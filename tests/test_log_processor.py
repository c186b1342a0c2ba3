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


@pytest.mark.parametrize(
    ('peaks', 'pools', 'memory'),
    [
        ([50, 8, 8, 70], [{1: 45}, {1: 45}, {}, {}], [50, 53, 53, 70]),  # a graph is given up before the last line
        ([50, 8, 50, 9], [{1: 45}, {1: 45}, {2: 45}, {2: 45}], [50, 53, 53, 54]),  # and another one captured
        ([50, 8, 68, 8], [{1: 45}, {1: 45}, {1: 105}, {1: 105}], [50, 53, 113, 113]),  # another one in the same pool
    ],
)
def test_the_largest_so_far(peaks, pools, memory, tmp_path, monkeypatch):
    peaks = itertools.chain(peaks, itertools.repeat(8))  # of a GPU, since the last line
    pools = itertools.chain(pools, itertools.repeat({}))
    monkeypatch.setattr(log_processor, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(log_processor, 'get_max_cuda_memory', lambda device: next(peaks))
    monkeypatch.setattr(
        'mmseg_resnest.log_processor.held_by_graphs', lambda: {i: size * 2**20 for i, size in next(pools).items()}
    )
    config_runner(tmp_path, write_data_set(tmp_path / 'data')).train()
    assert memory_of(tmp_path) == memory


@pytest.mark.gpu
def test_what_graphs_hold_is_counted(tmp_path):
    data = write_data_set(tmp_path / 'data')
    memory = {}
    for cuda_graphs in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work_dir = tmp_path / str(cuda_graphs)
        runner = config_runner(work_dir, data, f'model.cuda_graphs={cuda_graphs}', 'model.compiled=False')
        runner.train()
        memory[cuda_graphs] = memory_of(work_dir)
    assert min(memory[True]) >= min(memory[False])
    assert memory[True] == sorted(memory[True])
    held = held_by_graphs().total()  # for as long as there is the runner
    assert held > 0
    # More than the first line's, which has what was allocated for the capture: there is a momentum now.
    assert memory[True][-1] + 2 >= (torch.cuda.memory_allocated() + held) // 2**20
    del runner
