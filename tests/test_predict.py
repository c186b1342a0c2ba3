"""tools/predict.py on files, folders, globs and a video; and what it says of bad ones."""

import os
import runpy
import shutil
import struct

import cv2
import numpy as np
import pytest
from PIL import Image
from test_predictor import tiny_config, write_checkpoint
from tiny import ROOT, run_tool

from mmseg_resnest.predictor import Predictor

SIZES = [(48, 64), (40, 90), (48, 64), (70, 52)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config, a checkpoint, four good images (one in a subfolder) and a video."""
    root = tmp_path_factory.mktemp('predict')
    write_checkpoint(root / 'model.pth')
    tiny_config().dump(root / 'config.py')
    random = np.random.default_rng(0)
    (root / 'in' / 'sub').mkdir(parents=True)
    for i, (height, width) in enumerate(SIZES):
        coarse = random.integers(0, 256, (4, 5, 3), np.uint8)
        path = root / 'in' / ('sub' if i == 3 else '') / f'{i}.png'
        cv2.imwrite(str(path), cv2.resize(coarse, (width, height)))
    write_video(root / 'video.avi', 'MJPG')
    return root


def write_video(path, codec):
    """Writes 11 frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (64, 48))
    assert writer.isOpened()
    random = np.random.default_rng(0)
    for _ in range(11):
        writer.write(cv2.resize(random.integers(0, 256, (4, 5, 3), np.uint8), (64, 48)))
    writer.release()
    return path


@pytest.fixture(scope='module')
def predictor(folder):
    return Predictor(folder / 'config.py', folder / 'model.pth', 'cpu')


def predict(folder, *args):
    return run_tool('predict', 'config.py', 'model.pth', *args, cwd=folder)


def test_a_folder(folder, predictor, tmp_path):
    done = predict(folder, 'in', tmp_path / 'out', '--overlays', tmp_path / 'seen', '--batch-size', '2')
    assert done.returncode == 0, done.stderr
    names = ['0.png', '1.png', '2.png', 'sub/3.png']
    for where in ('out', 'seen'):
        assert sorted(str(path.relative_to(tmp_path / where)) for path in (tmp_path / where).rglob('*.png')) == names
    for name in names:
        labels = predictor(folder / 'in' / name)
        assert len(np.unique(labels)) > 1
        found = cv2.imread(str(tmp_path / 'out' / name), cv2.IMREAD_UNCHANGED)
        assert found.dtype == np.uint8
        assert (found != labels).mean() < 1e-3
        expected = cv2.imread(str(folder / 'in' / name)) / 2 + predictor.palette[labels][..., ::-1] / 2
        assert np.abs(cv2.imread(str(tmp_path / 'seen' / name)) - expected).mean() < 1


def test_bad_files_are_reported_and_left_out(folder, tmp_path):
    source = tmp_path / 'in'
    source.mkdir()
    good = Image.open(folder / 'in' / '0.png')
    good.save(source / 'good.png')
    good.save(source / 'last.jpg')
    (source / 'empty.jpg').write_bytes(b'')
    (source / 'page.png').write_text('<html>')
    Image.open(folder / 'in' / '1.png').convert('RGBA').save(source / 'alpha.png')
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(source / 'deep.png')
    good.save(source / 'cut.jpg')
    (source / 'cut.jpg').write_bytes((source / 'cut.jpg').read_bytes()[:-400])
    data = (folder / 'in' / '0.png').read_bytes()
    (source / 'worn.png').write_bytes(data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :])
    Image.fromarray(np.zeros((5000, 1, 3), np.uint8)).save(source / 'thread.png')
    done = predict(folder, source, tmp_path / 'out')
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith('predict.py: skipped: ')]
    assert len(lines) == 7
    for name, found in {
        'alpha.png': 'an alpha channel (mode RGBA); expected a picture of 8 bits',
        'cut.jpg': 'cut off before its end',
        'deep.png': 'other numbers than 8 bits',
        'empty.jpg': '0 bytes',
        'thread.png': 'error: OpenCV',  # less than a pixel wide when it is resized for the network
        'worn.png': f'AssertionError: failed to load image: {source}/worn.png; expected a picture of 8 bits',
        'page.png': "no picture that can be read: it begins with b'<html>'",
    }.items():
        assert any(f'skipped: {source / name}: {found}' in line for line in lines), name
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['good.png', 'last.png']
    assert 'Traceback' not in done.stderr


