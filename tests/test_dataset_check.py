"""The data set check: each thing that can be wrong is found, with its fix, and what is right is let through."""

import json
import os
import shutil
import struct
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
from bad_data import LOSSES, ROWS, paint, spoil, turn, with_value
from mmengine.config import Config
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image
from tiny import CAMVID, CLASSES, write_data_set

from mmseg_resnest import dataset_check
from mmseg_resnest.dataset_check import Finding, check, check_before_run, listing
from mmseg_resnest.datasets import set_data_root, splits_of
from mmseg_resnest.picture_files import (
    Picture,
    Task,
    decode_strictly,
    memory_of,
    read_picture,
    read_pictures,
    recall,
    remember,
)

TRAINING = ('train_dataloader', 'val_dataloader')
NAMES = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist')


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp('original') / 'data')


@pytest.fixture
def root(original, tmp_path):
    """A tiny data set that may be spoilt."""
    return shutil.copytree(original, tmp_path / 'data')


def config(root, classes=None, **options) -> Config:
    """CamVid's config on a tiny data set; its training set with other classes or options."""
    cfg = Config.fromfile(CAMVID)
    set_data_root(cfg, str(root))
    if classes:
        cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
    cfg.train_dataloader.dataset.update(options)
    return cfg


def findings(cfg, loader='train_dataloader', whole=False, severity='error') -> list[Finding]:
    return check(cfg, [loader], whole).of(severity)


def relabel(root, change, split='training') -> None:
    for path in (root / 'annotations' / split).iterdir():
        paint(path, change)


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize(('loader', 'split'), [('train_dataloader', 'training'), ('test_dataloader', 'validation')])
def test_each_row_of_the_table(row, loader, split, root):
    line = spoil(root, split, '2', row)
    if not ROWS[row].hidden:
        with pytest.raises(ValueError, match=r'^1 error in [34] pairs of images and label maps:\n') as error:
            check_before_run(config(root), [loader])
        assert f'\n  {line}' in str(error.value)
        assert str(error.value).endswith('; --skip-data-check runs all the same.')
    if ROWS[row].hidden or split == 'training':
        (finding,) = findings(config(root), loader, whole=True)
        assert finding.kind == 'damaged file' or str(finding).startswith(line)


@pytest.mark.parametrize('row', LOSSES)
def test_what_loading_drops_is_an_error_in_a_test(row, root):
    line = spoil(root, 'validation', '2', row)
    for loader, severity in {'val_dataloader': 'warning', 'test_dataloader': 'error'}.items():
        assert line in map(str, findings(config(root), loader, severity=severity))
    cfg = config(root)
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'  # for a network of its own
    assert findings(cfg, 'test_dataloader') == []


def test_floats_that_only_opencv_reads(root):
    image = root / 'image.hdr'
    cv2.imwrite(str(image), np.ones((8, 9, 3), np.float32))
    picture = read_picture(Task(str(image), False, False, 'cv2', True))
    assert (picture.mode, picture.width, picture.height, picture.defect) == ('float32 of 3 channels', 9, 8, '')


def test_what_is_right_passes(root, capsys):
    assert check(config(root), [*TRAINING, 'test_dataloader'], whole=True).of('error') == []
    check_before_run(config(root), TRAINING)
    out, err = capsys.readouterr()
    assert out == ''
    lines = err.splitlines()
    assert lines[0].startswith('Data set check: 4 + 4 pairs, values of 4 + 4 label maps, no error (')
    assert lines[1] == 'warning: classes that never occur (2)'
    assert lines[2].startswith(f'  {root}/annotations/training: 1 of 11 classes never occur (bicyclist); expected')
    assert len(lines) == 4


def test_an_image_that_exif_turns_to_fit_its_label_map(root):
    image = root / 'images/training/2.jpg'
    Image.open(image).transpose(Image.Transpose.ROTATE_90).save(image)
    assert [finding.kind for finding in findings(config(root))] == ['sizes']
    turn(image, 6)
    assert cv2.imread(str(image)).shape == (48, 64, 3)
    assert findings(config(root)) == []


