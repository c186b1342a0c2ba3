"""Predict label maps of an image, a folder, a glob or a video.

  python tools/predict.py CONFIG CHECKPOINT street.jpg labels/
  python tools/predict.py CONFIG CHECKPOINT 'photos/*.jpg' labels/ --overlays overlays/
  python tools/predict.py CONFIG CHECKPOINT photos/ labels/ --labels cityscapes
  python tools/predict.py CONFIG CHECKPOINT drive.mp4 drive_labels.mp4

Writes a PNG file an image: the classes' numbers, or Cityscapes' labelIds, which its servers take.
A video becomes a video with the classes' colours over it. A bad file is reported and left out; the
exit code is then 1.
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy import ndarray
from rich.console import Console
from rich.progress import track

from mmseg_resnest import cli
from mmseg_resnest.dataset_check import PICTURES
from mmseg_resnest.network import DTYPES, Speed, default_speed
from mmseg_resnest.predictor import AHEAD, Predictor

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')
COUNTED = ('.mp4', '.avi', '.mov', '.m4v')  # store their number of frames; OpenCV takes others' from the duration
CODECS = {'.avi': 'MJPG'}  # others are mp4v
OPACITY = 0.5


def make_parser() -> argparse.ArgumentParser:
    """Returns the tool's options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file of tools/train.py')
    parser.add_argument('input', help='an image, a folder, a glob of images in quotes, or a video')
    parser.add_argument('output', type=Path, help='a folder for label maps, or the video to write')
    cli.add_allow_pickle(parser)
    parser.add_argument('--overlays', type=Path, metavar='DIR', help="write images under their classes' colours there")
    parser.add_argument(
        '--labels', choices=('ids', 'cityscapes'), default='ids', help="numbers of the classes, or Cityscapes' labelIds"
    )
    parser.add_argument('--device', help='as cuda:1 or cpu (default: a GPU if there is one)')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='images that run together (default: 8)')
    parser.add_argument('--dtype', choices=DTYPES, help='number format (default: float16 on a GPU, float32 on a CPU)')
    parser.add_argument('--compile', action='store_true', help='compile sizes that repeat, one to two minutes each')
    return parser


def device_of(name: str | None) -> torch.device:
    """Returns the device that a command line names; None: a GPU if there is one. A UsageError if it is not there."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count()
        raise cli.UsageError(
            f'--device {name}: no device of this machine; expected cpu, cuda or cuda:N, of {gpus} GPUs'
        ) from error
    return torch.device(name)


def images_of(source: str) -> list[Path]:
    """Returns the images that a path, a folder or a glob names, sorted.

    Raises:
        UsageError: There are none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob('*') if file.suffix.lower() in PICTURES and not file.is_dir())
        if not found:
            there = ', '.join(sorted(file.name for file in path.iterdir())[:8]) or 'nothing'
            raise cli.UsageError(
                f'{source}: the folder holds no image (found: {there}); expected *{", *".join(PICTURES)}'
            )
    elif path.exists():
        found = [path]
    else:
        found = sorted(file for file in map(Path, glob.glob(source, recursive=True)) if file.is_file())
        if not found:
            raise cli.UsageError(f'{source}: there is no such file; expected an image, a folder, a glob or a video')
    return found


def outputs_of(images: Sequence[Path], source: str, folder: Path) -> list[Path]:
    """Returns where each label map, or overlay, goes: under ``folder`` as the image lies under the input.

    Raises:
        UsageError: ``folder`` is none, two images would have one, it would replace an image or what lies beside its
            image, or the next run would take it for an image.
    """
    if folder.is_file():
        raise cli.UsageError(f'{folder}: a file; expected a folder')
    if folder.suffix.lower() in PICTURES and not folder.exists():
        raise cli.UsageError(f'{folder}: the name of a picture; expected a folder, for a label map an image')
    if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise cli.UsageError(
            f'{folder} lies in {source}, where the next run would take what is written for images; expected a folder '
            'elsewhere, or the images as a glob'
        )
    common = Path(source) if Path(source).is_dir() else Path(os.path.commonpath([image.parent for image in images]))
    outputs = [folder / image.relative_to(common).with_suffix('.png') for image in images]
    if len(set(outputs)) < len(outputs):
        twice = next(output for i, output in enumerate(outputs) if output in outputs[:i])
        same = [str(image) for image, output in zip(images, outputs, strict=True) if output == twice]
        raise cli.UsageError(f'{" and ".join(same)} would both become {twice}; give a glob that takes one of them')
    sources = {image.resolve() for image in images}
    if replaced := [output for output in outputs if output.resolve() in sources]:
        raise cli.UsageError(f'{replaced[0]} is an image of the input, and would be replaced; expected another folder')
    pairs = zip(images, outputs, strict=True)
    if beside := [new for old, new in pairs if new.exists() and new.parent.resolve() == old.parent.resolve()]:
        raise cli.UsageError(
            f'{beside[0]} lies beside its image, may be its ground truth and would be replaced; expected another folder'
        )
    return outputs


