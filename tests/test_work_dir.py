"""Of two runs in one work dir the second does not start."""

import os
import re
import signal
import subprocess
import sys

import pytest
from test_checkpointing import run
from test_signals import command, ended, wait_for_log
from tiny import CAMVID, Tool, run_tool, write_data_set

from mmseg_resnest import work_dir
from mmseg_resnest.checkpointing import newest_checkpoint
from mmseg_resnest.work_dir import LOCK, claim, release

HOLD = 'import sys, time; from mmseg_resnest.work_dir import claim; claim(sys.argv[1]); print("held", flush=True); {}'


def holder(folder, then='time.sleep(600)'):
    """Starts another process that claims the folder; once it has, it prints "held"."""
    command = [sys.executable, '-c', HOLD.format(then), folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_run_does_not_start_and_leaves_the_first_ones_files(tmp_path):
    run(tmp_path, 2).train()
    partial = tmp_path / 'iter_3.pth.partial'  # as the first run would be writing
    partial.write_bytes(b'half')
    with ended(holder(tmp_path)) as first:
        assert first.stdout.readline() == 'held\n'
        runner = run(tmp_path, 3)
        match = f'{tmp_path}: another run is training here: process {first.pid} on .*, since 20.* own for each run'
        with pytest.raises(ValueError, match=match):
            runner.train()
        assert runner.iter == 0
        assert partial.exists()
        assert newest_checkpoint(tmp_path)[0].name == 'iter_2.pth'
        first.send_signal(signal.SIGKILL)
        first.wait()
        run(tmp_path, 3).train()
    assert newest_checkpoint(tmp_path)[0].name == 'iter_3.pth'


def test_checkpoints_elsewhere_are_one_runs_too(tmp_path):
    """MMEngine puts them into a folder of out_dir that is named as the work dir."""
    with ended(holder(tmp_path / 'out/w')) as first:
        assert first.stdout.readline() == 'held\n'
        with pytest.raises(ValueError, match=f'{tmp_path}/out/w: another run is training here: process {first.pid} on'):
            run(tmp_path / 'other/w', 1, out_dir=str(tmp_path / 'out')).train()
        assert newest_checkpoint(tmp_path / 'out/w') == (None, [])


def test_a_process_may_claim_again_and_keeps_it_until_its_run_is_over(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    out, error = holder(tmp_path, 'pass').communicate()
    assert out == ''
    assert f'another run is training here: process {os.getpid()} on ' in error
    release(tmp_path)
    assert holder(tmp_path, 'pass').communicate()[0] == 'held\n'


def test_a_worker_that_outlives_its_killed_trainer_does_not_hold_on(tmp_path):
    """It has all of the trainer's open files."""
    then = 'import os; worker = os.fork(); worker and print(worker, flush=True); time.sleep(600)'
    with ended(holder(tmp_path, then)) as first:
        assert first.stdout.readline() == 'held\n'
        worker = int(first.stdout.readline())
        first.send_signal(signal.SIGKILL)
        first.wait()
        try:
            claim(tmp_path)
            os.kill(worker, 0)  # it is still there
        finally:
            os.kill(worker, signal.SIGKILL)


def test_where_nothing_can_be_locked_a_run_goes_on_and_its_log_says_so(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(work_dir.fcntl, 'lockf', unsupported)
    run(tmp_path, 1).train()
    log = next(tmp_path.rglob('*.log')).read_text()
    assert re.search(r'\.lock: not locked \(.*Operation not supported\): see that no other run', log)
    assert newest_checkpoint(tmp_path)[0].name == 'iter_1.pth'


@pytest.mark.slow
def test_the_tool_does_not_start_a_second_run(tmp_path):
    data = write_data_set(tmp_path / 'data')
    tool = Tool('train', *command(data), cwd=tmp_path)
    with ended(tool.process) as first:
        wait_for_log('Iter(train)', tmp_path)
        before = {path: path.read_bytes() for path in (tmp_path / 'w').glob('*') if path.is_file()}
        done = run_tool('train', *command(data, 'optim_wrapper.optimizer.lr=0.5'), cwd=tmp_path)
        assert done.returncode == 1
        assert f'another run is training here: process {first.pid} on ' in done.stderr
        assert 'Traceback' not in done.stderr
        assert {path.name for path in before} == {CAMVID.name, LOCK}
        assert {path: path.read_bytes() for path in before} == before
        assert len(list((tmp_path / 'w').glob('*/'))) == 1  # the log of the first
        first.terminate()
        assert tool.wait().returncode == 143
    assert (tmp_path / 'w' / LOCK).exists()
    assert newest_checkpoint(tmp_path / 'w')[0]