def test_exif_that_the_sizes_do_not_tell_or_the_loader_ignores(root):
    turn(root / 'images/training/2.jpg', 3)
    cfg = config(root)
    turn(root / 'images/training/1.jpg', 0)
    (finding,) = findings(cfg)
    assert finding.kind == 'EXIF orientation'
    assert finding.found.endswith('2.png is not, whichever way it was drawn: the sizes do not tell')
    turn(root / 'images/training/2.jpg', 6)
    assert [finding.kind for finding in findings(cfg)] == ['EXIF orientation']
    loader = cfg.train_dataloader.dataset.pipeline[0]
    for option in (dict(color_type='color_ignore_orientation'), dict(imdecode_backend='turbojpeg')):
        cfg.train_dataloader.dataset.pipeline[0] = dict(loader, **option)
        assert {finding.kind for finding in check(cfg, ['train_dataloader'], False).findings} == {
            'classes that never occur'
        }


def with_late_exif(image, orientation):
    """Makes a PNG file whose EXIF data stand behind its pixels, as the format allows."""
    Image.open(image).save(image, format='PNG')
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = b'eXIf' + exif.tobytes().removeprefix(b'Exif\0\0')
    data = image.read_bytes()
    chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    image.write_bytes(data[:-12] + chunk + data[-12:])


def as_tiff(image, orientation):
    Image.open(image).save(image, format='TIFF', tiffinfo={0x0112: orientation})


def as_webp(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(image).save(image, format='WEBP', exif=exif, lossless=True)


def with_xmp(image, orientation):
    """Makes a JPEG file whose EXIF data have no orientation, and whose XMP data, which Pillow reads, have."""
    exif = Image.Exif()
    exif[0x010F] = 'maker'
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    Image.open(image).save(image, format='JPEG', exif=exif, xmp=xmp)


def test_a_tiff_label_map_is_turned_too(root):
    image, label = root / 'images/training/2.jpg', root / 'annotations/training/2.png'
    values = cv2.imread(str(label), 0)
    as_tiff(label, 6)
    loaded = LoadAnnotations().transform(dict(seg_map_path=str(label), seg_fields=[], reduce_zero_label=False))
    assert np.array_equal(loaded['gt_seg_map'], np.rot90(values, -1))
    assert [finding.kind for finding in findings(config(root))] == ['EXIF orientation']
    turn(image, 6)
    assert findings(config(root)) == []


@pytest.mark.parametrize('orientation', [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ('make', 'is_heeded'), [(turn, True), (with_late_exif, True), (as_tiff, True), (as_webp, True), (with_xmp, False)]
)
def test_orientation_is_what_opencv_makes_of_it(make, is_heeded, orientation, root):
    image = root / 'images/training/2.jpg'
    before = cv2.imread(str(image))
    make(image, orientation)
    loaded = cv2.imdecode(np.fromfile(image, np.uint8), cv2.IMREAD_COLOR)
    assert (loaded.shape == before.shape and np.abs(loaded.astype(int) - before).mean() < 20) != is_heeded
    picture = read_picture(Task(str(image), False, False, 'cv2', True))
    assert picture.orientation == (orientation if is_heeded else 1)
    assert (picture.height, picture.width) == loaded.shape[:2]
    assert [finding.kind for finding in findings(config(root))] == ['EXIF orientation'] * is_heeded
    label = root / 'annotations/training/2.png'
    paint(label, lambda pixels: pixels.T if orientation >= 5 and is_heeded else pixels)  # as large as the image shown
    assert len(findings(config(root))) == (is_heeded and orientation < 5)


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'P', 'CMYK', 'I;16'])
def test_images_that_the_loader_makes_rgb(mode, root):
    image = root / 'images/training/2.jpg'
    picture = Image.fromarray(np.zeros((48, 64), np.uint16)) if mode == 'I;16' else Image.open(image).convert(mode)
    picture.save(image, format='JPEG' if mode == 'CMYK' else 'PNG')
    assert cv2.imread(str(image)).shape == (48, 64, 3)
    for whole in (False, True):
        assert findings(config(root), whole=whole) == []
    found = {f.kind: f.found for f in findings(config(root), severity='warning')}
    assert ('type of file' in found) == (mode != 'CMYK')
    lost = {'LA': 'an alpha channel (mode LA)', 'RGBA': 'an alpha channel (mode RGBA)'}
    lost |= {'I;16': 'other numbers than 8 bits (mode I;16)'}
    assert found.get('images of 16 bits or with alpha') == lost.get(mode)


