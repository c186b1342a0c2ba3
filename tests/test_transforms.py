"""The pipeline that names a bad sample: each kind of bad file through mmsegmentation's own transforms."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import PhotoMetricDistortion as MmsegPhotoMetricDistortion
from mmseg.datasets.transforms import RandomCrop as MmsegRandomCrop
from mmseg.registry import TRANSFORMS
from PIL import Image
from tiny import CLASSES, SIZE, write_data_set

from mmseg_resnest import transforms
from mmseg_resnest.transforms import CheckedCompose, PhotoMetricDistortion, RandomCrop, label_problem

TRAINING = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(32, 32)),
    dict(type='PackSegInputs'),
]
TEST = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(32, 24), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]


@pytest.mark.parametrize('kind', [np.uint8, np.float32])
def test_photometric_distortion_is_that_of_mmsegmentation(kind):
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8).astype(kind)
    changed = 0
    for seed in range(40):  # each of the 2**5 ways several times
        np.random.seed(seed)
        expected = MmsegPhotoMetricDistortion()(dict(img=image.copy()))['img']
        np.random.seed(seed)
        found = PhotoMetricDistortion()(dict(img=image.copy()))['img']
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
        changed += not np.array_equal(found, image)
    assert changed > 30


@pytest.mark.parametrize('ratio', [0.3, 0.75, 1.0])
@pytest.mark.parametrize('ignore_index', [255, 2, -1, -100, None])
def test_random_crop_is_that_of_mmsegmentation(ratio, ignore_index):
    random = np.random.default_rng(0)
    boxes = set()
    for seed in range(40):
        labels = (
            random.choice([0, 1, 2, 255], (6, 8), p=[0.6, 0.2, 0.1, 0.1]).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        )
        sample = dict(img=random.integers(0, 256, (48, 64, 3), np.uint8), gt_seg_map=labels, seg_fields=['gt_seg_map'])
        crops = []
        for kind in (MmsegRandomCrop, RandomCrop):
            np.random.seed(seed)
            crops.append(kind((24, 80), ratio, ignore_index)(dict(sample)))  # wider than the image
        assert np.array_equal(crops[0]['img'], crops[1]['img'])
        assert np.array_equal(crops[0]['gt_seg_map'], crops[1]['gt_seg_map'])
        boxes.add(crops[0]['img'].tobytes())
    assert len(boxes) == 40


def labels_as(array):
    def write(image, label):
        cv2.imwrite(str(label), array)

    return write


def cut(kind, keep):
    def write(image, label):
        path = dict(image=image, label=label)[kind]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write


def write_garbage(image, label):
    image.write_bytes(np.random.default_rng(0).bytes(1000))


def turn_by_exif(image, label):
    picture = Image.open(image)
    picture.load()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture.save(image, exif=exif)


def write_199(image, label):
    values = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
    values[:2, :3] = 199
    values[5, 5] = CLASSES
    cv2.imwrite(str(label), values)


# What is done to a pair, and what its message says.
BAD = {
    'truncated image': (cut('image', 0.1), r'LoadImageFromFile failed: AssertionError: failed to load image'),
    'garbage image': (
        write_garbage,
        r'\(1000 bytes\), .*LoadImageFromFile failed: AssertionError: failed to load image',
    ),
    'empty image': (cut('image', 0), r'0\.jpg \(0 bytes\), label .*LoadImageFromFile failed: error: .*buf'),
    'missing image': (lambda image, label: image.unlink(), r'image \S+0\.jpg, label .*FileNotFoundError: .*0\.jpg'),
    'empty label': (cut('label', 0), r'0\.png \(0 bytes\): LoadAnnotations failed: UnidentifiedImageError'),
    'truncated label': (cut('label', 0.5), r'LoadAnnotations failed: \w+: .*(truncated|broken)'),
    'label of another size': (
        labels_as(np.zeros((40, 60), np.uint8)),
        r'the label is 60x40, the image 64x48 .*; expected the same size\. Pair the right files',
    ),
    'image turned by EXIF': (turn_by_exif, r'the label is 64x48, the image 48x64 \(width x height, EXIF rotation'),
    'label out of range': (
        write_199,
        r'the label has values 11, 199 at 7 pixels; expected 0-10 or 255 \(ignored\)\. Repair the label',
    ),
    'label in colour': (
        labels_as(np.zeros((*SIZE, 3), np.uint8)),
        r'the label has 3 channels \(shape \(48, 64, 3\)\); expected one',
    ),
}


@pytest.fixture
def data(tmp_path):
    return write_data_set(tmp_path / 'data', training=4, validation=1)


def make_data_set(root, pipeline, **options):
    return BaseSegDataset(
        metainfo=dict(classes=tuple(f'class {i}' for i in range(CLASSES))),
        data_root=str(root),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=pipeline,
        serialize_data=False,  # which would collect garbage for a second
        **options,
    )


def checked(data_set, **options):
    data_set.pipeline = CheckedCompose(data_set.pipeline.transforms, CLASSES, 255, **options)
    return data_set


def pair(root, i=0):
    return root / f'images/training/{i}.jpg', root / f'annotations/training/{i}.png'


@pytest.mark.parametrize('pipeline', [TRAINING, TEST], ids=['training', 'test'])
@pytest.mark.parametrize('kind', BAD)
def test_bad_sample_is_named(data, kind, pipeline):
    data_set = checked(make_data_set(data, pipeline, test_mode=pipeline is TEST), advice=' ADVICE')
    data_set[0]  # all is well
    image, label = pair(data)
    spoil, message = BAD[kind]
    spoil(image, label)
    with pytest.raises(ValueError, match=message) as error:
        data_set[0]
    text = str(error.value)
    assert text.startswith(f'bad sample: image {image}')
    assert str(label) in text
    assert text.endswith(' ADVICE')
    assert '\n' not in text
    data_set[1]


@pytest.mark.parametrize('pipeline', [TRAINING, TEST], ids=['training', 'test'])
def test_good_samples_are_those_of_the_plain_pipeline(data, pipeline):
    plain, ours = make_data_set(data, pipeline), checked(make_data_set(data, pipeline))
    assert type(plain.pipeline) is Compose
    for i in range(4):
        np.random.seed(i)
        expected = plain[i]
        np.random.seed(i)
        found = ours[i]
        assert np.array_equal(found['inputs'], expected['inputs'])
        assert np.array_equal(found['data_samples'].gt_sem_seg.data, expected['data_samples'].gt_sem_seg.data)


def test_any_transform_that_fails_is_named(data):
    pipeline = [*TRAINING[:2], dict(type='RandomRotate', prob=1.0, degree=5), lambda results: results['no such key']]
    with pytest.raises(ValueError, match=r"bad sample: image \S+0\.jpg .*: function failed: KeyError: 'no such key'"):
        checked(make_data_set(data, pipeline))[0]


def test_a_pipeline_without_labels_is_left_alone(data):
    write_199(*pair(data))
    sample = checked(make_data_set(data, [TRAINING[0], TRAINING[3]]))[0]
    assert sample['inputs'].shape == (3, *SIZE)


def test_one_transform_that_loads_and_resizes_both(data):
    """There the label is as large as the image is by then."""
    inner = [TRANSFORMS.build(t) for t in (*TRAINING[:2], dict(type='Resize', scale=(32, 24)))]
    sample = checked(make_data_set(data, [Compose(inner), TRAINING[3]]))[0]
    assert sample['data_samples'].gt_sem_seg.shape == (24, 32)


@pytest.mark.parametrize('skipped', [None, 'skipped.txt'])
@pytest.mark.parametrize(
    'transform',
    [
        dict(type='RandomRotate', prob=1.0, degree=(40, 41), seg_pad_val=200),
        dict(type='Pad', size=(80, 80), pad_val=dict(img=0, seg=200)),
    ],
)
def test_what_a_transform_fills_in_is_judged(data, tmp_path, transform, skipped):
    """No sample is to blame, so none is skipped."""
    data_set = make_data_set(data, [*TRAINING[:2], transform, TRAINING[3]])
    image, _ = pair(data)
    with pytest.raises(
        ValueError, match=rf'^image {image}: after the transforms .* values 200 at \d+ pixels; expected 0-10 or 255'
    ) as error:
        checked(data_set, skipped=skipped and tmp_path / skipped)[0]
    assert '\n' not in str(error.value)
    assert 'seg_pad_val=..., or pad_val=dict(img=0, seg=...) of Pad' in str(error.value)
    assert not (tmp_path / 'skipped.txt').exists()


def test_labels_are_judged_after_reduce_zero_label(data):
    image, label = pair(data)
    labels_as(np.full(SIZE, CLASSES, np.uint8))(image, label)
    data_set = checked(make_data_set(data, TRAINING, reduce_zero_label=True))
    assert (data_set[0]['data_samples'].gt_sem_seg.data == CLASSES - 1).all()
    labels_as(np.full(SIZE, CLASSES + 1, np.uint8))(image, label)
    with pytest.raises(ValueError, match=r'values 11 at 3072 pixels; expected .* after reduce_zero_label \(0 is ign'):
        data_set[0]


@pytest.mark.parametrize(
    ('values', 'classes', 'ignore_index', 'problem'),
    [
        ([0, 10, 255], 11, 255, ''),
        ([0, 10, 254], 11, 254, ''),
        ([0, 10, 255], 11, None, 'values 255 at 1 pixels; expected 0-10.'),
        ([0, 10, 255], 11, 254, 'values 255 at 1 pixels; expected 0-10 or 254 (ignored).'),
        ([0, 11, 200], None, None, ''),
        ([-1, 2, 300], 11, 255, 'values -1, 300 at 2 pixels;'),
        (list(range(20, 50)), 11, 255, 'values 20, 21, 22, 23, 24, 25, 26, 27, ... at 30 pixels;'),
    ],
)
def test_values(values, classes, ignore_index, problem):
    label = np.array([values], np.uint8 if max(values) < 256 and min(values) >= 0 else np.int64)
    found = label_problem(dict(gt_seg_map=label, ori_shape=label.shape), classes, ignore_index)
    assert problem in found
    assert bool(found) == bool(problem)


def test_skipping(data, tmp_path):
    """Another sample comes in the place of a bad one, whose message is kept."""
    write_199(*pair(data, 1))
    skipped = tmp_path / 'skipped.txt'
    data_set = checked(make_data_set(data, TRAINING), skipped=skipped)
    np.random.seed(0)
    files = [data_set[i]['data_samples'].img_path for i in (0, 1, 2, 1)]
    good = [str(pair(data, i)[0]) for i in (0, 2, 3)]
    assert files[0] == good[0]
    assert files[2] == good[1]
    assert {files[1], files[3]} <= set(good)
    lines = skipped.read_text().splitlines()
    assert len(lines) >= 2
    assert len(set(lines)) == 1
    files, found = lines[0].split('\t')
    assert files.startswith(f'image {pair(data, 1)[0]} (')
    assert 'values 11, 199 at 7 pixels' in found


@pytest.mark.parametrize('kind', BAD)
def test_bad_samples_of_each_kind_are_skipped(data, tmp_path, kind):
    """A missing image too; and what is written of one is the same each time."""
    data_set = checked(make_data_set(data, TRAINING), skipped=tmp_path / 'skipped.txt')
    BAD[kind][0](*pair(data, 1))
    files = {data_set[i]['data_samples'].img_path for i in (1, 0, 1)}
    assert files <= {str(pair(data, i)[0]) for i in (0, 2, 3)}
    lines = (tmp_path / 'skipped.txt').read_text().splitlines()
    assert len(lines) >= 2
    assert len(set(lines)) == 1
    assert f'image {pair(data, 1)[0]}' in lines[0]


def test_all_samples_bad_is_an_error(data, tmp_path):
    for i in range(4):
        write_199(*pair(data, i))
    skipped = tmp_path / 'skipped.txt'
    with pytest.raises(ValueError, match=r'100 bad samples in a row, no good one between; the last: image .*values 11'):
        checked(make_data_set(data, TRAINING), skipped=skipped)[0]
    assert len(skipped.read_text().splitlines()) == transforms.MAX_BAD_IN_A_ROW - 1


def test_bad_samples_with_good_ones_between_never_stop(data, tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, 'MAX_BAD_IN_A_ROW', 2)
    write_199(*pair(data, 1))
    data_set = make_data_set(data, TRAINING)
    data_set._rand_another = lambda: 0
    data_set = checked(data_set, skipped=tmp_path / 'skipped.txt')
    for _ in range(5):
        assert data_set[1]['data_samples'].img_path.endswith('0.jpg')


def test_goes_to_another_process(data):
    pipeline = checked(make_data_set(data, TEST)).pipeline
    copy = pickle.loads(pickle.dumps(pipeline))
    assert (copy.classes, copy.ignore_index, len(copy.transforms)) == (CLASSES, 255, 4)


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [3, 1, 200, None])
def test_pack_byte_labels_packs_what_mmsegmentations_does(kind, channels):
    """Also mirrored views, as RandomFlip makes them; a label map of uint8 keeps its dtype."""
    random = np.random.default_rng(0)
    shape = (20, 31) if channels is None else (20, 31, channels)
    results = dict(img=random.integers(0, 256, shape, np.uint8)[:, ::-1], ori_shape=(20, 31), img_path='a.jpg')
    results['gt_seg_map'] = random.integers(0, 200, (20, 31)).astype(kind)[:, ::-1]
    kept = dict(results)
    found, expected = (
        TRANSFORMS.build(dict(type=t))(results) for t in ('mmseg_resnest.PackByteLabels', 'PackSegInputs')
    )
    assert torch.equal(found['inputs'], expected['inputs'])
    assert found['inputs'].is_contiguous()
    ours, theirs = (packed['data_samples'] for packed in (found, expected))
    assert ours.gt_sem_seg.data.dtype == (torch.uint8 if kind is np.uint8 else torch.int64)
    assert torch.equal(ours.gt_sem_seg.data.long(), theirs.gt_sem_seg.data)
    assert ours.metainfo == theirs.metainfo
    assert all(results[key] is value for key, value in kept.items())
    without = TRANSFORMS.build(dict(type='mmseg_resnest.PackByteLabels'))(dict(img=results['img']))
    assert 'gt_sem_seg' not in without['data_samples']


def test_test_time_augmentation_makes_mmsegmentations_images(tmp_path):
    """And its first label; the others' are not there."""
    write_data_set(tmp_path)
    choices = [
        [dict(type='Resize', scale_factor=scale, keep_ratio=True) for scale in (0.5, 1.0, 1.75)],
        [dict(type='RandomFlip', prob=probability, direction='horizontal') for probability in (0.0, 1.0)],
    ]
    load = dict(type='LoadAnnotations')
    theirs = [*choices, [load], [dict(type='PackSegInputs')]]
    ours = [*choices, [dict(type='mmseg_resnest.PackByteLabels')]]
    samples = []
    for steps in (
        [dict(type='TestTimeAug', transforms=theirs)],
        [load, dict(type='mmseg_resnest.ImageTestTimeAug', transforms=ours)],
    ):
        pipeline = [dict(type='LoadImageFromFile'), *steps]
        folders = dict(img_path='images/validation', seg_map_path='annotations/validation')
        metainfo = dict(classes=[str(i) for i in range(CLASSES)])
        options = dict(data_root=str(tmp_path), data_prefix=folders, metainfo=metainfo, img_suffix='.jpg')
        samples.append(BaseSegDataset(**options, seg_map_suffix='.png', pipeline=pipeline)[0])
    expected, found = samples
    assert len(found['inputs']) == len(expected['inputs']) == 6
    for a, b in zip(found['inputs'], expected['inputs'], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found['data_samples'], expected['data_samples'], strict=True):
        assert a.metainfo == b.metainfo
    labels = [sample.get('gt_sem_seg') for sample in found['data_samples']]
    assert torch.equal(labels[0].data.long(), expected['data_samples'][0].gt_sem_seg.data)
    assert labels[1:] == [None] * 5
