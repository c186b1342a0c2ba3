"""Official data sets: from the archives that their authors publish to the layout that the configs expect.

What is written appears under its own name only when it is whole, so a run that was killed is simply run again. Two
notes below the root say what is there: ``.labels_from.json`` holds the SHA-1s of the archives that the converted labels
were made from, ``.prepared.json`` what was found when all was done.
"""

import hashlib
import json
import os
import shlex
import shutil
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path, PureWindowsPath
from typing import IO, Any

import numpy as np
from mmengine.config import Config
from PIL import Image
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from mmseg_resnest.dataset_check import check, listing
from mmseg_resnest.datasets import set_data_root
from mmseg_resnest.download import DownloadError, download

CONFIGS = Path(__file__).parent / '.mim' / 'configs' / 'resnest'
# Pascal Context's ids of the 59 classes that are used, in the order of mmsegmentation's PascalContextDataset59.
PASCAL_CONTEXT_IDS = (
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159),
    *(162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368),
    *(397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
)


def _shown(steps: Iterable, what: str, total: int) -> Iterable:
    """Says what comes, if there is anything, and yields the steps under a progress bar."""
    console = Console(stderr=True)
    if total:
        print(f'{what}: {total:,} files', flush=True)
    return track(steps, '', total, console=console, transient=True, disable=not (total and console.is_terminal))


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Gives a name to write to; it becomes ``path`` when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its name, size in bytes, CRC-32 (a tar has none), whether it is a link, how to read it."""

    name: str
    size: int
    crc: int | None
    is_link: bool
    open: Callable[[], IO[bytes]]

    def is_at(self, path: Path) -> bool:
        """Whether the file is there, with the archive's size and CRC."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return _crc(path.open('rb')) == (_crc(self.open()) if self.crc is None else self.crc)

    def unpack(self, path: Path) -> None:
        """Writes the file."""
        with _aside(path) as part, self.open() as source, part.open('wb') as target:
            shutil.copyfileobj(source, target, 2**20)


def _crc(file: IO[bytes]) -> int:
    crc = 0
    with file:
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return crc


@contextmanager
def _opened(archive: Path) -> Iterator[list[_Member]]:
    """Opens a ``.zip`` or ``.tar`` and gives its files."""
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive) as file:
            yield [
                _Member(
                    info.filename, info.file_size, info.CRC, info.external_attr >> 28 == 0o12, partial(file.open, info)
                )
                for info in file.infolist()  # 0o12: a symbolic link, in Unix's mode
                if not info.is_dir()
            ]
    else:
        with tarfile.open(archive, 'r:') as file:
            yield [
                _Member(info.name, info.size, None, not info.isreg(), partial(file.extractfile, info))
                for info in file.getmembers()
                if not info.isdir()
            ]


def unpack(archive: Path, root: Path, prefix: str = '') -> None:
    """Unpacks a ``.zip`` or ``.tar``; what is there already, with the same size and CRC, stays.

    Args:
        archive: The file.
        root: Where its members go.
        prefix: What their names lose in front, as ``'ADEChallengeData2016/'``.

    Raises:
        ValueError: The archive is damaged, or it holds a link or a name that leads out of ``root``.
        OSError: The disk has no room for it; nothing was unpacked.
    """
    try:
        with _opened(archive) as members:
            places = [(member, root / _safe_name(archive, member, prefix)) for member in members]
            missing = [(member, path) for member, path in places if not member.is_at(path)]
            _check_room(archive, root, sum(member.size for member, _ in missing))
            for member, path in _shown(missing, f'{archive}: unpacking', len(missing)):
                member.unpack(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f'{archive}: damaged or not whole ({error}; it has {archive.stat().st_size} bytes). Delete it, get it anew '
            'and run this again; what is unpacked stays'
        ) from error


def _safe_name(archive: Path, member: _Member, prefix: str) -> str:
    """Returns the member's name without the prefix; what is left has to be the name of a file below the root."""
    name = member.name.removeprefix(prefix)
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    if member.is_link or path.anchor or '..' in path.parts or not path.parts:
        what = 'a link or a device' if member.is_link else 'a name that leads out of its folder'
        raise ValueError(
            f'{archive}: {member.name!r} is {what}, which no official archive holds; nothing was unpacked. Delete '
            'the archive and get it from its official page'
        )
    return name