@pytest.mark.parametrize('whole', [False, True])
def test_colours_of_16_bits(whole, root):
    paint(root / 'images/training/2.jpg', lambda pixels: pixels)
    image = np.random.default_rng(0).integers(0, 65536, (48, 64, 3), np.uint16)
    (root / 'images/training/2.jpg').write_bytes(cv2.imencode('.png', image)[1].tobytes())
    found = {f.kind: f.found for f in findings(config(root), whole=whole, severity='warning')}
    assert found['images of 16 bits or with alpha'] == 'other numbers than 8 bits (mode RGB;16B)'


def test_label_maps_are_read_as_the_pipeline_reads_them(root):
    labels = root / 'annotations/training'
    relabel(root, lambda label: (label % 2).astype(np.uint8))
    for path in labels.iterdir():
        Image.fromarray(cv2.imread(str(path), 0) * 255).convert('1').save(path)
    cfg = config(root, ('background', 'crack'))
    assert findings(cfg) == []  # by Pillow: 0 and 1
    cfg.train_dataloader.dataset.pipeline[1].imdecode_backend = 'cv2'
    assert [finding.kind for finding in findings(cfg)] == ['masks of 0 and 255']
    Image.open(labels / '2.png').convert('P').save(labels / '2.png')
    (finding,) = (finding for finding in findings(cfg) if finding.file.endswith('2.png'))
    assert finding.found == '3 channels (P, read by cv2)'


def test_a_harmless_remark_of_the_decoder_is_a_warning(root):
    image = root / 'images/training/2.jpg'
    before, data = cv2.imread(str(image)), bytearray(image.read_bytes())
    start = data.index(b'\xff\xda') + 2
    data[start + data[start + 1] - 2] = 0  # the last coefficient, of which a sequential decoder makes nothing
    image.write_bytes(data)
    assert np.array_equal(cv2.imread(str(image)), before)
    assert findings(config(root), whole=True) == []
    (finding,) = (f for f in findings(config(root), whole=True, severity='warning') if f.file == str(image))
    assert finding.found.startswith("the decoder says 'Invalid SOS parameters for sequential JPEG', which changes no")


def test_a_file_that_the_system_does_not_let_be_read(root, tmp_path):
    (root / 'list.txt').write_text('0\n1\nfolder\n')
    (root / 'images/training/folder.jpg').mkdir()
    shutil.copy(root / 'annotations/training/0.png', root / 'annotations/training/folder.png')
    (finding,) = findings(config(root, ann_file='list.txt'))
    assert finding.found == f"[Errno 21] Is a directory: '{root}/images/training/folder.jpg'"
    assert finding.fix == 'Give yourself the right to read it, or look at its disk'
    picture = read_picture(Task(finding.file, False, False))
    remember(tmp_path / 'memory', {'good': Picture(1, 2), 'unreadable': picture})
    assert recall(tmp_path / 'memory') == {'good': Picture(1, 2)}


def test_palette_and_harmless_16_bit_label_maps(root):
    labels = root / 'annotations/training'
    palette = Image.open(labels / '1.png').convert('P')
    palette.putdata(np.asarray(Image.open(labels / '1.png')).ravel())
    palette.save(labels / '1.png')
    palette.save(labels / '3.png', transparency=0)  # pixels are its numbers all the same
    assert Image.open(labels / '3.png').info['transparency'] == 0
    paint(labels / '2.png', lambda label: label.astype(np.uint16))
    assert findings(config(root), whole=True) == []


