import json

import cv2
import numpy as np
import pytest

from mmseg_resnest import demo
from mmseg_resnest.demo import CLASSES, IGNORED, PALETTE, SIZE, STAMP, generate, main, render_scene

SMALL = (64, 96)
# Class -> the lowest and the highest share of all pixels, in per cent.
SHARES = {
    'road': (15, 28), 'lane marking': (2, 6), 'pavement': (3, 8), 'building': (16, 30), 'fence': (1.2, 5),
    'pole': (3, 9), 'traffic sign': (1.5, 5), 'vegetation': (4, 14), 'sky': (12, 24), 'person': (1.2, 4),
    'car': (2.5, 9), 'bus': (2.5, 9),
}  # fmt: skip


@pytest.fixture(scope='module')
def scenes():
    """The first validation scenes of seed 0: images and label maps."""
    images, labels = zip(*(render_scene(np.random.default_rng([0, 1, index])) for index in range(16)), strict=True)
    return np.stack(images), np.stack(labels)


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_layout_and_pairing(tmp_path):
    generate(tmp_path, train=2, val=1, size=SMALL)
    names = ('training/street_0000', 'training/street_0001', 'validation/street_0000')
    pictures = {f'images/{name}.jpg' for name in names} | {f'annotations/{name}.png' for name in names}
    assert contents(tmp_path).keys() == pictures | {STAMP}
    for split, name in zip((0, 0, 1), names, strict=True):
        drawn, label = render_scene(np.random.default_rng([0, split, int(name[-4:])]), SMALL)
        image = cv2.cvtColor(cv2.imread(str(tmp_path / f'images/{name}.jpg')), cv2.COLOR_BGR2RGB)
        # JPEG changes pixels a little; an image of another scene, or with red and blue swapped, is far off.
        assert np.abs(image.astype(int) - drawn).mean() < 8
        stored = cv2.imread(str(tmp_path / f'annotations/{name}.png'), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8
        np.testing.assert_array_equal(stored, label)


def test_the_same_bytes_for_the_same_seed_only(tmp_path):
    for folder, seed in (('one', 3), ('two', 3), ('other', 4)):
        generate(tmp_path / folder, train=1, val=1, size=SMALL, seed=seed)
    one, two, other = (contents(tmp_path / folder) for folder in ('one', 'two', 'other'))
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_a_scene_does_not_depend_on_the_counts(tmp_path):
    generate(tmp_path / 'few', train=1, val=1, size=SMALL)
    generate(tmp_path / 'more', train=2, val=3, size=SMALL)
    few, more = contents(tmp_path / 'few'), contents(tmp_path / 'more')
    few.pop(STAMP)
    assert few.items() <= more.items()
    # All seven differ, and so do training and validation.
    more.pop(STAMP)
    assert len(set(more.values())) == len(more) == 10


def test_classes_and_palette_belong_together():
    assert len(CLASSES) == len(set(CLASSES)) == len(PALETTE) == len({tuple(colour) for colour in PALETTE}) >= 10
    assert set(SHARES) == set(CLASSES)
    assert demo.CLASSES[demo.SKY] == 'sky' and demo.CLASSES[demo.BUS] == 'bus'


def test_labels_and_their_shares(scenes):
    images, labels = scenes
    assert images.shape == (16, *SIZE, 3) and labels.shape == (16, *SIZE)
    assert images.dtype == labels.dtype == np.uint8
    assert set(np.unique(labels)) == {*range(len(CLASSES)), IGNORED}
    ignored = (labels == IGNORED).mean(axis=(1, 2))
    assert 0.005 < ignored.mean() < 0.05 and ignored.max() < 0.08
    for index, name in enumerate(CLASSES):
        share = 100 * (labels == index).mean(axis=(1, 2))
        low, high = SHARES[name]
        assert low < share.mean() < high, name
        # 0.1 % are 25 pixels.
        assert (share > 0.1).mean() >= 0.9, name


def test_image_and_label_are_aligned(scenes):
    images, labels = scenes
    rows = np.broadcast_to(np.arange(SIZE[0])[:, None], SIZE)
    middle = {name: np.array([rows[label == CLASSES.index(name)].mean() for label in labels])
              for name in ('sky', 'building', 'car', 'road')}  # fmt: skip
    assert (middle['sky'] < middle['building']).all()
    assert (middle['building'] < middle['road']).all()
    assert (middle['car'] < middle['road']).mean() > 0.9
    # Colours change where labels do: a label map shifted by a few pixels fits its image worse.
    change = np.abs(np.diff(images.astype(float), axis=2)).mean(axis=-1)
    border = (np.diff(labels.astype(int), axis=2) != 0) & (labels[:, :, 1:] != IGNORED) & (labels[:, :, :-1] != IGNORED)
    fit = {shift: change[np.roll(border, shift, axis=2)].mean() for shift in (-4, 0, 4)}
    assert fit[0] > 1.5 * max(fit[-4], fit[4])


def test_markings_are_lighter_than_the_road_around_them(scenes):
    images, labels = scenes
    brightness = images.mean(axis=-1)
    lighter = [image[label == demo.MARKING].mean() - image[label == demo.ROAD].mean()
               for image, label in zip(brightness, labels, strict=True)]  # fmt: skip
    assert min(lighter) > 10


def test_light_varies(scenes):
    brightness = scenes[0].mean(axis=(1, 2, 3))
    assert 40 < brightness.min() < brightness.max() < 215
    assert brightness.std() > 12


@pytest.fixture
def written(tmp_path, capsys):
    """A folder with the demo of one scene and one."""
    root = tmp_path / 'demo'
    main([str(root), '--train', '1', '--val', '1'])
    assert capsys.readouterr().out == f'writing {root}: 1 + 1 scenes of 192 x 128 pixels, 12 classes ...\n'
    return root


def test_main_does_nothing_the_second_time(written, capsys):
    times = {path: path.stat().st_mtime_ns for path in written.rglob('*')}
    main([str(written), '--train', '1', '--val', '1'])
    assert f'{written} is complete' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written.rglob('*')} == times


