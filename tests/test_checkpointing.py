"""Checkpoints are whole at any moment, and a run goes on from the newest that is."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import CheckpointHook as StockHook
from mmengine.hooks import Hook
from mmengine.runner import find_latest_checkpoint
from test_hooks import Classifier, Stem, make_runner

from mmseg_resnest.checkpointing import (
    PARTIAL,
    CheckpointHook,
    _is_later_by_name,
    agreed_checkpoint,
    earlier_checkpoint,
    goes_on_from,
    newest_checkpoint,
    write_whole,
)
from mmseg_resnest.checkpoints import guarded_loading, read_checkpoint
from mmseg_resnest.signals import SignalHook


def run(work_dir, iterations, hook=None, width=4, **options):
    """Returns a runner that saves after every iteration; its model has ``width`` times 4 kB more than it needs."""
    model = Classifier(Stem(), 4)
    model.register_parameter('ballast', torch.nn.Parameter(torch.zeros(width, 1000), requires_grad=False))
    runner = make_runner(work_dir, model, [], max_iters=iterations)
    runner._hooks = [each for each in runner._hooks if not isinstance(each, StockHook)]
    runner.register_hook(hook or CheckpointHook(by_epoch=False, interval=1, **options))
    return runner


def files(folder):
    return sorted(path.name for path in Path(folder).glob('*.pth*'))


@pytest.fixture
def saved(tmp_path):
    """A work dir with the checkpoints of iterations 1 to 3."""
    run(tmp_path / 'w', 3, max_keep_ckpts=3).train()
    return tmp_path / 'w'


def test_the_newest_is_found_and_the_work_dir_may_move(saved, tmp_path):
    assert (saved / 'last_checkpoint').read_text() == 'iter_3.pth'
    moved = saved.rename(tmp_path / 'moved')
    assert newest_checkpoint(moved) == (moved / 'iter_3.pth', [])
    assert read_checkpoint(moved / 'iter_3.pth')['meta']['iter'] == 3


def flip(content):
    """Flips one bit in the middle of the file, where the tensors are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip_key(content):
    """Flips one bit of the key ``iter``, where the checkpoint is pickled."""
    assert content.count(b'\x04\x00\x00\x00iter') > 0
    return content.replace(b'\x04\x00\x00\x00iter', b'\x04\x00\x00\x00itez', 1)


def flip_kind(content):
    """In a zip file's directory, the bit of a member's attributes that says it is a folder."""
    member = content.rfind(b'PK\1\2', 0, content.rfind(b'/data/0'))
    return content[: member + 38] + bytes([content[member + 38] ^ 0x10]) + content[member + 39 :]


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (flip, 'iter_3.pth'),
        (flip_kind, 'the kind of'),
        (flip_key, 'no whole numbers iter and epoch'),
        (lambda content: content[:1000], '1000 bytes'),
        (lambda _: b'', '0 bytes'),
    ],
    ids=['a flipped bit', 'a flipped bit of the directory', 'a flipped bit of a key', 'cut off', 'empty'],
)
def test_a_damaged_one_is_skipped_and_named(damage, reason, saved):
    path = saved / 'iter_3.pth'
    path.write_bytes(damage(path.read_bytes()))
    newest, skipped = newest_checkpoint(saved)
    assert newest == saved / 'iter_2.pth'
    assert len(skipped) == 1
    assert str(path) in skipped[0]
    assert reason in skipped[0]


@pytest.mark.parametrize(
    'meta', [None, 3, {}, dict(iter=4), dict(iter='4', epoch=0)], ids=['none', 'a number', 'empty', 'no epoch', 'text']
)
def test_one_that_says_no_iteration_is_skipped_and_named(meta, saved):
    torch.save(dict(meta=meta, message_hub={}, optimizer={}), saved / 'iter_4.pth')
    newest, (reason,) = newest_checkpoint(saved)
    assert newest == saved / 'iter_3.pth'
    assert reason.startswith(f'{saved / "iter_4.pth"}: no checkpoint of a training run: its meta has no whole numbers')


