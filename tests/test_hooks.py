"""The hooks in real runs: what is refused before training, and what a terminal shows during it."""

import itertools
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmseg_resnest import ResNeSt

NAMES = (f'test_hooks_{i}' for i in itertools.count())


class Images(torch.utils.data.Dataset):
    """Seven plain images with a class each."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), index / 7), labels=index % 3)


class Classifier(BaseModel):
    """A backbone, the mean of its last feature map, and a linear layer; ``fail_at`` breaks one training step."""

    def __init__(self, backbone, channels, fail_at=None):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, 3)
        self.steps = 0
        self.fail_at = fail_at

    def forward(self, inputs, labels, mode='tensor'):
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == 'predict':
            return [dict(right=right) for right in logits.argmax(1) == labels]
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError('the step failed')
        return dict(loss=nn.functional.cross_entropy(logits, labels))


class Count(BaseMetric):
    """How many images were evaluated."""

    default_prefix = 'images'

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(count=len(results))


class Stem(nn.Sequential):
    """The smallest backbone there is."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x):
        return (super().forward(x),)


def make_runner(work_dir, model, hooks, batch_size=2, max_iters=5, **options):
    def loader(sampler):
        return dict(
            batch_size=batch_size,
            num_workers=0,
            dataset=Images(),
            sampler=dict(type=sampler, shuffle=False),
            collate_fn=dict(type='default_collate'),
        )

    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader('InfiniteSampler'),
        val_dataloader=loader('DefaultSampler'),
        test_dataloader=loader('DefaultSampler'),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=3),
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=[Count()],
        test_evaluator=[Count()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_last=False),
        ),
        custom_hooks=[dict(type=f'mmseg_resnest.{hook}') for hook in hooks],
        log_processor=dict(by_epoch=False),
        experiment_name=next(NAMES),
        **options,
    )


@pytest.fixture(autouse=True)
def no_stale_log():
    """MMEngine's loggers outlive a test, and the streams that it gave them do not."""
    yield
    handlers = MMLogger.get_current_instance().handlers
    for handler in handlers:
        handler.close()
    handlers.clear()


# --------------------------------------------------------------------------------------------------------------------
# BatchNormCheckHook
# --------------------------------------------------------------------------------------------------------------------


def train_resnest(work_dir, batch_size, **options):
    """Trains ResNeSt-14 and validates it; returns the largest change of a parameter of the head."""
    model = Classifier(ResNeSt(14, **options), 2048)
    before = model.head.weight.detach().clone()
    runner = make_runner(work_dir, model, ['BatchNormCheckHook'], batch_size)
    runner.train()
    assert runner.iter == 5
    return (model.head.weight - before).abs().max()


def test_one_image_and_batch_norm_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError) as error:
        train_resnest(tmp_path, batch_size=1)
    message = str(error.value)
    norms = 3 + 4 * 5
    assert message.startswith(
        f'train_dataloader.batch_size=1, but {norms} batch norm layers train (the first: backbone.conv1.1)'
    )
    for fix in ('train_dataloader.batch_size=2', 'sync_bn="torch"', 'norm_cfg=dict(type="GN", num_groups=8)'):
        assert fix in message


# Two processes ask the hook about batch norm of each kind; a loop of no steps, since torch synchronises only on GPUs.
TWO_PROCESSES = """
import sys
import tempfile

import torch.distributed
from torch import nn

sys.path.insert(0, {tests!r})
from mmseg_resnest import ResNeSt
from test_hooks import Classifier, make_runner

torch.distributed.init_process_group('gloo')
for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda model: model):
    runner = make_runner(tempfile.mkdtemp(), Classifier(ResNeSt(14), 2048), ['BatchNormCheckHook'], 1, max_iters=0)
    runner.model = convert(runner.model)
    try:
        runner.train()
        answer = 'passes'
    except ValueError as error:
        answer = str(error)
    print('answer', runner.world_size, type(runner.model.backbone.bn1).__name__, answer, flush=True)
"""


@pytest.mark.slow
def test_several_processes_need_synchronised_batch_norm(tmp_path):
    (tmp_path / 'script.py').write_text(TWO_PROCESSES.format(tests=os.path.dirname(__file__)))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*launch, 'script.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith('answer')]
    assert answers.count('answer 2 SyncBatchNorm passes') == 2
    refused = [answer for answer in answers if answer.startswith('answer 2 BatchNorm2d train_dataloader.batch_size=1')]
    assert len(refused) == 2


def test_synchronised_batch_norm_of_one_process_is_refused(tmp_path):
    model = Classifier(nn.SyncBatchNorm.convert_sync_batchnorm(ResNeSt(14)), 2048)
    with pytest.raises(ValueError, match='23 batch norm layers train'):
        make_runner(tmp_path, model, ['BatchNormCheckHook'], 1).train()