ODD = {
    'two words.png': np.full((20, 30, 3), 200, np.uint8),
    'straße/日本.PNG': np.arange(20 * 30, dtype=np.uint16).reshape(20, 30).astype(np.uint8),  # grey
    'a.b.c.bmp': np.full((1, 1, 3), 90, np.uint8),
    '[a]/-x.tif': np.full((1, 40, 3), 90, np.uint8),
    '[b]/-x.png': np.full((40, 1, 3), 90, np.uint8),
}


def test_odd_names_and_sizes(folder, predictor, tmp_path):
    for name, array in ODD.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'folder.jpg').mkdir()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'a.b.c.png').write_text('of an earlier run')
    done = predict(folder, tmp_path / 'in', tmp_path / 'out', '--overlays', tmp_path / 'seen')
    assert done.returncode == 0, done.stderr
    assert sum(path.is_file() for path in (tmp_path / 'out').rglob('*')) == len(ODD)
    for name, array in ODD.items():
        found = cv2.imread(str((tmp_path / 'out' / name).with_suffix('.png')), cv2.IMREAD_UNCHANGED)
        assert found.shape == array.shape[:2]
        assert (found != predictor(tmp_path / 'in' / name)).mean() < 1e-3
        assert cv2.imread(str((tmp_path / 'seen' / name).with_suffix('.png'))).shape == (*array.shape[:2], 3)
    done = predict(folder, tmp_path / 'in' / '[a]' / '-x.tif', tmp_path / 'one')  # a name before a glob
    assert done.returncode == 0, done.stderr


def test_names_that_are_no_utf_8(folder, tmp_path):
    """By such a name OpenCV would crash."""
    source = os.fsencode(tmp_path / 'in')
    os.mkdir(source)
    shutil.copy(folder / 'in' / '0.png', source + b'/\xff.png')
    with open(source + b'/\xfe.png', 'wb') as file:
        file.write(b'nothing')
    done = predict(folder, tmp_path / 'in', tmp_path / 'out', '--overlays', tmp_path / 'seen')
    assert done.returncode == 1
    assert "no picture that can be read: it begins with b'nothing'" in done.stderr
    for name in ('out', 'seen'):
        assert os.listdir(os.fsencode(tmp_path / name)) == [b'\xff.png']


def test_a_glob_and_an_image(folder, tmp_path):
    assert predict(folder, 'in/*.png', tmp_path / 'out').returncode == 0
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['0.png', '1.png', '2.png']
    assert predict(folder, 'in/sub/3.png', tmp_path / 'one').returncode == 0
    assert [path.name for path in (tmp_path / 'one').iterdir()] == ['3.png']


def test_a_video(folder, predictor, tmp_path):
    done = predict(folder, 'video.avi', tmp_path / 'out.avi', '--batch-size', '4')
    assert done.returncode == 0, done.stderr
    frames, found = (read_video(path) for path in (folder / 'video.avi', tmp_path / 'out.avi'))
    assert len(frames) == len(found) == 11
    for frame, picture in zip(frames, found, strict=True):
        expected = frame / 2 + predictor.palette[predictor(frame)][..., ::-1] / 2
        assert np.abs(picture - expected).mean() < 6  # MJPG changes pixels


def test_a_video_that_lasts_longer_than_its_frames(folder, tmp_path):
    """As beside a longer track of sound: OpenCV takes the number of frames from the duration."""
    path = write_video(tmp_path / 'long.mkv', 'mp4v')
    head, data = path.read_bytes().split(b'\x44\x89\x88')  # Matroska's duration, a double
    path.write_bytes(head + b'\x44\x89\x88' + struct.pack('>d', 5000) + data[8:])
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == 50
    done = predict(folder, path, tmp_path / 'out.avi')
    assert done.returncode == 0, done.stderr
    assert len(read_video(tmp_path / 'out.avi')) == 11


