"""Pictures of results: what was predicted, and how well each class does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy import ndarray

INK = '#2b2b33'


def colourise(labels: ndarray, palette: Sequence[Sequence[int]]) -> ndarray:
    """Returns the RGB picture (H, W, 3), uint8, of labels (H, W); those without a colour are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def plot_predictions(
    scenes: Sequence[tuple[ndarray, ndarray, ndarray]],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    path: Path,
) -> None:
    """Draws a column a scene: image, truth, prediction; and the classes' colours below.

    Args:
        scenes: Images (H, W, 3) RGB uint8, with labels (H, W) uint8 of truth and prediction. Where the truth is not
            labelled the prediction is drawn all the same.
        classes: Names in label order.
        palette: RGB colours in label order.
        path: Where the PNG goes.
    """
    height, width = scenes[0][0].shape[:2]
    figure = Figure(figsize=(2.8 * len(scenes), 3 * 2.8 * height / width + 0.6), layout='constrained', dpi=150)
    axes = figure.subplots(3, len(scenes), squeeze=False)
    for column, (image, truth, prediction) in enumerate(scenes):
        pictures = (image, colourise(truth, palette), colourise(prediction, palette))
        for row, (name, picture) in enumerate(zip(('image', 'truth', 'prediction'), pictures, strict=True)):
            axis = axes[row, column]
            axis.imshow(picture, interpolation='nearest')
            axis.set_xticks([], [])
            axis.set_yticks([], [])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(name, color=INK)
    patches = [Patch(color=np.array(colour) / 255, label=name) for name, colour in zip(classes, palette, strict=True)]
    figure.legend(
        handles=patches, loc='outside lower center', ncols=min(len(classes), 12), frameon=False, fontsize=8,
        labelcolor=INK, handlelength=1, columnspacing=1.2,
    )  # fmt: skip
    figure.savefig(path)


def plot_classes(iou: dict[str, float], miou: float, palette: Sequence[Sequence[int]], path: Path, title: str) -> None:
    """Draws a bar a class, the best on top, and a line at the mean.

    Args:
        iou: Class name, in label order -> IoU in percent.
        miou: Their mean, in percent.
        palette: RGB colours in label order.
        path: Where the PNG goes.
        title: The line above.
    """
    colours = dict(zip(iou, np.array(palette) / 255, strict=True))
    names = sorted(iou, key=lambda name: np.nan_to_num(iou[name]))
    figure = Figure(figsize=(6.5, 0.32 * len(names) + 1.1), layout='constrained', dpi=150)
    axis = figure.subplots()
    axis.axvline(miou, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axis.text(miou, 1.01, f'mIoU {miou:.1f}', transform=axis.get_xaxis_transform(), ha='center', fontsize=8, color=INK)
    axis.barh(names, [np.nan_to_num(iou[name]) for name in names], color=[colours[name] for name in names])
    for row, name in enumerate(names):
        text = 'not there' if np.isnan(iou[name]) else f'{iou[name]:.1f}'
        axis.text(101, row, text, va='center', fontsize=8, color=INK)
    axis.set(xlim=(0, 100), xlabel='IoU, %')
    axis.set_title(title, loc='left', fontsize=10, color=INK, pad=20)
    axis.tick_params(colors=INK, length=0, labelsize=8)
    axis.spines[['top', 'right', 'left']].set_visible(False)
    figure.savefig(path)
