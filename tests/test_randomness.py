"""A resumed run is the same run, bit for bit, whatever its data loader's workers."""

import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from mmengine.runner import loops
from mmseg.datasets import BaseSegDataset
from test_hooks import config_runner
from test_launch import free_port
from test_signals import HERE, children, command, pid_of_rank, torchrun, wait_for_log
from tiny import write_data_set
from torch.utils.data import BatchSampler

from mmseg_resnest.checkpoints import read_checkpoint
from mmseg_resnest.randomness import SAMPLE, STEP, _Numbered, seed_generators

DROPOUT = [f'model.{head}.dropout_ratio=0.5' for head in ('decode_head', 'auxiliary_head')]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('data') / 'data', training=6, validation=2)


def train(work_dir, data, workers, *options, edit=lambda cfg: None, iterations=5):
    """Trains with dropout and augmentation; a checkpoint is kept of every one."""
    saving = ['default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=-1']
    loader = [f'train_dataloader.num_workers={workers}', f'train_cfg.max_iters={iterations}']
    runner = config_runner(work_dir, data, *DROPOUT, *saving, *loader, *options, edit=edit)
    runner.train()
    assert runner.iter == runner.max_iters
    if workers:  # the garbage collector, which closes their queues first, would wait 10 s for them
        runner.train_loop.dataloader_iterator._iterator._shutdown_workers()


def resumed_from(checkpoint):
    """Returns the options of a run that goes on from a checkpoint."""
    return [f'load_from={checkpoint}', 'resume=True']


def states(path):
    """Returns the tensors of a run's checkpoint: weights, statistics and momenta."""
    checkpoint = read_checkpoint(path)
    momenta = checkpoint['optimizer']['state']
    return checkpoint['state_dict'] | {f'momentum {i}': state['momentum_buffer'] for i, state in momenta.items()}


def assert_equal(path, reference):
    found, expected = states(path), states(reference)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """A run that nothing has interrupted, with no workers."""
    folder = tmp_path_factory.mktemp('whole')
    train(folder, data, 0)
    return folder


@pytest.mark.parametrize('workers', [0, 2])
def test_two_and_three_iterations_are_five(workers, whole, data, tmp_path):
    """Resumed without workers or with two, and with another seed on the command line than the run had."""
    train(tmp_path, data, workers, 'randomness.seed=77', *resumed_from(whole / 'iter_2.pth'))
    for iteration in (3, 4, 5):
        assert_equal(tmp_path / f'iter_{iteration}.pth', whole / f'iter_{iteration}.pth')


def test_a_run_with_workers_is_the_one_without(whole, data, tmp_path):
    train(tmp_path / 'w', data, 2)
    assert_equal(tmp_path / 'w' / 'iter_5.pth', whole / 'iter_5.pth')
    train(tmp_path / 'r', data, 0, *resumed_from(tmp_path / 'w' / 'iter_3.pth'))
    assert_equal(tmp_path / 'r' / 'iter_5.pth', whole / 'iter_5.pth')


def test_without_the_hook_a_resumed_run_is_another(whole, data, tmp_path):
    """What the other tests see is the hook's work."""

    def drop(cfg):
        cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type != 'mmseg_resnest.RandomnessHook']

    train(tmp_path, data, 0, *resumed_from(whole / 'iter_2.pth'), edit=drop)
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / 'iter_5.pth', whole / 'iter_5.pth')


def by_epoch(cfg):
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=9)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.param_scheduler = []


def test_an_epoch_that_was_broken_off_goes_on_with_its_next_batch(data, tmp_path):
    """Two epochs of three batches, resumed after the fourth."""
    train(tmp_path / 'w', data, 0, edit=by_epoch)
    train(tmp_path / 'r', data, 0, *resumed_from(tmp_path / 'w' / 'iter_4.pth'), edit=by_epoch)
    assert_equal(tmp_path / 'r' / 'iter_6.pth', tmp_path / 'w' / 'iter_6.pth')