@pytest.mark.parametrize('lost', ['images/training/street_0000.jpg', 'annotations/validation/street_0000.png', STAMP])
def test_main_completes_what_is_missing(written, lost):
    before = contents(written)
    (written / lost).unlink()
    main([str(written), '--train', '1', '--val', '1'])
    assert contents(written) == before


def test_main_replaces_another_demo(written):
    assert json.loads((written / STAMP).read_text())['train'] == 1
    main([str(written), '--train', '0', '--val', '1', '--seed', '7'])
    now = contents(written)
    assert now.keys() == {'images/validation/street_0000.jpg', 'annotations/validation/street_0000.png', STAMP}
    stamp = json.loads(now[STAMP])
    assert (stamp['train'], stamp['val'], stamp['seed'], stamp['size']) == (0, 1, 7, list(SIZE))


def test_no_stamp_is_left_when_writing_fails(written, capsys):
    (written / 'images/training/street_0001.jpg').mkdir()  # where a picture should go
    with pytest.raises(SystemExit) as exit_info:
        main([str(written), '--train', '2', '--val', '0'])
    assert exit_info.value.code == 1
    assert 'street_0001.jpg' in capsys.readouterr().err
    assert not (written / STAMP).exists()


def test_somebody_elses_pictures_are_left_alone(tmp_path, capsys):
    theirs = tmp_path / 'images' / 'training' / 'ADE_train_00000001.jpg'
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b'precious')
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path)])
    assert exit_info.value.code == 1
    assert f'{theirs} is not from the demo' in capsys.readouterr().err
    assert contents(tmp_path) == {'images/training/ADE_train_00000001.jpg': b'precious'}


@pytest.mark.parametrize('option', ['--train', '--val', '--seed'])
def test_negative_numbers_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path), option, '-1'])
    assert exit_info.value.code == 2
    assert 'must not be negative' in capsys.readouterr().err
