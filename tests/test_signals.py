"""A run that is asked to stop saves first, ends with the code that says why, and leaves nobody behind."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.hooks import Hook
from test_checkpointing import wait_for
from test_hooks import config_runner
from tiny import CAMVID, ENVIRONMENT, OPTIONS, ROOT, Tool, run_tool, write_data_set
from torch.utils.data import DataLoader

from mmseg_resnest.checkpointing import newest_checkpoint
from mmseg_resnest.checkpoints import read_checkpoint
from mmseg_resnest.signals import SignalHook, _Shielded

FOR_EVER = [
    'train_cfg.max_iters=100000',
    'train_cfg.val_interval=100000',
    'default_hooks.checkpoint.interval=100000',
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('data') / 'data')


def command(data, *options, flags=()) -> list[str]:
    """The arguments of a training run in ``w`` that only a signal ends."""
    places = ['--work-dir', 'w', '--data-root', str(data)]
    return [str(CAMVID), *places, *flags, '--cfg-options', *OPTIONS, *FOR_EVER, *options]


@contextmanager
def ended(process):
    """Kills a process that is still there when the test has come to its end, or failed."""
    try:
        yield process
    finally:
        process.kill()


def wait_for_log(text, folder) -> None:
    """Waits until the log of the run in ``folder`` has ``text``."""
    wait_for(lambda: any(text in path.read_text() for path in folder.glob('w/*/*.log')), 300, 0.05)


def children(pid) -> list[int]:
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def state(pid) -> str:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]


def is_there(pid) -> bool:
    try:
        return state(pid) != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_saved(folder, name) -> int:
    """Asserts that one whole checkpoint is there, of the iteration that the log tells; returns the iteration."""
    newest, skipped = newest_checkpoint(folder / 'w')
    assert skipped == []
    assert [path.name for path in (folder / 'w').glob('*.pth*')] == [newest.name]
    iteration = read_checkpoint(newest)['meta']['iter']
    (log,) = folder.glob('w/*/*.log')
    assert f'{name}: stopped after iteration {iteration}; saved ' in log.read_text()
    return iteration


@pytest.mark.parametrize(('number', 'code'), [('SIGTERM', 143), ('SIGUSR1', 138), ('SIGHUP', 129)])
def test_a_signal_saves_and_ends_the_run(number, code, data, tmp_path):
    """With two workers, which get it too."""
    tool = Tool('train', *command(data, 'train_dataloader.num_workers=2'), cwd=tmp_path)
    with ended(tool.process):
        wait_for_log(' 3/100000]', tmp_path)
        workers = children(tool.process.pid)
        assert len(workers) >= 2
        for pid in (*workers, tool.process.pid):
            os.kill(pid, getattr(signal, number))
        tool.process.join(60)
        assert tool.process.exitcode == code
    wait_for(lambda: not any(map(is_there, workers)), 20)
    iteration = assert_saved(tmp_path, number)
    assert iteration >= 3
    if number == 'SIGTERM':
        resumed = command(data, f'train_cfg.max_iters={iteration + 1}', flags=['--resume'])
        done = run_tool('train', *resumed, cwd=tmp_path)
        assert f'resumed epoch: 0, iter: {iteration}' in done.stdout, done.stderr
        assert f'Trained {iteration + 1} iterations' in done.stdout


def test_the_whole_process_group_as_from_a_terminal(data, tmp_path):
    """A process that nothing has forked, whose interpreter ends as usual."""
    process = subprocess.Popen(
        [sys.executable, ROOT / 'tools' / 'train.py', *command(data, 'train_dataloader.num_workers=2')],
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with ended(process):
        wait_for_log(' 3/100000]', tmp_path)
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    assert len(workers) >= 2
    wait_for(lambda: not any(map(is_there, workers)), 20)
    assert_saved(tmp_path, 'SIGINT')


def test_a_second_sigint_ends_a_run_that_waits_for_its_data(tmp_path):
    """A label is a pipe: who reads it waits until somebody writes."""
    root = write_data_set(tmp_path / 'data', training=2)
    pipe = root / 'annotations/training/1.png'
    pipe.unlink()
    os.mkfifo(pipe)
    tool = Tool('train', *command(root, flags=['--skip-data-check']), cwd=tmp_path)
    with ended(tool.process):
        writer = []
        wait_for(lambda: writer.append(open_for_writing(pipe)) or writer[-1] is not None)
        wait_for(lambda: is_reading(tool.process.pid, pipe))
        os.kill(tool.process.pid, signal.SIGINT)
        wait_for(lambda: 'a second SIGINT ends it at once' in tool.logs[1].read_text())
        assert tool.process.is_alive()
        os.kill(tool.process.pid, signal.SIGINT)
        tool.process.join(20)
        assert tool.process.exitcode == 130
        os.close(writer[-1])
    assert list(tmp_path.glob('w/*.pth*')) == []


def open_for_writing(pipe) -> int | None:
    """Returns a descriptor once somebody has opened the pipe to read it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def is_reading(pid, file) -> bool:
    """Whether the process has opened ``file`` and sleeps: one whose open() has not returned yet can miss a signal."""
    return str(file) in map(os.path.realpath, Path(f'/proc/{pid}/fd').iterdir()) and state(pid) == 'S'


