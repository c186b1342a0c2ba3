"""tools/reproduce_step.py: a step that has stopped a run is the same step again."""

import re
import runpy
import shlex
import sys

import pytest
from mmengine.hooks import Hook
from test_hooks import Poison, config_runner
from tiny import CAMVID, OPTIONS, ROOT, run_tool, write_data_set


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('data') / 'data', training=6, validation=2)


class InfiniteGradient(Hook):
    """Makes a gradient of the third iteration infinite, from outside of the model: its losses are finite."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            weight = runner.model.decode_head.conv_seg.weight
            self.handle = weight.register_hook(lambda gradient: gradient * float('inf'))


def stop(work_dir, data, hook, *options):
    """Runs until a step is not finite; returns the message's command."""
    with pytest.raises(ValueError, match='the gradient norm') as error:
        config_runner(work_dir, data, *options, hooks=[hook]).train()
    return shlex.split(re.search('Reproduce it with: python (.*)', str(error.value))[1])


def reproduce(command, monkeypatch, capsys):
    """Runs the command in this process; returns its exit code, what it printed, and (again, in the run) losses."""
    monkeypatch.setattr(sys, 'argv', [str(ROOT / command[0]), *command[1:]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name='__main__')
    out, err = capsys.readouterr()
    assert not err
    return end.value.code, out, re.findall(r'^  (\S+) (\S+) \(in the run: (\S+)\)$', out, re.M)


@pytest.mark.parametrize('amp', [[], ['optim_wrapper.autocast_cpu=True'], ['optim_wrapper.accumulative_counts=3']])
def test_the_same_losses_bit_for_bit_with_dropout(amp, data, tmp_path, monkeypatch, capsys):
    dropout = [f'model.{head}.dropout_ratio=0.5' for head in ('decode_head', 'auxiliary_head')]
    command = stop(tmp_path / 'w', data, InfiniteGradient(), *dropout, *amp)
    code, out, losses = reproduce(command, monkeypatch, capsys)
    batches = 3 if 'accumulative_counts' in str(amp) else 1
    names = ['loss', 'decode.loss_ce', 'decode.acc_seg', 'aux.loss_ce', 'aux.acc_seg']
    assert [name for name, _, _ in losses] == names * batches
    assert all(again == before for _, again, before in losses)
    assert 'nan' not in str(losses)
    # The gradient was spoilt by none of what the step was computed from.
    assert code == 0
    assert re.search(r'^Gradient norm \d\S* \(in the run: (inf|nan)\)$', out, re.M)
    assert 'First output that is not finite: None\nFirst gradient that is not finite: None' in out
    assert out.startswith(
        f'Iteration 3 in {"bfloat16" if "autocast" in str(amp) else "float32"} on cpu (in the run: cpu)'
    )


def test_a_bad_input_is_found(data, tmp_path, monkeypatch, capsys):
    code, out, losses = reproduce(stop(tmp_path / 'w', data, Poison(3)), monkeypatch, capsys)
    assert code == 1
    assert ('loss', 'nan', 'nan') in losses
    assert 'Gradient norm nan (in the run: nan)\nFirst output that is not finite: data_preprocessor\n' in out
    assert out.count(f'{data}/images/training/') == 2


def test_a_work_dir_with_a_space(data, tmp_path):
    """The command can be copied to a shell as it is."""
    command = stop(tmp_path / 'my runs', data, Poison(1))
    assert command[1:] == [f'{tmp_path}/my runs/{CAMVID.name}', f'{tmp_path}/my runs/nonfinite_iter_1.pth']


@pytest.mark.slow
def test_from_the_first_command_to_the_last(data, tmp_path):
    """A learning rate of 1e36 with tools/train.py, and the command that it prints."""
    options = ['optim_wrapper.optimizer.lr=1e36', 'param_scheduler=None', 'default_hooks.checkpoint.interval=1']
    trained = run_tool('train', CAMVID, '--data-root', data, '--cfg-options', *OPTIONS, *options, cwd=tmp_path)
    assert trained.returncode == 1
    assert 'error: Iteration 2: the loss is not finite' in trained.stderr
    assert 'Traceback' not in trained.stderr
    _, *args = shlex.split(re.search('Reproduce it with: python (.*)', trained.stderr)[1])
    again = run_tool('reproduce_step', *args, cwd=tmp_path)
    assert again.returncode == 1, again.stderr
    assert 'Converting a tensor with requires_grad' not in again.stderr
    assert re.search('^First output that is not finite: (backbone|decode_head)', again.stdout, re.M)


def test_help_and_usage(tmp_path):
    done = run_tool('reproduce_step', '--help', cwd=tmp_path)
    assert done.returncode == 0
    assert 'nonfinite_iter_N.pth' in done.stdout
    missing = run_tool('reproduce_step', CAMVID, 'nonfinite_iter_9.pth', cwd=tmp_path)
    assert missing.returncode == 2
    assert 'nonfinite_iter_9.pth: there is no such step' in missing.stderr
