"""The hooks in real runs: what is refused before training, what stops it, and what a terminal shows during it."""

import io
import itertools
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.hooks import RuntimeInfoHook as MMEngineRuntimeInfoHook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmseg.registry import MODELS
from tiny import CAMVID, OPTIONS, write_data_set
from torch import nn

from mmseg_resnest import ResNeSt, cli
from mmseg_resnest.checkpoints import read_checkpoint
from mmseg_resnest.hooks import NonFiniteHook, SampleCheckHook

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
    for fix in (
        'train_dataloader.batch_size=2',
        'sync_bn="mmseg_resnest.SyncBN"',
        'norm_cfg=dict(type="GN", num_groups=8)',
    ):
        assert fix in message


# Two processes ask the hook about batch norm of each kind; a loop of no steps, since torch synchronises only on GPUs.
TWO_PROCESSES = """
import sys
import tempfile

import torch.distributed
from torch import nn

sys.path.insert(0, {tests!r})
from mmseg_resnest import ResNeSt
from mmseg_resnest.norm import SyncBatchNorm
from test_hooks import Classifier, make_runner

torch.distributed.init_process_group('gloo')
for convert in (SyncBatchNorm.convert, nn.SyncBatchNorm.convert_sync_batchnorm, lambda model: model):
    runner = make_runner(tempfile.mkdtemp(), Classifier(ResNeSt(14), 2048), ['BatchNormCheckHook'], 1, max_iters=0)
    runner.model = convert(runner.model)
    try:
        runner.train()
        answer = 'passes'
    except ValueError as error:
        answer = str(error)
    found = ' '.join(['answer', str(runner.world_size), type(runner.model.backbone.bn1).__name__, answer])
    sys.stdout.write(chr(10) + found + chr(10))  # at once: two processes write
    sys.stdout.flush()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes_need_synchronised_batch_norm(tmp_path):
    (tmp_path / 'script.py').write_text(TWO_PROCESSES.format(tests=os.path.dirname(__file__)))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*launch, 'script.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith('answer')]
    assert answers.count('answer 2 SyncBatchNorm passes') == 4  # ours and torch's
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
# Runs of a config, as tools/train.py makes them
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('data') / 'data', training=6, validation=2)


@MODELS.register_module()
class NormedStem(nn.Sequential):
    """A backbone of one layer with batch norm."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(inplace=True))

    def forward(self, x):
        return (super().forward(x),)


HEAD = dict(in_channels=4, in_index=0, channels=4, num_convs=1)


def config_runner(work_dir, data, *options, hooks=(), edit=lambda cfg: None, build=Runner.from_cfg):
    """The Runner of CAMVID with a tiny model, seeded, for four iterations without validation."""
    quiet = ['train_cfg.max_iters=4', 'train_cfg.val_interval=9', 'randomness.seed=0']
    command = [str(CAMVID), '--work-dir', str(work_dir), '--data-root', str(data)]
    args = cli.make_parser('').parse_args([*command, '--cfg-options', *OPTIONS, *quiet, *options])
    cfg = cli.load_config(args, 'train_dataloader')
    cfg.experiment_name = next(NAMES)
    cfg.model.backbone = dict(type='NormedStem')
    cfg.model.decode_head.update(HEAD, type='FCNHead')
    cfg.model.decode_head.pop('pool_scales')
    cfg.model.auxiliary_head.update(HEAD)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.serialize_data = False  # which would collect garbage for a second
    edit(cfg)
    # Formatting the config for its copies takes most of a tiny run.
    runner = build(Config(cfg.to_dict(), filename=cfg.filename, format_python_code=False))
    for hook in hooks:
        runner.register_hook(hook, priority='VERY_HIGH')
    return runner


def log_of(work_dir):
    (file,) = work_dir.rglob('*.log')
    return file.read_text()


# --------------------------------------------------------------------------------------------------------------------
# SampleCheckHook
# --------------------------------------------------------------------------------------------------------------------


