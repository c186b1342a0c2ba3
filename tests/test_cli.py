"""What the command lines share: options, configs, and errors that a reader can act on."""

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from tiny import ENVIRONMENT, Payload

from mmseg_resnest import cli

CAMVID = str(Path(__file__).parents[1] / 'configs' / 'pspnet_resnest50_camvid.py')


def parse(*words: str) -> argparse.Namespace:
    return cli.make_parser('A tool.').parse_args(words)


def load(*words: str) -> Config:
    return cli.load_config(parse(*words), 'train_dataloader')


# --------------------------------------------------------------------------------------------------------- options


def test_options():
    args = parse('c.py', '--work-dir', 'w', '--data-root', 'd', '--debug', '--cfg-options', 'a.b=1', 'c=[x,(1,2.5)]')
    assert vars(args) == dict(
        config='c.py', work_dir='w', data_root='d', debug=True, cfg_options={'a.b': 1, 'c': ['x', (1, 2.5)]}
    )
    assert vars(parse('c.py')) == dict(config='c.py', work_dir=None, data_root=None, debug=False, cfg_options={})


def test_options_of_two_command_lines_are_apart():
    assert parse('c.py', '--cfg-options', 'a=1').cfg_options == {'a': 1}
    assert parse('c.py').cfg_options == {}


def test_later_overrides_add_up():
    assert parse('c.py', '--cfg-options', 'a=1', 'b=None', '--cfg-options', 'a=True').cfg_options == {
        'a': True,
        'b': None,
    }


@pytest.mark.parametrize('words', ['model.backbone.depth', 'size=(64,48', 'a=1 batch_size'])
def test_override_that_is_no_pair_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse('c.py', '--cfg-options', *words.split())
    assert stop.value.code == 2
    assert f'argument --cfg-options: expected KEY=VALUE; got {words}' in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- configs


def test_config_as_it_is():
    cfg = load(CAMVID)
    assert cfg.pop('work_dir') == 'work_dirs/pspnet_resnest50_camvid'
    assert cfg.to_dict() == Config.fromfile(CAMVID).to_dict()