def _check_room(archive: Path, root: Path, needed: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            f'{root}: {archive.name} needs {decimal(needed)}, the disk has {decimal(free)} free; make room, or unpack '
            'elsewhere with --data-root DIR. Nothing was unpacked'
        )


def decode_rle(counts: str, height: int, width: int) -> np.ndarray:
    """Decodes a mask in COCO's compressed run lengths.

    The runs, column by column, are of 0 and 1 in turn. A run is written as its difference to the last run but one (from
    the fourth on), in groups of 5 bits, lowest first; bit 5 says that another group follows, and the highest bit of the
    last group is the sign. 48 is added to a group to make it a character.

    Args:
        counts: The runs.
        height, width: The mask's size.

    Returns:
        The mask, bool, of shape (height, width).

    Raises:
        ValueError: The runs are not as long as the mask.
    """
    groups = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - starts.repeat(ends - starts + 1)
    runs = np.add.reduceat((groups & 31) << 5 * place, starts)
    runs -= (groups[ends] >> 4 & 1) << 5 * (place[ends] + 1)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f'a mask has {runs.sum()} pixels, its image {height}x{width}')
    return (np.arange(len(runs)) % 2 == 1).repeat(runs).reshape(width, height).T


def _convert_ade20k(root: Path, archives: Path) -> None:
    """Does nothing: the archive has the layout already."""


def _need_cityscapesscripts() -> None:
    try:
        import cityscapesscripts.preparation.json2labelImg  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f'Cityscapes is converted by its own cityscapesscripts, which cannot be imported ({error}); '
            'pip install cityscapesscripts'
        ) from error


def _convert_cityscapes(root: Path, archives: Path) -> None:
    """Draws the polygons as train ids (255: ignored), as cityscapesscripts does."""
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    def convert(polygons: Path, labels: Path) -> None:
        annotation = Annotation()
        annotation.fromJsonFile(str(polygons))
        with _aside(labels) as part:
            createLabelImage(annotation, 'trainIds').save(part, 'PNG')

    suffix = '_polygons.json'
    jobs = [
        (polygons, polygons.with_name(polygons.name.removesuffix(suffix) + '_labelTrainIds.png'))
        for polygons in sorted(root.glob(f'gtFine/*/*/*{suffix}'))
    ]
    _run(convert, jobs)


def _convert_pascal_context(root: Path, archives: Path) -> None:
    """Paints the annotations of Pascal in Detail as classes 1 to 59 (0: background) and writes the lists of images."""
    path = archives / PASCAL_CONTEXT.archives[1].name
    try:
        annotations = json.loads(path.read_bytes())
        regions = defaultdict(list)
        for region in annotations['annos_segmentation']:
            regions[region['image_id']].append(region)
        images = {split: [i for i in annotations['images'] if i['phase'] == split] for split in ('train', 'val')}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: no annotations of Pascal in Detail ({error!r}); get it anew') from error

    def convert(image: dict, labels: Path) -> None:
        if not (photo := root / 'JPEGImages' / image['file_name']).is_file():
            raise FileNotFoundError(
                f'{photo} is not there, but {path} annotates it; unpack the whole archive of VOC 2010'
            )
        try:
            painted = _paint(image, regions[image['image_id']])
        except (ValueError, LookupError) as error:
            raise ValueError(f'{path}: {image["file_name"]}: {error}; get it anew') from error
        with _aside(labels) as part:
            Image.fromarray(painted).save(part, 'PNG')

    pngs = root / 'SegmentationClassContext'
    jobs = [(image, pngs / f'{Path(image["file_name"]).stem}.png') for image in images['train'] + images['val']]
    _run(convert, jobs)
    for split, members in images.items():
        with _aside(root / 'ImageSets' / 'SegmentationContext' / f'{split}.txt') as part:
            part.write_text(''.join(sorted(f'{Path(image["file_name"]).stem}\n' for image in members)))


