"""A measurement in a process of its own gives its result, or says how the process ended."""

import os
from dataclasses import dataclass

import pytest
from tiny import ROOT

from mmseg_resnest.benchmark.alone import run_alone


@dataclass(frozen=True)
class Spec:
    side: str
    sizes: tuple[int, ...] = (3, 4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program as the measurement of a spec."""

    def run_program(text):
        (tmp_path / 'program.py').write_text(text)
        monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(ROOT)]))
        return run_alone('program', Spec('ours'))

    return run_program


HAND_OVER = 'from mmseg_resnest.benchmark.alone import fields, hand_over\n'


def test_a_result_after_a_line_that_was_left_unfinished(run):
    assert run(f'{HAND_OVER}print("50%", end="")\nhand_over(dict(sizes=fields()["sizes"] == (3, 4)))') == {
        'sizes': True
    }


def test_a_crash_without_a_word_shows_where_it_happened(run):
    with pytest.raises(RuntimeError, match=r'(?s)^ours: ended with -11, 0 results: half way.*program\.py", line 4'):
        run('import mmseg.models\nimport ctypes\nprint("half way", flush=True)\nctypes.string_at(0)')


def test_a_crash_after_the_result_is_one(run):
    with pytest.raises(RuntimeError, match=r'^ours: ended with -9, 1 results'):
        run(f'import os\n{HAND_OVER}hand_over(dict(a=1))\nos.sys.stdout.flush()\nos.kill(os.getpid(), 9)')


def test_an_end_without_a_result_is_an_error(run):
    with pytest.raises(RuntimeError, match=r'^ours: ended with 0, 0 results'):
        run('')