@pytest.mark.parametrize('end', [b'\xff\xd9', b'\0' * 900 + b'\xff\xd9'])
def test_only_the_whole_check_sees_that_a_cut_file_was_filled_up(end, root):
    image = root / 'images/training/2.jpg'
    image.write_bytes(image.read_bytes()[:-900] + end)
    assert findings(config(root)) == []
    (finding,) = findings(config(root), whole=True)
    assert finding.kind == 'damaged file'


def test_a_junk_trailer_is_no_truncation(root):
    image = root / 'images/training/2.jpg'
    image.write_bytes(image.read_bytes() + b'\0' * 100)
    assert findings(config(root)) == []


# ------------------------------------------------------------------------------------------------------- label values


def test_values_from_1(root):
    relabel(root, lambda label: np.where(label == 255, 255, label + 1).astype(np.uint8))
    first = findings(config(root, NAMES[:10]))[0]
    assert first.found.startswith('value 10 in ')
    assert first.expected == '0-9, 255: 10 classes, and what is ignored'
    assert first.fix == 'All values are 1-10: set reduce_zero_label=True in each data set, or subtract 1'
    assert findings(config(root, NAMES[:10], reduce_zero_label=True)) == []


def test_one_value_too_many(root):
    first = findings(config(root, NAMES[:9]))[0]
    assert first.found.startswith('value 9 in ')
    assert 'values to 9, one more than classes: if 0 means "nothing", set reduce_zero_label=True' in first.fix
    assert findings(config(root, NAMES[:9], reduce_zero_label=True)) == []


def test_reduce_zero_label_where_0_is_a_class(root):
    (finding,) = findings(config(root, NAMES[:10], reduce_zero_label=True))
    assert finding.kind == 'reduce_zero_label'
    assert finding.file == f'{root}/annotations/training'
    assert finding.found == 'values 0-9 and never 10, with reduce_zero_label=True: class 0 would be ignored'
    assert finding.expected == 'values 1-10'
    assert finding.fix.startswith('Set reduce_zero_label=False, unless 0 means "nothing" and pedestrian occurs nowhere')


def test_a_sample_only_warns_of_reduce_zero_label(root, monkeypatch):
    monkeypatch.setattr(dataset_check, 'SAMPLE', 3)
    cfg = config(root, NAMES[:10], reduce_zero_label=True)
    assert findings(cfg) == []
    assert 'reduce_zero_label' in [finding.kind for finding in findings(cfg, severity='warning')]
    assert [finding.kind for finding in findings(cfg, whole=True)] == ['reduce_zero_label']


def replaced(**values):
    """Returns what gives some values of a label map another."""
    table = np.arange(256, dtype=np.uint8)
    table[[int(old[1:]) for old in values]] = list(values.values())
    return lambda label: cv2.LUT(label, table)


@pytest.mark.parametrize(
    ('change', 'classes', 'severity'),
    [
        (replaced(_3=2), 10, 'error'),
        (replaced(_3=2, _4=2), 10, 'warning'),
        (replaced(_3=2, _4=2, _5=2), 10, None),  # as likely by chance
        (lambda label: np.where((label == 0) & (np.indices(label.shape)[1] > 0), 1, label), 10, None),  # 0 is rare
    ],
)
def test_reduce_zero_label_where_0_is_a_class_and_others_lack(change, classes, severity, root):
    relabel(root, change)
    cfg = config(root, NAMES[:classes], reduce_zero_label=True)
    found = [f for f in check(cfg, ['train_dataloader'], whole=True).findings if f.kind == 'reduce_zero_label']
    assert [finding.severity for finding in found] == [severity] * (severity is not None)


def test_reduce_zero_label_where_another_split_has_the_last_class(root):
    cfg = config(root, NAMES[:10], reduce_zero_label=True)
    cfg.val_dataloader.dataset.update(reduce_zero_label=True)
    cfg.val_dataloader.dataset.metainfo = cfg.train_dataloader.dataset.metainfo
    assert [f.kind for f in check(cfg, TRAINING, False).of('error')] == ['reduce_zero_label'] * 2
    relabel(root, replaced(_9=10), 'validation')
    assert check(cfg, TRAINING, False).of('error') == []