@pytest.mark.parametrize('drop_last', [False, True])
def test_an_epoch_that_was_saved_after_its_last_batch_is_over(drop_last, data, tmp_path):
    """Batches of four: two an epoch, the second of two images, or one; the rates go down from epoch to epoch."""

    def edit(cfg):
        by_epoch(cfg)
        cfg.train_dataloader.batch_size, cfg.train_dataloader.drop_last = 4, drop_last
        cfg.param_scheduler = [dict(type='ExponentialLR', gamma=0.5, by_epoch=True)]

    batches = 1 if drop_last else 2
    train(tmp_path / 'w', data, 0, edit=edit)
    train(tmp_path / 'r', data, 0, *resumed_from(tmp_path / 'w' / f'iter_{batches}.pth'), edit=edit)
    names = sorted(path.name for path in (tmp_path / 'r').glob('iter_*.pth'))
    assert names == [f'iter_{i}.pth' for i in range(batches + 1, 2 * batches + 1)]
    assert_equal(tmp_path / 'r' / names[-1], tmp_path / 'w' / names[-1])


@pytest.mark.parametrize('told', [True, False], ids=['ours', "MMEngine's"])
@pytest.mark.parametrize('epoch', [0, 1], ids=['within the first', 'between the two'])
def test_epochs_of_fewer_batches_than_the_run_had_are_whole(epoch, told, data, tmp_path):
    """Of three batches, resumed after them with batches that hold four of six images: two batches an epoch are left."""

    def edit(cfg):
        by_epoch(cfg)
        cfg.train_dataloader.batch_size = 4

    train(tmp_path / 'w', data, 0, edit=by_epoch)
    checkpoint = torch.load(tmp_path / 'w' / 'iter_3.pth', weights_only=False)
    checkpoint['meta']['epoch'] = epoch
    if not told:
        checkpoint['meta']['iter'] = 9
        checkpoint['message_hub']['runtime_info'].pop('batches')
    torch.save(checkpoint, tmp_path / 'three.pth')
    runner = config_runner(tmp_path / 'r', data, *resumed_from(tmp_path / 'three.pth'), edit=edit)
    runner.train()
    assert (runner.epoch, runner.iter - checkpoint['meta']['iter']) == (2, 4 - 2 * epoch)


class Shuffled(torch.utils.data.Sampler):
    """A sampler that neither skips nor is told the epoch, as somebody's own."""

    def __init__(self, size):
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=self.generator).tolist())


def numbered_batches(drop_last):
    return BatchSampler(_Numbered(BatchSampler(Shuffled(7), 3, drop_last), 0, 1), 3, drop_last)


@pytest.mark.parametrize('drop_last', [False, True])
def test_what_is_skipped_is_what_the_passes_before_gave(drop_last):
    """Passes of seven samples in batches of three, of which the last is smaller or dropped."""
    batches = numbered_batches(drop_last)
    undisturbed = [batch for _ in range(3) for batch in batches]
    for skipped in range(len(undisturbed)):
        batches = numbered_batches(drop_last)
        batches.sampler.skip(3 * skipped)
        assert [batch for _ in range(3) for batch in batches][: len(undisturbed) - skipped] == undisturbed[skipped:]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_sampler_that_cannot_skip_goes_on_exactly(workers, data, tmp_path, monkeypatch):
    """Passes of two batches, of four and two images, resumed in the second and the third pass, before the fourth."""
    monkeypatch.setattr(loops.time, 'sleep', lambda _: None)  # MMEngine's two seconds between two passes
    options = ['train_dataloader.sampler.type=DefaultSampler', 'train_dataloader.batch_size=4']
    train(tmp_path / 'w', data, 0, *options, iterations=7)
    for iteration in (3, 4):
        resumed = [*options, *resumed_from(tmp_path / 'w' / f'iter_{iteration}.pth')]
        train(tmp_path / f'r{iteration}', data, workers, *resumed, iterations=7)
        assert_equal(tmp_path / f'r{iteration}' / 'iter_7.pth', tmp_path / 'w' / 'iter_7.pth')


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_generators_follow_from_the_key():
    draws = []
    for key in ((1, SAMPLE, 5), (1, STEP, 5), (2, SAMPLE, 5), (1, SAMPLE, 6), (1, SAMPLE, 5)):
        seed_generators(*key)
        draws.append(drawn())
    assert draws[0] == draws[-1]
    assert len({value for triple in draws[:-1] for value in triple}) == 12


def test_two_ranks_number_their_samples_without_a_gap():
    numbered = [_Numbered(BatchSampler(range(rank, 6, 2), 1, False), rank, 2) for rank in (0, 1)]
    assert [list(each) for each in numbered] == [[(0, 0), (2, 2), (4, 4)], [(1, 1), (3, 3), (5, 5)]]


