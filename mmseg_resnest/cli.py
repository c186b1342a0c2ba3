"""What the command lines share: options, configs, and errors that a reader can act on."""

import argparse
import contextlib
import difflib
import errno
import faulthandler
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from mmseg_resnest import launch
from mmseg_resnest.checkpoints import guarded_loading
from mmseg_resnest.datasets import set_data_root


class UsageError(Exception):
    """A command line that cannot be carried out as given: exit code 2."""


class _Override(DictAction):
    """MMEngine's ``KEY=VALUE`` options, whose mistakes are usage errors."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list, *args) -> None:
        try:
            super().__call__(parser, namespace, values, *args)
        except (ValueError, AssertionError) as error:
            raise argparse.ArgumentError(self, f'expected KEY=VALUE; got {" ".join(values)}') from error


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every tool has for its config."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, as configs/deeplabv3_resnest101_ade20k.py')
    parser.add_argument('--work-dir', metavar='DIR', help='logs and checkpoints go here (default: work_dirs/CONFIG)')
    parser.add_argument('--data-root', metavar='DIR', help='where the data set is, if not where the config says')
    add_overrides(parser)
    parser.add_argument('--debug', action='store_true', help='show the stack trace of an error')
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the option that overrides settings of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Override,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config, as train_dataloader.batch_size=4 model.backbone.init_cfg=None',
    )


def add_allow_pickle(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets checkpoints run code; ``run`` heeds it."""
    parser.add_argument(
        '--allow-pickle',
        action='store_true',
        help='unpickle in full a checkpoint that holds more than tensors and plain values: it may then run ANY CODE AS '
        'YOU, so only if you trust it as a program that you would start (default: such a file is refused unread)',
    )