def plan(args: argparse.Namespace) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Returns where the label map of each image goes, and where its overlay, if they are wanted.

    Raises:
        UsageError: There is no image, or a file would be lost.
    """
    images = images_of(args.input)
    label_maps = outputs_of(images, args.input, args.output)
    overlays = outputs_of(images, args.input, args.overlays) if args.overlays else []
    taken = {path.resolve() for path in label_maps}
    if both := [path for path in overlays if path.resolve() in taken]:
        raise cli.UsageError(
            f'--overlays {args.overlays}: {both[0]} would be a label map and an overlay; expected another folder'
        )
    return dict(zip(images, label_maps, strict=True)), dict(zip(images, overlays, strict=bool(overlays)))


def ahead(work: Callable, items: Iterable, pool: ThreadPoolExecutor, count: int) -> Iterator[tuple[object, Future]]:
    """Yields items and the futures of their work, of which ``count`` are begun before they are asked for."""
    items = iter(items)
    begun = [(item, pool.submit(work, item)) for item in islice(items, count)]
    while begun:
        yield begun.pop(0)
        begun += [(item, pool.submit(work, item)) for item in islice(items, 1)]


def label_table(labels: str, classes: Sequence[str]) -> ndarray | None:
    """Returns the number to write for each class, (256,) uint8; None if it is the class's own.

    Raises:
        UsageError: The classes are not those of Cityscapes.
    """
    if labels == 'ids':
        return None
    try:
        from cityscapesscripts.helpers.labels import trainId2label
    except ImportError as error:
        raise cli.UsageError('--labels cityscapes needs cityscapesscripts: pip install cityscapesscripts') from error
    names = [trainId2label[i].name for i in range(19)]
    if list(classes) != names:
        raise cli.UsageError(
            f'--labels cityscapes: the model has the classes {", ".join(classes[:4])}, ...; '
            f'expected the 19 of Cityscapes, {", ".join(names[:4])}, ...'
        )
    return np.array([*(trainId2label[i].id for i in range(19)), *[0] * 237], np.uint8)


def overlay(image: ndarray, labels: ndarray, palette: ndarray) -> ndarray:
    """Returns an image (H, W, 3), BGR, under the classes' colours."""
    return cv2.addWeighted(image, 1 - OPACITY, palette[labels][..., ::-1], OPACITY, 0)


def read_image(path: Path) -> ndarray:
    """Returns an image (H, W, 3), BGR; OpenCV crashes on a name that is no UTF-8."""
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)