@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_a_resume_at_iteration_160_000_does_not_replay_the_data(sampler, whole, data, tmp_path, monkeypatch):
    """The first batch is there within two seconds of what a start takes, and no more images are read than there."""
    checkpoint = torch.load(whole / 'iter_2.pth', weights_only=False)
    checkpoint['meta']['iter'] = 160_000
    torch.save(checkpoint, tmp_path / 'late.pth')
    sampler = f'train_dataloader.sampler.type={sampler}'

    read, prepare = [], BaseSegDataset.prepare_data
    monkeypatch.setattr(BaseSegDataset, 'prepare_data', lambda self, i: read.append(i) or prepare(self, i))

    def cost(name, *options):  # seconds of the processor, since those of a clock are also other work's; images
        before = time.process_time(), len(read)
        train(tmp_path / name, data, 0, sampler, *options)
        return time.process_time() - before[0], len(read) - before[1]

    start, images = cost('a', 'train_cfg.max_iters=1')
    late = ['train_cfg.max_iters=160001', *resumed_from(tmp_path / 'late.pth')]
    tries = [cost(name, *late) for name in 'bcd']
    assert min(seconds for seconds, _ in tries) < start + 2
    assert [count for _, count in tries] == [images] * 3
    assert (tmp_path / 'b' / 'iter_160001.pth').is_file()


def one_machine_of_two():
    """The options of the two torchruns, of one process each."""
    meeting = ['--nnodes', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{free_port()}']
    return [*meeting, '--local-addr', '127.0.0.1', '--nproc-per-node', '1']


@pytest.mark.slow
@pytest.mark.parametrize('machine', [0, 1])
def test_a_rank_of_two_machines_that_is_killed_is_restarted(machine, data, tmp_path):
    """Each torchrun counts the restarts by itself; all ranks go on from the checkpoint, to the end."""
    saving = ['default_hooks.checkpoint.interval=2', 'env_cfg.dist_cfg.timeout=30', 'train_cfg.max_iters=20']
    options = [*one_machine_of_two(), '--max-restarts', '2']
    with (
        torchrun(tmp_path, *command(data, *saving), options=options) as first,
        torchrun(tmp_path, *command(data, *saving), options=options) as second,
    ):
        wait_for_log('3/20]', tmp_path)
        (rank,) = children((first, second)[machine].pid)
        os.kill(rank, signal.SIGKILL)
        assert [first.wait(150), second.wait(150)] == [0, 0], (tmp_path / 'out').read_text()
    out = (tmp_path / 'out').read_text()
    assert int(re.search(r'resumed epoch: 0, iter: (\d+)', out)[1]) >= 2
    assert 'Trained 20 iterations' in out


@pytest.mark.slow
def test_a_restart_by_torchrun_gives_what_two_machines_give_undisturbed(data, tmp_path):
    """A rank is killed after the third of twelve iterations; ``--nnodes 2`` are two torchruns of one process each."""
    saving = ['default_hooks.checkpoint.interval=2', 'default_hooks.checkpoint.max_keep_ckpts=-1']
    args = command(data, *DROPOUT, *saving, 'train_cfg.max_iters=12', 'randomness.seed=5')
    disturbed, undisturbed = (tmp_path / name for name in ('disturbed', 'undisturbed'))
    disturbed.mkdir()
    undisturbed.mkdir()
    with torchrun(disturbed, *args, options=[*HERE, '--max-restarts', '1']) as process:
        wait_for_log('3/12]', disturbed)
        os.kill(pid_of_rank(1, process), signal.SIGKILL)
        assert process.wait(200) == 0, (disturbed / 'out').read_text()
    out = (disturbed / 'out').read_text()
    resumed_at = int(re.search(r'resumed epoch: 0, iter: (\d+)', out)[1])
    assert 2 <= resumed_at <= 10
    machine = one_machine_of_two()
    with (
        torchrun(undisturbed, *args, options=machine) as first,
        torchrun(undisturbed, *args, options=machine) as second,
    ):
        assert [first.wait(200), second.wait(200)] == [0, 0], (undisturbed / 'out').read_text()
    assert 'GPU number: 2' in (undisturbed / 'out').read_text()  # MMEngine's word for processes
    for iteration in (2, 12):
        assert_equal(disturbed / 'w' / f'iter_{iteration}.pth', undisturbed / 'w' / f'iter_{iteration}.pth')
