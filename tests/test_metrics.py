"""The metric's figures a class, counted by hand and held against mmsegmentation's."""

import contextlib
import math

import cv2
import mmseg.evaluation
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import DefaultSampler

from mmseg_resnest.metrics import IoUMetric, joint_counts

CLASSES = ('road', 'car', 'sky', 'boat')
# The last pixel of the second image is not labelled; no pixel is, or is taken for, a boat.
LABELS = torch.tensor([[[0, 0, 0], [1, 1, 2]], [[0, 1, 1], [2, 2, 255]]])
PREDICTIONS = torch.tensor([[[0, 0, 1], [1, 1, 1]], [[0, 1, 0], [2, 2, 1]]])
# class -> (pixels labelled and predicted so, labelled, predicted), counted by eye
AREAS = {'road': (3, 4, 4), 'car': (3, 4, 5), 'sky': (2, 3, 2)}


def evaluated(metric_class, **options):
    metric = metric_class(**{'iou_metrics': ['mIoU'], **options})
    metric.dataset_meta = dict(classes=CLASSES)
    for label, prediction in zip(LABELS, PREDICTIONS, strict=True):
        metric.process({}, [dict(gt_sem_seg=dict(data=label[None]), pred_sem_seg=dict(data=prediction[None]))])
    return metric, metric.evaluate(len(LABELS))


def test_figures_of_each_class():
    metric, _ = evaluated(IoUMetric)
    assert list(metric.per_class) == list(CLASSES)
    for name, (both, labelled, predicted) in AREAS.items():
        assert metric.per_class[name] == pytest.approx(
            dict(IoU=100 * both / (labelled + predicted - both), Acc=100 * both / labelled), rel=1e-6
        )
    assert metric.per_class['road']['IoU'] == pytest.approx(60)
    assert all(math.isnan(value) for value in metric.per_class['boat'].values())
    assert {type(value) for figures in metric.per_class.values() for value in figures.values()} == {float}


@pytest.mark.parametrize('labels', [torch.int8, torch.int64])
@pytest.mark.parametrize('predictions', [torch.int8, torch.uint8, torch.bool])
def test_narrow_numbers_are_counted_as_wide_ones(labels, predictions):
    label, prediction = torch.tensor([[[0, 1, 0, 1, -1]]]), torch.tensor([[[0, 1, 1, 0, 1]]])
    metric = IoUMetric(ignore_index=-1)
    metric.dataset_meta = dict(classes=CLASSES[:2])
    sample = dict(gt_sem_seg=dict(data=label.to(labels)), pred_sem_seg=dict(data=prediction.to(predictions)))
    metric.process({}, [sample])
    assert metric.evaluate(1)['aAcc'] == 50
    assert metric.confusion.tolist() == [[1, 1], [1, 1]]


def test_other_figures():
    metric, _ = evaluated(IoUMetric, iou_metrics=['mDice', 'mFscore'])
    both, labelled, predicted = AREAS['car']
    dice = 200 * both / (labelled + predicted)
    assert metric.per_class['car'] == pytest.approx(
        dict(Dice=dice, Acc=75, Fscore=dice, Precision=100 * both / predicted, Recall=75), rel=1e-6
    )


def test_nan_can_be_counted_as_a_number():
    metric, _ = evaluated(IoUMetric, nan_to_num=-1)
    assert metric.per_class['boat'] == dict(IoU=-100, Acc=-100)


@pytest.mark.parametrize('iou_metrics', [['mIoU'], ['mIoU', 'mDice', 'mFscore']])
def test_equals_mmsegmentations(iou_metrics):
    metric, figures = evaluated(IoUMetric, iou_metrics=iou_metrics)
    _, expected = evaluated(mmseg.evaluation.IoUMetric, iou_metrics=iou_metrics)
    assert figures == expected
    assert figures['aAcc'] == round(100 * 8 / 11, 2)
    # The means are those of the classes that occur.
    for name, value in figures.items():
        if name != 'aAcc':
            present = [metric.per_class[c][name.removeprefix('m')] for c in AREAS]
            assert value == pytest.approx(sum(present) / len(present), abs=0.005), name