def write_199(root, split, i):
    file = str(root / f'annotations/{split}/{i}.png')
    label = cv2.imread(file, cv2.IMREAD_UNCHANGED)
    label[:8, :8] = 199
    cv2.imwrite(file, label)


@pytest.fixture
def spoilt(tmp_path):
    """A data set of which two samples of six to train are bad: a label with 199 and an empty image."""
    root = write_data_set(tmp_path / 'data', training=6, validation=2)
    write_199(root, 'training', 2)
    (root / 'images/training/4.jpg').write_bytes(b'')
    return root


SKIP = 'default_hooks.samples.on_bad_sample=skip'


def test_bad_training_sample_stops_the_run(spoilt, tmp_path):
    with pytest.raises(ValueError, match=r'bad sample: image \S+/[24]\.jpg .*, label \S+/[24]\.png .*: ') as error:
        config_runner(tmp_path / 'w', spoilt, 'train_cfg.max_iters=9').train()
    assert str(error.value).endswith(f'Or skip bad samples in training: --cfg-options {SKIP}')


@pytest.mark.parametrize('mode', ['val', 'test'])
def test_bad_sample_stops_an_evaluation_whatever_is_asked(mode, spoilt, tmp_path):
    write_199(spoilt, 'validation', 1)
    with pytest.raises(ValueError, match=r'validation/1\.png .*values 199 at 64 pixels; expected 0-10 or 255') as error:
        getattr(config_runner(tmp_path / 'w', spoilt, SKIP), mode)()
    assert 'on_bad_sample' not in str(error.value)


def check_skipped(work_dir):
    """The log names each of the two bad samples once, when it was met, and counts them in the end."""
    text = log_of(work_dir)
    each = re.findall(r'WARNING - Skipped a bad sample: image (\S+)', text)
    assert sorted(map(os.path.basename, each)) == ['2.jpg', '4.jpg']
    ((total, different, listed),) = re.findall(
        r'WARNING - Skipped (\d+) bad samples in iterations 1 to 9, (\d+) different:((?:\n  .*)+)', text
    )
    assert different == '2'
    counts = {file: int(count) for count, file in re.findall(r'(\d+) times: image (\S+) \(', listed)}
    assert counts.keys() == set(each)
    # What the worker wrote as it met them is what is counted; it may have read ahead since.
    (file,) = work_dir.rglob('bad_samples_0.txt')
    lines = file.read_text().splitlines()[: int(total)]
    assert {file: sum(f'image {file} (' in line for line in lines) for file in each} == counts
    assert sum(counts.values()) == int(total)
    return int(total)


def test_bad_training_samples_are_skipped_counted_and_reported(spoilt, tmp_path):
    runner = config_runner(tmp_path / 'w', spoilt, SKIP, 'train_cfg.max_iters=9')
    runner.train()
    assert runner.iter == 9
    total = check_skipped(tmp_path / 'w')
    assert total >= 6  # in three epochs
    (file,) = tmp_path.rglob('bad_samples_0.txt')
    assert len(file.read_text().splitlines()) == total  # nobody reads ahead


def test_report_of_a_resumed_run_says_what_it_counts(spoilt, tmp_path):
    def resume(cfg):
        cfg.load_from, cfg.resume = str(tmp_path / 'w/iter_2.pth'), True

    options = [SKIP, 'default_hooks.checkpoint.interval=2']
    config_runner(tmp_path / 'w', spoilt, *options, 'train_cfg.max_iters=2').train()
    config_runner(tmp_path / 'w', spoilt, *options, 'train_cfg.max_iters=8', edit=resume).train()
    text = ''.join(file.read_text() for file in tmp_path.glob('w/*/*.log'))
    assert re.search(r'Skipped \d+ bad samples in iterations 3 to 8, 2 different:', text)


@pytest.mark.slow
@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_workers_skip_and_are_counted(start, spoilt, tmp_path):
    workers = ['num_workers=2', 'persistent_workers=True', f'multiprocessing_context={start}']
    options = [f'train_dataloader.{option}' for option in workers]
    runner = config_runner(tmp_path / 'w', spoilt, SKIP, 'train_cfg.max_iters=9', *options)
    runner.train()
    check_skipped(tmp_path / 'w')