def test_values_from_1_without_the_last_class(root):
    relabel(root, replaced(_0=1))
    (finding,) = (f for f in findings(config(root, NAMES[:10]), severity='warning') if f.kind == 'reduce_zero_label')
    assert finding.found == 'values 1-9 and never 0, with reduce_zero_label=False'
    assert finding.fix == 'Set reduce_zero_label=True if the labels count from 1, unless sky occurs nowhere'
    relabel(root, replaced(_3=2, _4=2, _5=2))
    assert not [f for f in findings(config(root, NAMES[:10]), severity='warning') if f.kind == 'reduce_zero_label']


def test_masks_of_0_and_255_but_for_a_pixel(root):
    relabel(root, lambda label: np.where(label < 5, 0, 255).astype(np.uint8))
    label = root / 'annotations/training/1.png'
    paint(label, lambda pixels: np.where(np.arange(pixels.size).reshape(pixels.shape) == 9, 1, pixels).astype(np.uint8))
    cfg = config(root, ('background', 'crack'))
    assert findings(cfg) == []
    (finding,) = findings(cfg, severity='warning')
    assert finding.found == 'values 0 and 255 but for 1 pixels: all that is not class 0 is ignored'


def test_masks_of_0_and_255(root):
    relabel(root, lambda label: np.where(label < 5, 0, 255).astype(np.uint8))
    (finding,) = findings(config(root, ('background', 'crack')))
    assert finding.found == 'values 0 and 255 only: all that is not class 0 is ignored'
    assert finding.expected == '0-1'
    assert finding.fix.startswith('Write 0 and 1, as by cv2.imwrite(path, (label > 0).astype("uint8"))')
    (finding,) = findings(config(root, ('background', 'crack'), reduce_zero_label=True))
    assert finding.found == 'values 0, 255 only: every pixel of 4 label maps is ignored'


def test_nothing_labelled_in_one_file(root):
    paint(root / 'annotations/training/2.png', lambda label: np.full_like(label, 255))
    cfg = config(root)
    assert findings(cfg) == []
    (finding,) = (f for f in findings(cfg, severity='warning') if f.kind == 'nothing labelled')
    assert finding.file == f'{root}/annotations/training/2.png'
    assert finding.found == 'value 255 only: every pixel is ignored'


def test_the_ignored_label_is_the_heads(root):
    cfg = config(root)
    cfg.model.decode_head.ignore_index = 77
    kinds = {finding.kind for finding in findings(cfg)}
    assert kinds == {'label values'}
    relabel(root, lambda label: np.where(label == 255, 77, label).astype(np.uint8))
    assert findings(cfg) == []


