"""How the processes of a run find one another: plain ``python``, ``torchrun`` or ``srun``, on GPUs or CPUs."""

import atexit
import os
import subprocess
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import all_reduce

WRAPPER = 'MMDistributedDataParallel'
# Of torch's DistributedDataParallel. Gradients that are views of what is sent need no copy: 3 of 124 ms, two H200.
PARALLEL = dict(broadcast_buffers=False, gradient_as_bucket_view=True)


def detect_launcher() -> str:
    """Returns who started this process: ``'torchrun'``, ``'srun'`` (with several tasks) or ``'python'``."""
    if {'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
        return 'torchrun'
    # Set by srun for each step, not by sbatch: a plain `python` inside a batch script stays one process.
    if int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
        return 'srun'
    return 'python'


def is_restarted() -> bool:
    """Returns whether torchrun (``--max-restarts``) or Slurm (a requeued job) has started this run once more.

    All ranks ask, after ``set_launcher``: a torchrun counts only the restarts that its own machine has caused.
    """
    names = ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    restarts = torch.tensor(max(int(os.environ.get(name) or 0) for name in names))
    all_reduce(restarts, 'max')
    return restarts.item() > 0


def set_launcher(cfg: Config) -> None:
    """Makes the config fit the launcher, and lets the processes meet: by NCCL on GPUs, by gloo on CPUs."""
    launcher = detect_launcher()
    run = _export_slurm() if launcher == 'srun' else ''
    cfg.launcher = 'none' if launcher == 'python' else 'pytorch'
    if cfg.launcher == 'none':
        return
    wrapper = dict(type=WRAPPER, find_unused_parameters=bool(cfg.get('find_unused_parameters')), **PARALLEL)
    wrapper |= cfg.get('model_wrapper_cfg') or {}
    if not torch.cuda.is_available():
        if cfg.get('sync_bn') == 'torch':
            cfg.sync_bn = 'mmseg_resnest.SyncBN'  # the same on CPUs, for which torch's is not
        wrapper['device_ids'] = None
    if wrapper['type'] == WRAPPER:
        cfg.model_wrapper_cfg = wrapper
    if not torch.distributed.is_initialized():
        _start_process_group(run, **(cfg.get('env_cfg') or {}).get('dist_cfg', {}))


def end(code: int) -> None:
    """Writes out what is printed, and ends this process if it is one of several, after ``atexit``'s turn.

    The interpreter's own end is not safe there: gloo's threads abort it now and then, where they are the last to hold a
    tensor (pytorch/pytorch#190489), and with NCCL it may wait for CUDA graphs of collectives (pytorch/pytorch#115388).
    """
    several = torch.distributed.is_initialized()
    if several:
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more, for which the interpreter's code would be 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if several:
        os._exit(code)


def _start_process_group(run: str = '', backend: str = 'nccl', timeout: float = 1800) -> None:
    """Starts the process group, which MMEngine's own start-up cannot on CPUs.

    Args:
        run: What processes of other runs that find this one's store do not share.
        backend: The one for GPUs; CPUs have gloo.
        timeout: Seconds that one collective may take.

    Raises:
        OSError: The port is in use, on rank 0.
    """
    limit = timedelta(seconds=timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    try:
        store, rank, world_size = next(torch.distributed.rendezvous('env://', timeout=limit))
    except torch.distributed.DistNetworkError as error:
        if 'EADDRINUSE' not in str(error):
            raise
        raise OSError(
            f'port {os.environ["MASTER_PORT"]}, where the processes were to meet, is in use, perhaps by another run on '
            'this machine: set MASTER_PORT to a free one for all of them'
        ) from error
    store = torch.distributed.PrefixStore(f'run {run}', store)
    attempt = _meet(store, rank, world_size, timeout)
    if attempt > 1:  # also where another machine has caused it, or been replaced
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(attempt - 1)
    store = torch.distributed.PrefixStore(f'attempt_{attempt}', store)
    backend = backend if torch.cuda.is_available() else 'gloo'
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)


def _meet(store: torch.distributed.Store, rank: int, world_size: int, timeout: float) -> int:
    """Returns which attempt of the run this is, from 1; the same on all ranks.

    torchrun keeps one store over its restarts, in which processes would look for those that have died. When it starts
    processes all older ones are dead. So rank 0 gives the number to every token that it finds, old ones too, until
    each rank has told that it has got it.

    Raises:
        TimeoutError: Ranks have not come, on rank 0; the others get the store's own error.
    """
    if rank > 0:
        token = uuid.uuid4().hex
        store.set(f'token/{rank}', token)
        attempt = int(store.get(f'attempt/{token}'))
        store.set(f'arrived/{attempt}/{rank}', '')
        return attempt
    attempt = store.add('attempts', 1)
    missing = range(1, world_size)
    end = time.monotonic() + timeout
    while missing := [other for other in missing if not store.check([f'arrived/{attempt}/{other}'])]:
        if time.monotonic() > end:
            raise TimeoutError(f'ranks {missing} of {world_size} have not started within {timeout:g} s')
        for key in (f'token/{other}' for other in missing):
            if store.check([key]):
                store.set(f'attempt/{store.get(key).decode()}', str(attempt))
        time.sleep(0.05)
    return attempt


def _export_slurm() -> str:
    """Translates srun's environment variables to those of torch.distributed; what is set already stays.

    Returns:
        The name of the step.
    """
    slurm = os.environ
    if slurm.get('SLURM_STEP_NUM_NODES', '1') == '1':
        address = '127.0.0.1'
    else:
        command = ['scontrol', 'show', 'hostnames', slurm['SLURM_STEP_NODELIST']]
        address = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    os.environ['RANK'] = slurm['SLURM_PROCID']
    os.environ['LOCAL_RANK'] = slurm['SLURM_LOCALID']
    if torch.cuda.device_count() == 1:  # --gpus-per-task=1: a task sees its own GPU only, as number 0
        os.environ['LOCAL_RANK'] = '0'
    os.environ['WORLD_SIZE'] = slurm['SLURM_STEP_NUM_TASKS']
    os.environ.setdefault('MASTER_ADDR', address)
    # Jobs that share a node must not share a port, nor must the steps of one.
    job, step = (int(slurm.get(name, 0)) for name in ('SLURM_JOB_ID', 'SLURM_STEP_ID'))
    os.environ.setdefault('MASTER_PORT', str(20000 + (job + 1000 * step) % 10000))
    return f'{job}.{step}'