@pytest.mark.parametrize('handler', [signal.SIG_IGN, signal.SIG_DFL], ids=['ignored', 'not ignored'])
def test_sighup_that_is_ignored_stays_so(handler):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, handler)
    hook = SignalHook()
    hook._wrapper = SimpleNamespace(signal=0)
    hook._take()
    try:
        taken = signal.getsignal(signal.SIGHUP) != handler
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)  # which comes after it
        wait_for(lambda: hook._received == signal.SIGUSR1)
    finally:
        hook._give_back()
        left = signal.signal(signal.SIGHUP, before)
    assert taken == (handler == signal.SIG_DFL)
    assert left == handler


def test_a_forked_process_does_not_tell_its_signals_to_the_one_that_trains():
    """Ctrl-C while a worker starts is one SIGINT of the training process, not two."""
    hook = SignalHook()
    hook._wrapper = SimpleNamespace(signal=0)
    hook._take()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: hook._received)
        assert hook._received == signal.SIGINT
    finally:
        hook._give_back()


def test_a_worker_that_a_server_has_forked_ends_with_its_trainer_only():
    """The server is the worker's parent."""
    options = dict(num_workers=1, multiprocessing_context='forkserver', persistent_workers=True)
    loader = DataLoader(range(2), worker_init_fn=_Shielded(None), **options)
    assert len(list(loader)) == 2
    (worker,) = loader._iterator._workers
    subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)
    worker.join(2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_the_thread_ends_with_the_run_though_a_worker_is_left():
    hook = SignalHook()
    hook._take()
    worker = os.fork()
    if not worker:
        time.sleep(60)
        os._exit(0)
    try:
        hook._give_back()
        assert not hook._listener.is_alive()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


class Stopping(Hook):
    """Has the process asked to stop in its first iteration; remembers when what shows the run is closed."""

    def __init__(self):
        self.closed = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        close = runner.visualizer.close
        runner.visualizer.close = lambda: (self.closed.append(runner.iter), close())
        runner.optim_wrapper.agreed_signal = signal.SIGTERM


def test_a_run_that_is_stopped_closes_what_shows_it(data, tmp_path):
    hook = Stopping()
    with pytest.raises(SystemExit) as stop:
        config_runner(tmp_path, data, hooks=[hook]).train()
    assert stop.value.code == 143
    assert hook.closed == [0]


# ------------------------------------------------------------------------------------------------------ two processes


HERE = ('--standalone', '--nproc-per-node', '2')


@contextmanager
def torchrun(folder, *args, options=HERE):
    """Starts a training run of two processes with the options of torchrun; what is printed goes to ``out``."""
    command = [sys.executable, '-m', 'torch.distributed.run', *options, ROOT / 'tools' / 'train.py', *args]
    variables = os.environ | ENVIRONMENT | dict(OMP_NUM_THREADS='1')
    with (folder / 'out').open('a') as out:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT)
    with ended(process):
        yield process


def pid_of_rank(rank, launcher) -> int:
    def environ(pid):
        return Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')

    (pid,) = (pid for pid in children(launcher.pid) if f'RANK={rank}'.encode() in environ(pid))
    return pid


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(data, tmp_path):
    """Both have stopped after the same iteration, for rank 0 could not have saved it alone."""
    with torchrun(tmp_path, *command(data)) as process:
        wait_for_log(' 3/100000]', tmp_path)
        os.kill(pid_of_rank(1, process), signal.SIGUSR1)
        assert process.wait(120) == 1  # torchrun's own
    out = (tmp_path / 'out').read_text()
    assert out.count('SIGUSR1: the run stops after this iteration') == 1
    assert 'exitcode  : 138' in out
    assert_saved(tmp_path, 'SIGUSR1')


@pytest.mark.slow
def test_a_second_sigint_ends_a_rank_that_waits_for_another(data, tmp_path):
    """The other one is stopped: the collective does not return, and Python runs no handler."""
    with torchrun(tmp_path, *command(data)) as process:
        wait_for_log(' 3/100000]', tmp_path)
        waiting, stopped = (pid_of_rank(rank, process) for rank in (0, 1))
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(2)  # longer than a step
        os.kill(waiting, signal.SIGINT)
        wait_for(lambda: 'a second SIGINT ends it at once' in (tmp_path / 'out').read_text(), 20)
        os.kill(waiting, signal.SIGINT)
        assert process.wait(60) == 1  # it kills the one that is stopped after 30 s
    assert re.search(r'rank +: 0 .*\n +exitcode +: 130 ', (tmp_path / 'out').read_text())
    assert not any(map(is_there, (waiting, stopped)))


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(data, tmp_path):
    """SIGTERM by itself, SIGUSR1 where its option says so; it does not restart a run that it has stopped itself."""
    options = [*HERE, '--signals-to-handle', 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1', '--max-restarts', '1']
    with torchrun(tmp_path, *command(data), options=options) as process:
        wait_for_log(' 3/100000]', tmp_path)
        ranks = [pid_of_rank(rank, process) for rank in (0, 1)]
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 1
    assert_saved(tmp_path, 'SIGUSR1')
    assert not any(map(is_there, ranks))
