"""The data set check as users meet it: tools/check_dataset.py, and before tools/train.py and tools/test.py start."""

import json
import shutil

import cv2
import numpy as np
import pytest
from bad_data import ROWS, overwrite, spoil
from tiny import CAMVID, CLASSES, OPTIONS, run_tool, write_data_set

COMMON = ['--data-root', 'data', '--cfg-options', *OPTIONS]


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny data set, with a pair for each row of the table."""
    write_data_set(tmp_path / 'data', training=len(ROWS), validation=len(ROWS))
    return tmp_path


def spoil_all(folder, split) -> dict[str, str]:
    """Spoils a pair for each row; returns the lines of their findings, as a tool in ``folder`` prints them."""
    lines = {row: spoil(folder / 'data', split, str(i), row) for i, row in enumerate(ROWS)}
    return {row: line.replace(f'{folder}/', '') for row, line in lines.items()}


def test_training_stops_at_every_row_of_the_table(folder):
    lines = spoil_all(folder, 'training')
    done = run_tool('train', CAMVID, *COMMON, cwd=folder)
    assert done.returncode == 1
    assert 'train.py: error: 15 errors in 14 + 16 pairs of images and label maps:\n' in done.stderr
    assert 'Traceback' not in done.stderr
    for row, line in lines.items():
        assert (f'\n  {line}' in done.stderr) == (not ROWS[row].hidden), row


def test_testing_stops_at_every_row_of_the_table_and_can_be_told_not_to_look(folder):
    lines = spoil_all(folder, 'validation')
    (folder / 'none.pth').touch()
    done = run_tool('test', CAMVID, 'none.pth', *COMMON, cwd=folder)
    assert done.returncode == 1
    assert 'test.py: error: 15 errors in 14 pairs of images and label maps:\n' in done.stderr
    for row, line in lines.items():
        assert (f'\n  {line}' in done.stderr) == (not ROWS[row].hidden), row
    skipped = run_tool('test', CAMVID, 'none.pth', '--skip-data-check', *COMMON, cwd=folder)
    assert skipped.returncode == 1
    assert 'none.pth: ' in skipped.stderr.partition('test.py: error: ')[2]  # the next thing that is wrong
    assert 'pairs' not in skipped.stderr


def test_training_on_what_the_check_refuses(folder):
    overwrite(folder / 'data/images/training/0.jpg')
    (folder / 'data/images/training/1.jpg').unlink()
    options = [*COMMON, 'train_cfg.val_interval=9']
    done = run_tool('train', CAMVID, '--work-dir', 'w', '--skip-data-check', *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert 'Trained 2 iterations' in done.stdout


@pytest.mark.parametrize(
    ('change', 'found'), [(shutil.rmtree, 'does not exist'), ('.jpeg', 'holds no *.jpg (found: .jpeg)')]
)
def test_no_image_at_all(change, found, folder):
    images = folder / 'data/images/training'
    if change == '.jpeg':
        for image in images.iterdir():
            image.rename(image.with_suffix('.jpeg'))
    else:
        change(images)
    for tool in ('train', 'check_dataset'):
        done = run_tool(tool, CAMVID, *COMMON, cwd=folder)
        assert done.returncode == 1
        assert f'error: train_dataloader.dataset: data/images/training {found}' in done.stderr


def test_the_whole_check_finds_every_row_of_the_table(folder):
    lines = spoil_all(folder, 'training')
    done = run_tool('check_dataset', CAMVID, '--json', 'deep/f.json', *COMMON, cwd=folder)
    assert done.returncode == 1
    assert done.stderr.count('rror') == 0
    for line in lines.values():
        assert line.partition(': ')[0] in done.stdout  # why a file is damaged is told in other words
    assert f'\n  {lines["corrupt bytes in a JPEG"]}' in done.stdout
    assert '16 errors, 3 warnings\n' in done.stdout
    content = json.loads((folder / 'deep/f.json').read_text())
    errors = [finding for finding in content['findings'] if finding['severity'] == 'error']
    assert len(errors) == len(ROWS)
    assert {finding['file'] for finding in errors} == {line.partition(': ')[0] for line in lines.values()}
    assert all(finding[key] for finding in errors for key in ('kind', 'found', 'expected', 'fix'))


def test_the_whole_check_of_a_good_data_set(folder):
    done = run_tool('check_dataset', CAMVID, '--json', 'f.json', *COMMON, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith('warning: classes that never occur (2)\n')
    assert done.stdout.endswith('Pairs: 16 in train, 16 in val, test\n0 errors, 2 warnings\n')
    splits = json.loads((folder / 'f.json').read_text())['splits']
    assert list(splits) == ['train_dataloader.dataset', 'val_dataloader.dataset, test_dataloader.dataset']
    labels = np.stack([cv2.imread(str(path), 0) for path in (folder / 'data/annotations/training').iterdir()])
    sky = splits['train_dataloader.dataset']['classes']['sky']
    assert sky == dict(pixels=int((labels == 0).sum()), images=int((labels == 0).any((1, 2)).sum()))
    row = next(line for line in done.stdout.splitlines() if line.startswith('│ sky'))
    cells = [cell.strip() for cell in row.strip('│').split('│')]
    share = 100 * sky['pixels'] / (labels < CLASSES).sum()
    assert cells[:3] == ['sky', f'{share:.3f} %', str(sky['images'])]


def test_some_splits(folder):
    shutil.rmtree(folder / 'data/images/training')
    done = run_tool('check_dataset', CAMVID, '--splits', 'val', '--data-root', 'data', cwd=folder)
    assert done.returncode == 0
    assert done.stdout.endswith('Pairs: 16 in val\n0 errors, 1 warning\n')


def test_help(tmp_path):
    done = run_tool('check_dataset', '--help', cwd=tmp_path)
    assert done.returncode == 0
    for option in ('--splits', '--json FILE', '--data-root DIR', '--cfg-options'):
        assert option in done.stdout


def test_a_folder_for_the_findings(folder):
    done = run_tool('check_dataset', CAMVID, '--json', 'data', cwd=folder)
    assert done.returncode == 2
    assert done.stderr.endswith('check_dataset.py: error: --json data: a folder; name a file in it\n')
