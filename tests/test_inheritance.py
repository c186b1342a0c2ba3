"""Another repository inherits our configs: as text and as pure Python, from a wheel and from an editable install."""

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmseg_resnest import ResNeSt

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
STACK = ('torch', 'torchvision', 'cv2', 'numpy', 'mmengine', 'mmcv', 'mmseg', 'hatchling')

TEXT = """
_base_ = 'mmseg_resnest::resnest/deeplabv3_resnest101_ade20k.py'

classes = ('wall', 'building', 'sky')
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(128, 64))
train_pipeline[3].update(crop_size=(64, 64), cat_max_ratio=1.0)
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(128, 64))
data = dict(data_root='data', metainfo=dict(classes=classes))
loading = dict(num_workers=0, persistent_workers=False)

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(depth=14, init_cfg=None),
    decode_head=dict(num_classes=3),
    auxiliary_head=dict(num_classes=3),
)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline, **data), **loading)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data), **loading)
train_cfg = dict(max_iters=2)
"""
PURE_PYTHON = """
from mmengine.config import read_base

with read_base():
    from mmseg_resnest.configs.deeplabv3_resnest101_ade20k import *

classes = ('wall', 'building', 'sky')
train_pipeline[2].update(scale=(128, 64))
train_pipeline[3].update(crop_size=(64, 64), cat_max_ratio=1.0)
test_pipeline[1].update(scale=(128, 64))
data = dict(data_root='data', metainfo=dict(classes=classes))
loading = dict(num_workers=0, persistent_workers=False)

model.data_preprocessor.update(size=(64, 64))
model.backbone.update(depth=14, init_cfg=None)
model.decode_head.update(num_classes=3)
model.auxiliary_head.update(num_classes=3)
train_dataloader.update(batch_size=2, **loading)
train_dataloader.dataset.update(pipeline=train_pipeline, **data)
val_dataloader.update(**loading)
val_dataloader.dataset.update(pipeline=test_pipeline, **data)
train_cfg.update(max_iters=2)
"""
MMSEG_BASE = """
_base_ = 'mmseg::_base_/datasets/ade20k.py'
train_dataloader = dict(batch_size=3)
"""
# A downstream project's own tool: mmseg's, under a line that registers us.
OWN_TOOL = """
import runpy

import mmseg_resnest

runpy.run_path({stock_tool!r}, run_name='__main__')
"""


def origin(module: str) -> Path:
    """Returns the folder of an installed package without importing it."""
    return Path(importlib.util.find_spec(module).origin).parent


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command as a shell without Python's variables would; returns its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')}
    done = subprocess.run(command, cwd=cwd, env=clean | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, REPOSITORY, cwd=folder)
    (path,) = folder.glob('*.whl')
    return path


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def environment(request, tmp_path_factory):
    """A virtual environment with the stack of the running one and, of its own, our package; yields (kind, python)."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / 'venv', with_pip=False)
    python = folder / 'venv' / 'bin' / 'python'
    (site,) = (folder / 'venv' / 'lib').glob('python*/site-packages')
    (site / 'stack.pth').write_text('\n'.join({str(origin(module).parent) for module in STACK}))
    # The .pth files of folders named in a .pth file are not read: an editable install in the running environment, which
    # is one, does not reach this one.
    run(python, '-c', 'import torch, importlib.util as u; assert u.find_spec("mmseg_resnest") is None', cwd=folder)
    ours = [request.getfixturevalue('wheel')] if request.param == 'wheel' else ['--editable', REPOSITORY]
    options = ['--no-deps', '--no-build-isolation', '--ignore-installed']
    run(*PIP, '--python', python, 'install', *options, *ours, cwd=folder)
    return request.param, python


@pytest.fixture
def project(tmp_path):
    """A downstream project: configs in both forms, a tool, and a tiny data set in ADE20K's layout."""
    random = np.random.default_rng(0)
    for split, count in (('training', 4), ('validation', 2)):
        images, labels = (tmp_path / 'data' / kind / split for kind in ('images', 'annotations'))
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(images / f'{i}.jpg'), random.integers(0, 256, (80, 96, 3), np.uint8))
            cv2.imwrite(str(labels / f'{i}.png'), random.integers(0, 4, (80, 96), np.uint8))
    (tmp_path / 'text.py').write_text(TEXT)
    (tmp_path / 'pure_python.py').write_text(PURE_PYTHON)
    (tmp_path / 'mmseg_base.py').write_text(MMSEG_BASE)
    (tmp_path / 'own_tool.py').write_text(OWN_TOOL.format(stock_tool=str(STOCK_TOOL)))
    return tmp_path


