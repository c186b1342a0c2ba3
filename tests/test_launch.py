"""How the processes of a run find one another, and that two of them do what one does."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from tiny import CAMVID, ENVIRONMENT, OPTIONS, ROOT, Tool, run_tool, write_data_set

from mmseg_resnest import cli, launch

TORCHRUN = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
SBATCH = dict(SLURM_JOB_ID='123456', SLURM_NTASKS='8', SLURM_NPROCS='8', SLURM_PROCID='0', SLURM_LOCALID='0')
SRUN = SBATCH | dict(
    SLURM_STEP_NUM_TASKS='8', SLURM_STEP_NUM_NODES='1', SLURM_STEP_NODELIST='node7', SLURM_PROCID='5', SLURM_LOCALID='5'
)


def free_port(ports: range = range(10_000, 32_000)) -> int:
    """Returns a port that nobody has, and that the system gives nobody who asks for any."""
    return next(port for port in random.SystemRandom().sample(ports, 100) if is_free(port))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(('127.0.0.1', port)) != 0


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


def in_one_process_of_torchrun(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    variables = TORCHRUN | dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_PORT=str(free_port()))
    with environment(variables):
        try:
            launch.set_launcher(cfg)
            assert torch.distributed.get_backend() == 'gloo'
            assert torch.distributed.get_world_size() == 1
        finally:
            torch.distributed.destroy_process_group()
    return cfg


def test_one_process_of_torchrun_on_a_cpu(monkeypatch):
    """The process group is there, and the config asks for what works without GPUs."""
    cfg = in_one_process_of_torchrun(Config(dict(sync_bn='torch', find_unused_parameters=True)), monkeypatch)
    assert (cfg.launcher, cfg.sync_bn) == ('pytorch', 'mmseg_resnest.SyncBN')
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=True, **launch.PARALLEL
    )


def test_a_wrapper_of_the_configs_own_keeps_its_options(monkeypatch):
    cfg = Config(dict(model_wrapper_cfg=dict(find_unused_parameters=True, bucket_cap_mb=1)))
    found = in_one_process_of_torchrun(cfg, monkeypatch).model_wrapper_cfg
    assert (found.find_unused_parameters, found.bucket_cap_mb, found.device_ids) == (True, 1, None)
    other = dict(type='MMSeparateDistributedDataParallel')
    assert in_one_process_of_torchrun(Config(dict(model_wrapper_cfg=other)), monkeypatch).model_wrapper_cfg == other


ENDING = """
import atexit, os, sys
import torch.distributed
from mmseg_resnest import launch

class Threads:  # as gloo's, which abort the interpreter's end
    def __del__(self):
        os.abort()

threads = Threads()
atexit.register(print, 'cleaned up')
if sys.argv[1] == 'one of several':
    torch.distributed.init_process_group('gloo', 'file://' + sys.argv[2], rank=0, world_size=1)
print('told')
launch.end(3)
print('goes on')
"""


@pytest.mark.parametrize(
    ('process', 'code', 'printed'),
    [('one of several', 3, 'told\ncleaned up\n'), ('alone', -signal.SIGABRT, 'told\ngoes on\ncleaned up\n')],
)
def test_a_process_of_several_ends_past_the_interpreters_end(process, code, printed, tmp_path):
    done = subprocess.run([sys.executable, '-c', ENDING, process, str(tmp_path / 'store')], capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (code, printed)


UNREAD = """
import sys
import torch.distributed
from mmseg_resnest import launch

if sys.argv[1] == 'one of several':
    torch.distributed.init_process_group('gloo', 'file://' + sys.argv[2], rank=0, world_size=1)
