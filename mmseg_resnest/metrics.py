"""Evaluation metrics."""

from mmseg.evaluation import IoUMetric as _IoUMetric
from numpy import ndarray

from mmseg_resnest.registry import METRICS


@METRICS.register_module()
class IoUMetric(_IoUMetric):
    """mmsegmentation's IoUMetric, which also keeps each class's figures after an evaluation.

    Attributes:
        per_class: class name -> metric (``'IoU'``, ``'Acc'``) -> its value in percent; nan for a class that occurs
            neither in the labels nor in the predictions.
    """

    per_class: dict[str, dict[str, float]]

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
