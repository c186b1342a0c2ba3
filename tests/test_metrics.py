"""The metric's figures a class, counted by hand and held against mmsegmentation's."""

import math

import mmseg.evaluation
import pytest
import torch

from mmseg_resnest.metrics import IoUMetric

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


def test_a_data_set_without_classes_is_refused():
    with pytest.raises(ValueError, match=r'IoUMetric: the data set names no classes; expected metainfo=dict\(classes='):
        process(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), classes=None)


def test_without_labels_only_the_prediction_is_checked(tmp_path):
    metric = process(torch.tensor([[0, 199]]), torch.tensor([[0, 1]]), format_only=True, output_dir=str(tmp_path))
    assert (tmp_path / 'a.png').is_file()
    assert metric.results == []


def test_a_second_evaluation_replaces_the_first():
    metric, _ = evaluated(IoUMetric)
    metric.process({}, [dict(gt_sem_seg=dict(data=LABELS[:1]), pred_sem_seg=dict(data=LABELS[:1]))])
    metric.evaluate(1)
    assert metric.per_class['road'] == dict(IoU=100, Acc=100)
    assert metric.per_class['sky'] == dict(IoU=100, Acc=100)