def run(command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Runs a command and turns an exception into one message: exit code 2 for usage errors, 1 for the rest.

    Whatever loads checkpoints during the command does so safely and strictly, MMEngine's own loaders too. A crash of
    compiled code, which ends a process without a word, prints the Python stack.
    """
    args = parser.parse_args()
    if sys.__stderr__ and not faulthandler.is_enabled():  # pytest has its own
        faulthandler.enable(sys.__stderr__)
    _import_quietly()
    try:
        _carry_out(command, args, parser.prog)
    except SystemExit as stop:  # an error, or a signal
        launch.end(stop.code or 0)
        raise
    launch.end(0)


def _carry_out(command: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str) -> None:
    try:
        with guarded_loading(getattr(args, 'allow_pickle', False)):
            command(args)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            hint = '' if isinstance(error, UsageError) else '\n(--debug shows where this happened.)'
            print(f'{prog}: error: {_message(error)}{hint}', file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _import_quietly() -> None:
    """Imports mmsegmentation, which prints a debug line to stdout for each optional package that is absent."""
    with contextlib.redirect_stdout(None):
        import mmseg.datasets
        import mmseg.models  # noqa: F401


def _message(error: Exception) -> str:
    text = str(error).strip()
    if 'Original Traceback' in text:  # from a worker of a data loader: its last line is the message
        return re.sub('^(ValueError|FileNotFoundError): ', '', text.splitlines()[-1])
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        text += '. Free some space in the work dir and for temporary files, or take other folders: --work-dir, TMPDIR'
    name = '' if isinstance(error, UsageError | ValueError | FileNotFoundError) else f'{type(error).__name__}: '
    return name + (text or type(error).__name__)


def load_config(args: argparse.Namespace, loader: str) -> Config:
    """Reads the config that the command line names and applies its common options.

    Args:
        args: The command line.
        loader: The data loader that the command uses, as ``'train_dataloader'``.

    Raises:
        UsageError: There is no such file, it is no whole config, or an option overrides what is not there.
    """
    path = Path(args.config)
    cfg = read_config(path, args.cfg_options, loader)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{path.stem}'
    return cfg


def read_config(path: Path, overrides: dict, loader: str) -> Config:
    """Reads a config, sets the overrides, and raises what ``load_config`` does."""
    if not path.is_file():
        known = {p.name: p for p in [*path.parent.glob('*.py'), *Path('configs').glob('*.py')]}
        close = difflib.get_close_matches(path.name, known, n=3)
        hint = f'did you mean {", ".join(str(known[name]) for name in close)}?' if close else 'see configs/'
        raise UsageError(f'{path}: there is no such config file; {hint}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UsageError(f'{path}: not a valid config: {error}') from error
    _override(cfg, overrides)
    for key in ('model', loader):
        if not cfg.get(key):
            raise UsageError(f'{path}: the config has no {key}; give one of configs/, or inherit one')
    return cfg


# What is read of a config beside the Runner's arguments. Other names are a config's own helpers: what was built from
# them stays as it was.
_READ = (
    *('sync_bn', 'find_unused_parameters', 'model_wrapper_cfg', 'compile'),
    *('tta_model', 'tta_pipeline', 'authors_tta_model'),
)
_READ_ELSEWHERE = {
    'data_root': '--data-root DIR',
    'metainfo': 'train_dataloader.dataset.metainfo, and val_ and test_dataloader',
    'train_pipeline': 'train_dataloader.dataset.pipeline.N',
    'test_pipeline': 'test_dataloader.dataset.pipeline.N, and val_dataloader',
}


def _override(cfg: Config, overrides: dict) -> None:
    """Sets the overrides; one of a name that nobody reads would be lost without a word."""
    known = sorted({*inspect.signature(Runner).parameters, *_READ} - {'cfg'})
    for key, value in overrides.items():
        name = key.split('.')[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(known)}'
            hint = f'use {_READ_ELSEWHERE[name]}' if name in _READ_ELSEWHERE else hint
            raise UsageError(f'--cfg-options {key}: nothing reads {name} at the top of a config; {hint}')
        try:
            cfg.merge_from_dict({key: value})
        except (KeyError, TypeError) as error:
            raise UsageError(f'--cfg-options {key}: the config has no such place, or not of that kind') from error


# Those that MMEngine adds to a config, and leaves out where they are None.
_MMENGINE_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


def build_runner(cfg: Config) -> Runner:
    """Returns the Runner of a config; it checks its samples, whether or not the config has a SampleCheckHook.

    A default hook that is None is left out, whoever's it is; MMEngine does so with its own only.
    """
    from mmseg_resnest.hooks import SampleCheckHook  # here: it imports mmsegmentation

    drop_absent_hooks(cfg)
    runner = Runner.from_cfg(cfg)
    if not any(isinstance(hook, SampleCheckHook) for hook in runner.hooks):
        runner.register_hook(SampleCheckHook())
    return runner


def drop_absent_hooks(cfg: Config) -> None:
    """Takes default hooks that are None out of a config, which MMEngine takes for its own hooks only."""
    for name, hook in list((cfg.get('default_hooks') or {}).items()):
        if hook is None and name not in _MMENGINE_HOOKS:
            del cfg.default_hooks[name]


def make_folder(folder: Path) -> None:
    """Makes a folder for output, or raises a UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'{folder}: the folder cannot be written ({error.strerror}); expected another') from error


def make_room(path: Path) -> None:
    """Makes the folder of ``--json`` before there are figures for it, or raises a UsageError."""
    if path.is_dir():
        raise UsageError(f'--json {path}: a folder; name a file in it')
    make_folder(path.parent)


def existing_file(path: str | Path, what: str, origin: str) -> str:
    """Returns ``path`` if it is a file.

    Args:
        path: The file.
        what: What it is, for the message.
        origin: Which command writes such files, for the message.

    Raises:
        UsageError: It is not; the message names files of its kind in its folder, or their origin.
    """
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        found = ', '.join(sorted(map(str, folder.glob(f'*{path.suffix or ".pth"}')))[:8])
        hint = f'its folder has {found}' if found else origin
        raise UsageError(f'{path}: {"a folder, no" if path.is_dir() else "there is no such"} {what}; {hint}')
    return str(path)


def existing_checkpoint(path: str | Path) -> str:
    """Returns ``path`` if it is a file; else a UsageError says where checkpoints are."""
    return existing_file(path, 'checkpoint', 'tools/train.py writes them to work_dirs/CONFIG, as iter_N.pth')