@pytest.mark.slow
def test_message_of_a_worker(spoilt, tmp_path):
    options = ['train_dataloader.num_workers=2', 'train_cfg.max_iters=9']
    with pytest.raises(ValueError) as error:
        config_runner(tmp_path / 'w', spoilt, *options).train()
    assert re.match(
        r'bad sample: image \S+/[24]\.jpg .*: .*skip$', cli._message(error.value).removeprefix('ValueError: ')
    )


def test_wrapped_data_sets_are_checked(spoilt, tmp_path):
    def wrap(cfg):
        inner = cfg.train_dataloader.dataset
        twice = dict(type='RepeatDataset', times=2, dataset=inner)
        cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, twice])

    with pytest.raises(ValueError, match=r'bad sample: image \S+/[24]\.jpg'):
        config_runner(tmp_path / 'w', spoilt, 'train_cfg.max_iters=9', edit=wrap).train()


def test_heads_say_which_label_is_ignored(data, tmp_path):
    heads = [f'model.{head}.ignore_index=254' for head in ('decode_head', 'auxiliary_head')]
    padding = 'model.data_preprocessor.seg_pad_val'
    with pytest.raises(ValueError, match=r'values 255 at \d+ pixels; expected 0-10 or 254 \(ignored\)'):
        config_runner(tmp_path / 'one', data, *heads, f'{padding}=254').train()
    with pytest.raises(ValueError, match=r'values 255 at \d+ pixels; expected 0-10\.'):
        config_runner(tmp_path / 'two', data, heads[0], f'{padding}=0').train()  # a class may be padded with


@pytest.mark.parametrize(
    ('extra', 'key'),
    [
        (None, 'model.data_preprocessor.seg_pad_val'),
        (dict(type='RandomRotate', prob=1.0, degree=5), 'seg_pad_val of RandomRotate in train_dataloader.dataset.pipe'),
        (dict(type='Pad', size=(48, 64)), 'pad_val.seg of Pad in train_dataloader.dataset.pipeline'),
    ],
)
def test_padding_that_is_no_class_and_not_ignored_is_refused(extra, key, data, tmp_path):
    """Before the first iteration: small images may be rare."""

    def edit(cfg):
        cfg.model.data_preprocessor.seg_pad_val = 255 if extra is None else 0
        if extra:
            inner = dict(type='RandomApply', transforms=[extra], prob=0.5)
            cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)
            cfg.train_dataloader.dataset.dataset.pipeline.insert(2, inner)

    options = [f'model.{head}.ignore_index=0' for head in ('decode_head', 'auxiliary_head')]
    with pytest.raises(
        ValueError, match=rf'^{key}\S* is 255, but model\.decode_head has ignore_index=0 and the classes 0-10: padding'
    ):
        config_runner(tmp_path / 'w', data, *options, edit=edit).train()


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (['type=mmseg.EncoderDecoder'], "EncoderDecoder's losses need int64; model.type='mmseg_resnest.E"),
        *(
            (
                [f'{part}={number}' for part in ('data_preprocessor.seg_pad_val', 'decode_head.ignore_index')],
                rf'model\.data_preprocessor\.seg_pad_val={number} is no uint8',
            )
            for number in (-100, 256)
        ),
    ],
)
def test_labels_of_one_byte_are_refused_where_they_do_not_do(options, reason, data, tmp_path):
    def edit(cfg):
        cfg.model.pop('auxiliary_head')
        cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)

    message = rf"^train_dataloader\.dataset\.pipeline: mmseg_resnest\.PackByteLabels .* but {reason}.*'PackSegInputs'"
    with pytest.raises(ValueError, match=message):
        config_runner(tmp_path / 'w', data, *(f'model.{option}' for option in options), edit=edit).train()