@pytest.mark.parametrize(
    ('batch_size', 'options'),
    [
        (2, dict()),
        (1, dict(norm_cfg=dict(type='GN', num_groups=8))),
        (1, dict(norm_eval=True)),
        (1, dict(frozen_stages=4)),
    ],
)
def test_what_can_train_is_trained(tmp_path, batch_size, options):
    assert train_resnest(tmp_path, batch_size, **options) > 0


# --------------------------------------------------------------------------------------------------------------------
# ProgressBarHook
# --------------------------------------------------------------------------------------------------------------------

ESCAPE = re.compile(r'\x1b\[[0-9;?]*[a-zA-Z]')


class Terminal:
    """A pseudo-terminal: what is written to ``stream`` can be read after the ``with`` block."""

    def __enter__(self):
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, 'w')
        self.content = b''
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self):
        try:
            while chunk := os.read(self.master, 65536):
                self.content += chunk
        except OSError:  # all writers have closed
            pass

    def __exit__(self, *_):
        self.stream.close()
        self._reader.join()
        os.close(self.master)

    @property
    def raw(self):
        return self.content.decode()

    @property
    def text(self):
        return ESCAPE.sub('', self.raw).replace('\r', '\n')

    @property
    def shows_cursor(self):
        return self.raw.rfind('\x1b[?25h') > self.raw.rfind('\x1b[?25l')

    def progress(self, name):
        """The (done, total) pairs that bars of a name have shown, in order, without repetitions."""
        shown = re.findall(rf'^{name} +\S+ +(\d+)/(\d+) \d:', self.text, re.MULTILINE)
        return [tuple(map(int, pair)) for pair, _ in itertools.groupby(shown)]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, wide enough for the lines of the log."""
    monkeypatch.setenv('TERM', 'xterm-256color')
    monkeypatch.setenv('COLUMNS', '250')
    return Terminal()


def log_messages(work_dir):
    (file,) = work_dir.rglob('*.log')
    found = re.findall(r'mmengine - INFO - (Iter\(.*)', file.read_text())
    assert len(found) >= 5
    return found


def test_bars_advance_to_the_end_and_leave_the_log_intact(tmp_path, terminal):
    with terminal, redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
        runner = make_runner(tmp_path, Classifier(Stem(), 4), ['ProgressBarHook'])
        runner.train()
        runner.test()
        assert sys.stdout is sys.stderr is terminal.stream
    # Training's bar makes room for validation after the 3rd step, and comes back.
    train = terminal.progress('train')
    assert train[0] == (0, 5)
    assert (3, 5) in train
    assert train[-1] == (5, 5)
    assert train == sorted(train)
    for name in ('validate', 'test'):
        assert terminal.progress(name)[-1] == (4, 4), name
    assert terminal.shows_cursor
    messages = log_messages(tmp_path)
    for message in messages:
        line = rf'^\d\d/\d\d [\d:]{{8}} - mmengine - INFO - {re.escape(message.rstrip())} *$'
        assert len(re.findall(line, terminal.text, re.MULTILINE)) == messages.count(message), message


def test_bar_goes_on_where_a_resumed_run_does(tmp_path, terminal):
    make_runner(tmp_path, Classifier(Stem(), 4), []).train()
    with terminal, redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
        make_runner(tmp_path, Classifier(Stem(), 4), ['ProgressBarHook'], resume=True).train()
    assert terminal.progress('train')[0] == (4, 5)
    assert terminal.progress('train')[-1] == (5, 5)


def test_log_goes_where_standard_output_goes(tmp_path, terminal):
    with terminal, (tmp_path / 'stdout.txt').open('w') as file, redirect_stdout(file), redirect_stderr(terminal.stream):
        make_runner(tmp_path, Classifier(Stem(), 4), ['ProgressBarHook']).train()
        assert sys.stdout is file
    assert terminal.progress('train')[-1] == (5, 5)
    assert 'Iter(train)' not in terminal.text
    written = ESCAPE.sub('', (tmp_path / 'stdout.txt').read_text())
    assert all(f'{message}\n' in written for message in log_messages(tmp_path))


def test_no_bar_without_a_terminal(tmp_path, capsys):
    make_runner(tmp_path, Classifier(Stem(), 4), ['ProgressBarHook']).train()
    out, err = capsys.readouterr()
    assert err == ''
    messages = log_messages(tmp_path)
    assert all(f'{message}\n' in ESCAPE.sub('', out) for message in messages)
    assert '━' not in out


FAILING = """
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from test_hooks import Classifier, Stem, make_runner

make_runner(Path({work_dir!r}), Classifier(Stem(), 4, fail_at=2), ['ProgressBarHook']).train()
"""


def test_terminal_is_given_back_when_a_run_fails(tmp_path, terminal):
    script = FAILING.format(tests=os.path.dirname(__file__), work_dir=str(tmp_path))
    command = [sys.executable, '-W', 'ignore', '-c', script]
    with terminal:
        done = subprocess.run(command, stdout=terminal.stream, stderr=terminal.stream)
    assert done.returncode == 1
    assert terminal.progress('train')[-1] == (1, 5)
    assert 'RuntimeError: the step failed' in terminal.text
    assert terminal.shows_cursor