STOCK_TOOL = origin('mmseg') / '.mim' / 'tools' / 'train.py'
WAYS = {
    'text, own tool': ('own_tool.py', 'text.py'),
    'text, our tool': (REPOSITORY / 'tools' / 'train.py', 'text.py'),
    'pure Python, stock tool': (STOCK_TOOL, 'pure_python.py'),
}


def test_wheel_carries_every_config(wheel):
    configs = {path.relative_to(REPOSITORY / 'configs'): path for path in (REPOSITORY / 'configs').rglob('*.py')}
    assert Path('deeplabv3_resnest101_ade20k.py') in configs
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read('mmseg_resnest/.mim/model-index.yml') == b'Import: []\n'
        prefix = 'mmseg_resnest/.mim/configs/resnest/'
        carried = {Path(name.removeprefix(prefix)) for name in archive.namelist() if name.startswith(prefix)}
        assert carried == configs.keys()
        for name, path in configs.items():
            assert archive.read(f'{prefix}{name}') == path.read_bytes()
            if len(name.parts) == 1:
                flat = REPOSITORY / 'mmseg_resnest' / 'configs' / name
                assert archive.read(f'mmseg_resnest/configs/{name}') == flat.read_bytes()


def test_wheel_from_the_source_archive_is_the_same(wheel, tmp_path):
    run(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', tmp_path, cwd=REPOSITORY)
    (archive,) = tmp_path.glob('*.tar.gz')
    run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, archive, cwd=tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_package_is_the_one_installed(environment, tmp_path):
    kind, python = environment
    show = 'import mmseg_resnest, pathlib; print(pathlib.Path(mmseg_resnest.__file__).resolve().parents[1])'
    found = Path(run(python, '-c', show, cwd=tmp_path).splitlines()[-1])
    if kind == 'wheel':
        assert found.is_relative_to(python.parents[1].resolve())
        assert not (found / 'mmseg_resnest' / '.mim' / 'configs' / 'resnest').is_symlink()
    else:
        assert found == REPOSITORY


def test_mmseg_bases_resolve(environment, project):
    _, python = environment
    show = """
import mmseg_resnest
from mmengine.config import Config
loader = Config.fromfile('mmseg_base.py').train_dataloader
print(loader.batch_size, loader.dataset.type)
"""
    assert run(python, '-c', show, cwd=project).splitlines()[-1] == '3 ADE20KDataset'


@pytest.mark.parametrize('way', WAYS)
def test_training_from_an_inherited_config(environment, project, way):
    _, python = environment
    tool, config = WAYS[way]
    run(python, tool, config, '--work-dir', 'out', cwd=project)
    checkpoint = torch.load(project / 'out' / 'iter_2.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    assert checkpoint['meta']['dataset_meta']['classes'] == ('wall', 'building', 'sky')
    weights = checkpoint['state_dict']
    assert weights['decode_head.conv_seg.weight'].shape == (3, 512, 1, 1)
    assert weights['auxiliary_head.conv_seg.weight'].shape == (3, 256, 1, 1)
    # Only our class has these names: mmseg's ResNeSt would fail here.
    backbone = {name.removeprefix('backbone.'): w for name, w in weights.items() if name.startswith('backbone.')}
    ResNeSt(depth=14, output_stride=8).load_state_dict(backbone, strict=True)