def test_a_video_that_is_cut_off(folder, tmp_path):
    path = write_video(tmp_path / 'cut.avi', 'MJPG')
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    done = predict(folder, path, tmp_path / 'out.avi')
    assert done.returncode == 1
    count = len(read_video(tmp_path / 'out.avi'))
    assert 0 < count < 11
    assert f'skipped: {path}: {count} of 11 frames could be decoded; the video ends there' in done.stderr


def test_a_video_that_cannot_be_written_to_a_full_disk(folder, tmp_path):
    (tmp_path / 'full.avi').symlink_to('/dev/full')
    done = predict(folder, 'video.avi', tmp_path / 'full.avi')
    assert done.returncode == 1
    assert f'{tmp_path}/full.avi: 0 of 11 frames were written; make room on its disk' in done.stderr


@pytest.mark.parametrize(('name', 'codec'), [('a.avi', 'MJPG'), ('a.mp4', 'mp4v'), ('a.mkv', 'mp4v')])
def test_frames_of_a_video_are_counted_as_they_are_read(name, codec, tmp_path):
    path = write_video(tmp_path / name, codec)
    frames_in = runpy.run_path(str(ROOT / 'tools' / 'predict.py'))['frames_in']
    assert frames_in(path) == len(read_video(path)) == 11
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert frames_in(path) == len(read_video(path)) < 11


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return frames


@pytest.mark.slow
def test_cityscapes_label_ids(tmp_path):
    """The classes of the demo's checkpoint become those of Cityscapes; its servers' numbers are cityscapesscripts'."""
    from cityscapesscripts.helpers.labels import trainId2label

    names = tuple(trainId2label[i].name for i in range(19))
    write_checkpoint(tmp_path / 'model.pth', classes=names)
    tiny_config(classes=names).dump(tmp_path / 'config.py')
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), cv2.resize(coarse, (64, 48)))
    for labels in ('ids', 'cityscapes'):
        done = predict(tmp_path, 'a.png', labels, '--labels', labels)
        assert done.returncode == 0, done.stderr
    ids, label_ids = (cv2.imread(str(tmp_path / name / 'a.png'), -1) for name in ('ids', 'cityscapes'))
    assert len(np.unique(ids)) > 1
    assert np.array_equal(label_ids, np.array([trainId2label[i].id for i in range(19)])[ids])


def test_more_classes_than_8_bits_tell(tmp_path):
    names = tuple(map(str, range(300)))
    write_checkpoint(tmp_path / 'model.pth', classes=names)
    tiny_config(classes=names).dump(tmp_path / 'config.py')
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), cv2.resize(coarse, (64, 48)))
    done = predict(tmp_path, 'a.png', 'out')
    assert done.returncode == 0, done.stderr
    labels = Predictor(tmp_path / 'config.py', tmp_path / 'model.pth', 'cpu')(tmp_path / 'a.png')
    assert labels.max() > 255
    assert (cv2.imread(str(tmp_path / 'out' / 'a.png'), cv2.IMREAD_UNCHANGED) != labels).mean() < 1e-3