def test_command_line_comes_before_the_config(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{CAMVID}'\nwork_dir = 'theirs'\n")
    assert load(str(path)).work_dir == 'theirs'
    cfg = load(
        str(path), '--work-dir', 'ours', '--data-root', 'elsewhere', '--cfg-options',
        'model.backbone.depth=14', 'model.backbone.init_cfg=None', 'randomness.seed=7', 'sync_bn=None',
        'train_dataloader.dataset.pipeline.3.crop_size=(9,8)',
    )  # fmt: skip
    assert cfg.work_dir == 'ours'
    assert {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {'elsewhere'}
    assert (cfg.model.backbone.depth, cfg.model.backbone.init_cfg) == (14, None)
    assert cfg.train_dataloader.dataset.pipeline[3].crop_size == (9, 8)
    assert cfg.randomness == dict(seed=7)  # the Runner's, not in the config
    assert cfg.sync_bn is None


def test_data_root_reaches_wrapped_data_sets(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        f"_base_ = '{CAMVID}'\n"
        'part = _base_.train_dataloader.dataset\n'
        "train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=part))\n"
    )
    cfg = load(str(path), '--data-root', 'elsewhere')
    assert cfg.train_dataloader.dataset.dataset.data_root == 'elsewhere'


def error_of(*words: str) -> str:
    with pytest.raises(cli.UsageError) as error:
        load(*words)
    return str(error.value)


def test_wrong_path_names_close_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    for name in ('pspnet_a.py', 'deeplabv3_b.py'):
        (tmp_path / 'configs' / name).touch()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'pspnet_c.py').touch()
    assert error_of('configs/psnet_a.py') == (
        'configs/psnet_a.py: there is no such config file; did you mean configs/pspnet_a.py?'
    )
    assert error_of('deeplabv3_b.py').endswith('did you mean configs/deeplabv3_b.py?')  # the folder forgotten
    assert error_of('pspnet_a').endswith('did you mean configs/pspnet_a.py?')  # the suffix forgotten
    assert 'mine/pspnet_c.py' in error_of('mine/pspnet_d.py')
    assert error_of('nothing/like/it.yaml') == 'nothing/like/it.yaml: there is no such config file; see configs/'
    assert error_of('configs').startswith('configs: there is no such config file')  # a folder


BROKEN = {
    'model = dict(\n': "'(' was never closed",
    'model = nothing\n': "name 'nothing' is not defined",
    "_base_ = 'none.py'\n": 'none.py',
    "_base_ = 'mmseg_resnest::resnest/none.py'\n": 'none.py',
}


@pytest.mark.parametrize('text', BROKEN)
def test_broken_config_says_what_is_wrong(text, tmp_path):
    (tmp_path / 'broken.py').write_text(text)
    message = error_of(str(tmp_path / 'broken.py'))
    assert message.startswith(f'{tmp_path}/broken.py: not a valid config: ')
    assert BROKEN[text] in message


def test_file_of_another_kind(tmp_path):
    (tmp_path / 'notes.txt').write_text('hello')
    assert 'notes.txt: not a valid config: Only py/yml/yaml/json' in error_of(str(tmp_path / 'notes.txt'))


def test_half_a_config_is_refused(tmp_path):
    base = Path(CAMVID).parent / '_base_' / 'pspnet.py'
    assert error_of(str(base)) == f'{base}: the config has no train_dataloader; give one of configs/, or inherit one'
    (tmp_path / 'empty.py').touch()
    assert 'empty.py: the config has no model;' in error_of(str(tmp_path / 'empty.py'))


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('modell.backbone.depth=50', 'nothing reads modell at the top of a config; did you mean model?'),
        ('train_dataloder.batch_size=2', 'nothing reads train_dataloder at the top of a config; did you mean train_d'),
        ('sync_nb=None', 'nothing reads sync_nb at the top of a config; did you mean sync_bn?'),
        ('qqq=1', 'nothing reads qqq at the top of a config; there are authors_tta_model, '),
        # Helpers of the config itself: what was built from them stays.
        ('data_root=x', 'nothing reads data_root at the top of a config; use --data-root DIR'),
        ('train_pipeline.2.scale=1', 'nothing reads train_pipeline at the top of a config; use train_dataloader.dat'),
        ('metainfo.classes=x', 'nothing reads metainfo at the top of a config; use train_dataloader.dataset.metainfo'),
        ('train_dataloader.batch_size.x=1', 'the config has no such place, or not of that kind'),
        ('train_dataloader.dataset.pipeline.9.scale=1', 'the config has no such place, or not of that kind'),
        ('train_dataloader.dataset.pipeline.scale=1', 'the config has no such place, or not of that kind'),
    ],
)
def test_override_of_what_is_not_there(override, message):
    assert error_of(CAMVID, '--cfg-options', 'model.backbone.depth=14', override).startswith(
        f'--cfg-options {override.split("=")[0]}: {message}'
    )


def test_existing_file(tmp_path):
    (tmp_path / 'x.pth').touch()
    there = tmp_path / 'x.pth'
    assert cli.existing_checkpoint(there) == str(there)
    for path, found in ((tmp_path, 'a folder, no'), (tmp_path / 'none.pth', 'there is no such')):
        with pytest.raises(cli.UsageError, match=f'^{path}: {found} checkpoint; its folder has {there}$'):
            cli.existing_checkpoint(path)
    there.unlink()
    with pytest.raises(cli.UsageError, match=r'no such checkpoint; tools/train.py writes them to work_dirs/CONFIG'):
        cli.existing_checkpoint(there)


# ---------------------------------------------------------------------------------------------------------- errors


