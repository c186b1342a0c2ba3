"""Draw the results of tools/test.py: predictions.png and classes.png.

python tools/test.py CONFIG CHECKPOINT --json DIR/result.json --out DIR/labels
python tools/report.py CONFIG --json DIR/result.json --labels DIR/labels --out DIR
"""

import argparse
import json
import math
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from mmseg_resnest import cli, report
from mmseg_resnest.datasets import check_folders


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('--json', required=True, type=Path, metavar='FILE', help='figures, from tools/test.py --json')
    parser.add_argument('--labels', required=True, type=Path, metavar='DIR', help='label maps, from its --out')
    parser.add_argument('--out', required=True, type=Path, metavar='DIR', help='the pictures go here')
    parser.add_argument('--scenes', type=int, default=4, metavar='N', help='columns of predictions.png (default: 4)')
    return parser


def build_dataset(cfg: Config) -> BaseDataset:
    """Returns the test data set, without its pipeline."""
    return DATASETS.build(dict(cfg.test_dataloader.dataset, pipeline=[], _scope_=cfg.default_scope))


def read_labels(path: Path, reduce_zero_label: bool) -> np.ndarray:
    """Returns the labels (H, W) of a PNG file, counted from 0; 255 is not labelled."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: there is no such label map; tools/test.py --out writes one an image')
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return labels - np.uint8(reduce_zero_label)  # 0 wraps to 255, as in mmsegmentation


def draw(args: argparse.Namespace) -> None:
    """Draws the scenes, spread over the data set, and the classes."""
    cfg = cli.load_config(args, 'test_dataloader')
    check_folders('test_dataloader', cfg.test_dataloader.dataset)
    dataset = build_dataset(cfg)
    result = json.loads(Path(cli.existing_file(args.json, 'result', 'tools/test.py --json writes it')).read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in np.linspace(0, len(dataset) - 1, min(args.scenes, len(dataset))).astype(int):
        sample = dataset.get_data_info(int(index))
        image = cv2.cvtColor(cv2.imread(sample['img_path']), cv2.COLOR_BGR2RGB)
        truth = read_labels(sample['seg_map_path'], dataset.reduce_zero_label)
        predicted = args.labels / f'{Path(sample["img_path"]).stem}.png'
        scenes.append((image, truth, read_labels(predicted, dataset.reduce_zero_label)))
    classes, palette = dataset.metainfo['classes'], dataset.metainfo['palette']
    report.plot_predictions(scenes, classes, palette, args.out / 'predictions.png')
    iou = {name: math.nan if figures['IoU'] is None else figures['IoU'] for name, figures in result['classes'].items()}
    title = f'{Path(result["config"]).stem}: IoU of each class'
    report.plot_classes(iou, result['mIoU'], palette, args.out / 'classes.png', title)
    print(f'Drew {args.out / "predictions.png"} and {args.out / "classes.png"}')


if __name__ == '__main__':
    cli.run(draw, make_parser())