@pytest.mark.parametrize('ignored', [65535, 256, 254, 3, 0, -1, -100, None])
@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.uint16, torch.uint8])
def test_uncommon_labels(dtype, ignored):
    """Of every dtype that has the ignored label."""
    if ignored is not None and not torch.iinfo(dtype).min <= ignored <= torch.iinfo(dtype).max:
        return
    generator = torch.Generator().manual_seed(0)
    label, prediction = torch.randint(4, (2, 30, 40), generator=generator)
    if ignored is not None:
        label[:7] = ignored
    found = []
    for kind in (IoUMetric, mmseg.evaluation.IoUMetric):
        metric = kind(iou_metrics=['mIoU', 'mFscore'], ignore_index=ignored)
        metric.dataset_meta = dict(classes=CLASSES)
        sample = dict(gt_sem_seg=dict(data=label.to(dtype)[None]), pred_sem_seg=dict(data=prediction[None]))
        metric.process({}, [sample])
        found.append(metric.evaluate(1))
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    assert 20 < found[0]['aAcc'] < 30


@pytest.mark.parametrize('ignored', [65535, 256, None])
def test_uncommon_labels_out_of_range_are_refused(ignored):
    label = torch.tensor([[0, 1, 70000, 256 if ignored == 65535 else 257]])
    with pytest.raises(ValueError, match=r'values 25[67], 70000 at 2 pixels; expected 0-3'):
        process(label, torch.tensor([[0, 1, 2, 3]]), ignore_index=ignored)


# -------------------------------------------------------------------------------------------- what cannot be counted


def process(label, prediction, classes=CLASSES, **options):
    metric = IoUMetric(iou_metrics=['mIoU'], **options)
    metric.dataset_meta = dict(classes=classes)
    sample = dict(
        img_path='images/a.jpg',
        seg_map_path='annotations/a.png',
        gt_sem_seg=dict(data=torch.as_tensor(label)[None]),
        pred_sem_seg=dict(data=torch.as_tensor(prediction)[None]),
    )
    metric.process({}, [sample])
    return metric


def test_labels_out_of_range_are_refused():
    """Two classes, half of the labels 199, all the others right: mmsegmentation reports aAcc 100, mIoU 50."""
    label = torch.tensor([[0, 1, 199, 199]])
    with pytest.raises(ValueError) as error:
        process(label, label % 199, classes=('road', 'car'))
    assert str(error.value) == (
        'annotations/a.png: the label has values 199 at 2 pixels; expected 0-1 or 255 (ignored). '
        'Repair the label, or set the classes or reduce_zero_label'
    )
    process(label, label % 199, classes=('road', 'car'), ignore_index=199)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_labels_of_each_dtype(dtype):
    label = torch.tensor([[0, 3, 255, 255]], dtype=dtype)
    assert process(label, torch.tensor([[0, 3, 1, 2]])).evaluate(1)['mIoU'] == 100
    with pytest.raises(ValueError, match='values 4, 254 at 2 pixels'):
        process(torch.tensor([[0, 4, 254, 255]], dtype=dtype), torch.tensor([[0, 3, 1, 2]]))


@pytest.mark.parametrize(('ignored', 'label'), [(-100, 156), (300, 44)])
def test_a_label_that_the_ignored_one_wraps_to_is_refused(ignored, label):
    labels = torch.tensor([[0, 1, 2, label]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf'values {label} at 1 pixel'):
        process(labels, torch.tensor([[0, 1, 2, 3]]), ignore_index=ignored)


def test_a_label_of_another_size_is_refused():
    with pytest.raises(ValueError) as error:
        process(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64))
    assert str(error.value).startswith(
        'annotations/a.png: the label is (3, 4), the prediction for images/a.jpg (4, 3) (height, width); expected the'
    )


def test_predictions_of_other_classes_are_refused():
    with pytest.raises(
        ValueError, match=r'images/a\.jpg: the prediction has values 17 at 1 pixels; expected 0-3: the mo'
    ):
        process(torch.tensor([[0, 1]]), torch.tensor([[0, 17]]))


def test_predictions_from_logits_that_are_not_finite_are_refused():
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=CLASSES)
    sample = dict(gt_sem_seg=dict(data=LABELS[:1]), pred_sem_seg=dict(data=PREDICTIONS[:1]), img_path='a.jpg')
    metric.process({}, [sample | dict(finite=torch.tensor(True))])
    with pytest.raises(ValueError, match=r'^a\.jpg: the logits are not finite'):
        metric.process({}, [sample | dict(finite=torch.tensor(False))])


def test_a_data_set_without_classes_is_refused():
    with pytest.raises(ValueError, match=r'IoUMetric: the data set names no classes; expected metainfo=dict\(classes='):
        process(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), classes=None)