def test_none_that_is_whole_is_an_error_and_none_at_all_is_not(saved, tmp_path):
    for path in saved.glob('*.pth'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='no checkpoint to go on from is whole') as error:
        newest_checkpoint(saved)
    assert all(f'iter_{i}.pth (0 bytes)' in str(error.value) for i in (1, 2, 3))
    assert newest_checkpoint(tmp_path / 'nowhere') == (None, [])


def test_those_of_stock_mmengine_are_found(tmp_path):
    run(tmp_path / 'w', 3, StockHook(by_epoch=False, interval=1)).train()
    moved = (tmp_path / 'w').rename(tmp_path / 'moved')
    assert (moved / 'last_checkpoint').read_text() == str(tmp_path / 'w' / 'iter_3.pth')
    assert newest_checkpoint(moved) == (moved / 'iter_3.pth', [])


@pytest.mark.parametrize('text', ['iter_5.pth', 'gone/iter_5.pth'])
def test_one_of_another_run_in_the_current_folder_is_not_taken(text, saved, tmp_path, monkeypatch):
    run(tmp_path / 'other', 5, max_keep_ckpts=9).train()
    (saved / 'last_checkpoint').write_text(text)
    monkeypatch.chdir(tmp_path / 'other')
    assert newest_checkpoint(saved) == (saved / 'iter_3.pth', [])


@pytest.mark.parametrize('absolute', [False, True])
def test_a_copy_of_a_stock_work_dir_goes_on_by_itself(absolute, tmp_path, monkeypatch):
    """The original has gone on; ``last_checkpoint`` is relative to where the run was started, or absolute."""
    monkeypatch.chdir(tmp_path)
    work_dir = tmp_path / 'w' if absolute else Path('w')
    run(work_dir, 2, StockHook(by_epoch=False, interval=1)).train()
    assert newest_checkpoint(work_dir) == (tmp_path / 'w' / 'iter_2.pth', [])
    shutil.copytree('w', 'copy')
    run(work_dir, 3, StockHook(by_epoch=False, interval=1)).train()
    assert newest_checkpoint('copy') == (tmp_path / 'copy' / 'iter_2.pth', [])


def go_on_from(checkpoint, iterations):
    runner = run(checkpoint.parent, iterations, max_keep_ckpts=3)
    runner._resume, runner._load_from = True, str(checkpoint)
    runner.train()


def test_a_run_that_went_back_and_was_killed_before_it_saved_goes_on_from_there(saved):
    """And what was saved after it, in the branch that was left, is told."""
    go_on_from(saved / 'iter_1.pth', 1)  # no iteration is left
    told = [f'{saved / f"iter_{i}.pth"}: later than iter_1.pth, which the run saved last' for i in (2, 3)]
    assert newest_checkpoint(saved) == (saved / 'iter_1.pth', told)
    assert read_checkpoint(saved / 'iter_1.pth')['meta']['iter'] == 1


def test_what_a_run_has_gone_on_from_is_known(saved, tmp_path):
    first = saved / 'iter_1.pth'
    shutil.copy(first, tmp_path / 'first.pth')
    assert not goes_on_from(saved / 'iter_3.pth', first)  # the same run
    assert goes_on_from(first, first)
    go_on_from(first, 1)  # saved again, and no more
    assert goes_on_from(first, tmp_path / 'first.pth')
    go_on_from(first, 2)
    for source in (first, tmp_path / 'first.pth', tmp_path / 'gone.pth'):
        assert goes_on_from(saved / 'iter_2.pth', source)
    content = torch.load(saved / 'iter_2.pth', weights_only=False)
    content['meta']['save']['sources'] += [f'{i}' for i in range(500)]  # as often has it been restarted since
    torch.save(content, saved / 'iter_2.pth')
    assert goes_on_from(saved / 'iter_2.pth', tmp_path / 'first.pth')
    assert not goes_on_from(saved / 'iter_3.pth', first)
    run(tmp_path / 'stock', 2, StockHook(by_epoch=False, interval=1)).train()
    assert not goes_on_from(tmp_path / 'stock' / 'iter_2.pth', tmp_path / 'stock' / 'iter_1.pth')


