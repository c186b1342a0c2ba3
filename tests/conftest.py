"""What every test starts from."""

import os
from pathlib import Path

import pytest

# Read when torch is imported. On the tests' small tensors threads wait for one another more than they compute.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Read when triton is imported, which anything may do. Without a GPU its kernels run in an interpreter.
if not Path('/dev/nvidiactl').exists():
    os.environ.setdefault('TRITON_INTERPRET', '1')


@pytest.fixture(autouse=True)
def default_scope():
    """MMEngine's default scope is mmseg, as in the configs; a Runner changes it for good, here until the test ends."""
    from mmengine.registry import DefaultScope  # imports torch

    with DefaultScope.overwrite_default_scope('mmseg'):
        yield
