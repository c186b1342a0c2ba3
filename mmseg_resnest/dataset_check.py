"""The data set check: what is wrong in the files of a config's data sets, each finding with its fix.

The quick check, before a run, reads every header, and the values of ``SAMPLE`` label maps a split, evenly spaced. It
took 6.2 s (8.7 s of CPU) for 20,000 pairs of small files on two idle cores, and 2.6 s where they are remembered from an
earlier run.

The whole check decodes everything: 0.8 ms of CPU an image and 1.4 ms a label map of 480x360, 28 ms a label map of
2048x1024. What it cannot notice is told at ``picture_files.decode_strictly``.
"""

import argparse
import bisect
import filecmp
import functools
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from mmengine.config import Config

from mmseg_resnest.datasets import Split, check_folders, splits_of
from mmseg_resnest.picture_files import (
    JPEG,
    REMEMBERED_FROM,
    Picture,
    Task,
    loss_when_loaded,
    memory_of,
    read_pictures,
    recall,
    remember,
)
from mmseg_resnest.transforms import CheckedCompose

SAMPLE = 200
PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
SHOWN = 8  # findings of a kind, in a message

Pictures = Mapping[str, Picture | None]


@dataclass(frozen=True)
class Finding:
    """Something wrong, or odd: ``severity`` is ``'error'`` or ``'warning'``, which stops no run."""

    kind: str
    file: str
    found: str
    expected: str
    fix: str
    severity: str = 'error'

    def __str__(self) -> str:
        return f'{self.file}: {self.found}; expected {self.expected}. {self.fix}.'


@dataclass
class Histogram:
    """What the decoded label maps of a split hold.

    Attributes:
        classes: Their names.
        pixels: (classes,) int64: how many each class has.
        images: (classes,) int64: how many label maps have the class.
        ignored: Pixels whose label is ignored.
        out_of_range: Pixels whose label is neither a class nor ignored.
        label_maps: How many were decoded.
        of: How many there are.
        values: Each that occurs in the files, before ``reduce_zero_label`` and the label map -> its pixels.
    """

    classes: tuple[str, ...]
    of: int
    pixels: np.ndarray = field(init=False)
    images: np.ndarray = field(init=False)
    ignored: int = 0
    out_of_range: int = 0
    label_maps: int = 0
    values: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(self.classes), np.int64)
        self.images = np.zeros(len(self.classes), np.int64)

    def add(self, values: Iterable[tuple[int, int]], split: Split) -> None:
        """Adds a label map: its values and their numbers of pixels."""
        self.label_maps += 1
        present = set()
        for value, pixels in values:
            self.values[value] += pixels
            label = _label(split, value)
            if label == split.ignored:
                self.ignored += pixels
            elif label < len(self.classes):
                self.pixels[label] += pixels
                present.add(int(label))
            else:
                self.out_of_range += pixels
        self.images[list(present)] += 1


@dataclass
class Report:
    """What a check found: the split's name -> its histogram, and the findings."""

    splits: list[Split]
    histograms: dict[str, Histogram]
    findings: list[Finding]

    def of(self, severity: str) -> list[Finding]:
        """Returns the findings that are errors, or warnings."""
        return [finding for finding in self.findings if finding.severity == severity]


def count(things: Sequence, name: str) -> str:
    """Returns how many there are, as ``'1 error'``."""
    return f'{len(things):,} {name}{"s" * (len(things) != 1)}'


def listing(findings: Iterable[Finding], shown: int = SHOWN) -> str:
    """Returns the findings kind by kind, at most ``shown`` of each, a line each."""
    lines = []
    for (severity, kind), group in itertools.groupby(
        sorted(findings, key=lambda finding: (finding.severity, finding.kind)), lambda f: (f.severity, f.kind)
    ):
        found = list(group)
        lines += [f'{severity}: {kind} ({len(found):,})', *(f'  {finding}' for finding in found[:shown])]
        lines += [f'  ... and {len(found) - shown:,} more'] if len(found) > shown else []
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------ what is wrong with a pair


