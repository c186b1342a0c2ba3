"""The official data sets' archives, in their layout and tiny: what comes out, and what is refused."""

import io
import json
import os
import shlex
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from mmengine.config import Config
from mmseg.datasets import CityscapesDataset, PascalContextDataset59
from tiny import ROOT

from mmseg_resnest.prepare import (
    ADE20K,
    CITYSCAPES,
    OFFICIAL,
    PASCAL_CONTEXT,
    PASCAL_CONTEXT_IDS,
    decode_rle,
    prepare,
    unpack,
)

# What pycocotools writes for these masks of 6x8 pixels.
BLOCK = '=3300000005'  # rows 1-3 of columns 2-6
ROW = '01500000O11O00000'  # row 0, and the pixel (5, 3)
ALL = '0`1'


def encoded(suffix, image):
    return cv2.imencode(suffix, image)[1].tobytes()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_zip(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path, files):
    with tarfile.open(path, 'w') as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def ade20k_files(training=2):
    files = {'objectInfo150.txt': b'Idx\n', 'images/': b'', 'images/training/': b''}
    label = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for split, name, count in (('training', 'train', training), ('validation', 'val', 1)):
        for i in range(count):
            files[f'images/{split}/ADE_{name}_{i:08d}.jpg'] = encoded('.jpg', noise(6, 8, 3))
            files[f'annotations/{split}/ADE_{name}_{i:08d}.png'] = encoded('.png', label)
    return {f'ADEChallengeData2016/{name}': content for name, content in files.items()}


def write_ade20k(folder):
    folder.mkdir()
    write_zip(folder / 'ADEChallengeData2016.zip', ade20k_files())
    return folder


def rectangle(label, left, top, right, bottom, **more):
    return dict(label=label, polygon=[[left, top], [right, top], [right, bottom], [left, bottom]], **more)


STREET = dict(
    imgHeight=8,
    imgWidth=16,
    objects=[
        rectangle('road', 0, 0, 15, 7),
        rectangle('cargroup', 2, 2, 5, 4),
        rectangle('license plate', 3, 3, 4, 4),  # id -1: not drawn
        rectangle('train', 8, 0, 9, 7, deleted=1),
        rectangle('bicycle', 12, 6, 20, 9),  # over the edge
        rectangle('ego vehicle', 0, 7, 15, 7),
    ],
)
STREET_LABELS = np.zeros((8, 16), np.uint8)
STREET_LABELS[2:5, 2:6] = 13
STREET_LABELS[6:, 12:] = 18
STREET_LABELS[7] = 255


def write_cityscapes(folder, training=2, street=STREET):
    folder.mkdir()
    photos, labels = {'README': b'x', 'license.txt': b'x'}, {'README': b'x', 'license.txt': b'x'}
    empty = dict(STREET, objects=[rectangle('out of roi', 0, 0, 15, 7)])
    for split, city, polygons, count in (
        ('train', 'aachen', street, training),
        ('val', 'munster', street, 1),
        ('test', 'bonn', empty, 1),
    ):
        for i in range(count):
            name = f'{split}/{city}/{city}_{i:06d}_000019'
            photos[f'leftImg8bit/{name}_leftImg8bit.png'] = encoded('.png', noise(8, 16, 3))
            labels[f'gtFine/{name}_gtFine_polygons.json'] = json.dumps(polygons)
            labels[f'gtFine/{name}_gtFine_labelIds.png'] = encoded('.png', noise(8, 16))
    write_zip(folder / 'leftImg8bit_trainvaltest.zip', photos)
    write_zip(folder / 'gtFine_trainvaltest.zip', labels)
    return folder