def test_a_work_dir_that_is_a_link_and_checkpoints_elsewhere(tmp_path):
    (tmp_path / 'far' / 'away' / 'w').mkdir(parents=True)
    (tmp_path / 'w').symlink_to(tmp_path / 'far' / 'away' / 'w')
    run(tmp_path / 'w', 1, out_dir=str(tmp_path / 'elsewhere')).train()
    assert agreed_checkpoint(tmp_path / 'w') == (tmp_path / 'elsewhere' / 'w' / 'iter_1.pth', [])


def test_the_last_one_of_a_run_that_went_back_is_taken(saved):
    """Iteration 2 is saved once more; where that is damaged, what the run has gone back from is not taken for it."""
    for iteration in (1, 2, 3):
        content = torch.load(saved / f'iter_{iteration}.pth', weights_only=False)
        content['meta']['time'] = f'2026010{9 - iteration}_000000'  # the clock has gone back
        torch.save(content, saved / f'iter_{iteration}.pth')
    go_on_from(saved / 'iter_1.pth', 2)
    assert (saved / 'last_checkpoint').read_text() == 'iter_2.pth'
    told = f'{saved / "iter_3.pth"}: later than iter_2.pth, which the run saved last'
    assert newest_checkpoint(saved) == (saved / 'iter_2.pth', [told])
    (saved / 'iter_2.pth').write_bytes(b'')
    newest, (reason, *others) = newest_checkpoint(saved)
    assert newest == saved / 'iter_1.pth'
    assert 'iter_2.pth' in reason
    assert others == [told]
    (saved / 'iter_1.pth').write_bytes(b'')
    assert newest_checkpoint(saved)[0] == saved / 'iter_3.pth'  # better than none


def test_later_by_its_name_is_the_number():
    """As iter_10 is than iter_9, and an epoch's is not than an iteration's."""
    names = ['iter_9.pth', 'iter_10.pth', 'epoch_11.pth', 'iter_2.pth']
    assert [name for name in names if _is_later_by_name(Path(name), Path('iter_9.pth'))] == ['iter_10.pth']


def test_a_flipped_bit_of_the_saves_name_is_skipped_and_named(saved):
    path = saved / 'iter_3.pth'
    content = path.read_bytes()
    key = b'\x02\x00\x00\x00id'
    assert content.count(key) == 1
    path.write_bytes(content.replace(key, b'\x02\x00\x00\x00ie'))
    newest, (reason,) = newest_checkpoint(saved)
    assert newest == saved / 'iter_2.pth'
    assert f'{path}: a damaged checkpoint' in reason


def test_one_that_is_a_link_is_of_its_work_dir(saved, tmp_path):
    """As where it was moved to a larger disk: what the run keeps is known when it goes on from there."""
    (tmp_path / 'large').mkdir()
    (saved / 'iter_3.pth').rename(tmp_path / 'large' / 'iter_3.pth')
    (saved / 'iter_3.pth').symlink_to(tmp_path / 'large' / 'iter_3.pth')
    newest, _ = agreed_checkpoint(saved)
    assert newest == saved / 'iter_3.pth'
    go_on_from(newest, 4)
    assert files(saved) == ['iter_2.pth', 'iter_3.pth', 'iter_4.pth']
    assert (saved / 'iter_3.pth').is_symlink()