def test_without_labels_only_the_prediction_is_checked(tmp_path):
    metric = process(torch.tensor([[0, 199]]), torch.tensor([[0, 1]]), format_only=True, output_dir=str(tmp_path))
    assert (tmp_path / 'a.png').is_file()
    assert metric.results == []


@pytest.mark.parametrize(('classes', 'reduced', 'label'), [(256, False, 255), (256, True, 255), (300, False, 299)])
def test_predictions_are_written_as_the_numbers_that_they_are(classes, reduced, label, tmp_path):
    metric = IoUMetric(format_only=True, output_dir=str(tmp_path))
    metric.dataset_meta = dict(classes=tuple(map(str, range(classes))))
    data = torch.tensor([[[0, 1, label]]])  # a row of pixels is no column
    sample = dict(img_path='x/a.jpg', pred_sem_seg=dict(data=data), reduce_zero_label=reduced)
    metric.process({}, [sample])
    metric.process({}, [sample])
    assert cv2.imread(str(tmp_path / 'a.png'), cv2.IMREAD_UNCHANGED).tolist() == (data[0] + reduced).tolist()
    with pytest.raises(ValueError, match=r'y/a\.png and x/a\.jpg would both become .*/a\.png; expected images of'):
        metric.process({}, [sample | dict(img_path='y/a.png')])


def test_a_second_evaluation_replaces_the_first():
    metric, _ = evaluated(IoUMetric)
    metric.process({}, [dict(gt_sem_seg=dict(data=LABELS[:1]), pred_sem_seg=dict(data=LABELS[:1]))])
    metric.evaluate(1)
    assert metric.per_class['road'] == dict(IoU=100, Acc=100)
    assert metric.per_class['sky'] == dict(IoU=100, Acc=100)


# ------------------------------------------------------------------------------------------------ the same number


def test_the_matrix():
    metric, _ = evaluated(IoUMetric)
    assert metric.confusion.dtype == torch.int64
    assert metric.confusion.tolist() == [[3, 1, 0, 0], [1, 3, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]


def test_counts_above_two_to_the_24th():
    """float32 would round the union of the road, 2**24 + 4096 pixels, so that the one car in it is lost."""
    label = torch.zeros(4097, 4096, dtype=torch.uint8)
    label[0, 0] = 1
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=('road', 'car'))
    metric.process({}, [dict(gt_sem_seg=dict(data=label[None]), pred_sem_seg=dict(data=torch.zeros_like(label)[None]))])
    metric.evaluate(1)
    assert metric.confusion.tolist() == [[4097 * 4096 - 1, 0], [1, 0]]
    assert metric.per_class['road']['Acc'] == 100
    assert metric.per_class['road']['IoU'] < 100


@pytest.mark.parametrize('count', [0, 3])
def test_another_number_of_images_is_refused(count):
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=CLASSES)
    for label in PREDICTIONS:
        metric.process({}, [dict(gt_sem_seg=dict(data=label[None]), pred_sem_seg=dict(data=label[None]))])
    with pytest.raises(ValueError, match=f'IoUMetric: 2 images were evaluated; expected the {count} of the data set'):
        metric.evaluate(count)


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(2, 260),
    dtypes=st.tuples(*[st.sampled_from([torch.uint8, torch.int64])] * 2),
    seed=st.integers(0, 1000),
)
def test_joint_counts(classes, dtypes, seed):
    generator = torch.Generator().manual_seed(seed)
    label, prediction = (
        torch.randint(0, min(classes, 256) if dtype == torch.uint8 else classes, (7, 9), generator=generator).to(dtype)
        for dtype in dtypes
    )
    if dtypes[0] == torch.int64:
        label[0, :3] = torch.tensor([-1, 9999, 1 << 40])
    counts = joint_counts(label, prediction, 300)
    expected = torch.zeros(300, 300, dtype=torch.int64)
    for i, j in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        expected[i if 0 <= i < 300 else 299, j] += 1
    assert torch.equal(counts, expected)


def test_a_gpus_images_are_checked_together(monkeypatch):
    """As on a GPU, where values are looked at every few images and at the end: the message names the right one."""
    monkeypatch.setattr(IoUMetric, '_looks_at_once', lambda self, table: False)
    monkeypatch.setattr('mmseg_resnest.metrics.CHECKED_TOGETHER', 8)
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=CLASSES)

    def process(name, value):
        label = torch.full((1, 2, 2), value)
        sample = dict(seg_map_path=name, gt_sem_seg=dict(data=label), pred_sem_seg=dict(data=torch.zeros_like(label)))
        metric.process({}, [sample])

    process('a.png', 0)
    process('b.png', 17)
    process('c.png', 1)
    with pytest.raises(ValueError, match=r'b\.png: the label has values 17 at 4 pixels'):
        metric.evaluate(3)
    metric._reset()
    with pytest.raises(ValueError, match=r'2\.png: the label has values 9 at 4 pixels'):
        for i in range(8):
            process(f'{i}.png', 9 if i == 2 else 0)