def pair_findings(
    split: Split, image_path: str, label_path: str | None, pictures: Pictures, seen: Iterable[int]
) -> list[Finding]:
    """Returns what is wrong with an image and its label map; where one cannot be read, only that."""
    paths = [path for path in (image_path, label_path) if path]
    missing = [_missing(split, path, image_path) for path in paths if pictures[path] is None]
    if missing:
        return missing[:1]  # a name that is wrong in the list names neither file
    unreadable = [_unreadable(path, pictures[path]) for path in paths if pictures[path].unreadable]
    damaged = [_damaged(path, pictures[path]) for path in paths if pictures[path].defect]
    if unreadable or damaged:
        return unreadable + damaged
    found = []
    for check in IMAGE_CHECKS:
        found += check(split, image_path, pictures[image_path])
    if label_path:
        for check in LABEL_CHECKS:
            found += check(split, label_path, pictures[label_path])
        found += _sizes(split, image_path, label_path, pictures)
        found += _values(split, label_path, pictures[label_path], seen)
    return found


def _missing(split: Split, path: str, image_path: str) -> Finding:
    is_image = path == image_path
    name = os.path.basename(path).removesuffix(split.suffixes[0 if is_image else 1])
    if is_image and not name:
        return Finding('missing image', path, 'a blank line', 'a name in each line of ann_file', 'Remove the line')
    found = f'no such file{_besides(path, name)}'
    if is_image:
        fix = 'Put it there, or take its name from ann_file, which has names without suffix'
        return Finding('missing image', path, found, 'the image that ann_file lists', fix)
    fix = 'Put the label map there, rename what was found, or set seg_map_suffix; or remove the image'
    return Finding('missing label map', path, found, f'the label map of {image_path}', fix)