print('saved')
launch.end(143)
sys.exit(143)
"""


@pytest.mark.parametrize('process', ['one of several', 'alone'])
def test_a_process_whose_output_nobody_reads_any_more_keeps_its_code(process, tmp_path):
    """As in ``tools/train.py | tee log``, where Ctrl-C ends both; the interpreter's own code for it is 120."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | dict(PYTHONUNBUFFERED='')
    command = [sys.executable, '-c', UNREAD, process, str(tmp_path / 'store')]
    done = subprocess.run(command, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    assert done.returncode == 143


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


def test_steps_of_one_job_meet_at_ports_of_their_own():
    ports = {exported(SRUN | dict(SLURM_STEP_ID=step))['MASTER_PORT'] for step in ('0', '1', '2')}
    assert ports == {'23456', '24456', '25456'}


def test_a_port_that_is_in_use_is_told():
    with socket.socket() as other, environment(SRUN | dict(SLURM_PROCID='0', CUDA_VISIBLE_DEVICES='')):
        other.bind(('127.0.0.1', 0))
        other.listen()
        os.environ['MASTER_PORT'] = str(other.getsockname()[1])
        with pytest.raises(
            OSError, match=f'port {os.environ["MASTER_PORT"]}, where the processes were to meet, is in use'
        ):
            launch.set_launcher(Config(dict(model=dict())))


def test_an_address_that_is_set_stays():
    found = exported(SRUN | dict(MASTER_ADDR='10.0.0.1', MASTER_PORT='1234'))
    assert (found['MASTER_ADDR'], found['MASTER_PORT']) == ('10.0.0.1', '1234')


@pytest.fixture
def store():
    return torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, timeout=timedelta(seconds=20))


def test_ranks_that_have_died_do_not_confuse_the_next_attempt(store):
    """The first attempt of three ranks ends before rank 2 has come, the second when its ranks have met."""

    def attempt(rank, seconds=20):
        return launch._meet(store.clone(), rank, 3, seconds)

    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(attempt, 0, 3), pool.submit(attempt, 1)]
        with pytest.raises(TimeoutError, match=r'ranks \[2\] of 3 have not started within 3 s'):
            first[0].result()
        assert first[1].result() == 1
        for number in (2, 3):
            later = [pool.submit(attempt, rank) for rank in (1, 0, 2)]
            assert [done.result() for done in later] == [number] * 3


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
    job = free_port(range(20_000, 30_000)) - 20_000
    step = dict(SLURM_JOB_ID=str(job), SLURM_NTASKS='2', SLURM_STEP_NUM_TASKS='2', SLURM_STEP_NUM_NODES='1')
    return [step | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]


def srun(name, *args, cwd) -> str:
    """Two tasks, as srun would start them."""
    tasks = [Tool(name, *args, cwd=cwd, OMP_NUM_THREADS='1', **task) for task in step_of_two()]
    done = [task.wait() for task in tasks]
    assert [task.returncode for task in done] == [0, 0], done[0].stderr + done[1].stderr
    return ''.join(task.stdout for task in done)


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


@pytest.mark.slow
def test_a_process_of_another_step_does_not_join(folder, tmp_path):
    """Of two steps of one job that were given the same port rank 1 of the second comes first to rank 0 of the first."""
    first, second = ([task | dict(SLURM_STEP_ID=step) for task in step_of_two()] for step in '01')
    meeting = dict(MASTER_PORT=str(free_port()), OMP_NUM_THREADS='1')

    def start(task, work_dir):
        args = ['train', CAMVID, '--work-dir', tmp_path / work_dir, *arguments(str(folder / 'data'))]
        return Tool(*args, cwd=tmp_path, **task | meeting)

    stranger, zero = start(second[1], 'second'), start(first[0], 'first')
    time.sleep(10)  # both are there by now
    one = start(first[1], 'first')
    done = [task.wait() for task in (zero, one)]
    assert [task.returncode for task in done] == [0, 0], done[0].stderr + done[1].stderr
    assert (tmp_path / 'first/iter_2.pth').exists()
    stranger.process.join(30)
    assert stranger.process.exitcode == 1
    assert not (tmp_path / 'second').exists()


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--resume'], ['--resume', 'w/iter_2.pth']], ids=['the newest', 'named'])
def test_two_processes_that_see_other_checkpoints_do_not_train(flags, folder, checkpoint, tmp_path):
    """As on machines whose work dirs are their own: each process has another current folder."""
    for name in ('first', 'second'):
        shutil.copytree(folder / 'w', tmp_path / name / 'w')
    (tmp_path / 'second/w/iter_2.pth').unlink()
    command = [CAMVID, '--work-dir', 'w', *flags, *arguments(str(folder / 'data')), 'train_cfg.max_iters=3']
    cwds = [tmp_path / 'first', tmp_path / 'second']
    tasks = [Tool('train', *command, cwd=cwd, **task) for cwd, task in zip(cwds, step_of_two(), strict=True)]
    for done in (task.wait() for task in tasks):
        assert done.returncode == 1
        assert 'w/iter_2.pth: the processes do not go on from the same checkpoint. Expected, on' in done.stderr
        assert 'found:\n  rank 1: there is no such file' in done.stderr
    assert not list(tmp_path.rglob('iter_3.pth'))


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