BAD = {
    'empty folder': (['none', 'out'], 2, 'none: the folder holds no image (found: nothing); expected *.jpg, '),
    'no such file': (['in/9.png', 'out'], 2, 'in/9.png: there is no such file; expected an image, a folder, a glob'),
    'output is a file': (['in', 'model.pth'], 2, 'model.pth: a file; expected a folder'),
    'output inside the input': (
        ['in', 'in/out'],
        2,
        'in/out lies in in, where the next run would take what is written',
    ),
    'overlays inside the input': (['in', 'out', '--overlays', 'in'], 2, 'in lies in in, where the next run'),
    'image as output': (['in/0.png', 'in'], 2, 'in/0.png is an image of the input, and would be replaced; expected'),
    'one folder for both': (
        ['in', 'out', '--overlays', './out'],
        2,
        '--overlays out: out/0.png would be a label map and an overlay; expected another folder',
    ),
    'overlays among the label maps': (
        ['alike', 'out', '--overlays', 'out/sub'],
        2,
        '--overlays out/sub: out/sub/0.png would be a label map and an overlay; expected another folder',
    ),
    'video as output': (['video.avi', './video.avi'], 2, 'video.avi is the input, and would be replaced; expected'),
    'overlays of a video': (
        ['video.avi', 'out.avi', '--overlays', 'seen'],
        2,
        '--overlays: a video becomes one with the colours over it, no label maps; leave it out',
    ),
    'labelIds of a video': (['video.avi', 'out.avi', '--labels', 'cityscapes'], 2, '--labels: a video becomes'),
    'no batch': (['in', 'out', '--batch-size', '0'], 2, '--batch-size 0: expected 1 or more'),
    'no device': (['in', 'out', '--device', 'foo'], 2, '--device foo: no device of this machine; expected cpu, cuda'),
    'no such GPU': (['in', 'out', '--device', 'cuda:7'], 2, 'cuda:7: no device of this machine; expected cpu, cuda'),
    'folder that cannot be made': (['in', '/proc/nope'], 2, '/proc/nope: the folder cannot be written ('),
    'folder of overlays that cannot be made': (
        ['in', 'out', '--overlays', 'model.pth/seen'],
        2,
        'model.pth/seen: the folder cannot be written (Not a directory); expected another',
    ),
    'folder of a video that cannot be made': (['video.avi', '/proc/nope/out.avi'], 2, '/proc/nope: the folder cannot'),
    'other classes': (
        ['in', 'out', '--labels', 'cityscapes'],
        2,
        '--labels cityscapes: the model has the classes sky, building, pole, road, ...; expected the 19 of Cityscapes',
    ),
    'video that is none': (['none.mp4', 'out.mp4'], 1, 'skipped: none.mp4: no frame can be decoded; expected a video'),
    'no such video': (['nowhere.mp4', 'out.mp4'], 2, 'nowhere.mp4: there is no such video'),
    'video of no kind': (
        ['video.avi', 'out/out.txt'],
        2,
        'out.txt: no name of a video; expected a name with one of .mp4',
    ),
    'video of no name': (
        ['video.avi', 'out\udce9.mp4'],
        2,
        "out\\udce9.mp4': a name that is no UTF-8, at which OpenCV",
    ),
    'picture of no folder': (['in/0.png', 'labels.png'], 2, 'labels.png: the name of a picture; expected a folder'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case, folder):
    (folder / 'none').mkdir(exist_ok=True)
    (folder / 'none.mp4').write_bytes(b'nothing')
    for name in ('0.png', 'sub/0.png'):
        (folder / 'alike' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / 'in' / '0.png', folder / 'alike' / name)
    args, code, message = BAD[case]
    done = predict(folder, *args)
    assert done.returncode == code
    assert message in done.stderr
    assert 'Traceback' not in done.stderr


def test_what_lies_beside_an_image_is_not_replaced(folder, tmp_path):
    Image.open(folder / 'in' / '0.png').save(tmp_path / 'a.jpg')
    (tmp_path / 'a.png').write_text('ground truth')
    (tmp_path / 'link').symlink_to(tmp_path)
    for source, output in (('a.jpg', '.'), ('*.jpg', 'link')):
        done = predict(folder, tmp_path / source, tmp_path / output)
        assert done.returncode == 2
        assert f'{tmp_path / output / "a.png"} lies beside its image, may be its ground truth and would' in done.stderr
    assert (tmp_path / 'a.png').read_text() == 'ground truth'
    (tmp_path / 'a.png').unlink()
    assert predict(folder, tmp_path / 'a.jpg', tmp_path).returncode == 0


def test_two_images_with_one_name_are_refused(folder, tmp_path):
    (tmp_path / 'in').mkdir()
    for name in ('a.png', 'a.jpg'):
        Image.open(folder / 'in' / '0.png').save(tmp_path / 'in' / name)
    done = predict(folder, tmp_path / 'in', tmp_path / 'out')
    assert done.returncode == 2
    assert f'{tmp_path}/in/a.jpg and {tmp_path}/in/a.png would both become {tmp_path}/out/a.png' in done.stderr