def _besides(path: str, name: str) -> str:
    """Says which files with that name, but for what follows it, lie where ``path`` should be."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        return f': there is no folder {folder}'
    files = _sorted_names(folder, os.stat(folder).st_mtime_ns)
    alike = itertools.takewhile(lambda file: file.startswith(name), files[bisect.bisect_left(files, name) :])
    found = [file for file in alike if not file[len(name) :][:1].isalnum()]
    return f' (but {", ".join(found[:3])})' if found else ''


@functools.lru_cache(maxsize=8)
def _sorted_names(folder: str, mtime_ns: int) -> list[str]:
    return sorted(os.listdir(folder))


def _damaged(path: str, picture: Picture) -> Finding:
    fix = 'Get the file again from where it comes, or remove it and its partner'
    return Finding('damaged file', path, picture.defect, 'a picture that decodes whole', fix)


def _unreadable(path: str, picture: Picture) -> Finding:
    fix = 'Give yourself the right to read it, or look at its disk'
    return Finding('unreadable file', path, picture.unreadable, 'a file that can be read', fix)


def _type(split: Split, path: str, picture: Picture) -> Iterator[Finding]:
    suffix, name = Path(path).suffix.lower(), 'JPEG' if picture.format in JPEG else picture.format
    named = {'.jpg': 'JPEG', '.jpeg': 'JPEG', '.png': 'PNG'}.get(suffix, name)
    if name and name != named:
        fix = 'It is read all the same; rename it, and the suffix in the config'
        yield Finding('type of file', path, f'a {name} file', f'{named}, as {suffix} says', fix, 'warning')


def _loss(split: Split, path: str, picture: Picture) -> Iterator[Finding]:
    """Yields that loading drops a part of an image: an error in a test, whose figures nobody questions."""
    found = loss_when_loaded(picture)
    if found and split.loading[0].color_type != 'unchanged':
        fix = 'The loader keeps the upper 8 of 16 bits, and no alpha; write 8 bits without it, as you mean it'
        severity = 'error' if 'test_dataloader' in split.name else 'warning'
        yield Finding('images of 16 bits or with alpha', path, found, '8 bits, grey or colour', fix, severity)


def _remark(split: Split, path: str, picture: Picture) -> Iterator[Finding]:
    if picture.remark:
        found = f'the decoder says {picture.remark!r}, which changes no pixel, and might have said more after it'
        fix = 'Look at the picture, and write it anew (jpegtran -copy all) where it is as it should be'
        yield Finding('odd file', path, found, 'no remark', fix, 'warning')


def _channels(split: Split, path: str, label: Picture) -> Iterator[Finding]:
    if label.channels > 1:
        fix = "Write one channel: each pixel's class by number, not by colour (docs/custom_dataset.md)"
        found = (
            f'{label.channels} channels ({label.mode}{f", read by {split.label_backend}" * (label.mode in ("P", "1"))})'
        )
        yield Finding('channels of label maps', path, found, 'one channel', fix)


def _lossy(split: Split, path: str, label: Picture) -> Iterator[Finding]:
    if label.format in JPEG:
        fix = 'JPEG changes the numbers at the borders of classes; write PNG from the original labels'
        yield Finding('lossy label map', path, 'a JPEG file', 'PNG', fix)


IMAGE_CHECKS: tuple[Callable[[Split, str, Picture], Iterator[Finding]], ...] = (_type, _loss, _remark)
LABEL_CHECKS: tuple[Callable[[Split, str, Picture], Iterator[Finding]], ...] = (_type, _channels, _lossy)


def _sizes(split: Split, image_path: str, label_path: str, pictures: Pictures) -> Iterator[Finding]:
    """Compares the image as it is loaded with its label map, which is not turned unless it is a TIFF file."""
    image, label = pictures[image_path], pictures[label_path]
    if not image.width or not label.width:
        return
    loaded, wanted = (image.width, image.height), (label.width, label.height)
    if image.orientation != label.orientation and _stored(image) == _stored(label):
        found = (
            f'EXIF orientation {image.orientation}, by which it is turned when loaded, and its label map {label_path}'
        )
        found += ' is not' if label.orientation == 1 else f' by {label.orientation}'
        found += '' if loaded != wanted else ', whichever way it was drawn: the sizes do not tell'
        fix = (
            'Where the label was drawn on the image as stored, remove the tag (exiftool -Orientation= FILE); where on '
            'the image as it is shown, turn the pixels (mogrify -auto-orient FILE)'
        )
        yield Finding('EXIF orientation', image_path, found, 'orientation 1', fix)
    elif loaded != wanted:
        sizes = [f'{width}x{height}' for width, height in (loaded, wanted)]
        found = f'{sizes[0]}, its label map {label_path} {sizes[1]} (width x height)'
        fix = 'Pair the right files, or export the label map anew'
        yield Finding('sizes', image_path, found, 'the same size', fix)


def _stored(picture: Picture) -> tuple[int, int]:
    return (picture.height, picture.width) if picture.orientation >= 5 else (picture.width, picture.height)


def _values(split: Split, path: str, label: Picture, seen: Iterable[int]) -> Iterator[Finding]:
    """Compares a decoded label map's values with the classes."""
    pixels = dict(label.values or ())
    wide = [value for value in pixels if not 0 <= value < 256]
    if wide:
        found = f'values to {max(wide)} ({label.mode}), which wrap to 8 bits: {max(wide)} becomes {max(wide) % 256}'
        fix = 'Write 8 bits; where these are instance numbers, take the file with the classes'
        yield Finding('bit depth of label maps', path, found, 'values of 8 bits', fix)
        return
    wrong = [value for value in pixels if _is_wrong(split, value)]
    if wrong:
        share = 100 * sum(pixels[value] for value in wrong) / sum(pixels.values())
        found = f'value{"s" * (len(wrong) > 1)} {_ranges(wrong)} in {share:.3g} % of its pixels'
        right = _ranges([value for value in range(256) if not _is_wrong(split, value)])
        reduced = ' (reduce_zero_label=True: 0 is ignored, n becomes n - 1)' if split.reduce_zero_label else ''
        expected = f'{right}: {len(split.classes)} classes, and what is ignored{reduced}'
        yield Finding('label values', path, found, expected, _values_fix(split, seen))
    elif pixels and all(_label(split, value) == split.ignored for value in pixels):
        found = f'value{"s" * (len(pixels) > 1)} {_ranges(pixels)} only: every pixel is ignored'
        fix = 'Nothing is learned from it; label it, or remove the pair'
        yield Finding('nothing labelled', path, found, 'pixels of some class', fix, 'warning')


def _label(split: Split, value: int) -> int:
    return int(split.meaning[value % 256])


def _is_wrong(split: Split, value: int) -> bool:
    label = _label(split, value)
    return label >= len(split.classes) and label != split.ignored