def restarted(rank, port, folder):
    variables = TORCHRUN | dict(RANK=str(rank), MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT=str(rank))
    with environment(variables):
        launch._start_process_group()
        (folder / f'restarted_{rank}').write_text(f'{launch.is_restarted()}')
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_restart_that_one_machine_has_counted_is_one_for_all(tmp_path):
    torch.multiprocessing.spawn(restarted, (str(free_port()), tmp_path), nprocs=2)
    assert [(tmp_path / f'restarted_{rank}').read_text() for rank in (0, 1)] == ['True', 'True']


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
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.count('error: Pretrained weights resnest50-528c19ca.pth are wanted and could not be') == 1


def build_frozen(average_valid):
    """CAMVID's tiny model in float64, with batch norm that normalises by running statistics, and without dropout."""
    args = cli.make_parser('').parse_args([str(CAMVID), '--cfg-options', *OPTIONS])
    cfg = cli.load_config(args, 'train_dataloader')
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.dropout_ratio = 0
        head.loss_decode.avg_non_ignore = average_valid
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def losses_and_gradients(model, images):
    """Returns the sum of the losses and the parameters' gradients for some of four images, unevenly labelled."""
    inputs = torch.randn(4, 3, 48, 64, dtype=torch.float64, generator=torch.manual_seed(1))
    labels = torch.randint(0, 11, (4, 1, 48, 64), generator=torch.manual_seed(2))
    for image, ignored in enumerate((47, 30, 3, 0)):
        labels[image, :, :ignored] = 255
    samples = [SegDataSample(metainfo=dict(img_shape=(48, 64)), gt_sem_seg=PixelData(data=labels[i])) for i in images]
    losses = model(inputs[images], samples, mode='loss')
    loss = sum(value for name, value in losses.items() if 'loss' in name)
    loss.backward()
    return loss.detach(), {name.removeprefix('module.'): p.grad for name, p in model.named_parameters()}


def one_of_two(rank, port, folder):
    torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    for average_valid in (False, True):
        wrapped = MMDistributedDataParallel(build_frozen(average_valid), device_ids=None, broadcast_buffers=False)
        found = losses_and_gradients(wrapped, [2 * rank, 2 * rank + 1])
        torch.save(found, f'{folder}/{average_valid}_{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_loss_and_gradients_of_two_processes_are_those_of_one_with_both_batches(tmp_path):
    """For both averages: over all pixels, and over those that are not ignored, which the ranks count together."""
    torch.multiprocessing.spawn(one_of_two, (free_port(), str(tmp_path)), nprocs=2)
    for average_valid in (False, True):
        loss, gradients = losses_and_gradients(build_frozen(average_valid), range(4))
        found = [torch.load(tmp_path / f'{average_valid}_{rank}.pt') for rank in (0, 1)]
        torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss, rtol=1e-12, atol=0)
        assert found[0][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-9, atol=1e-10 * scale)
            assert torch.equal(found[1][1][name], found[0][1][name])
        assert sum(gradient.abs().max() > 0 for gradient in gradients.values()) > 50