def _rank(rank, world_size, count, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world_size)
    images = torch.arange(count)
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=('a', 'b'))
    for i in DefaultSampler(images, shuffle=False):
        label = torch.zeros(1, 1, 2 ** int(i), dtype=torch.uint8)  # each image's size is its own bit
        metric.process({}, [dict(gt_sem_seg=dict(data=label), pred_sem_seg=dict(data=label))])
    metric.evaluate(count)
    torch.save(metric.confusion, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(('world_size', 'count'), [(2, 4), (2, 5), (3, 7), (4, 9), (3, 1)])
def test_default_sampler_counts_each_image_once(world_size, count, tmp_path):
    mp.spawn(_rank, (world_size, count, str(tmp_path)), nprocs=world_size)
    for rank in range(world_size):
        assert torch.load(tmp_path / f'{rank}.pth').tolist() == [[2**count - 1, 0], [0, 0]]


def _writing_rank(rank, world_size, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world_size)
    label = dict(data=torch.zeros(1, 2, 2, dtype=torch.uint8))
    for images, message in (
        (('x/a.png', 'x/b.png', 'x/a.png'), None),  # the third is the first again, as DefaultSampler has it
        (('x/a.png', 'y/a.png'), r'^y/a\.png and x/a\.png would both become .*/a\.png; expected images of different'),
    ):
        metric = IoUMetric(format_only=True, output_dir=folder)
        metric.dataset_meta = dict(classes=('a', 'b'))
        metric.process({}, [dict(img_path=image, pred_sem_seg=label) for image in images[rank::world_size]])
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            metric.evaluate(2)
    dist.destroy_process_group()


@pytest.mark.slow
def test_images_of_one_name_on_two_processes_are_refused(tmp_path):
    """By both."""
    mp.spawn(_writing_rank, (2, str(tmp_path)), nprocs=2)


@pytest.mark.slow
def test_equals_cityscapesscripts(tmp_path, monkeypatch):
    """Its own evaluation, run on a generated set in Cityscapes' layout: labelIds in, each class's IoU out."""
    monkeypatch.setenv('CITYSCAPES_DATASET', str(tmp_path))
    monkeypatch.setattr(np, 'in1d', np.isin, raising=False)  # which it calls, and NumPy no longer has
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as evaluation
    from cityscapesscripts.helpers.labels import id2label, trainId2label

    random = np.random.default_rng(0)
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=tuple(trainId2label[i].name for i in range(19)))
    truths, predictions = [], []
    to_train = np.array([id2label[i].trainId % 256 for i in range(34)], np.uint8)  # 255: ignored
    to_id = np.array([trainId2label[i].id for i in range(19)], np.uint8)
    for i in range(3):
        label = random.integers(0, 34, (12, 16), np.uint8).repeat(8, 0).repeat(8, 1)
        guess = np.where(random.random(label.shape) < 0.7, to_train[label], random.integers(0, 19, label.shape))
        guess = np.where(guess == 255, 3, guess).astype(np.uint8)
        for folder, suffix, values, paths in (
            ('gtFine', '_gtFine_labelIds', label, truths),
            ('results', '', to_id[guess], predictions),
        ):
            path = tmp_path / folder / 'val' / 'a' / f'a_{i:06}_000019{suffix}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), values)
            paths.append(str(path))
        sample = dict(gt_sem_seg=dict(data=torch.from_numpy(to_train[label])[None]))
        metric.process({}, [sample | dict(pred_sem_seg=dict(data=torch.from_numpy(guess)[None]))])
    figures = metric.evaluate(3)
    args = evaluation.args
    args.evalInstLevelScore, args.quiet, args.JSONOutput = False, True, False
    args.evalPixelAccuracy = True
    result = evaluation.evaluateImgLists(predictions, truths, args)
    assert figures['mIoU'] == round(100 * result['averageScoreClasses'], 2)
    for name, values in metric.per_class.items():
        assert values['IoU'] == pytest.approx(100 * result['classScores'][name], abs=1e-9)