def _ranges(values: Iterable[int]) -> str:
    """Returns numbers in short, as ``'0-10, 255'``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    text = [f'{run[0]}-{run[-1]}' if len(run) > 1 else f'{run[0]}' for run in runs]
    return ', '.join(text[:8]) + (', ...' if len(text) > 8 else '')


def _values_fix(split: Split, seen: Iterable[int]) -> str:
    """Says what the values that a split holds look like."""
    classes, largest = len(split.classes), max((value for value in seen if value != 255), default=0)
    if not split.reduce_zero_label and largest == classes and 0 not in seen:
        return f'All values are 1-{classes}: set reduce_zero_label=True in each data set, or subtract 1'
    if not split.reduce_zero_label and largest == classes:
        return (
            f'The data set has values to {classes}, one more than classes: if 0 means "nothing", set '
            'reduce_zero_label=True in each data set; if it is a class, name it in metainfo.classes and set num_classes'
        )
    return 'Correct the label map; or name all classes in metainfo.classes, and set num_classes of the heads'


# ----------------------------------------------------------------------------------------- what is wrong with a split


def split_findings(split: Split, histogram: Histogram, alike: Sequence[Histogram]) -> Iterator[Finding]:
    """Yields what the values of all decoded label maps say together; ``alike`` are those of splits that count alike."""
    classes, values = len(split.classes), histogram.values
    where = split.folders[1] if split.folders else split.name
    if not histogram.label_maps or histogram.out_of_range:
        return
    counting = [*_masks(split, values), *_counting(split, values, alike)]
    if not histogram.pixels.any() and not counting:
        found = f'values {_ranges(values)} only: every pixel of {histogram.label_maps:,} label maps is ignored'
        fix = 'Correct the label maps, reduce_zero_label or metainfo.classes'
        yield Finding('nothing labelled in a split', where, found, 'pixels of some class', fix)
    elif histogram.label_maps == histogram.of and not histogram.pixels.all() and not counting:
        never = [name for name, pixels in zip(split.classes, histogram.pixels, strict=True) if not pixels]
        found = f'{len(never)} of {classes} classes never occur ({", ".join(never[:4])}{", ..." * (len(never) > 4)})'
        fix = 'Nothing is wrong if that is known: they cannot be learned, or count in no mIoU, there'
        yield Finding('classes that never occur', where, found, 'pixels of each class', fix, 'warning')
    yield from (replace(finding, file=where) for finding in counting)


def _masks(split: Split, values: Counter[int]) -> Iterator[Finding]:
    """Yields that label maps hold 0 and 255; a warning where others have less than a thousandth of their pixels."""
    others = values.total() - values[0] - values[255]
    if (
        split.reduce_zero_label
        or len(split.classes) < 2
        or not values[255]
        or 1000 * others >= min(values[0], values[255])
    ):
        return
    only = 'only' if not others else f'but for {others:,} pixels'
    found, expected = f'values 0 and 255 {only}: all that is not class 0 is ignored', f'0-{len(split.classes) - 1}'
    fix = 'Write 0 and 1, as by cv2.imwrite(path, (label > 0).astype("uint8")): 255 means "not labelled"'
    yield Finding('masks of 0 and 255', '', found, expected, fix, 'warning' if others else 'error')


def _counting(split: Split, values: Counter[int], alike: Sequence[Histogram]) -> Iterator[Finding]:
    """Yields that label maps seem to count from 0 where ``reduce_zero_label`` has them count from 1, or the reverse.

    The sign is that most values of the other way of counting occur, and the one that it lacks occurs in no split. Where
    labels seem to count from 0, 0 must have half an even share of the pixels too, and it is an error where nearly all
    values occur and every label map was decoded.
    """
    classes = len(split.classes)
    seen = set().union(*(histogram.values for histogram in alike))
    share = len(set(range(classes)) & values.keys()) / classes
    lacks_0, lacks_last, labelled = 0 not in seen, classes not in seen, values.total() - values[255]
    if classes < 2 or not values or split.label_map:
        return
    if split.reduce_zero_label and lacks_last and share >= 0.75 and 2 * classes * values[0] >= labelled:
        found = (
            f'values {_ranges(values.keys() - {255})} and never {classes}, with reduce_zero_label=True: class 0 would'
        )
        fix = f'Set reduce_zero_label=False, unless 0 means "nothing" and {split.classes[-1]} occurs nowhere'
        proven = share >= 0.9 and all(histogram.label_maps == histogram.of for histogram in alike)
        severity = 'error' if proven else 'warning'
        yield Finding('reduce_zero_label', '', f'{found} be ignored', f'values 1-{classes}', fix, severity)
    elif not split.reduce_zero_label and lacks_0 and share >= 0.75 * (classes - 1) / classes:
        found = f'values {_ranges(values.keys() - {255})} and never 0, with reduce_zero_label=False'
        fix = f'Set reduce_zero_label=True if the labels count from 1, unless {split.classes[0]} occurs nowhere'
        yield Finding('reduce_zero_label', '', found, f'values 0-{classes - 1}', fix, 'warning')


def layout_findings(splits: Sequence[Split]) -> Iterator[Finding]:
    """Yields splits that are empty or cannot be judged, label maps without an image, and images in no pair."""
    paired = {os.path.normpath(path) for split in splits for pair in split.pairs for path in pair if path}
    for split in splits:
        if not split.pairs:
            fix = 'Correct its ann_file, or leave it out to take all files of the folders'
            yield Finding('empty split', split.name, 'no pair of files', 'at least one', fix)
        if split.unread:
            fix = 'Its files are read by other means, and are not checked'
            yield Finding(
                'unchecked', split.name, split.unread, "local files and mmsegmentation's loaders", fix, 'warning'
            )
        if split.unread or not split.folders:
            continue
        images, labels = split.folders
        for label in _files(labels, split.suffixes[1]) if labels else ():
            if os.path.normpath(label) not in paired:
                yield _without_image(split, label)
        left_out = [path for path in _files(images) if _is_left_out(path, labels, paired)]
        if left_out:
            found = f'{count(left_out, "picture")} of the folder in no pair, this one among them'
            fix = 'Rename them, or add a data set with their img_suffix; or they are left out'
            yield Finding('images left out', left_out[0], found, f'*{split.suffixes[0]}', fix, 'warning')


def _files(folder: str, suffix: str = '') -> Iterator[str]:
    """Yields the files in a folder and below, as MMEngine would list them."""
    for path, _, files in os.walk(folder, followlinks=True):
        yield from sorted(os.path.join(path, file) for file in files if file.endswith(suffix) and file[0] != '.')


def _is_left_out(path: str, labels: str, paired: set[str]) -> bool:
    """Whether a picture beside images is in no pair, and no label map."""
    path = os.path.normpath(path)
    is_label = bool(labels) and path.startswith(os.path.join(os.path.normpath(labels), ''))
    return path not in paired and Path(path).suffix.lower() in PICTURES and not is_label


def _without_image(split: Split, label: str) -> Finding:
    name = os.path.relpath(label, split.folders[1]).removesuffix(split.suffixes[1])
    image = os.path.join(split.folders[0], name)
    found = f'no such file{_besides(image, os.path.basename(name))}'
    fix = 'Put the image there, rename what was found, or set img_suffix; without it the pair is silently left out'
    return Finding('label map without image', f'{image}{split.suffixes[0]}', found, f'the image of {label}', fix)


def shared_findings(splits: Sequence[Split], pictures: Pictures) -> Iterator[Finding]:
    """Yields the other splits that hold images of the training set: the same name, length and bytes."""

    def key(path: str) -> tuple[str, int]:
        return os.path.basename(path), pictures[path].size

    readable = {split.name: [image for image, _ in split.pairs if pictures.get(image)] for split in splits}
    training = {key(image): image for name, images in readable.items() if name.startswith('train_') for image in images}
    for name, images in readable.items():
        if name.startswith('train_'):
            continue
        twins = [(image, training[key(image)]) for image in images if key(image) in training]
        twins = [(image, twin) for image, twin in twins if image == twin or filecmp.cmp(image, twin, shallow=False)]
        if twins:
            found = (
                f'{len(twins):,} of {len(images):,} images of {name} are in the training set, this one as {twins[0][1]}'
            )
            fix = 'Leave them out of one; on images that were learned the mIoU says little'
            yield Finding('images in two splits', twins[0][0], found, 'images that were not trained on', fix, 'warning')


# ----------------------------------------------------------------------------------------------------------- the check


def check(cfg: Config, loaders: Sequence[str], whole: bool, may_skip: bool = False) -> Report:
    """Checks the data sets of a config's loaders.

    Args:
        cfg: The config.
        loaders: Its keys, as ``'train_dataloader'``.
        whole: Decode every file. Otherwise: read all headers and ``SAMPLE`` label maps a split, evenly spaced, and
            remember what they say until the files change.
        may_skip: Training skips bad samples, so that a pair of the training set which it notices is no error.
    """
    splits = splits_of(cfg, loaders)
    report = Report(splits, {}, list(layout_findings(splits)))
    pictures: dict[str, Picture | None] = {}
    for split in (split for split in splits if not split.unread):
        found = read_split(split, whole)
        pictures |= found
        labels = [label for _, label in split.pairs if label]
        histogram = report.histograms[split.name] = Histogram(split.classes, len(labels))
        for label in labels:
            if found[label] and found[label].values:
                histogram.add(found[label].values, split)
        for image, label in split.pairs:
            bad = pair_findings(split, image, label, found, histogram.values)
            is_error = any(finding.severity == 'error' for finding in bad)
            if is_error and may_skip and split.name.startswith('train_') and is_noticed(split, image, label):
                bad = [replace(finding, severity='warning') for finding in bad]
            report.findings += bad
    judged = {split.name: split for split in splits if split.name in report.histograms}
    for name, split in judged.items():
        alike = [report.histograms[other.name] for other in judged.values() if _count_alike(split, other)]
        report.findings += split_findings(split, report.histograms[name], alike)
    report.findings += shared_findings(splits, pictures)
    return report


def is_noticed(split: Split, image: str, label: str | None) -> bool:
    """Whether a pair is bad to a run that looks at its samples, which loads it in the same way."""
    sample = dict(img_path=image, seg_map_path=label, seg_fields=[], label_map=split.label_map)
    pipeline = CheckedCompose([*split.loading], classes=len(split.classes), ignore_index=split.ignored)
    try:
        pipeline(sample | dict(reduce_zero_label=split.reduce_zero_label))
    except ValueError:
        return True
    return False


def _count_alike(split: Split, other: Split) -> bool:
    return (split.classes, split.reduce_zero_label) == (other.classes, other.reduce_zero_label)


def read_split(split: Split, whole: bool) -> Pictures:
    """Reads a split's files, or what is remembered of them."""
    sample = {int(index) for index in np.linspace(0, len(split.pairs) - 1, min(len(split.pairs), SAMPLE))}
    images, labels = split.image_backend, split.label_backend
    tasks = [Task(image, False, whole, images, split.may_turn) for image, _ in split.pairs]
    tasks += [Task(label, True, whole or i in sample, labels) for i, (_, label) in enumerate(split.pairs) if label]
    if whole or len(tasks) < REMEMBERED_FROM:
        return read_pictures(tasks, title=split.name)
    memory = memory_of(
        images, labels, str(split.may_turn), *sorted({os.path.dirname(os.path.abspath(task.path)) for task in tasks})
    )
    known = recall(memory)
    pictures = read_pictures(tasks, known, split.name)
    if pictures != known:
        remember(memory, pictures)
    return pictures