def _paint(image: dict, regions: list[dict]) -> np.ndarray:
    """Paints an image's regions one over the other; returns its labels, uint8, of shape (height, width)."""
    labels = np.zeros((image['height'], image['width']), np.uint8)
    for region in regions:
        if region['category_id'] not in PASCAL_CONTEXT_IDS:
            raise ValueError(f'category {region["category_id"]} is none of the 59 classes')
        mask = decode_rle(region['segmentation']['counts'], *labels.shape)
        labels[mask] = PASCAL_CONTEXT_IDS.index(region['category_id']) + 1
    return labels


def _run(convert: Callable, jobs: list[tuple[Any, Path]]) -> None:
    """Converts what has no whole label yet, in threads: compressing a PNG, half of the work, needs no interpreter."""
    missing = [(source, labels) for source, labels in jobs if not _is_whole(labels)]
    with ThreadPoolExecutor() as pool:
        for _ in _shown(pool.map(lambda job: convert(*job), missing), 'Converting labels', len(missing)):
            pass


def _is_whole(png: Path) -> bool:
    """Whether the file is there, with its last chunk and with the CRCs that are written in it."""
    try:
        with Image.open(png) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises
        return False
    return png.read_bytes().endswith(b'IEND\xaeB`\x82')


@dataclass(frozen=True)
class Archive:
    """A file that the data set's authors publish."""

    name: str
    url: str = ''  # empty where one has to log in
    sha1: str = ''  # empty where none is published


@dataclass(frozen=True)
class OfficialDataset:
    """What is known of a data set.

    Attributes:
        title: Its name.
        page: Where a person gets it.
        terms: Where the terms of use are.
        root: Where the configs expect it.
        archives: What it is published as; those that are not unpacked are read by ``convert``.
        prefix: What the names in the archives lose in front.
        convert: Makes the labels that are not there, given the root and the archives' folder.
        config: A config that uses it; with it the files are checked.
        counts: How many files match a pattern below the root, or how many lines a ``.txt`` has; None: not published.
        converted: The pattern of the labels that ``convert`` makes.
        need: Raises if what converts it is not installed.
    """

    title: str
    page: str
    terms: str
    root: Path
    archives: tuple[Archive, ...]
    prefix: str
    convert: Callable[[Path, Path], None]
    config: str
    counts: dict[str, int | None]
    converted: str = ''
    need: Callable[[], None] = lambda: None

    def survey(self, root: Path) -> dict[str, list]:
        """Returns, by the patterns of ``counts``, how many files are there and a hash of their names and sizes."""
        return {pattern: _survey(root, pattern) for pattern in self.counts}


def _survey(root: Path, pattern: str) -> list:
    names = sorted(name for name in glob(pattern, root_dir=root) if os.path.isfile(f'{root}/{name}'))
    sizes = [f'{name} {os.path.getsize(f"{root}/{name}")}' for name in names]
    number = sum(len((root / name).read_text().split()) for name in names) if pattern.endswith('.txt') else len(names)
    return [number, hashlib.sha1(os.fsencode('\n'.join(sizes))).hexdigest()]


