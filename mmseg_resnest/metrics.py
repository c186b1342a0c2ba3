"""Evaluation metrics."""

from collections.abc import Sequence

from mmseg.evaluation import IoUMetric as _IoUMetric
from numpy import ndarray

from mmseg_resnest.registry import METRICS
from mmseg_resnest.transforms import expected_labels, listing, out_of_range


@METRICS.register_module()
class IoUMetric(_IoUMetric):
    """mmsegmentation's IoUMetric, which refuses what it cannot count, and keeps each class's figures.

    Attributes:
        per_class: class name -> metric (``'IoU'``, ``'Acc'``) -> its value in percent; nan for a class that occurs
            neither in the labels nor in the predictions.
    """

    per_class: dict[str, dict[str, float]]

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Counts a batch.

        Raises:
            ValueError: A label map has another size than the prediction, or one of both has values that are no class;
                or the data set names no classes.
        """
        if not self.dataset_meta.get('classes'):
            raise ValueError(
                f'{type(self).__name__}: the data set names no classes; expected metainfo=dict(classes=(...)) in '
                'val_dataloader.dataset, and in test_dataloader.dataset'
            )
        for sample in data_samples:
            self._check(sample)
        super().process(data_batch, data_samples)

    def _check(self, sample: dict) -> None:
        """Refuses what mmsegmentation leaves out of the histograms without a word, and counts wrongly."""
        classes = len(self.dataset_meta['classes'])
        image = sample.get('img_path', 'an image without a path')
        prediction = sample['pred_sem_seg']['data'].squeeze()
        if len(wrong := out_of_range(prediction, classes, None)):
            raise ValueError(
                f'{image}: the prediction has values {listing(wrong)}; expected {expected_labels(classes, None)}: '
                'the model has other classes than the data set. Set num_classes, or use the right checkpoint'
            )
        if self.format_only:
            return
        label = sample['gt_sem_seg']['data'].squeeze().to(prediction)
        name = sample.get('seg_map_path', f'the label of {image}')
        if label.shape != prediction.shape:
            raise ValueError(
                f'{name}: the label is {tuple(label.shape)}, the prediction for {image} {tuple(prediction.shape)} '
                '(height, width); expected the same size. Pair the right files, or export the label anew'
            )
        if len(wrong := out_of_range(label, classes, self.ignore_index)):
            raise ValueError(
                f'{name}: the label has values {listing(wrong)}; expected '
                f'{expected_labels(classes, self.ignore_index)}. Repair the label, or set the classes or '
                'reduce_zero_label'
            )

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Returns mIoU, mAcc and aAcc in percent, as plain numbers: MMEngine stores the best one in checkpoints."""
        return {name: round(float(value), 2) for name, value in super().compute_metrics(results).items()}

    def total_area_to_metrics(self, *args, **kwargs) -> dict[str, ndarray]:
        """Returns each metric's values, one a class, as fractions (``aAcc``: one value in all)."""
        metrics = super().total_area_to_metrics(*args, **kwargs)
        self.per_class = {
            name: {metric: float(values[i]) * 100 for metric, values in metrics.items() if metric != 'aAcc'}
            for i, name in enumerate(self.dataset_meta['classes'])
        }
        return metrics