def test_mmsegmentations_segmentor_trains_with_its_own_packing(data, tmp_path):
    def edit(cfg):
        cfg.train_dataloader.dataset.pipeline[-1] = dict(type='PackSegInputs')
        for switch in ('fused_loss', 'channels_last', 'compiled', 'cuda_graphs'):
            cfg.model.pop(switch, None)

    config_runner(tmp_path / 'w', data, 'model.type=mmseg.EncoderDecoder', edit=edit).train()
    assert 'Iter(train) [4/4]' in log_of(tmp_path / 'w')


def test_heads_say_how_many_classes_there_are_where_the_data_set_does_not(data, tmp_path):
    def nine(cfg):
        del cfg.train_dataloader.dataset['metainfo']
        cfg.model.auxiliary_head.num_classes = 9

    with pytest.raises(ValueError, match=r'the label has values 9 at \d+ pixels; expected 0-8 or 255'):
        config_runner(tmp_path / 'w', data, edit=nine).train()


@pytest.mark.parametrize('leave_out', ['None', 'del'])
def test_our_tools_always_check_samples(leave_out, data, tmp_path):
    """Whatever the config says; another default hook that is None is left out."""
    options = ['default_hooks.nonfinite=None', *(['default_hooks.samples=None'] if leave_out == 'None' else [])]
    kept = [f'default_hooks.{name}=None' for name in ('logger', 'checkpoint')]

    def edit(cfg):
        if leave_out == 'del':
            del cfg.default_hooks['samples']

    runner = config_runner(tmp_path / 'w', data, *options, *kept, edit=edit, build=cli.build_runner)
    kinds = [type(hook).__name__ for hook in runner.hooks]
    assert kinds.count('SampleCheckHook') == 1
    assert not {'NonFiniteHook', 'LoggerHook', 'CheckpointHook'} & set(kinds)


def test_on_bad_sample_is_one_of_two():
    with pytest.raises(ValueError, match="on_bad_sample='ignore'; expected stop or skip"):
        SampleCheckHook('ignore')


# --------------------------------------------------------------------------------------------------------------------
# NonFiniteHook
# --------------------------------------------------------------------------------------------------------------------


class Poison(Hook):
    """Makes one value of a batch infinite, at the iterations named (counted from 1), and keeps the weights before."""

    def __init__(self, *iterations):
        self.iterations = iterations
        self.states = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.states[runner.iter + 1] = state_of(runner)
        if runner.iter + 1 in self.iterations:
            data_batch['inputs'][1] = data_batch['inputs'][1].float()
            data_batch['inputs'][1][0, 0, 0] = float('inf')


def state_of(runner):
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


CHECKPOINTS = 'default_hooks.checkpoint.interval=2'
SKIP_STEPS = 'default_hooks.nonfinite.action=skip'


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    work_dir = tmp_path / 'w'
    poison = Poison(3)
    runner = config_runner(work_dir, data, CHECKPOINTS, hooks=[poison])
    with pytest.raises(ValueError) as error:
        runner.train()
    text = str(error.value)
    assert text.startswith('Iteration 3: the loss is not finite, the gradient norm nan (loss nan, decode.loss_ce nan, ')
    files = re.search(r'^Images: (\S+), (\S+)$', text, re.M).groups()
    assert all(file.startswith(f'{data}/images/training/') for file in files)
    assert f'\nLast good checkpoint: {work_dir}/iter_2.pth\n' in text
    step = work_dir / 'nonfinite_iter_3.pth'
    command = f'python tools/reproduce_step.py {work_dir}/{CAMVID.name} {step}'
    assert f'\nReproduce it with: {command}\n' in text
    assert (work_dir / CAMVID.name).is_file()
    assert SKIP_STEPS in text
    # No step was made, and what the forward pass left in the batch norms was undone; no checkpoint was written.
    assert same(state_of(runner), poison.states[3])
    assert sorted(path.name for path in work_dir.glob('*.pth')) == ['iter_2.pth', step.name]
    content = read_checkpoint(step)
    assert same(content['state_dict'], poison.states[3])
    (batch,) = content['step']['batches']
    assert [sample['metainfo']['img_path'] for sample in batch['batch']['data_samples']] == list(files)
    assert batch['batch']['inputs'][1][0, 0, 0] == float('inf')
    assert np.isnan(batch['losses']['loss'])