def write_pascal_context(folder, category=2):
    folder.mkdir()
    names = {'2008_000002': 'train', '2008_000003': 'val', '2010_006086': 'train'}
    photos = {f'JPEGImages/{name}.jpg': encoded('.jpg', noise(6, 8, 3)) for name in (*names, '2009_000001')}
    files = {**photos, 'ImageSets/Main/train.txt': b'2008_000002\n2010_006086\n'}
    write_tar(
        folder / 'VOCtrainval_03-May-2010.tar',
        {f'VOCdevkit/VOC2010/{name}': content for name, content in files.items()},
    )
    images = [
        dict(image_id=int(name.replace('_', '')), file_name=f'{name}.jpg', height=6, width=8, phase=phase)
        for name, phase in names.items()
    ]
    regions = [
        dict(image_id=image, category_id=category, segmentation=dict(size=[6, 8], counts=counts))
        for image, category, counts in (
            (2008000002, 360, ALL),
            (2010006086, category, ALL),  # another image's in between
            (2008000002, 284, BLOCK),
            (2008000002, 458, ROW),
            (2008000003, 72, BLOCK),
        )
    ]
    (folder / 'trainval_merged.json').write_text(json.dumps(dict(images=images, annos_segmentation=regions)))
    return folder


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


def read(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_ade20k_is_unpacked_as_it_is(tmp_path):
    root = tmp_path / 'ade'
    prepare(ADE20K, root, write_ade20k(tmp_path / 'archives'), subset=True)
    expected = {name.removeprefix('ADEChallengeData2016/'): content for name, content in ade20k_files().items()}
    found = tree(root)
    record = json.loads(found.pop('.prepared.json'))
    assert found == {name: content for name, content in expected.items() if not name.endswith('/')}
    assert {name: number for name, (number, _) in record['found'].items() if '*' in name} == {
        'images/training/*.jpg': 2,
        'annotations/training/*.png': 2,
        'images/validation/*.jpg': 1,
        'annotations/validation/*.png': 1,
    }


def test_cityscapes_polygons_become_train_ids(tmp_path):
    prepare(CITYSCAPES, tmp_path / 'city', write_cityscapes(tmp_path / 'archives'), subset=True)
    fine = tmp_path / 'city' / 'gtFine'
    for name in ('train/aachen/aachen_000000', 'train/aachen/aachen_000001', 'val/munster/munster_000000'):
        np.testing.assert_array_equal(read(fine / f'{name}_000019_gtFine_labelTrainIds.png'), STREET_LABELS)
    assert (read(fine / 'test/bonn/bonn_000000_000019_gtFine_labelTrainIds.png') == 255).all()


def test_cityscapes_train_ids_are_in_the_order_of_the_classes():
    assert CityscapesDataset.METAINFO['classes'] == tuple(trainId2label[i].name for i in range(19))


def test_without_cityscapesscripts_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cityscapesscripts', None)  # what is not installed
    monkeypatch.delitem(sys.modules, 'cityscapesscripts.preparation.json2labelImg', raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'which cannot be imported .*; pip install cityscapesscripts'):
        prepare(CITYSCAPES, tmp_path / 'city', write_cityscapes(tmp_path / 'archives'), subset=True)
    assert not (tmp_path / 'city').exists()


def test_pascal_context_is_painted_region_over_region(tmp_path):
    root = tmp_path / 'VOC2010'
    prepare(PASCAL_CONTEXT, root, write_pascal_context(tmp_path / 'archives'), subset=True)
    classes = ('background', *PascalContextDataset59.METAINFO['classes'])
    labels = np.full((6, 8), classes.index('sky'))
    labels[1:4, 2:7] = classes.index('person')
    labels[0] = labels[5, 3] = classes.index('wood')
    pngs = root / 'SegmentationClassContext'
    np.testing.assert_array_equal(read(pngs / '2008_000002.png'), labels)
    assert set(np.unique(read(pngs / '2008_000003.png'))) == {0, classes.index('chair')}
    assert (read(pngs / '2010_006086.png') == classes.index('aeroplane')).all()
    assert len(list(pngs.iterdir())) == 3
    lists = root / 'ImageSets' / 'SegmentationContext'
    assert (lists / 'train.txt').read_text() == '2008_000002\n2010_006086\n'
    assert (lists / 'val.txt').read_text() == '2008_000003\n'


def test_the_59_classes_are_numbered_as_mmsegmentation_numbers_them():
    # Their converter imports an API that has to be compiled, so only its table is read.
    source = Path(mmseg.__file__).parent / '.mim/tools/dataset_converters/pascal_context.py'
    table = source.read_text().split('np.array([')[1].split('])')[0]
    assert sorted(int(number) for number in table.split(',')) == [0, *PASCAL_CONTEXT_IDS]
    assert len(PascalContextDataset59.METAINFO['classes']) == 59


def test_run_lengths_are_decoded():
    block = np.zeros((6, 8), bool)
    block[1:4, 2:7] = True
    np.testing.assert_array_equal(decode_rle(BLOCK, 6, 8), block)
    row = np.zeros((6, 8), bool)
    row[0] = row[5, 3] = True
    np.testing.assert_array_equal(decode_rle(ROW, 6, 8), row)
    assert decode_rle(ALL, 6, 8).all()
    # pycocotools again: a disc, whose runs grow and shrink, and runs of more than 15 bits
    y, x = np.mgrid[:48, :64]
    disc = 'Qd07V16K4L4M2N2N2N2O0O2O0O2O000O2O000000000001N10001N101N101N2N2N2N3L4L5Jbg0'
    np.testing.assert_array_equal(decode_rle(disc, 48, 64), (y - 20) ** 2 + (x - 30) ** 2 < 300)
    large = np.zeros((400, 500), bool)
    large[:, 100:] = True
    large[5, 300] = False
    np.testing.assert_array_equal(decode_rle('PRW1UT^21E', 400, 500), large)
    with pytest.raises(ValueError, match='a mask has 48 pixels, its image 6x9'):
        decode_rle(BLOCK, 6, 9)


@pytest.mark.parametrize('name', OFFICIAL)
def test_a_second_call_does_nothing_even_without_the_archives(name, tmp_path, capsys):
    archives = globals()[f'write_{name}'](tmp_path / 'archives')
    prepare(OFFICIAL[name], tmp_path / 'data', archives, subset=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'data').rglob('*')}
    capsys.readouterr()
    prepare(OFFICIAL[name], tmp_path / 'data', archives, subset=True)
    shutil.rmtree(archives)
    prepare(OFFICIAL[name], tmp_path / 'data', archives, subset=True)
    said = capsys.readouterr().out
    assert said.count('\n') == 2
    assert f'{tmp_path / "data"}: {OFFICIAL[name].title} is prepared already; python tools/' in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'data').rglob('*')} == before