@pytest.mark.parametrize('out_dir', [None, 'elsewhere'])
@pytest.mark.parametrize('name', ['iter_3.pth', 'epoch_1.pth', 'best_mIoU_iter_3.pth'])
def test_what_a_new_run_might_replace_is_found(name, out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(out_dir or '.') / 'w'
    folder.mkdir(parents=True)
    (folder / 'pretrained.pth').touch()
    assert earlier_checkpoint('w', out_dir) is None
    (folder / name).touch()
    assert earlier_checkpoint('w', out_dir) == tmp_path / folder / name
    assert earlier_checkpoint('v', out_dir) is None


@pytest.mark.parametrize(('option', 'hint'), [('max_keep_ckpt', 'did you mean max_keep_ckpts'), ('foo', 'drop it')])
def test_an_option_that_is_none_is_refused_before_the_run(option, hint):
    with pytest.raises(ValueError, match=rf'default_hooks\.checkpoint: the hook has no option {option}; {hint}'):
        CheckpointHook(**{option: 1})


def test_one_that_was_saved_and_not_yet_named_is_the_newest(saved):
    """As by a kill between the two; damaged, it is not."""
    (saved / 'last_checkpoint').write_text('iter_2.pth')
    assert newest_checkpoint(saved) == (saved / 'iter_3.pth', [])
    (saved / 'iter_3.pth').write_bytes(flip((saved / 'iter_3.pth').read_bytes()))
    newest, (reason,) = newest_checkpoint(saved)
    assert newest == saved / 'iter_2.pth'
    assert 'iter_3.pth: a damaged checkpoint' in reason


def test_other_names_and_folders_are_found_though_the_last_one_is_gone(tmp_path):
    run(tmp_path / 'w', 2, filename_tmpl='model_{}.pth').train()
    assert newest_checkpoint(tmp_path / 'w') == (tmp_path / 'w' / 'model_2.pth', [])
    (tmp_path / 'w' / 'model_2.pth').unlink()
    assert newest_checkpoint(tmp_path / 'w') == (tmp_path / 'w' / 'model_1.pth', [])
    run(tmp_path / 'v', 2, out_dir=str(tmp_path / 'elsewhere')).train()
    assert (tmp_path / 'v' / 'last_checkpoint').read_text() == '../elsewhere/v/iter_2.pth'
    (tmp_path / 'elsewhere' / 'v' / 'iter_2.pth').unlink()
    assert newest_checkpoint(tmp_path / 'v') == (tmp_path / 'elsewhere' / 'v' / 'iter_1.pth', [])


@pytest.mark.parametrize('text', [b'iter_3.pth', b'', b'\xff\xfe', b'a\x00b', b'x' * 5000, b'/nowhere/iter_9.pth'])
def test_a_run_that_has_saved_does_not_start_anew_without_a_word(text, saved):
    (saved / 'last_checkpoint').write_bytes(text)
    assert newest_checkpoint(saved) == (saved / 'iter_3.pth', [])
    for path in saved.glob('*.pth'):
        path.unlink()
    with pytest.raises(ValueError, match=r'last_checkpoint: the run has saved .* is there. Name another one with'):
        newest_checkpoint(saved)


def test_mmengines_own_resume_finds_it(saved, tmp_path):
    """As a config with ``resume=True`` has it, in mmsegmentation's train.py too."""
    (saved / 'iter_3.pth').write_bytes(b'')
    for start in (2, 3):  # then from what it has saved itself
        runner = run(saved, start + 1, max_keep_ckpts=3)
        runner._resume = True
        runner.train()
        assert newest_checkpoint(saved)[0].name == f'iter_{start + 1}.pth'
    log = ''.join(path.read_text() for path in saved.rglob('*.log'))
    assert f'Not resumed from: {saved}/iter_3.pth (0 bytes)' in log
    assert f'Auto resumed from the latest checkpoint {saved}/iter_2.pth' in log
    assert 'resumed epoch: 0, iter: 3' in log


def agree(rank, folders, answers):
    """What one of two processes, each with a work dir of its own, goes on from."""
    os.chdir(folders[rank])
    store = torch.distributed.FileStore(str(folders[0] / 'store'), 2)
    torch.distributed.init_process_group('gloo', store=store, rank=rank, world_size=2)
    try:
        answer = agreed_checkpoint('w')
    except ValueError as error:
        answer = str(error)
    answers.put((rank, answer))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ('edit', 'found'),
    [
        (lambda saved: None, None),
        (lambda saved: (saved / 'iter_3.pth').unlink(), 'there is no such file'),
        (lambda saved: shutil.copy(saved / 'iter_2.pth', saved / 'iter_3.pth'), 'iteration 2, '),
    ],
    ids=['the same', 'gone', 'another one'],
)
def test_all_processes_go_on_from_the_same_one(edit, found, saved, tmp_path):
    folders = [tmp_path, tmp_path / 'second']
    shutil.copytree(saved, folders[1] / 'w')
    edit(folders[1] / 'w')
    answers = answers_of_two(folders)
    if found is None:
        assert answers == [(folder / 'w' / 'iter_3.pth', []) for folder in folders]
    else:
        for folder, answer in zip(folders, answers, strict=True):
            assert answer.startswith(f'{folder}/w/iter_3.pth: the processes do not go on from the same checkpoint. ')
            assert f'on rank 0: iteration 3, {(saved / "iter_3.pth").stat().st_size} bytes, checksum ' in answer
            assert f'; found:\n  rank 1: {found}' in answer


