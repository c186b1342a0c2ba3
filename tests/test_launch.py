"""How the processes of a run find one another, and that two of them do what one does."""

import json
import os
import re
import socket
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config
from tiny import CAMVID, ENVIRONMENT, OPTIONS, ROOT, Tool, run_tool, write_data_set

from mmseg_resnest import launch

TORCHRUN = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
SBATCH = dict(SLURM_JOB_ID='123456', SLURM_NTASKS='8', SLURM_NPROCS='8', SLURM_PROCID='0', SLURM_LOCALID='0')
SRUN = SBATCH | dict(
    SLURM_STEP_NUM_TASKS='8', SLURM_STEP_NUM_NODES='1', SLURM_STEP_NODELIST='node7', SLURM_PROCID='5', SLURM_LOCALID='5'
)


def environment(variables):
    return patch.dict(os.environ, {'PATH': os.environ['PATH']} | variables, clear=True)


@pytest.mark.parametrize(
    ('variables', 'launcher'),
    [
        ({}, 'python'),
        (TORCHRUN, 'torchrun'),
        (SRUN, 'srun'),
        (SRUN | TORCHRUN, 'torchrun'),  # srun starts torchrun, one a node
        (SBATCH, 'python'),  # plain python in a batch script
        (SRUN | dict(SLURM_STEP_NUM_TASKS='1'), 'python'),
        (dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500'), 'python'),  # left over in a shell
    ],
)
def test_detection(variables, launcher):
    with environment(variables):
        assert launch.detect_launcher() == launcher


def test_plain_python_changes_nothing_but_the_launcher():
    cfg = Config(dict(sync_bn='torch', model=dict(type='X')))
    with environment({}):
        launch.set_launcher(cfg)
    assert cfg.to_dict() == dict(sync_bn='torch', model=dict(type='X'), launcher='none')
    assert not torch.distributed.is_initialized()


def test_one_process_of_torchrun_on_a_cpu(monkeypatch):
    """The process group is there, and the config asks for what works without GPUs."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    cfg = Config(dict(sync_bn='torch'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with environment(TORCHRUN | dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_PORT=port)):
        try:
            launch.set_launcher(cfg)
            assert torch.distributed.get_backend() == 'gloo'
            assert torch.distributed.get_world_size() == 1
        finally:
            torch.distributed.destroy_process_group()
    assert (cfg.launcher, cfg.sync_bn) == ('pytorch', 'mmseg_resnest.SyncBN')
    assert cfg.model_wrapper_cfg == dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


def exported(variables) -> dict[str, str]:
    with environment(variables):
        launch._export_slurm()
        return {name: os.environ[name] for name in TORCHRUN}


def test_srun_on_one_node():
    assert exported(SRUN) == dict(
        RANK='5', LOCAL_RANK='5', WORLD_SIZE='8', MASTER_ADDR='127.0.0.1', MASTER_PORT='23456'
    )


def test_srun_on_two_nodes(tmp_path):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    scontrol.chmod(0o755)
    variables = SRUN | dict(SLURM_STEP_NUM_NODES='2', SLURM_STEP_NODELIST='node[7-8]', SLURM_LOCALID='1')
    found = exported(variables | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}'))
    assert found == dict(RANK='5', LOCAL_RANK='1', WORLD_SIZE='8', MASTER_ADDR='node7', MASTER_PORT='23456')


def test_an_address_that_is_set_stays():
    found = exported(SRUN | dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='1234'))
    assert (found['MASTER_ADDR'], found['MASTER_PORT']) == ('10.0.0.1', '1234')


# ----------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    write_data_set(folder / 'data', training=8, validation=4)
    write_data_set(folder / 'odd', training=8, validation=5)
    return folder


def arguments(data: str = 'data') -> list[str]:
    return ['--data-root', data, '--cfg-options', *OPTIONS]


def torchrun(name, *args, cwd) -> str:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    variables = os.environ | ENVIRONMENT | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [*command, ROOT / 'tools' / f'{name}.py', *args], cwd=cwd, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def step_of_two() -> list[dict[str, str]]:
    """Returns the variables of the two tasks of a step on one node."""
    job = next(job for job in range(5000, 6000) if is_free(20000 + job))
    step = dict(SLURM_JOB_ID=str(job), SLURM_NTASKS='2', SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NUM_NODES='1')
    return [step | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]


def srun(name, *args, cwd) -> str:
    """Two tasks, as srun would start them."""
    tasks = [Tool(name, *args, cwd=cwd, OMP_NUM_THREADS='1', **task) for task in step_of_two()]
    done = [task.wait() for task in tasks]
    assert [task.returncode for task in done] == [0, 0], done[0].stderr + done[1].stderr
    return ''.join(task.stdout for task in done)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0


LAUNCHERS = {'torchrun': torchrun, 'srun': srun}


@pytest.mark.slow
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_two_processes_train(launcher, folder, tmp_path):
    out = LAUNCHERS[launcher]('train', CAMVID, '--work-dir', tmp_path, '--seed', '1', *arguments(), cwd=folder)
    assert out.count(f'Trained 2 iterations; checkpoints and the log are in {tmp_path}\n') == 1  # one rank speaks
    assert 'Distributed launcher: pytorch' in out
    assert 'Distributed training: True' in out
    assert 'GPU number: 2' in out
    checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    assert checkpoint['state_dict']['backbone.bn1.num_batches_tracked'] == 2
    assert all(value.isfinite().all() for value in checkpoint['state_dict'].values())


@pytest.fixture(scope='module')
def checkpoint(folder):
    done = run_tool('train', CAMVID, '--work-dir', 'w', '--seed', '1', *arguments(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / 'w' / 'iter_2.pth'


@pytest.mark.slow
@pytest.mark.parametrize(('launcher', 'data'), [('torchrun', 'odd'), ('srun', 'data')])
def test_two_processes_evaluate_as_one(launcher, data, folder, checkpoint, tmp_path):
    args = [CAMVID, checkpoint, *arguments(data)]
    one = run_tool('test', *args[:2], '--json', tmp_path / 'one.json', *args[2:], cwd=folder)
    assert one.returncode == 0, one.stderr
    out = LAUNCHERS[launcher]('test', *args[:2], '--json', tmp_path / 'two.json', *args[2:], cwd=folder)
    assert len(re.findall(r'^mIoU \S+  mAcc \S+  aAcc \S+$', out, re.M)) == 1
    first, second = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'two'))
    assert second == first
    assert first['aAcc'] > 0


@pytest.mark.slow
def test_an_error_in_two_processes_is_still_a_message(folder, tmp_path):
    """Weights that cannot be had: the process that downloads says so, and the other does not wait for ever."""
    options = [option for option in OPTIONS if not option.startswith('model.backbone.')]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run(
        [
            *command,
            ROOT / 'tools/train.py',
            CAMVID,
            '--work-dir',
            'x',
            '--data-root',
            'data',
            '--cfg-options',
            *options,
        ],
        cwd=folder,
        env=os.environ
        | ENVIRONMENT
        | dict(OMP_NUM_THREADS='1', TORCH_HOME=str(tmp_path), RESNEST_WEIGHTS='')
        | dict(https_proxy='http://127.0.0.1:9', all_proxy='', no_proxy=''),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count('error: Pretrained weights resnest50-528c19ca.pth are wanted and could not be') == 1