def write_picture(path: Path, picture: ndarray) -> None:
    """Writes a picture, or raises an OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(path.suffix, picture)
    assert done, path
    path.write_bytes(data)


def predict_images(
    predictor: Predictor, label_maps: dict[Path, Path], overlays: dict[Path, Path], numbers: str
) -> list[str]:
    """Predicts images, decoding, computing and encoding at the same time; returns what was bad."""
    table = label_table(numbers, predictor.classes)
    bad: list[str] = []

    def write(path: Path, labels: ndarray) -> None:
        written = labels if labels.dtype == np.uint8 else labels.astype(np.uint16)  # of more than 256 classes
        write_picture(label_maps[path], written if table is None else table[labels])
        if overlays:
            write_picture(overlays[path], overlay(read_image(path), labels, predictor.palette))

    threads = max(os.cpu_count() or 1, 2)
    size = AHEAD * predictor.batch_size
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        prepared = _good(ahead(predictor.prepare, progress(label_maps), readers, 2 * size), bad)
        writing: list[Future] = []
        while group := list(islice(prepared, size)):
            for done in writing:
                done.result()
            labels = predictor.predict([item for _, item in group])
            writing = [writers.submit(write, path, part) for (path, _), part in zip(group, labels, strict=True)]
        for done in writing:
            done.result()
    return bad


def _good(items: Iterable[tuple[Path, Future]], bad: list[str]) -> Iterator[tuple[Path, dict]]:
    """Yields what was prepared; adds what was bad to a list."""
    for path, future in items:
        try:
            yield path, future.result()
        except ValueError as error:
            bad.append(str(error))


def check_video(args: argparse.Namespace) -> None:
    """Raises a UsageError if the command line of a video cannot be carried out."""
    cli.existing_file(args.input, 'video', 'give the path of one, not a glob')
    for path in (args.input, str(args.output)):
        if path != path.encode(errors='replace').decode():
            raise cli.UsageError(f'{path!r}: a name that is no UTF-8, at which OpenCV crashes; expected another name')
    if args.output.suffix.lower() not in VIDEOS:
        raise cli.UsageError(f'{args.output}: no name of a video; expected a name with one of {", ".join(VIDEOS)}')
    if args.output.resolve() == Path(args.input).resolve():
        raise cli.UsageError(f'{args.output} is the input, and would be replaced; expected another file')
    if args.overlays or args.labels != 'ids':
        option = '--overlays' if args.overlays else '--labels'
        raise cli.UsageError(f'{option}: a video becomes one with the colours over it, no label maps; leave it out')


def predict_video(predictor: Predictor, args: argparse.Namespace) -> list[str]:
    """Writes a video with the classes' colours over it; decoding, computing and encoding overlap."""
    capture = cv2.VideoCapture(args.input)
    is_counted = Path(args.input).suffix.lower() in COUNTED
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if is_counted else 0
    first = capture.read()[1]
    if first is None:
        return [f'{args.input}: no frame can be decoded; expected a video']
    height, width = first.shape[:2]
    codec = cv2.VideoWriter.fourcc(*CODECS.get(args.output.suffix.lower(), 'mp4v'))
    writer = cv2.VideoWriter(str(args.output), codec, capture.get(cv2.CAP_PROP_FPS) or 25, (width, height))
    if not writer.isOpened():
        raise cli.UsageError(f'{args.output}: cannot be written as a video; expected a name as out.mp4 or out.avi')
    count = 0

    def read(_: int) -> tuple[ndarray, dict] | None:
        nonlocal first
        frame = first if first is not None else capture.read()[1]
        first = None
        return None if frame is None else (frame, predictor.prepare(frame))

    def write(parts: list[tuple[ndarray, ndarray]]) -> None:
        for frame, labels in parts:
            writer.write(overlay(frame, labels, predictor.palette))

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as encoder:  # each keeps the order of the frames
        steps = (future.result() for _, future in ahead(read, _endless(), reader, 2 * predictor.batch_size))
        steps = progress(iter(steps.__next__, None), frames)
        written = encoder.submit(write, [])
        while group := list(islice(steps, predictor.batch_size)):
            labels = predictor.predict([item for _, item in group])
            written.result()
            written = encoder.submit(write, [(frame, part) for (frame, _), part in zip(group, labels, strict=True)])
            count += len(group)
        written.result()
    writer.release()  # which, as the writer, keeps quiet about errors
    if (found := frames_in(args.output)) != count:
        raise OSError(f'{args.output}: {found} of {count} frames were written; make room on its disk, and try again')
    if count < frames:
        return [f'{args.input}: {count} of {frames} frames could be decoded; the video ends there']
    return []


def frames_in(path: Path) -> int:
    """Returns the number of frames of a video, which are read and not decoded; 0 if it is no file."""
    if not path.is_file():
        return 0
    capture = cv2.VideoCapture(str(path))
    capture.set(cv2.CAP_PROP_FORMAT, -1)  # as stored
    return sum(1 for _ in iter(capture.grab, False))


def _endless() -> Iterator[int]:
    while True:
        yield 0


def progress(items: Iterable, total: int | None = None) -> Iterable:
    """Shows a bar where stderr is a terminal."""
    console = Console(stderr=True)
    total = len(items) if total is None else total
    return track(items, 'predicting', total=total or None, console=console, disable=not console.is_terminal)


def predict(args: argparse.Namespace) -> None:
    """Predicts what the command line names; exits with 1 if anything was bad."""
    cfg = cli.load_config(args, 'test_dataloader')
    cli.existing_checkpoint(args.checkpoint)
    if args.batch_size < 1:
        raise cli.UsageError(f'--batch-size {args.batch_size}: expected 1 or more')
    is_video = Path(args.input).suffix.lower() in VIDEOS
    if is_video:
        check_video(args)
    else:
        label_maps, overlays = plan(args)
    device = device_of(args.device)
    for folder in (args.output.parent,) if is_video else filter(None, (args.output, args.overlays)):
        cli.make_folder(folder)
    speed = Speed(dtype=args.dtype or default_speed(device).dtype, compile=args.compile)
    predictor = Predictor(cfg, args.checkpoint, device, speed, args.batch_size)
    bad = predict_video(predictor, args) if is_video else predict_images(predictor, label_maps, overlays, args.labels)
    for line in bad:
        print(f'predict.py: skipped: {line}', file=sys.stderr)
    if bad:
        sys.exit(1)


if __name__ == '__main__':
    cli.run(predict, make_parser())
