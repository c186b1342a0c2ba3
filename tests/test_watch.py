"""A rank that is dead, stopped or without data ends the job, and is named."""

import os
import re
import signal
import time
from contextlib import contextmanager

import pytest
from hang import write_config
from test_checkpointing import wait_for
from test_launch import step_of_two
from test_signals import command, ended, is_reading, is_there, open_for_writing, pid_of_rank, torchrun, wait_for_log
from tiny import CAMVID, Tool, write_data_set

from mmseg_resnest.watch import EXIT_STALLED, WatchHook

TIMEOUT = 6
SHORT = f'custom_hooks.4.timeout={TIMEOUT}'  # WatchHook's
KILLED_AFTER = 30  # seconds, in which torchrun lets the other ranks end by themselves
SLACK = 30  # for a machine with much to do


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('data') / 'data')


def test_a_timeout_is_positive():
    with pytest.raises(ValueError, match='timeout=0; expected a number of seconds above 0'):
        WatchHook(timeout=0)


@pytest.mark.slow
@pytest.mark.parametrize('number', ['SIGKILL', 'SIGSTOP'])
def test_a_rank_that_is_killed_or_stopped_ends_the_job(number, data, tmp_path):
    with torchrun(tmp_path, *command(data, SHORT)) as process:
        wait_for_log(' 3/100000]', tmp_path)
        ranks = [pid_of_rank(rank, process) for rank in (0, 1)]
        start = time.monotonic()
        os.kill(ranks[1], getattr(signal, number))
        assert process.wait(TIMEOUT + KILLED_AFTER + SLACK) == 1  # torchrun's own
        seconds = time.monotonic() - start
    out = (tmp_path / 'out').read_text()
    if number == 'SIGKILL':  # torchrun sees it, and rank 0 that the connection is gone
        assert re.search(r'rank +: 1 .*\n +exitcode +: -9 ', out)
        assert seconds < SLACK
    else:
        assert f'error on rank 0: rank 1 has not been heard of for {TIMEOUT} s: dead, stopped, or cut off' in out
        assert re.search(rf'rank +: 0 .*\n +exitcode +: {EXIT_STALLED} ', out)
    assert not any(map(is_there, ranks))


@pytest.mark.slow
def test_a_rank_whose_data_do_not_come_is_named(tmp_path):
    """One of the labels is a pipe that nobody writes to: the rank that reads it lives, but does not get on."""
    root = write_data_set(tmp_path / 'data', training=8)
    pipe = root / 'annotations/training/7.png'
    pipe.unlink()
    os.mkfifo(pipe)
    args = command(root, SHORT, flags=['--skip-data-check'])
    first, second = (Tool('train', *args, cwd=tmp_path, OMP_NUM_THREADS='1', **task) for task in step_of_two())
    with ended(first.process), ended(second.process):
        writer = []
        wait_for(lambda: writer.append(open_for_writing(pipe)) or writer[-1] is not None, 300, 0.05)
        wait_for(lambda: any(is_reading(tool.process.pid, pipe) for tool in (first, second)), 60, 0.05)
        stuck = [is_reading(tool.process.pid, pipe) for tool in (first, second)]
        assert sorted(stuck) == [False, True]
        for tool in (first, second):
            tool.process.join(TIMEOUT * 2 + SLACK)
        assert [tool.process.exitcode for tool in (first, second)] == [EXIT_STALLED] * 2
        os.close(writer[-1])
    reason = f'rank {stuck.index(True)} has been behind the others for {TIMEOUT} s'
    for rank, tool in enumerate((first, second)):
        assert f'error on rank {rank}: {reason}' in tool.logs[1].read_text()


@contextmanager
def two_tasks(config, data, folder, *options):
    """Two ranks as srun starts them, the first of which keeps the store."""
    args = [config, *command(data, SHORT, *options)[1:]]
    first, second = (Tool('train', *args, cwd=folder, OMP_NUM_THREADS='1', **task) for task in step_of_two())
    with ended(first.process), ended(second.process):
        yield first, second


@pytest.mark.slow
@pytest.mark.parametrize(
    ('rank', 'point', 'validation'),
    [
        (0, 'after_train_iter', 5),  # evaluated three times: rank 0 three batches, rank 1 two
        (1, 'before_train_iter', 4),  # both have their data, and rank 0 waits in its step
    ],
)
def test_a_rank_that_hangs_is_named_by_both(rank, point, validation, tmp_path):
    data = write_data_set(tmp_path / 'data', validation=validation)
    config = write_config(tmp_path, rank=rank, point=point, at=9, seconds=1000)
    with two_tasks(config, data, tmp_path, 'train_cfg.val_interval=3') as tools:
        wait_for_log(' 9/100000]', tmp_path)
        for tool in tools:
            tool.process.join(TIMEOUT * 3 + SLACK)
        assert [tool.process.exitcode for tool in tools] == [EXIT_STALLED] * 2
    reason = f'rank {rank} has been behind the others for {TIMEOUT} s'
    for own, tool in enumerate(tools):
        assert f'error on rank {own}: {reason}' in tool.logs[1].read_text()


@pytest.mark.slow
def test_a_store_that_is_stopped_ends_the_others(data, tmp_path):
    with two_tasks(str(CAMVID), data, tmp_path) as (first, second):
        wait_for_log(' 3/100000]', tmp_path)
        os.kill(first.process.pid, signal.SIGSTOP)  # who keeps it
        second.process.join(TIMEOUT * 3 + SLACK)
        assert second.process.exitcode == EXIT_STALLED
    reason = f'kept by rank 0 or torchrun, has not answered for {TIMEOUT} s: stopped, or cut off'
    assert reason in second.logs[1].read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_after_its_last_evaluation_is_named(data, tmp_path):
    """As in saving the best one, while the other one waits at the end of the run."""
    config = write_config(tmp_path, rank=0, point='after_val_epoch', at=5, seconds=1000)
    with two_tasks(config, data, tmp_path, 'train_cfg.max_iters=5') as tools:
        for tool in tools:
            tool.process.join(TIMEOUT * 3 + 2 * SLACK)
        assert [tool.process.exitcode for tool in tools] == [EXIT_STALLED] * 2
    assert f'error on rank 1: rank 0 has been behind the others for {TIMEOUT} s' in tools[1].logs[1].read_text()


@pytest.mark.slow
def test_a_rank_that_is_slow_to_leave_after_a_signal_leaves_with_its_code(data, tmp_path):
    """Rank 0 has taken the store with it by then."""
    config = write_config(tmp_path, rank=1, point='exit', at=0, seconds=TIMEOUT * 2)
    with two_tasks(config, data, tmp_path) as tools:
        wait_for_log(' 3/100000]', tmp_path)
        os.kill(tools[0].process.pid, signal.SIGUSR1)
        for tool in tools:
            tool.process.join(TIMEOUT * 2 + SLACK)
        assert [tool.process.exitcode for tool in tools] == [138, 138]