@pytest.mark.parametrize(
    ('reduce_zero_label', 'label_map'), [(False, None), (True, None), (False, {0: 255, 1: 0}), (True, {0: 1, 1: 255})]
)
def test_values_mean_what_they_mean_to_mmsegmentation(reduce_zero_label, label_map, tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    cv2.imwrite(str(tmp_path / 'a.png'), values)
    sample = dict(seg_map_path=str(tmp_path / 'a.png'), seg_fields=[])
    sample.update(reduce_zero_label=reduce_zero_label, label_map=label_map)
    loaded = LoadAnnotations().transform(sample)['gt_seg_map']
    from mmseg_resnest.datasets import _meaning

    assert np.array_equal(_meaning(reduce_zero_label, label_map), loaded.ravel())


def test_histogram(root):
    report = check(config(root), ['train_dataloader'], whole=True)
    (histogram,) = report.histograms.values()
    labels = np.stack([cv2.imread(str(path), 0) for path in sorted((root / 'annotations/training').iterdir())])
    assert histogram.pixels.tolist() == [(labels == label).sum() for label in range(CLASSES)]
    assert histogram.images.tolist() == [(labels == label).any((1, 2)).sum() for label in range(CLASSES)]
    assert histogram.ignored == (labels == 255).sum()
    assert (histogram.label_maps, histogram.of, histogram.out_of_range) == (4, 4, 0)


# ---------------------------------------------------------------------------------------------- which files a split has


def test_an_empty_list(root):
    (root / 'none.txt').touch()
    (finding,) = findings(config(root, ann_file='none.txt'))
    assert str(finding) == (
        'train_dataloader.dataset: no pair of files; expected at least one. '
        'Correct its ann_file, or leave it out to take all files of the folders.'
    )


def test_a_list_that_names_a_file_that_is_not_there(root):
    (root / 'list.txt').write_text('0\n1.jpg\n\n')
    image, blank = findings(config(root, ann_file='list.txt'))
    assert image.file == f'{root}/images/training/1.jpg.jpg'
    assert image.found == 'no such file (but 1.jpg)'
    assert image.fix == 'Put it there, or take its name from ann_file, which has names without suffix'
    assert (blank.found, blank.fix) == ('a blank line', 'Remove the line')


def test_a_list_that_is_not_there(root):
    with pytest.raises(FileNotFoundError, match=r'ann_file .*/data/list.txt does not exist; expected a list of names'):
        check_before_run(config(root, ann_file='list.txt'), TRAINING)


def test_label_maps_beside_a_list_need_no_image(root):
    (root / 'list.txt').write_text('0\n1\n')
    (root / 'images/training/2.jpg').unlink()
    assert findings(config(root, ann_file='list.txt')) == []
    assert len(splits_of(config(root, ann_file='list.txt'), ['train_dataloader'])[0].pairs) == 2


def test_two_data_sets_that_share_a_folder(root):
    """JPEG and PNG images side by side, as two data sets: each label map has its image in one of them."""
    image = root / 'images/training/2.jpg'
    Image.open(image).save(image.with_suffix('.png'))
    image.unlink()
    cfg = config(root)
    part = cfg.train_dataloader.dataset
    both = [part, dict(part, img_suffix='.png')]
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=both)
    )
    assert findings(cfg) == []
    splits = splits_of(cfg, ['train_dataloader'])
    assert [split.name for split in splits] == [
        'train_dataloader.dataset (1 of 2)',
        'train_dataloader.dataset (2 of 2)',
    ]
    assert [len(split.pairs) for split in splits] == [3, 1]


def test_images_that_are_left_out(root):
    for name in ('9.jpeg', '8.PNG', 'readme.txt', '.hidden.jpeg'):
        shutil.copy(root / 'images/training/0.jpg', root / 'images/training' / name)
    assert findings(config(root)) == []
    (finding,) = (f for f in findings(config(root), severity='warning') if f.kind == 'images left out')
    assert finding.file == f'{root}/images/training/8.PNG'
    assert finding.found == '2 pictures of the folder in no pair, this one among them'


def test_the_same_split_comes_once(root):
    splits = splits_of(config(root), ['train_dataloader', 'val_dataloader', 'test_dataloader'])
    assert [split.name for split in splits] == [
        'train_dataloader.dataset',
        'val_dataloader.dataset, test_dataloader.dataset',
    ]


def test_images_in_two_splits(root):
    shutil.copy(root / 'images/training/2.jpg', root / 'images/validation/2.jpg')
    (finding,) = (f for f in check(config(root), TRAINING, False).of('warning') if f.kind == 'images in two splits')
    assert finding.file == f'{root}/images/validation/2.jpg'
    assert finding.found == (
        f'1 of 4 images of val_dataloader.dataset are in the training set, this one as {root}/images/training/2.jpg'
    )


def test_data_without_labels(root):
    shutil.rmtree(root / 'annotations/validation')
    cfg = config(root)
    cfg.test_dataloader.dataset.data_prefix = dict(img_path='images/validation')
    with pytest.raises(ValueError, match='its pipeline loads labels, but data_prefix has no seg_map_path; add their'):
        check_before_run(cfg, ['test_dataloader'])
    cfg.test_dataloader.dataset.pipeline.pop(2)
    assert findings(cfg, 'test_dataloader', whole=True) == []
    check_before_run(cfg, ['test_dataloader'])


