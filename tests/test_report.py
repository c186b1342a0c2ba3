"""The pictures of results: the colours of labels, and what tools/report.py draws from tools/test.py's files."""

import json
import math

import cv2
import numpy as np
import pytest
from tiny import CAMVID, CLASSES, run_tool, write_data_set

from mmseg_resnest import report

PALETTE = [[200, 40, 40], [40, 200, 40], [40, 40, 200]]


def colours(path) -> set[tuple[int, ...]]:
    """The RGB colours of a PNG file that cover at least a hundred pixels."""
    found, counts = np.unique(cv2.imread(str(path))[..., ::-1].reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, colour)) for colour, count in zip(found, counts, strict=True) if count >= 100}


def test_colours_of_labels():
    labels = np.array([[0, 1, 2], [2, 255, 3]], np.uint8)
    expected = [[*PALETTE], [PALETTE[2], [0, 0, 0], [0, 0, 0]]]
    assert report.colourise(labels, PALETTE).tolist() == expected


def test_predictions_have_truth_and_prediction_in_the_palettes_colours(tmp_path):
    image = np.full((40, 60, 3), (250, 220, 10), np.uint8)
    truth, prediction = np.zeros((2, 40, 60), np.uint8)
    truth[:, 30:], prediction[:, 30:] = 255, 2
    report.plot_predictions([(image, truth, prediction)] * 2, ('a', 'b', 'c'), PALETTE, tmp_path / 'p.png')
    assert {(250, 220, 10), (0, 0, 0), *map(tuple, PALETTE)} <= colours(tmp_path / 'p.png')


def test_bars_are_as_long_as_the_figures(tmp_path):
    iou = {'a': 80.0, 'b': 40.0, 'c': math.nan}
    report.plot_classes(iou, 60.0, PALETTE, tmp_path / 'c.png', 'title')
    pixels = cv2.imread(str(tmp_path / 'c.png'))[..., ::-1]
    widths = [int((pixels == colour).all(-1).sum(1).max()) for colour in PALETTE]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.03)
    assert widths[2] == 0


def test_the_tool_draws_what_a_test_wrote(tmp_path):
    write_data_set(tmp_path / 'data', validation=3)
    (tmp_path / 'labels').mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / 'labels' / f'{i}.png'), np.full((48, 64), i, np.uint8))
    classes = {f'class {i}': dict(IoU=10.0 * i or None, Acc=1.0) for i in range(CLASSES)}  # 0 does not occur
    content = dict(mIoU=50.0, classes=classes, config='configs/x.py')
    (tmp_path / 'result.json').write_text(json.dumps(content))
    arguments = ['--data-root', 'data', '--json', 'result.json', '--labels', 'labels', '--out', 'pictures']
    done = run_tool('report', CAMVID, *arguments, '--scenes', '3', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The labels of the three scenes: CamVid's sky, building and pole.
    drawn = colours(tmp_path / 'pictures' / 'predictions.png')
    assert {(128, 128, 128), (128, 0, 0), (192, 192, 128)} <= drawn
    assert (tmp_path / 'pictures' / 'classes.png').is_file()
    done = run_tool('report', CAMVID, *arguments[:2], '--json', 'nothing.json', *arguments[4:], cwd=tmp_path)
    assert done.returncode == 2
    assert 'nothing.json: there is no such result' in done.stderr
    (tmp_path / 'labels' / '2.png').unlink()
    done = run_tool('report', CAMVID, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert '2.png: there is no such label map' in done.stderr