def check_before_run(cfg: Config, loaders: Sequence[str]) -> None:
    """Checks the data sets that a command uses, quickly; of several processes, the first one does.

    Raises:
        FileNotFoundError: A folder is missing or empty.
        ValueError: There are errors. Warnings are printed.
    """
    for loader in loaders:
        check_folders(loader, cfg[loader].dataset)
    if int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) != 0:
        return
    start = time.perf_counter()
    samples = (cfg.get('default_hooks') or {}).get('samples') or {}  # mmseg_resnest.SampleCheckHook's options
    report = check(cfg, loaders, whole=False, may_skip=samples.get('on_bad_sample') == 'skip')
    pairs = ' + '.join(f'{len(split.pairs):,}' for split in report.splits)
    errors, warnings = report.of('error'), report.of('warning')
    if errors:
        raise ValueError(
            f'{count(errors, "error")} in {pairs} pairs of images and label maps:\n'
            f'{listing(errors)}\n'
            'tools/check_dataset.py CONFIG decodes every file and lists all of it; --skip-data-check runs all the same.'
        )
    read = ' + '.join(f'{histogram.label_maps:,}' for histogram in report.histograms.values())
    seconds = time.perf_counter() - start
    print(f'Data set check: {pairs} pairs, values of {read} label maps, no error ({seconds:.1f} s).', file=sys.stderr)
    if warnings:
        print(listing(warnings), file=sys.stderr)


def add_skip_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that leaves ``check_before_run`` out."""
    parser.add_argument(
        '--skip-data-check',
        action='store_true',
        help='start without a look at the files of the data set, where the check is wrong or too slow for it',
    )