# The SHA-1s are those of GluonCV's scripts, which PyTorch-Encoding and others have taken over.
ADE20K = OfficialDataset(
    title='ADE20K (MIT scene parsing benchmark)',
    page='http://sceneparsing.csail.mit.edu/',
    terms='https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/',
    root=Path('data/ade/ADEChallengeData2016'),
    archives=(
        Archive(
            'ADEChallengeData2016.zip',
            'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',
            '219e1696abb36c8ba3a3afe7fb2f4b4606a897c7',
        ),
    ),
    prefix='ADEChallengeData2016/',
    convert=_convert_ade20k,
    config='deeplabv3_resnest50_ade20k.py',
    counts={
        'images/training/*.jpg': 20210,
        'annotations/training/*.png': 20210,
        'images/validation/*.jpg': 2000,
        'annotations/validation/*.png': 2000,
    },
)
CITYSCAPES = OfficialDataset(
    title='Cityscapes',
    page='https://www.cityscapes-dataset.com/downloads/',
    terms='https://www.cityscapes-dataset.com/license/',
    root=Path('data/cityscapes'),
    archives=(Archive('leftImg8bit_trainvaltest.zip'), Archive('gtFine_trainvaltest.zip')),
    prefix='',
    convert=_convert_cityscapes,
    config='deeplabv3_resnest50_cityscapes.py',
    counts={
        'leftImg8bit/train/*/*_leftImg8bit.png': 2975,
        'gtFine/train/*/*_gtFine_labelTrainIds.png': 2975,
        'leftImg8bit/val/*/*_leftImg8bit.png': 500,
        'gtFine/val/*/*_gtFine_labelTrainIds.png': 500,
        'leftImg8bit/test/*/*_leftImg8bit.png': 1525,
        'gtFine/test/*/*_gtFine_labelTrainIds.png': 1525,
    },
    converted='gtFine/*/*/*_gtFine_labelTrainIds.png',
    need=_need_cityscapesscripts,
)
PASCAL_CONTEXT = OfficialDataset(
    title='Pascal Context, 59 classes',
    page='https://sites.google.com/view/pasd/dataset',
    terms='http://host.robots.ox.ac.uk/pascal/VOC/voc2010/',
    root=Path('data/VOCdevkit/VOC2010'),
    archives=(
        Archive(
            'VOCtrainval_03-May-2010.tar',
            'http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar',
            'bf9985e9f2b064752bf6bd654d89f017c76c395a',
        ),
        Archive(
            'trainval_merged.json',
            'https://codalabuser.blob.core.windows.net/public/trainval_merged.json',
            '169325d9f7e9047537fedca7b04de4dddf10b881',
        ),
    ),
    prefix='VOCdevkit/VOC2010/',
    convert=_convert_pascal_context,
    config='deeplabv3_resnest50_pascal_context_authors.py',
    counts={
        'ImageSets/SegmentationContext/train.txt': 4998,
        'ImageSets/SegmentationContext/val.txt': 5105,
        'SegmentationClassContext/*.png': 4998 + 5105,
        'JPEGImages/*.jpg': None,  # more than are annotated
    },
    converted='SegmentationClassContext/*.png',
)
OFFICIAL = dict(ade20k=ADE20K, cityscapes=CITYSCAPES, pascal_context=PASCAL_CONTEXT)


def prepare(dataset: OfficialDataset, root: Path, archives: Path, mirror: str = '', subset: bool = False) -> None:
    """Fetches, verifies, unpacks, converts and checks a data set; does nothing where that was done.

    Args:
        dataset: Which one, of ``OFFICIAL``.
        root: Where it goes.
        archives: Where its archives are, or are downloaded to.
        mirror: The folder (a URL) that has the archives; empty: the official places.
        subset: Whether the archives may be other than the published ones, and hold fewer images.

    Raises:
        FileNotFoundError: An archive is missing and cannot be downloaded.
        ValueError: An archive is not the published one, or damaged; or the files are not as many as published, or
            the check finds errors in them.
        OSError: The disk is too small.
        ModuleNotFoundError: What converts the labels is not installed.
    """
    stamp = root / '.prepared.json'
    record = _read_note(stamp)
    if record.get('subset') in (subset, False):  # one that was compared with what is published also serves as a subset
        found = dataset.survey(root) | _marks(dataset, archives)
        changed = [name for name, mark in found.items() if record['found'].get(name) != mark]
        if not changed:
            print(f'{root}: {dataset.title} is prepared already; {_how_to_check(dataset, root)} checks it again')
            return
        print(f'{root}: {", ".join(changed)} changed since it was prepared; looking at all of it')
    dataset.need()
    print(f'{dataset.title}: whoever uses it accepts the terms of {dataset.terms}', flush=True)
    paths = [_fetch(archive, dataset, archives, mirror) for archive in dataset.archives]
    marks = _marks(dataset, archives)
    hashes = {archive.name: _sha1(archive, path, subset) for archive, path in zip(dataset.archives, paths, strict=True)}
    stamp.unlink(missing_ok=True)
    for path in paths:
        if path.suffix in ('.zip', '.tar'):
            unpack(path, root, dataset.prefix)
    _drop_other_labels(dataset, root, hashes)
    dataset.convert(root, archives)
    found = dataset.survey(root)
    _check_counts(root, {pattern: number for pattern, (number, _) in found.items()}, dataset.counts, subset)
    _check_files(dataset, root)
    _write_note(stamp, dict(subset=subset, found=found | marks))
    print(f'{root}: {dataset.title} is prepared; {_how_to_check(dataset, root)} shows how often each class occurs')


