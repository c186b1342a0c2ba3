"""tools/prepare_dataset.py: from archives on a server, or in a folder, to a data set that passes the check."""

import functools
import http.server
import json
import threading
import time

import cv2
import numpy as np
import pytest
from test_prepare import (
    STREET,
    STREET_LABELS,
    ade20k_files,
    noise,
    tree,
    write_ade20k,
    write_cityscapes,
    write_pascal_context,
    write_zip,
)
from tiny import Tool, run_tool

from mmseg_resnest.prepare import ADE20K, CITYSCAPES, prepare


@pytest.fixture
def mirror(tmp_path):
    """Serves ``tmp_path / 'server'``."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'server')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_ade20k_is_downloaded_unpacked_and_checked(tmp_path, mirror):
    write_ade20k(tmp_path / 'server')
    done = run_tool('prepare_dataset', 'ade20k', '--mirror', mirror, '--subset', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'data/archives/ADEChallengeData2016.zip').is_file()
    label = cv2.imread(str(tmp_path / ADE20K.root / 'annotations/validation/ADE_val_00000000.png'), 0)
    np.testing.assert_array_equal(label, np.arange(48).reshape(6, 8))
    assert '     2 images/training/*.jpg (published: 20210)\n' in done.stdout
    assert 'ChallengeData2016: decoding every file\n' in done.stdout
    assert 'is prepared; python tools/check_dataset.py configs/deeplabv3_resnest50_ade20k.py shows' in done.stdout


def test_pascal_context_goes_where_it_is_told(tmp_path, mirror):
    write_pascal_context(tmp_path / 'server')
    where = ('--archives', 'here', '--data-root', 'there')
    done = run_tool('prepare_dataset', 'pascal_context', '--mirror', mirror, '--subset', *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / 'here').iterdir()) == [
        'VOCtrainval_03-May-2010.tar',
        'trainval_merged.json',
    ]
    label = cv2.imread(str(tmp_path / 'there/SegmentationClassContext/2010_006086.png'), cv2.IMREAD_UNCHANGED)
    assert (label == 1).all()


def test_cityscapes_is_taken_from_the_archives_that_are_there(tmp_path):
    asked = run_tool('prepare_dataset', 'cityscapes', cwd=tmp_path)
    assert asked.returncode == 1
    assert 'data/archives/leftImg8bit_trainvaltest.zip is not there' in asked.stderr
    assert 'log in: get it from https://www.cityscapes-dataset.com/downloads/ and put it into data/arch' in asked.stderr
    write_cityscapes(tmp_path / 'archives')
    done = run_tool('prepare_dataset', 'cityscapes', '--archives', 'archives', '--subset', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label = tmp_path / CITYSCAPES.root / 'gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png'
    np.testing.assert_array_equal(cv2.imread(str(label), cv2.IMREAD_UNCHANGED), STREET_LABELS)


def test_a_file_that_the_server_does_not_have_is_named_with_its_place(tmp_path, mirror):
    archives = write_pascal_context(tmp_path / 'server')
    (archives / 'trainval_merged.json').unlink()
    done = run_tool('prepare_dataset', 'pascal_context', '--mirror', mirror, '--subset', cwd=tmp_path)
    assert done.returncode == 1
    assert f'{mirror}/trainval_merged.json could not be downloaded: HTTP status 404' in done.stderr
    assert 'save it as data/archives/trainval_merged.json' in done.stderr
    assert not (tmp_path / 'data' / 'VOCdevkit').exists()


def killed(tmp_path, pattern, *args):
    """Runs the tool until some files match, kills it and returns how many did."""
    tool = Tool('prepare_dataset', *args, '--subset', cwd=tmp_path)
    while len(list(tmp_path.glob(pattern))) < 20:
        assert tool.process.is_alive()
        time.sleep(0.01)
    tool.process.kill()
    tool.process.join()
    return len(list(tmp_path.glob(pattern)))


@pytest.mark.slow
def test_an_unpacking_that_was_killed_goes_on(tmp_path):
    (tmp_path / 'data' / 'archives').mkdir(parents=True)
    large = {f'ADEChallengeData2016/large/{i}.bin': noise(30_000).tobytes() for i in range(3000)}
    write_zip(tmp_path / 'data/archives/ADEChallengeData2016.zip', {**large, **ade20k_files()})
    prepare(ADE20K, tmp_path / 'expected', tmp_path / 'data/archives', subset=True)
    root = tmp_path / ADE20K.root
    assert killed(tmp_path, f'{ADE20K.root}/large/*.bin', 'ade20k') < 3000
    expected = tree(tmp_path / 'expected')
    assert all(content == expected[name] for name, content in tree(root).items() if not name.endswith('.part'))
    first = (root / 'large' / '0.bin').stat().st_mtime_ns
    done = run_tool('prepare_dataset', 'ade20k', '--subset', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(root) == expected
    assert (root / 'large' / '0.bin').stat().st_mtime_ns == first


@pytest.mark.slow
def test_a_conversion_that_was_killed_goes_on(tmp_path):
    archives = write_cityscapes(tmp_path / 'archives', training=1000)
    prepare(CITYSCAPES, tmp_path / 'expected', archives, subset=True)
    root = tmp_path / CITYSCAPES.root
    before = write_cityscapes(tmp_path / 'before', street=dict(STREET, objects=STREET['objects'][:1]))
    prepare(CITYSCAPES, root, before, subset=True)  # a try with other archives
    made = 'gtFine/train/aachen/*_labelTrainIds.png'
    assert killed(tmp_path, f'{CITYSCAPES.root}/{made}', 'cityscapes', '--archives', archives) < 1000
    first, *_ = sorted(root.glob(made))
    time_before = first.stat().st_mtime_ns
    assert not (root / '.prepared.json').exists()
    done = run_tool('prepare_dataset', 'cityscapes', '--archives', archives, '--subset', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(root) == tree(tmp_path / 'expected')
    assert first.stat().st_mtime_ns == time_before
    record = json.loads((root / '.prepared.json').read_text())
    assert record['found'][made.replace('aachen/*_label', '*/*_gtFine_label')][0] == 1000