@TRANSFORMS.register_module()
class LoadColours(LoadAnnotations):
    """A user's loader."""


def test_files_that_are_read_by_other_means_are_not_judged(root):
    spoil(root, 'training', '2', 'RGB PNG')
    cfg = config(root)
    assert [finding.kind for finding in findings(cfg)] == ['channels of label maps']
    cfg.train_dataloader.dataset.pipeline[1].type = 'LoadColours'
    assert findings(cfg) == []
    (finding,) = findings(cfg, severity='warning')
    assert finding.found == 'LoadColours in its pipeline'


# ------------------------------------------------------------------------------------------------------ how it is read


def wrap(root):
    paint(root / 'annotations/training/2.png', with_value(256 + 3, np.uint16))


@pytest.mark.parametrize(
    ('row', 'is_noticed'),
    [
        ('garbage JPEG', True),
        ('truncated PNG', True),
        ('missing label map', True),
        ('different sizes', True),
        ('EXIF rotation', True),
        ('label out of range', True),
        ('RGB PNG', True),
        ('corrupt bytes in a JPEG', False),
        ('JPEG for labels', False),
        ('missing image', False),  # no run sees a label map alone
        (wrap, False),
        (lambda root: turn(root / 'images/training/2.jpg', 3), False),
    ],
)
def test_where_bad_samples_are_skipped_what_a_run_does_not_notice_stays_an_error(row, is_noticed, root):
    row(root) if callable(row) else spoil(root, 'training', '2', row)
    (finding,) = check(config(root), TRAINING, True).of('error')
    (same,) = (f for f in check(config(root), TRAINING, True, may_skip=True).findings if f.kind == finding.kind)
    assert same == replace(finding, severity='warning' if is_noticed else 'error')


def test_a_listed_image_that_is_not_there_is_skipped(root):
    (root / 'list.txt').write_text('0\n1\nnone\n')
    report = check(config(root, ann_file='list.txt'), TRAINING, False, may_skip=True)
    assert report.of('error') == []
    assert 'missing image' in [finding.kind for finding in report.of('warning')]


def test_bad_pairs_of_training_are_warnings_where_they_are_skipped(root, capsys):
    line = spoil(root, 'training', '2', 'truncated JPEG')
    cfg = config(root)
    cfg.default_hooks.samples = dict(type='mmseg_resnest.SampleCheckHook', on_bad_sample='skip')
    check_before_run(cfg, TRAINING)
    assert line in capsys.readouterr().err
    spoil(root, 'validation', '2', 'truncated JPEG')
    with pytest.raises(ValueError, match=r'^1 error in 4 \+ 4 pairs'):
        check_before_run(cfg, TRAINING)


def test_only_the_first_process_checks(root, monkeypatch):
    spoil(root, 'training', '2', 'truncated JPEG')
    for variable in ('RANK', 'SLURM_PROCID'):
        monkeypatch.setenv(variable, '1')
        check_before_run(config(root), TRAINING)
        monkeypatch.delenv(variable)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(ValueError, match='1 error in'):
        check_before_run(config(root), TRAINING)


@pytest.fixture
def many(root, monkeypatch, tmp_path):
    """A training set of 504 pairs, which is remembered in ``tmp_path/cache``."""
    for i in range(4, 504):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            os.link(root / kind / 'training' / f'{i % 4}.{suffix}', root / kind / 'training' / f'{i}.{suffix}')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return root