def _read_note(path: Path) -> dict:
    """Returns what ``_write_note`` wrote; nothing if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write_note(path: Path, note: dict) -> None:
    with _aside(path) as part:
        part.write_text(json.dumps(note, indent=1) + '\n')


def _marks(dataset: OfficialDataset, folder: Path) -> dict[str, list[int]]:
    """Returns the size and the time of change of the archives that are there: another file has others."""
    marks = {}
    for archive in dataset.archives:
        if (path := folder / archive.name).is_file():
            marks[archive.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return marks


def _drop_other_labels(dataset: OfficialDataset, root: Path, hashes: dict[str, str]) -> None:
    """Deletes converted labels unless they were made from these archives, so that they are made anew."""
    note = root / '.labels_from.json'
    if not dataset.converted or _read_note(note) == hashes:
        return
    others = list(root.glob(dataset.converted))
    if others:
        print(f'{root}: {len(others):,} labels were not made from these archives; they are made anew')
    for path in others:
        path.unlink()
    _write_note(note, hashes)


def _fetch(archive: Archive, dataset: OfficialDataset, folder: Path, mirror: str) -> Path:
    """Returns the archive's path, downloading it if it is not there and needs no login."""
    path = folder / archive.name
    if path.is_file():
        return path
    url = f'{mirror.rstrip("/")}/{archive.name}' if mirror else archive.url
    by_hand = f'get it from {dataset.page} and put it into {folder} (--archives DIR: another folder)'
    if not url:
        raise FileNotFoundError(f'{path} is not there, and to download it one has to log in: {by_hand}')
    try:
        return download(url, path)
    except DownloadError as error:
        raise FileNotFoundError(f'{error}. Or {by_hand}') from error


def _sha1(archive: Archive, path: Path, subset: bool) -> str:
    """Returns the file's SHA-1; it has to be the published one, unless it may be a subset."""
    print(f'{path}: computing its SHA-1', flush=True)
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha1').hexdigest()
    if archive.sha1 and found != archive.sha1 and not subset:
        raise ValueError(
            f'{path}: its SHA-1 is {found}, that of the published file {archive.sha1}; it is damaged or another one. '
            'Delete it and run this again, or take it as it is with --subset'
        )
    return found


def _check_counts(root: Path, found: dict[str, int], expected: dict[str, int | None], subset: bool) -> None:
    wrong = {pattern for pattern in expected if expected[pattern] not in (None, found[pattern])}
    for pattern in expected:
        print(f'{found[pattern]:6d} {pattern}' + (f' (published: {expected[pattern]})' if pattern in wrong else ''))
    if wrong and not subset:
        raise ValueError(
            f'{root}: {len(wrong)} of these counts are not the published ones. Look for files of other origin, or '
            'delete that folder and run this again; --subset takes a part of the data set'
        )
    if not any(found.values()):
        raise ValueError(f'{root}: the archives held nothing of {", ".join(expected)}; are they the official ones?')


def _check_files(dataset: OfficialDataset, root: Path) -> None:
    """Decodes the files of the training and the validation set, as tools/check_dataset.py does."""
    cfg = Config.fromfile(CONFIGS / dataset.config)
    set_data_root(cfg, str(root))
    print(f'{root}: decoding every file', flush=True)
    report = check(cfg, ('train_dataloader', 'val_dataloader'), whole=True)
    errors, warnings = report.of('error'), report.of('warning')
    if warnings:
        print(listing(warnings))
    if errors:
        raise ValueError(f'{root}: {len(errors):,} errors in its files:\n{listing(errors)}')


def _how_to_check(dataset: OfficialDataset, root: Path) -> str:
    place = [] if root == dataset.root else ['--data-root', str(root)]
    return shlex.join(['python', 'tools/check_dataset.py', f'configs/{dataset.config}', *place])