def test_processes_of_which_rank_0_alone_has_none_do_not_start(saved, tmp_path):
    (tmp_path / 'first').mkdir()
    for answer in answers_of_two([tmp_path / 'first', tmp_path]):
        assert 'on rank 0: there is no such file; found:\n  rank 1: no checkpoint of a training run, 10 bytes' in answer


def test_what_rank_0_cannot_go_on_from_stops_all(saved, tmp_path):
    for path in saved.glob('*.pth'):
        path.write_bytes(b'')
    assert all('no checkpoint to go on from is whole' in answer for answer in answers_of_two([tmp_path, saved]))


def answers_of_two(folders):
    context = multiprocessing.get_context('fork')
    answers = context.Queue()
    processes = [context.Process(target=agree, args=(rank, folders, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [found[0], found[1]]


def test_one_to_keep_is_the_last_and_a_resumed_run_deletes_the_one_before(tmp_path):
    run(tmp_path / 'w', 3, max_keep_ckpts=1).train()
    assert files(tmp_path / 'w') == ['iter_3.pth']
    (tmp_path / 'w' / f'iter_9.pth{PARTIAL}').write_bytes(b'of a killed run')
    runner = run(tmp_path / 'w', 5, max_keep_ckpts=1)
    runner.resume(str(tmp_path / 'w' / 'iter_3.pth'))
    runner.train()
    assert files(tmp_path / 'w') == ['iter_5.pth']
    assert newest_checkpoint(tmp_path / 'w')[0].name == 'iter_5.pth'
    assert find_latest_checkpoint(str(tmp_path / 'w')) == 'iter_5.pth'


@pytest.mark.parametrize('best', ['images/count', ['images/count', 'rank']])
def test_the_best_before_is_deleted_once_the_next_is_there(best, tmp_path):
    hook = CheckpointHook(by_epoch=False, interval=1, save_best=best, rule='greater')
    runner = run(tmp_path, 1, hook)
    runner._val_loop = None  # the metrics come from below
    runner.train()
    before_remove = []
    hook._remove = lambda path: (before_remove.append(files(tmp_path)), CheckpointHook._remove(hook, path))
    for iteration, count in enumerate((3, 5, 4), 1):
        runner.train_loop._iter = iteration
        hook._save_best_checkpoint(runner, {'images/count': count, 'rank': count})
    kept = [name for name in files(tmp_path) if name.startswith('best')]
    keys = 1 if isinstance(best, str) else 2
    assert [name.endswith('_iter_2.pth') for name in kept] == [True] * keys
    assert len(before_remove) == keys
    assert sum(name.startswith('best') for name in before_remove[0]) > keys  # the next one was there already


def run_with_best(work_dir, iterations, best, score, max_keep_ckpts=2, **other):
    """Trains and evaluates once, at the end, as if with that score; a work dir that has checkpoints is resumed."""
    hook = CheckpointHook(by_epoch=False, interval=1, max_keep_ckpts=max_keep_ckpts, save_best=best, rule='greater')
    runner = run(work_dir, iterations, hook)
    runner._val_loop = None
    if newest := newest_checkpoint(work_dir)[0]:
        runner.resume(str(newest))
    runner.train()
    hook._save_best_checkpoint(runner, {'images/count': score, 'rank': score} | other)


def bests(folder):
    return sorted({name.rpartition('_')[2] for name in files(folder) if name.startswith('best')})


@pytest.mark.parametrize('best', ['images/count', ['images/count', 'rank']])
def test_a_copied_run_leaves_the_best_of_the_original_and_a_moved_one_replaces_its_own(best, tmp_path):
    run_with_best(tmp_path / 'w', 2, best, 3)
    shutil.copytree(tmp_path / 'w', tmp_path / 'copy')
    run_with_best(tmp_path / 'copy', 4, best, 5)
    assert (bests(tmp_path / 'w'), bests(tmp_path / 'copy')) == (['2.pth'], ['4.pth'])
    moved = (tmp_path / 'w').rename(tmp_path / 'moved')
    run_with_best(moved, 4, best, 5)
    assert bests(moved) == ['4.pth']


def test_where_the_best_one_is_gone_the_next_is_the_best(tmp_path):
    """Though its score is lower."""
    run_with_best(tmp_path, 2, 'rank', 5)
    next(tmp_path.glob('best_*')).unlink()
    run_with_best(tmp_path, 4, 'rank', 3)
    assert bests(tmp_path) == ['4.pth']


def train_until_killed(work_dir, best):
    """Goes on until it is about to remove a checkpoint, or the best one, and kills itself there."""
    hook = CheckpointHook(by_epoch=False, interval=1, max_keep_ckpts=1, save_best='images/count', rule='greater')
    remove = hook._remove
    hook._remove = lambda path: os.kill(os.getpid(), signal.SIGKILL) if best == ('best' in path) else remove(path)
    runner = run(work_dir, 100, hook)
    runner._val_loop = None
    after_train_iter = hook.after_train_iter

    def evaluate(runner, *args, **kwargs):
        after_train_iter(runner, *args, **kwargs)
        if best:
            runner.train_loop._iter += 1
            hook._save_best_checkpoint(runner, {'images/count': runner.iter})
            runner.train_loop._iter -= 1

    hook.after_train_iter = evaluate
    if newest := newest_checkpoint(work_dir)[0]:
        runner.resume(str(newest))
    runner.train()


@pytest.mark.parametrize('best', [False, True], ids=['the last', 'the best'])
def test_kill_9_before_the_old_one_is_removed(best, tmp_path):
    """The resumed run removes it, however often that happens."""
    for _ in range(3):
        child = multiprocessing.get_context('fork').Process(target=train_until_killed, args=(tmp_path, best))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    newest, _ = newest_checkpoint(tmp_path)
    assert len(files(tmp_path)) == (3 if best else 2)  # none of the earlier kills
    run_with_best(tmp_path, int(newest.stem.removeprefix('iter_')) + 1, 'images/count', 100, max_keep_ckpts=1)
    name = f'{newest.stem[:5]}{int(newest.stem[5:]) + 1}.pth'
    assert files(tmp_path) == [f'best_images_count_{name}', name]


def test_going_on_from_another_run_deletes_nothing_here(tmp_path):
    """Whose list of what it keeps has the same numbers."""
    other = run(tmp_path / 'other', 2, max_keep_ckpts=1)
    other.train()
    other.message_hub.update_info('keep_ckpt_ids', [1, 2])  # as where it is killed before 1 is removed
    other.save_checkpoint(str(tmp_path / 'other'), 'iter_2.pth', by_epoch=False)
    run(tmp_path / 'mine', 1).train()
    before = (tmp_path / 'mine/iter_1.pth').read_bytes()
    mine = run(tmp_path / 'mine', 3, max_keep_ckpts=1)
    mine._load_from, mine._resume = str(tmp_path / 'other/iter_2.pth'), True
    mine.train()
    assert (tmp_path / 'mine/iter_1.pth').read_bytes() == before
    assert (tmp_path / 'other/iter_2.pth').exists()


def test_going_on_from_another_run_leaves_the_best_one_here(tmp_path):
    """Whose best has the same name, and a score of its own."""
    for name in ('other', 'mine'):
        run_with_best(tmp_path / name, 2, 'images/count', 3)
    best = tmp_path / 'mine' / 'best_images_count_iter_2.pth'
    before = best.read_bytes()
    hook = CheckpointHook(by_epoch=False, interval=1, save_best='images/count', rule='greater')
    mine = run(tmp_path / 'mine', 3, hook)
    mine._load_from, mine._resume, mine._val_loop = str(tmp_path / 'other/iter_2.pth'), True, None
    mine.train()
    assert hook.best_ckpt_path is None
    hook._save_best_checkpoint(mine, {'images/count': 5})
    assert best.read_bytes() == before


def test_a_best_one_that_is_still_the_best_is_not_outdated(tmp_path, monkeypatch):
    """Of two figures one gets better, and the run ends before the best one before is removed."""
    best = ['images/count', 'rank']
    run_with_best(tmp_path, 1, best, 3)
    monkeypatch.setattr(CheckpointHook, '_remove', lambda self, path: None)
    run_with_best(tmp_path, 2, best, 5, rank=2)
    assert len(files(tmp_path)) == 5
    monkeypatch.undo()
    run_with_best(tmp_path, 3, best, 0)
    kept = ['best_images_count_iter_2.pth', 'best_rank_iter_1.pth', 'iter_2.pth', 'iter_3.pth']
    assert files(tmp_path) == kept


class End(Hook):
    """Ends the process by a signal in an iteration, or by kill -9 in the evaluation after it; notes what is evaluated.

    Args:
        number: The signal, or None.
        iteration: The iteration.
    """

    priority = 'VERY_HIGH'

    def __init__(self, number=None, iteration=None):
        self.number, self.iteration, self.evaluated = number, iteration, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.iteration and self.number == signal.SIGUSR1:
            os.kill(os.getpid(), self.number)
            (hook,) = (each for each in runner.hooks if isinstance(each, SignalHook))
            wait_for(lambda: hook._received)  # by its thread

    def before_val_epoch(self, runner):
        if runner.iter == self.iteration and self.number == signal.SIGKILL:
            os.kill(os.getpid(), self.number)

    def after_val_epoch(self, runner, metrics=None):
        self.evaluated.append((runner.iter, runner.model.head.weight.square().sum().item()))


def evaluations(work_dir, end):
    """Returns what a run of six iterations evaluates, which is due after three and six, or what is left of it."""
    torch.manual_seed(0)
    runner = run(work_dir, 6, max_keep_ckpts=2)
    runner.register_hook(end)
    runner.register_hook(SignalHook())
    if newest := newest_checkpoint(work_dir)[0]:
        runner.resume(str(newest))
    runner.train()
    return end.evaluated


@pytest.mark.parametrize('iteration', [3, 6])
@pytest.mark.parametrize(('number', 'code'), [(signal.SIGUSR1, 138), (signal.SIGKILL, -9)], ids=['SIGUSR1', 'kill -9'])
def test_an_evaluation_that_was_cut_off_is_made_first(number, code, iteration, tmp_path):
    """Saved is each iteration, before its evaluation; what has been evaluated is not evaluated once more."""
    undisturbed = evaluations(tmp_path / 'undisturbed', End())
    assert [at for at, _ in undisturbed] == [3, 6]
    child = multiprocessing.get_context('fork').Process(
        target=evaluations, args=(tmp_path / 'w', End(number, iteration))
    )
    child.start()
    child.join()
    assert child.exitcode == code
    assert newest_checkpoint(tmp_path / 'w')[0].name == f'iter_{iteration}.pth'
    assert evaluations(tmp_path / 'w', End()) == [each for each in undisturbed if each[0] >= iteration]
    assert evaluations(tmp_path / 'w', End()) == []


def test_what_is_no_plain_value_is_saved_as_one(tmp_path):
    """A schedule's formula, a config's dicts, paths: what is saved can be read without running its code."""
    schedule = dict(type='OneCycleLR', eta_max=0.1, total_steps=4, by_epoch=False, begin=0, end=4)
    rates = []

    class Rate(Hook):
        def before_train_iter(self, runner, **_):
            rates.append(runner.optim_wrapper.get_lr()['lr'][0])

    def train(iterations, resume=False):
        runner = make_runner(
            tmp_path / 'w', Classifier(Stem(), 4), [], max_iters=iterations, param_scheduler=dict(schedule)
        )
        runner._hooks = [each for each in runner._hooks if not isinstance(each, StockHook)]
        runner.register_hook(CheckpointHook(by_epoch=False, interval=1))
        runner.register_hook(Rate())
        runner.train_dataloader.dataset.metainfo = ConfigDict(groups=dict(road='flat'), root=Path('a'))
        runner.message_hub.update_info('of_a_hook', deque([(np.float16(1), np.str_('b'))]))
        if resume:
            runner._resume, runner._load_from = True, str(newest_checkpoint(tmp_path / 'w')[0])
        runner.train()

    train(2)
    content = read_checkpoint(tmp_path / 'w' / 'iter_2.pth')
    assert content['meta']['dataset_meta'] == dict(groups=dict(road='flat'), root='a')
    assert content['message_hub']['runtime_info']['of_a_hook'] == [(1, 'b')]
    train(4, resume=True)
    together, rates[:] = list(rates), []
    shutil.rmtree(tmp_path / 'w')
    train(4)
    assert rates == together
    assert len(set(rates)) == 4


def test_what_could_not_be_read_again_stops_a_run_before_its_first_iteration(tmp_path):
    runner = run(tmp_path / 'w', 2)
    runner.message_hub.update_info('of_a_hook', Stem())
    with pytest.raises(ValueError, match=r'could not be read again: .*Stem.*Expected plain values in'):
        runner.train()
    assert runner.iter == 0


def test_what_cannot_be_read_again_in_a_later_save_is_told(tmp_path, capfd):
    class Late(Hook):
        def after_train_iter(self, runner, **_):
            runner.message_hub.update_info('of_a_hook', Stem())

    runner = run(tmp_path / 'w', 1)
    runner.register_hook(Late())
    runner.train()
    assert 'this checkpoint can only be read with --allow-pickle: ' in ''.join(capfd.readouterr())
    with pytest.raises(ValueError, match='only if you trust it as a program, let it run its code with --allow-pickle'):
        newest_checkpoint(tmp_path / 'w')
    with guarded_loading(allow_pickle=True):
        assert newest_checkpoint(tmp_path / 'w')[0] == tmp_path / 'w' / 'iter_1.pth'


def test_a_run_that_leaves_the_optimizer_out_is_warned(tmp_path, capfd):
    run(tmp_path / 'w', 1, save_optimizer=False).train()
    assert '--resume cannot go on from what this run saves' in ''.join(capfd.readouterr())


def test_a_save_between_two_steps_is_told(tmp_path):
    """Three iterations make a step, and the last one always does."""
    runner = run(tmp_path, 5)
    runner._val_loop = None
    runner.optim_wrapper['accumulative_counts'] = 3
    runner.train()
    log = next(tmp_path.rglob('*.log')).read_text()
    told = re.findall(r'(iter_\d\.pth) is saved between two steps.* multiples of accumulative_counts=3', log)
    assert told == ['iter_1.pth', 'iter_2.pth', 'iter_4.pth']


def train_for_ever(work_dir):
    run(work_dir, 100_000, width=4000, max_keep_ckpts=1).train()


@pytest.mark.parametrize('written', [0, 0.3, 0.9, None], ids=['begun', 'a third', 'nearly all', 'anywhen'])
def test_kill_9_in_the_middle_of_a_save(written, tmp_path):
    """With one checkpoint to keep and 16 MB to write, killed when that part of it is on the disk."""
    child = multiprocessing.get_context('fork').Process(target=train_for_ever, args=(tmp_path,))
    child.start()
    try:
        wait_for(lambda: len(list(tmp_path.glob('iter_*.pth'))) > 0)
        if written is None:
            time.sleep(0.5)
        else:
            wait_for(lambda: size_of_partial(tmp_path) >= written * 16e6)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    newest, skipped = newest_checkpoint(tmp_path)
    assert skipped == []
    assert read_checkpoint(newest)['meta']['iter'] == int(newest.stem.removeprefix('iter_'))
    runner = run(tmp_path, int(newest.stem.removeprefix('iter_')) + 2, width=4000, max_keep_ckpts=1)
    runner.resume(str(newest))
    runner.train()
    assert files(tmp_path) == [f'iter_{runner.iter}.pth']  # what was half written is gone, too


def size_of_partial(folder):
    try:
        return next(folder.glob(f'*.pth{PARTIAL}')).stat().st_size
    except (StopIteration, FileNotFoundError):
        return -1


def wait_for(condition, seconds=60, every=0.001):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come in time'
        time.sleep(every)


def test_a_full_disk_is_explained_and_spares_what_was_there(tmp_path):
    """No file may grow beyond 1 MB, which the next save needs."""
    path = tmp_path / 'iter_1.pth'
    write_whole(path, b'before')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r'2000000 bytes could not be written .* free some space'):
            write_whole(path, bytes(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b'before'
    assert files(tmp_path) == ['iter_1.pth']