@pytest.mark.parametrize(
    'name, lost, cut',
    [
        ('ade20k', 'images/training/ADE_train_00000000.jpg', 'annotations/training/ADE_train_00000001.png'),
        (
            'cityscapes',
            'gtFine/val/munster/munster_000000_000019_gtFine_labelTrainIds.png',
            'leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png',
        ),
        (
            'cityscapes',
            'leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png',
            'gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png',
        ),
        ('pascal_context', 'SegmentationClassContext/2008_000002.png', 'JPEGImages/2010_006086.jpg'),
        ('pascal_context', 'JPEGImages/2009_000001.jpg', 'SegmentationClassContext/2010_006086.png'),
    ],
)
def test_what_is_lost_or_cut_off_is_restored_and_the_rest_stays(name, lost, cut, tmp_path):
    archives = globals()[f'write_{name}'](tmp_path / 'archives')
    root = tmp_path / 'data'
    prepare(OFFICIAL[name], root, archives, subset=True)
    expected = tree(root)
    times = {path: path.stat().st_mtime_ns for path in root.rglob('*') if path.suffix in ('.jpg', '.png')}
    (root / lost).unlink()
    (root / cut).write_bytes(expected[cut][:-1])
    for archive in archives.iterdir():
        os.utime(archive)  # downloaded again
    prepare(OFFICIAL[name], root, archives, subset=True)
    found = tree(root)
    assert found.pop('.prepared.json') != expected.pop('.prepared.json')
    assert found == expected
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {root / lost, root / cut}


@pytest.mark.parametrize('size', [0, -1])
@pytest.mark.parametrize(
    'name, cut',
    [
        ('ade20k', 'annotations/training/ADE_train_00000001.png'),
        ('cityscapes', 'gtFine/train/aachen/aachen_000001_000019_gtFine_labelTrainIds.png'),
        ('pascal_context', 'SegmentationClassContext/2010_006086.png'),
        ('pascal_context', 'ImageSets/SegmentationContext/val.txt'),
    ],
)
def test_a_file_cut_off_after_success_is_noticed_and_restored(name, cut, size, tmp_path, capsys):
    archives = globals()[f'write_{name}'](tmp_path / 'archives')
    root = tmp_path / 'data'
    prepare(OFFICIAL[name], root, archives, subset=True)
    expected = tree(root)
    (root / cut).write_bytes(expected[cut][:size])
    capsys.readouterr()
    prepare(OFFICIAL[name], root, archives, subset=True)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f'{root}: {Path(cut).parts[0]}/') and said.endswith(
        ' changed since it was prepared; looking at all of it'
    )
    assert tree(root) == expected