def test_no_checkpoint_yet(data, tmp_path):
    with pytest.raises(ValueError, match='Iteration 1: the loss is not finite') as error:
        config_runner(tmp_path / 'w', data, hooks=[Poison(1)]).train()
    assert f'Last good checkpoint: none yet in {tmp_path}/w\n' in str(error.value)


def test_an_infinite_learning_rate_stops_the_run_after_one_step(data, tmp_path):
    options = ['optim_wrapper.optimizer.lr=1e36', 'param_scheduler=None', 'optim_wrapper.optimizer.weight_decay=0']
    with pytest.raises(ValueError, match='Iteration 2: the loss is not finite') as error:
        config_runner(tmp_path / 'w', data, *options).train()
    assert 'no step was made' in str(error.value).lower()


def test_skipped_steps_leave_no_trace(data, tmp_path):
    poison = Poison(2, 4)
    runner = config_runner(tmp_path / 'w', data, SKIP_STEPS, 'train_cfg.max_iters=5', hooks=[poison])
    runner.train()
    assert runner.iter == 5
    states = poison.states
    assert same(states[3], states[2])
    assert same(states[5], states[4])
    assert not same(states[4], states[3])
    assert not same(state_of(runner), states[5])
    assert all(value.isfinite().all() for value in state_of(runner).values())
    text = log_of(tmp_path / 'w')
    assert re.findall(r'WARNING - Iteration (\d): the loss is not finite', text) == ['2', '4']
    assert text.count('The step was skipped.') == 2
    assert 'Skipped 2 steps whose loss or gradient norm was not finite' in text
    assert not list((tmp_path / 'w').glob('nonfinite*'))


def test_skipped_steps_in_a_row_stop_the_run(data, tmp_path):
    options = [SKIP_STEPS, 'default_hooks.nonfinite.limit=2', 'train_cfg.max_iters=6']
    with pytest.raises(ValueError, match=r'Iteration 4: .*\n.*\nNo step was made, 2 times in a row; the'):
        config_runner(tmp_path / 'w', data, *options, hooks=[Poison(1, 3, 4)]).train()
    assert (tmp_path / 'w' / 'nonfinite_iter_4.pth').is_file()


def test_accumulated_batches_are_all_kept(data, tmp_path):
    poison = Poison(3)
    options = ['optim_wrapper.accumulative_counts=2', 'train_cfg.max_iters=8']
    with pytest.raises(ValueError, match='Iteration 4: the loss is not finite') as error:  # where the step is due
        config_runner(tmp_path / 'w', data, *options, hooks=[poison]).train()
    assert len(re.search('^Images: (.*)$', str(error.value), re.M)[1].split(', ')) == 4
    content = read_checkpoint(tmp_path / 'w' / 'nonfinite_iter_4.pth')
    assert same(content['state_dict'], poison.states[3])
    losses = [batch['losses']['loss'] for batch in content['step']['batches']]
    assert np.isnan(losses).tolist() == [True, False]


def use_stock_wrapper(cfg):
    cfg.optim_wrapper = dict(optimizer=cfg.optim_wrapper.optimizer)


def test_stock_wrapper_stops_after_its_step(data, tmp_path):
    with pytest.raises(ValueError, match='Iteration 3: the loss is not finite') as error:
        config_runner(tmp_path / 'w', data, CHECKPOINTS, hooks=[Poison(3)], edit=use_stock_wrapper).train()
    assert 'OptimWrapper has stepped with it: the weights are lost' in str(error.value)
    assert f'Last good checkpoint: {tmp_path}/w/iter_2.pth' in str(error.value)
    assert [path.name for path in (tmp_path / 'w').glob('*.pth')] == ['iter_2.pth']