def test_many_files_are_read_in_parallel_and_remembered(many, tmp_path):
    (split,) = splits_of(config(many), ['train_dataloader'])
    pictures = dataset_check.read_split(split, whole=False)
    assert sum(picture.values is not None for picture in pictures.values()) == dataset_check.SAMPLE
    (memory,) = (tmp_path / 'cache/mmseg_resnest/pictures').iterdir()
    assert recall(memory) == pictures
    content = json.loads(memory.read_text())
    for fields in content['files'].values():
        fields[5] = 65  # a width that no file has: it can only be remembered
    memory.write_text(json.dumps(content))
    spoil(many, 'training', '503', 'truncated JPEG')  # and the other names of its file
    again = dataset_check.read_split(split, whole=False)
    changed = {path for path, picture in again.items() if picture.width == 64}
    assert changed == {f'{many}/images/training/{i}.jpg' for i in range(3, 504, 4)}
    assert all(again[path].defect.startswith('cut off before its end (') for path in changed)
    assert not any(picture.width == 65 for picture in dataset_check.read_split(split, whole=True).values())


def test_a_damaged_memory_is_forgotten(many, tmp_path):
    cfg = config(many)
    assert findings(cfg) == []
    (memory,) = (tmp_path / 'cache/mmseg_resnest/pictures').iterdir()
    whole = memory.read_text()
    for content in (
        '',
        '{"version": 2, "fil',
        '[]',
        '{"version": 0, "files": {}}',
        '{"version": 2, "files": {"a": [1]}}',
    ):
        memory.write_text(content)
        assert recall(memory) == {}
    assert findings(cfg) == []
    assert memory.read_text() == whole


def test_a_memory_that_cannot_be_written(many, tmp_path):
    (tmp_path / 'cache').write_text('a file where a folder is wanted')
    assert findings(config(many)) == []


def test_memory_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert memory_of('a').parent == tmp_path / '.cache/mmseg_resnest/pictures'
    assert memory_of('a') != memory_of('b')


def test_read_picture(root):
    image, label = root / 'images/training/0.jpg', root / 'annotations/training/0.png'
    read = read_picture(Task(str(image), False, False))
    status = image.stat()
    assert read == Picture(status.st_size, status.st_mtime_ns, False, 'JPEG', 'RGB', 64, 48, 3)
    values, counts = np.unique(cv2.imread(str(label), 0), return_counts=True)
    assert read_picture(Task(str(label), True, True)).values == np.stack((values, counts), 1).tolist()
    assert read_picture(Task(str(root / 'none'), False, True)) is None
    assert read_pictures([Task(str(root / 'none'), False, True)]) == {str(root / 'none'): None}


@pytest.mark.parametrize('progressive', [False, True])
def test_most_overwritten_bytes_are_noticed(progressive):
    """Photograph-like pictures, of which 2 to 20 bytes behind the header are overwritten."""
    random = np.random.default_rng(0)
    found = 0
    for _ in range(50):
        picture = cv2.resize(random.integers(0, 256, (24, 32, 3), np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
        picture = np.clip(picture + random.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
        data = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)])[1].tobytes()
        decode_strictly(data)
        spoilt = bytearray(data)
        for position in random.integers(data.index(b'\xff\xda') + 14, len(data) - 2, random.integers(2, 21)):
            spoilt[position] = random.integers(256)
        try:
            decode_strictly(bytes(spoilt))
        except ValueError:
            found += 1
    assert found >= 45


def test_at_most_some_findings_of_a_kind_are_listed():
    many = [Finding('sizes', f'{i}.jpg', 'a', 'b', 'c') for i in range(1234)]
    lines = listing(
        [Finding('damaged file', 'x', 'a', 'b', 'c'), *many, Finding('odd', 'y', 'a', 'b', 'c', 'warning')], 5
    )
    assert lines.splitlines() == [
        'error: damaged file (1)',
        '  x: a; expected b. c.',
        'error: sizes (1,234)',
        *[f'  {i}.jpg: a; expected b. c.' for i in range(5)],
        '  ... and 1,229 more',
        'warning: odd (1)',
        '  y: a; expected b. c.',
    ]


def test_values_of_a_row_are_counted_in_range(root):
    paint(root / 'annotations/training/2.png', with_value(200))
    (histogram,) = check(config(root), ['train_dataloader'], whole=False).histograms.values()
    assert histogram.out_of_range == 24 * 64