@pytest.mark.parametrize('change', [b'', b'{"images/training/*.jpg": 2}', b'{"subset": tr'])
def test_without_a_whole_note_everything_is_looked_at(change, tmp_path):
    archives = write_ade20k(tmp_path / 'archives')
    prepare(ADE20K, tmp_path / 'ade', archives, subset=True)
    expected = tree(tmp_path / 'ade')
    (tmp_path / 'ade' / '.prepared.json').write_bytes(change)
    prepare(ADE20K, tmp_path / 'ade', archives, subset=True)
    assert tree(tmp_path / 'ade') == expected


@pytest.mark.parametrize('lost', [(), ('.prepared.json', '.labels_from.json')])
@pytest.mark.parametrize(
    'name, other',
    [
        ('cityscapes', dict(street=dict(STREET, objects=STREET['objects'][1:]))),
        ('pascal_context', dict(category=9)),
    ],
)
def test_labels_made_from_other_archives_are_made_anew(name, other, lost, tmp_path, capsys):
    write, root = globals()[f'write_{name}'], tmp_path / 'data'
    old, new = write(tmp_path / 'old'), write(tmp_path / 'new', **other)
    prepare(OFFICIAL[name], tmp_path / 'expected', new, subset=True)
    prepare(OFFICIAL[name], root, old, subset=True)
    assert tree(root) != tree(tmp_path / 'expected')
    for note in lost:
        (root / note).unlink()
    capsys.readouterr()
    prepare(OFFICIAL[name], root, new, subset=True)
    assert tree(root) == tree(tmp_path / 'expected')
    labels = 4 if name == 'cityscapes' else 3
    assert f'{labels} labels were not made from these archives; they are made anew\n' in capsys.readouterr().out


def test_a_label_that_the_new_archives_do_not_have_goes(tmp_path):
    archives = write_pascal_context(tmp_path / 'archives')
    foreign = tmp_path / 'VOC2010' / 'SegmentationClassContext' / '2009_000001.png'
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(encoded('.png', noise(6, 8)))
    prepare(PASCAL_CONTEXT, tmp_path / 'VOC2010', archives, subset=True)
    assert not foreign.exists()


def test_a_conversion_that_stopped_keeps_what_it_made_and_not_what_was_there_before(tmp_path):
    old, new = write_pascal_context(tmp_path / 'old'), write_pascal_context(tmp_path / 'new', category=9)
    root = tmp_path / 'VOC2010'
    prepare(PASCAL_CONTEXT, root, old, subset=True)
    obstacle = root / 'SegmentationClassContext' / '2008_000003.png.part'
    obstacle.mkdir()
    with pytest.raises(OSError, match='2008_000003'):
        prepare(PASCAL_CONTEXT, root, new, subset=True)
    obstacle.rmdir()
    made = root / 'SegmentationClassContext' / '2010_006086.png'
    time = made.stat().st_mtime_ns
    prepare(PASCAL_CONTEXT, root, new, subset=True)
    assert made.stat().st_mtime_ns == time
    prepare(PASCAL_CONTEXT, tmp_path / 'expected', new, subset=True)
    assert tree(root) == tree(tmp_path / 'expected')


@pytest.mark.parametrize('write', [write_zip, write_tar])
def test_a_file_of_the_right_size_with_other_bytes_is_restored(write, tmp_path):
    archive = tmp_path / f'a.{write.__name__[-3:]}'
    write(archive, {'top/a.txt': b'right', 'top/b.txt': b'b'})
    unpack(archive, tmp_path / 'out', 'top/')
    (tmp_path / 'out' / 'a.txt').write_bytes(b'wrong')
    before = (tmp_path / 'out' / 'b.txt').stat().st_mtime_ns
    unpack(archive, tmp_path / 'out', 'top/')
    assert tree(tmp_path / 'out') == {'a.txt': b'right', 'b.txt': b'b'}
    assert (tmp_path / 'out' / 'b.txt').stat().st_mtime_ns == before