def test_stock_wrapper_cannot_skip(data, tmp_path):
    with pytest.raises(ValueError, match="action='skip' cannot undo a step of OptimWrapper"):
        config_runner(tmp_path / 'w', data, SKIP_STEPS, edit=use_stock_wrapper).train()


class Spoil(Hook):
    """Makes a weight infinite after one iteration, as a step with an infinite learning rate does."""

    priority = 'HIGHEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            runner.model.backbone[0].weight.data[0] = float('inf')


BROKEN = r'1 of \d+ tensors of the model are not finite \(the first: backbone\.0\.weight\)'


@pytest.mark.parametrize('edit', [lambda cfg: None, use_stock_wrapper], ids=['ours', 'stock wrapper'])
def test_weights_that_are_not_finite_are_not_saved(edit, data, tmp_path):
    """Nor does a good checkpoint go, which MMEngine alone would delete to make room for it."""
    options = ['default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=2']
    with pytest.raises(ValueError, match=rf'^Iteration 3: {BROKEN} after it, and no checkpoint of them was saved') as e:
        config_runner(tmp_path / 'w', data, *options, hooks=[Spoil(3)], edit=edit).train()
    assert f'\nLast good checkpoint: {tmp_path}/w/iter_2.pth\n' in str(e.value)
    assert {path.name for path in (tmp_path / 'w').glob('*.pth')} == {'iter_1.pth', 'iter_2.pth'}
    assert all(value.isfinite().all() for value in read_checkpoint(tmp_path / 'w/iter_2.pth')['state_dict'].values())


@pytest.mark.parametrize('iteration', [3, 4])
def test_weights_that_are_not_finite_end_the_run_as_an_error(iteration, data, tmp_path):
    """With skip too: the step after them is not finite, and nothing can make it so; or there is none."""
    options = [SKIP_STEPS, 'default_hooks.checkpoint=None', 'train_cfg.val_begin=9']
    when = 'before its step, so no loss can be finite' if iteration == 3 else 'after it, at the end of training'
    with pytest.raises(ValueError, match=rf'^Iteration 4: {BROKEN} {when}\.\nA step has broken them') as error:
        config_runner(tmp_path / 'w', data, *options, hooks=[Spoil(iteration)]).train()
    assert f'Last good checkpoint: none yet in {tmp_path}/w\n' in str(error.value)
    assert not list((tmp_path / 'w').glob('*.pth'))