def ended(command, monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Returns the exit code of a command, 0 where it returns, and what it wrote to stderr; stdout must be empty."""
    monkeypatch.setattr(sys, 'argv', ['tools/tool.py', 'c.py', *words])
    try:
        cli.run(command, cli.make_parser('A tool.'))
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert out == ''
    return code, err


def failing(error: BaseException):
    def command(args):
        raise error

    return command


HINT = '(--debug shows where this happened.)\n'
WORKER = """Caught ZeroDivisionError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "dataset.py", line 1, in <module>
ZeroDivisionError: division by zero
"""
WORKER_VALUE = WORKER.replace('ZeroDivisionError: division by zero', 'ValueError: bad sample: image a.jpg: b')


SPACE = 'Free some space in the work dir and for temporary files, or take other folders: --work-dir, TMPDIR'


@pytest.mark.parametrize(
    ('error', 'code', 'printed'),
    [
        (cli.UsageError('x: no such file'), 2, 'tool.py: error: x: no such file\n'),
        (ValueError('depth=18'), 1, f'tool.py: error: depth=18\n{HINT}'),
        (FileNotFoundError('no weights'), 1, f'tool.py: error: no weights\n{HINT}'),
        (KeyError('model'), 1, f"tool.py: error: KeyError: 'model'\n{HINT}"),
        (OSError(errno.ENOSPC, 'full'), 1, f'tool.py: error: OSError: [Errno 28] full. {SPACE}\n{HINT}'),
        (OSError(errno.ENOSPC, 'full', 'a.pth'), 1, f"tool.py: error: OSError: [Errno 28] full: 'a.pth'\n{HINT}"),
        (RuntimeError('two\nlines\n'), 1, f'tool.py: error: RuntimeError: two\nlines\n{HINT}'),
        (AssertionError(), 1, f'tool.py: error: AssertionError: AssertionError\n{HINT}'),
        (ValueError(WORKER_VALUE), 1, f'tool.py: error: bad sample: image a.jpg: b\n{HINT}'),
        (ZeroDivisionError(WORKER), 1, f'tool.py: error: ZeroDivisionError: division by zero\n{HINT}'),
    ],
)
def test_error_is_one_message(error, code, printed, monkeypatch, capsys):
    assert ended(failing(error), monkeypatch, capsys) == (code, printed)


def test_debug_shows_the_stack(monkeypatch, capsys):
    code, printed = ended(failing(cli.UsageError('x: no such file')), monkeypatch, capsys, '--debug')
    assert code == 2
    assert printed.startswith('Traceback (most recent call last):')
    assert 'in command' in printed
    assert printed.endswith('UsageError: x: no such file\n')
    assert ended(failing(ValueError('x')), monkeypatch, capsys, '--debug')[0] == 1


def test_command_that_succeeds_gets_its_options(monkeypatch, capsys):
    seen = []
    assert ended(seen.append, monkeypatch, capsys, '--work-dir', 'w') == (0, '')
    assert (seen[0].config, seen[0].work_dir) == ('c.py', 'w')


@pytest.mark.parametrize('words', [(), ('--allow-pickle',)])
def test_a_command_loads_safely_unless_it_is_told_otherwise(words, monkeypatch, tmp_path):
    torch.save({'a': Payload(tmp_path / 'made')}, tmp_path / 'evil.pth')

    def command(args):
        with contextlib.nullcontext() if args.allow_pickle else pytest.raises(ValueError, match='loaded safely'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'evil.pth'))

    parser = cli.make_parser('A tool.')
    cli.add_allow_pickle(parser)
    monkeypatch.setattr(sys, 'argv', ['tools/tool.py', 'c.py', *words])
    cli.run(command, parser)
    assert (tmp_path / 'made').exists() == bool(words)
    assert 'may then run ANY CODE AS YOU' in ' '.join(parser.format_help().split())


@pytest.mark.parametrize('error', [KeyboardInterrupt(), SystemExit(5), SystemExit(0), SystemExit('why')])
def test_a_wish_to_stop_is_no_error(error, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['tools/tool.py', 'c.py'])
    with pytest.raises(type(error)):
        cli.run(failing(error), cli.make_parser('A tool.'))


def test_a_crash_of_compiled_code_shows_the_stack():
    program = """
import ctypes
import sys

from mmseg_resnest import cli

sys.argv = ['tool.py', 'c.py']
cli.run(lambda args: ctypes.string_at(0), cli.make_parser('A tool.'))
"""
    done = subprocess.run([sys.executable, '-c', program], env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert 'Segmentation fault' in done.stderr
    assert 'in _carry_out' in done.stderr