@pytest.mark.parametrize('prefix', ['', 'top/', 'top/sub/'])
@pytest.mark.parametrize(
    'name', ['../out.txt', '{}/out.txt', 'a/../../out.txt', '..\\out.txt', 'C:\\out.txt', '\\out.txt', '.']
)
@pytest.mark.parametrize('write', [write_zip, write_tar])
def test_names_that_lead_elsewhere_are_refused_before_anything_is_written(name, prefix, write, tmp_path):
    archive = tmp_path / f'a.{write.__name__[-3:]}'
    write(archive, {'fine.txt': b'x', 'top/sub/fine.txt': b'x', prefix + name.format(tmp_path): b'x'})
    with pytest.raises(ValueError, match=r"a\.(zip|tar): '.*' is a name that leads out of its folder"):
        unpack(archive, tmp_path / 'deep' / 'root', prefix)
    assert list(tmp_path.rglob('*')) == [archive]


def test_a_name_that_is_absolute_once_the_prefix_is_gone_is_refused(tmp_path):
    (tmp_path / 'archives').mkdir()
    absolute = f'ADEChallengeData2016/{tmp_path}/out.txt'
    write_zip(tmp_path / 'archives' / 'ADEChallengeData2016.zip', {**ade20k_files(), absolute: b'x'})
    with pytest.raises(ValueError, match=r"out\.txt' is a name that leads out of its folder"):
        prepare(ADE20K, tmp_path / 'ade', tmp_path / 'archives', subset=True)
    assert not (tmp_path / 'out.txt').exists()


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo('link')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr(link, '/etc')
    info = tarfile.TarInfo('link')
    info.type, info.linkname = tarfile.SYMTYPE, '/etc'
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        archive.addfile(info)
    for suffix in ('zip', 'tar'):
        with pytest.raises(ValueError, match="'link' is a link or a device"):
            unpack(tmp_path / f'a.{suffix}', tmp_path / 'root')
    assert not (tmp_path / 'root').exists()


def test_a_wrong_byte_in_a_zip_is_noticed_and_leaves_no_file(tmp_path):
    content = noise(5000).tobytes()
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('a.bin', content)
    whole = (tmp_path / 'a.zip').read_bytes()
    place = whole.index(content) + 2500
    (tmp_path / 'a.zip').write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        ValueError, match=r"a\.zip: damaged or not whole \(Bad CRC-32 for file 'a\.bin'; it has \d+ byt"
    ):
        unpack(tmp_path / 'a.zip', tmp_path / 'root')
    assert tree(tmp_path / 'root') == {}


@pytest.mark.parametrize('write', [write_zip, write_tar])
def test_an_archive_that_ends_early_is_noticed(write, tmp_path):
    archive = tmp_path / f'a.{write.__name__[-3:]}'
    write(archive, {f'{i}.bin': noise(5000).tobytes() for i in range(9)})
    archive.write_bytes(archive.read_bytes()[:-9000] if write is write_zip else archive.read_bytes()[:27000])
    with pytest.raises(
        ValueError, match=rf'{archive.name}: damaged or not whole \(.*; it has {archive.stat().st_size} '
    ):
        unpack(archive, tmp_path / 'root')