def test_the_last_good_checkpoint_is_finite(data, tmp_path):
    """One of an earlier version, saved with what is not finite, and one that cannot be read are passed over."""

    class Damage(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 3:
                content = torch.load(tmp_path / 'w/iter_2.pth', weights_only=False)
                content['state_dict']['backbone.0.weight'][0] = float('nan')
                torch.save(content, tmp_path / 'w/iter_2.pth')
                (tmp_path / 'w/iter_3.pth').write_bytes(b'')

    options = ['default_hooks.checkpoint.interval=1']
    with pytest.raises(ValueError, match='Iteration 4: the loss is not finite') as error:
        config_runner(tmp_path / 'w', data, *options, hooks=[Poison(4), Damage()]).train()
    found = f'{tmp_path}/w/iter_1.pth (iter_3.pth cannot be read) (iter_2.pth is not finite)'
    assert f'\nLast good checkpoint: {found}\n' in str(error.value)


def test_weights_that_are_not_finite_are_not_evaluated(data, tmp_path):
    runner = config_runner(tmp_path / 'w', data)
    runner.model.backbone[1].running_var[0] = float('nan')
    with pytest.raises(ValueError, match=r'1 of \d+ tensors of the model are not finite .*backbone\.1\.running_var'):
        runner.test()


def test_a_full_disk_does_not_hide_what_has_happened(data, tmp_path, monkeypatch):
    save = torch.save

    def full(content, file):
        if not isinstance(file, io.BytesIO):
            raise OSError('No space left on device')
        save(content, file)

    runner = config_runner(tmp_path / 'w', data, hooks=[Poison(1)])
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(ValueError, match='Iteration 1: the loss is not finite') as error:
        runner.train()
    assert 'nonfinite_iter_1.pth: No space left on device' in str(error.value)


def test_a_score_that_is_nan_is_never_the_best(tmp_path):
    class Nan(Count):
        def compute_metrics(self, results):
            return dict(count=float('nan'))

    runner = make_runner(tmp_path, Classifier(Stem(), 4), [], max_iters=3)
    runner._val_evaluator = [Nan()]
    (saver,) = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    saver.__init__(by_epoch=False, save_best='images/count', rule='greater')
    runner.train()
    assert not list(tmp_path.glob('best*'))


@pytest.mark.parametrize('options', [dict(action='warn'), dict(limit=0)])
def test_options_of_the_hook(options):
    with pytest.raises(ValueError, match='expected stop or skip, and at least 1'):
        NonFiniteHook(**options)


# Rank 1 alone sees a loss that is not finite, at the second iteration.
TWO_RANKS = """
import sys
from pathlib import Path

import torch.distributed

sys.path.insert(0, {tests!r})
from test_hooks import Poison, config_runner, state_of

torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
for action in ('stop', 'skip'):
    gloo = ['launcher=pytorch', 'sync_bn=None', 'model_wrapper_cfg.type=MMDistributedDataParallel',
            'model_wrapper_cfg.device_ids=None', 'model_wrapper_cfg.broadcast_buffers=False',
            'default_hooks.nonfinite.action=' + action, 'train_cfg.max_iters=3']
    poison = Poison(*[2] * rank)
    runner = config_runner(Path(action).absolute(), {data!r}, *gloo, hooks=[poison])
    try:
        runner.train()
        answer = 'trained ' + str(runner.iter)
    except ValueError as error:
        answer = str(error)
    after = poison.states.get(3, state_of(runner))
    kept = all(torch.equal(value, after[key]) for key, value in poison.states[2].items())
    weights = torch.cat([p.detach().flatten() for p in runner.model.parameters()]).double().sum().item()
    Path(action + str(rank)).write_text(chr(10).join([answer, str(kept), repr(weights)]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_agree(data, tmp_path):
    (tmp_path / 'script.py').write_text(TWO_RANKS.format(tests=os.path.dirname(__file__), data=str(data)))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run([*launch, 'script.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = {}
    for action in ('stop', 'skip'):
        ranks = [(tmp_path / f'{action}{rank}').read_text().splitlines() for rank in (0, 1)]
        (*first, kept, weights), (*second, kept_too, weights_too) = ranks
        assert kept == kept_too == 'True'
        assert weights == weights_too
        assert np.isfinite(float(weights))
        answers[action] = first, second
    assert answers['skip'] == (['trained 3'], ['trained 3'])
    first, second = answers['stop']
    assert first[0].startswith('Iteration 2: the loss is not finite, the gradient norm nan (')
    assert second[0].startswith('Iteration 2: the loss is not finite (on rank 1), the gradient norm nan (')
    assert 'The loss of another rank is not finite' in first[4]
    assert second[4].endswith(f'{tmp_path}/stop/nonfinite_iter_2_rank1.pth')
    assert [path.name for path in (tmp_path / 'stop').glob('*.pth')] == ['nonfinite_iter_2_rank1.pth']


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


def test_the_config_is_formatted_to_train_and_not_to_test(tmp_path, monkeypatch):
    formatted = []

    class Watched(Config):
        @property
        def pretty_text(self):
            formatted.append(True)
            return super().pretty_text

    runner = make_runner(tmp_path, Classifier(Stem(), 4), [])
    runner.hooks[:] = [hook for hook in runner.hooks if type(hook) is not MMEngineRuntimeInfoHook]
    runner.register_hook(dict(type='mmseg_resnest.RuntimeInfoHook'))
    runner.cfg = Watched(dict(a=1))
    formatted.clear()
    runner.test()
    assert not formatted
    runner.train()
    assert formatted
    assert runner.message_hub.get_info('cfg').strip() == 'a = 1'
    assert runner.message_hub.get_info('seed') == runner.seed
