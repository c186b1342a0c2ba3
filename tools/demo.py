"""The demo: generate the data set, train, test and draw the results, with the project's own tools.

  python tools/demo.py

It writes into data/demo and work_dirs/demo of the current folder, and deletes what an earlier demo left in the latter,
unless it is to --resume. What is given to it goes to tools/train.py.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mmseg_resnest.work_dir import claim, release

ROOT = Path(os.path.relpath(Path(__file__).parents[1]))
CONFIG = str(ROOT / 'configs' / 'pspnet_resnest14_demo.py')
DATA = 'data/demo'
WORK_DIR = Path('work_dirs/demo')


def step(title: str, *command: str) -> None:
    """Says what comes and runs it; where it fails, the demo ends with its exit code."""
    print(f'\n==> {title}\n    python {" ".join(command)}', flush=True)
    process = subprocess.run([sys.executable, *command], env=os.environ | {'PYTHONWARNINGS': 'ignore'})
    if process.returncode:
        sys.exit(process.returncode)


def tool(name: str) -> str:
    """Returns the path of one of the tools."""
    return str(ROOT / 'tools' / f'{name}.py')


def _clear(work_dir: Path) -> None:
    """Deletes what an earlier demo left; one that is running keeps its own."""
    try:
        claim(work_dir)
    except ValueError as error:
        sys.exit(f'error: {error}')
    shutil.rmtree(work_dir, ignore_errors=True)
    release(work_dir)


def main() -> None:
    """Runs the four steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    _, for_training = parser.parse_known_args()
    start = time.monotonic()
    if not any(option.startswith('--resume') for option in for_training):
        _clear(WORK_DIR)
    where = ('--work-dir', str(WORK_DIR))
    labels, result = WORK_DIR / 'labels', WORK_DIR / 'result.json'
    step('Generating street scenes', '-m', 'mmseg_resnest.demo', DATA)
    step('Training PSPNet with ResNeSt-14 from scratch', tool('train'), CONFIG, *where, '--seed', '0', *for_training)
    checkpoint = str(WORK_DIR / (WORK_DIR / 'last_checkpoint').read_text())
    outputs = ('--json', str(result), '--out', str(labels))
    step('Testing on the held-out scenes', tool('test'), CONFIG, checkpoint, *where, *outputs)
    inputs = ('--json', str(result), '--labels', str(labels))
    step('Drawing the results', tool('report'), CONFIG, *inputs, '--out', str(WORK_DIR))
    print(f'\nDone in {time.monotonic() - start:.0f} s. Look at {WORK_DIR}/predictions.png and {WORK_DIR}/classes.png')


if __name__ == '__main__':
    main()
