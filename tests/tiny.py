"""What the tests of the command lines share: a tiny data set, options that make a config tiny, and a tool's process."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np

ROOT = Path(__file__).parents[1]
CAMVID = ROOT / 'configs' / 'pspnet_resnest50_camvid.py'
CLASSES = 11
SIZE = (48, 64)
# What a tool's process gets: this package, and no GPU even where there is one.
ENVIRONMENT = dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES='')

_SERIAL = [
    f'{loader}.{key}'
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
    for key in ('num_workers=0', 'persistent_workers=False')
]
# For --cfg-options: CAMVID in a tiny size, from scratch, for two iterations.
OPTIONS = [
    'model.backbone.depth=14',
    'model.backbone.init_cfg=None',
    'model.decode_head.channels=8',
    'model.auxiliary_head.channels=8',
    'model.data_preprocessor.size=(48,64)',
    'train_dataloader.dataset.pipeline.2.scale=(64,48)',
    'train_dataloader.dataset.pipeline.3.crop_size=(48,64)',
    'val_dataloader.dataset.pipeline.1.scale=(64,48)',
    'test_dataloader.dataset.pipeline.1.scale=(64,48)',
    'train_dataloader.batch_size=2',
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.save_best=None',
    *_SERIAL,
]


def write_data_set(root: Path, training: int = 4, validation: int = 4) -> Path:
    """Writes a data set in ADE20K's layout: noise, whose labels 0-9 (10 does not occur) and 255 are coarse blocks."""
    random = np.random.default_rng(0)
    for split, count in (('training', training), ('validation', validation)):
        images, labels = (root / kind / split for kind in ('images', 'annotations'))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            blocks = random.integers(0, CLASSES, (6, 8), np.uint8)
            blocks[blocks == 10] = 255
            cv2.imwrite(str(images / f'{i}.jpg'), random.integers(0, 256, (*SIZE, 3), np.uint8))
            cv2.imwrite(str(labels / f'{i}.png'), blocks.repeat(8, 0).repeat(8, 1))
    return root


class Payload:
    """What a malicious checkpoint holds: unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


class Tool:
    """A run of ``python tools/NAME.py ARGS`` in a process of its own, forked from one that has imported the stack."""

    _context = multiprocessing.get_context('forkserver')
    _context.set_forkserver_preload(['mmseg_resnest.cli', 'mmseg.models', 'mmseg.datasets', 'mmseg.engine'])

    def __init__(self, name: str, *args: str | Path, cwd: Path, **env: str) -> None:
        self.logs = [cwd / f'{name}{os.getpid()}_{id(self)}.{stream}' for stream in ('out', 'err')]
        self.argv = [str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
        self.process = self._context.Process(target=_main, args=(self.argv, str(cwd), env, self.logs))
        with patch.dict(os.environ, ENVIRONMENT):  # MMEngine looks for a GPU when it is imported
            self.process.start()

    def wait(self) -> subprocess.CompletedProcess:
        """Returns the exit code and what was printed."""
        self.process.join()
        out, err = (log.read_text() for log in self.logs)
        return subprocess.CompletedProcess(self.argv, self.process.exitcode, out, err)


def _main(argv: list[str], cwd: str, env: dict[str, str], logs: list[Path]) -> None:
    sys.stdout.flush()  # what the server had not written yet is not this tool's
    for fd, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    multiprocessing.set_start_method(None, force=True)  # as in a process that nothing has forked
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')


def run_tool(name: str, *args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Runs ``python tools/NAME.py ARGS`` with the environment variables ``env`` added; returns when it has ended."""
    return Tool(name, *args, cwd=cwd, **env).wait()