def test_an_archive_too_large_for_the_disk_is_not_begun(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
        archive.writestr('small.txt', 'x')
        archive.writestr('large.txt', 'x')
        archive.infolist()[1].file_size = 2**60  # goes into the directory at the end
    with pytest.raises(OSError, match=r'root: a\.zip needs 1\.2 EB, the disk has .* free; .* --data-root DIR'):
        unpack(tmp_path / 'a.zip', tmp_path / 'root')
    assert tree(tmp_path / 'root') == {}


def test_only_the_published_archive_is_taken_unless_told_otherwise(tmp_path):
    with pytest.raises(ValueError, match=r'2016\.zip: its SHA-1 is .*, that of the published file 219e1696.*--subset'):
        prepare(ADE20K, tmp_path / 'ade', write_ade20k(tmp_path / 'archives'))
    assert not (tmp_path / 'ade').exists()


def test_as_many_files_as_published_are_asked_for(tmp_path, capsys):
    archives = write_cityscapes(tmp_path / 'archives')  # its archives' hashes are not published
    with pytest.raises(ValueError, match='city: 6 of these counts are not the published ones'):
        prepare(CITYSCAPES, tmp_path / 'city', archives)
    assert '     2 leftImg8bit/train/*/*_leftImg8bit.png (published: 2975)\n' in capsys.readouterr().out
    with pytest.raises(ValueError, match='6 of these'):  # nor is it taken for prepared
        prepare(CITYSCAPES, tmp_path / 'city', archives)


def test_archives_of_something_else_are_refused(tmp_path):
    write_zip(tmp_path / 'ADEChallengeData2016.zip', {'other/a.jpg': b'x'})
    with pytest.raises(ValueError, match=r'the archives held nothing of images/training/\*\.jpg'):
        prepare(ADE20K, tmp_path / 'ade', tmp_path, subset=True)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda d: d['annos_segmentation'][0].update(category_id=3), '2008_000002.jpg: category 3 is none of the 59'),
        (lambda d: d['images'][0].update(width=9), '2008_000002.jpg: a mask has 48 pixels, its image 6x9'),
        (lambda d: d.pop('images'), r"no annotations of Pascal in Detail \(KeyError\('images'\)\)"),
        (lambda d: d['images'][0].update(file_name='2008_9.jpg'), r'JPEGImages/2008_9\.jpg is not there, but'),
    ],
)
def test_annotations_that_do_not_fit_are_an_error(change, message, tmp_path):
    archives = write_pascal_context(tmp_path / 'archives')
    annotations = json.loads((archives / 'trainval_merged.json').read_text())
    change(annotations)
    (archives / 'trainval_merged.json').write_text(json.dumps(annotations))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(PASCAL_CONTEXT, tmp_path / 'VOC2010', archives, subset=True)
    assert not (tmp_path / 'VOC2010' / '.prepared.json').exists()


def test_it_ends_with_the_check_of_every_file(tmp_path):
    (tmp_path / 'archives').mkdir()
    files = ade20k_files()
    wrong = 'ADEChallengeData2016/annotations/training/ADE_train_00000001.png'
    files[wrong] = encoded('.png', np.full((6, 8), 151, np.uint8))
    write_zip(tmp_path / 'archives' / 'ADEChallengeData2016.zip', files)
    for _ in range(2):  # nor is it taken for prepared
        with pytest.raises(
            ValueError, match=r'1 errors in its files:\n(.*\n)*.*ADE_train_00000001\.png: value 151 in 100'
        ):
            prepare(ADE20K, tmp_path / 'ade', tmp_path / 'archives', subset=True)


def test_what_was_taken_as_it_is_is_not_what_was_published(tmp_path, capsys):
    archives = write_cityscapes(tmp_path / 'archives')
    counts = {pattern: 2 if '/train/' in pattern else 1 for pattern in CITYSCAPES.counts}
    dataset = replace(CITYSCAPES, counts=counts)
    said = []
    for subset in (True, False, True, False):
        prepare(dataset, tmp_path / 'city', archives, subset=subset)
        said.append('is prepared already' in capsys.readouterr().out)
    assert said == [False, False, True, True]


def test_the_command_it_names_can_be_copied(tmp_path, capsys):
    prepare(ADE20K, tmp_path / 'my data', write_ade20k(tmp_path / 'archives'), subset=True)
    command = capsys.readouterr().out.split('is prepared; ')[1].split(' shows how often')[0]
    config = 'configs/deeplabv3_resnest50_ade20k.py'
    assert shlex.split(command) == ['python', 'tools/check_dataset.py', config, '--data-root', f'{tmp_path}/my data']


@pytest.mark.parametrize('name', OFFICIAL)
def test_the_data_goes_where_the_configs_look_for_it(name):
    cfg = Config.fromfile(ROOT / 'configs' / OFFICIAL[name].config)
    assert str(OFFICIAL[name].root) == cfg.train_dataloader.dataset.data_root
