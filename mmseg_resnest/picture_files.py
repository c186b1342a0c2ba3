"""Picture files: what their headers, and if need be their pixels, say; read in parallel and remembered."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track

JPEG = ('JPEG', 'MPO')  # MPO: a JPEG file with further pictures behind the first, as some cameras write them
REMEMBERED_FROM = 1000  # fewer files are read in some 0.1 s
_END = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}
_CHUNK = 128  # files that a process is given at a time: their headers take it some 10 ms
_VERSION = 1  # of what is remembered


class Task(NamedTuple):
    """A file to read: whether it is a label map, and whether its pixels are wanted beside its header."""

    path: str
    is_label: bool
    whole: bool


class Picture(NamedTuple):
    """What is known of a file.

    Attributes:
        size: Its length in bytes.
        mtime_ns: When it was last written.
        whole: Whether its pixels were decoded.
        format: Pillow's name, as ``'PNG'``.
        mode: Pillow's name of its channels and depth, as ``'RGB'`` or ``'I;16'``.
        width: Of the picture as stored; 0 where the header does not tell.
        height: Likewise.
        orientation: EXIF's, from 1 (as stored) to 8.
        defect: Why it cannot be read whole; empty if it can.
        values: A decoded label map's [value, number of pixels] in rising order; None for all others.
    """

    size: int
    mtime_ns: int
    whole: bool = False
    format: str = ''
    mode: str = ''
    width: int = 0
    height: int = 0
    orientation: int = 1
    defect: str = ''
    values: list[list[int]] | None = None

    @property
    def channels(self) -> int:
        """How many there are; a palette's index is one. 0 where the header does not tell."""
        return Image.getmodebands(self.mode) if self.mode else 0


def read_picture(task: Task) -> Picture | None:
    """Reads a file's header, and its pixels where they are wanted or the header makes them suspicious.

    Suspicious are a file without its format's end marker and a label map of more than 8 bits.

    Returns:
        What was found; None if there is no such file.
    """
    try:
        status = os.stat(task.path)
    except FileNotFoundError:
        return None
    picture = Picture(status.st_size, status.st_mtime_ns, task.whole)
    if picture.size == 0:
        return picture._replace(defect='0 bytes')
    try:
        with open(task.path, 'rb') as file:
            picture = _read_header(picture, file, task)
            picture = _read_pixels(picture, file, task)
    except ImportError:  # of simplejpeg
        raise
    except Exception as error:  # whatever a decoder raises is the finding; what the header said stays
        defect = ' '.join(str(error).split()) or type(error).__name__
        return picture._replace(defect=f'cut off before its end ({defect})' if _is_cut(picture, task) else defect)
    return picture


def _read_header(picture: Picture, file: BinaryIO, task: Task) -> Picture:
    """Adds what the header says; OpenCV, which loads images, is asked about one that Pillow does not take."""
    try:
        header = Image.open(file)
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        pixels = cv2.imread(file.name) if not task.is_label and cv2.haveImageReader(file.name) else None
        if pixels is not None:
            return picture._replace(width=pixels.shape[1], height=pixels.shape[0])
        if isinstance(error, Image.DecompressionBombError):
            raise
        file.seek(0)
        raise ValueError(f'no picture that can be read: it begins with {file.read(16)!r}') from error
    # Asked for EXIF data that a PNG does not have, Pillow would decode all of it.
    tags = header.getexif() if 'exif' in header.info or header.format == 'TIFF' else {}
    orientation = tags.get(ExifTags.Base.Orientation)
    return picture._replace(
        format=header.format,
        mode=header.mode,
        width=header.width,
        height=header.height,
        orientation=orientation if orientation in range(2, 9) else 1,  # some cameras write 0
    )


def _read_pixels(picture: Picture, file: BinaryIO, task: Task) -> Picture:
    """Decodes a file if it should be, and counts a label map's values; an error says that it is damaged."""
    is_wide_label = task.is_label and picture.mode[:1] in ('I', 'F')  # 'I;16', 'I', 'F'
    if not picture.format or not (task.whole or is_wide_label or _lacks_end(picture, file)):
        return picture
    file.seek(0)
    if task.whole and picture.format in JPEG and not task.is_label:
        decode_strictly(file.read())
        return picture
    if task.whole and picture.format == 'PNG':
        Image.open(file).verify()  # the checksums
    file.seek(0)
    if task.is_label and picture.channels == 1:
        return picture._replace(whole=True, values=count_values(np.asarray(Image.open(file))))
    Image.open(file).load()
    return picture


def count_values(label: np.ndarray) -> list[list[int]]:
    """Returns each value of a label map and its number of pixels, in rising order."""
    if label.dtype != np.uint8:
        return np.stack(np.unique(label.astype(np.int64), return_counts=True), 1).tolist()
    counts = np.bincount(label.ravel())  # np.unique takes ten times as long
    values = np.flatnonzero(counts)
    return np.stack((values, counts[values]), 1).tolist()


def _lacks_end(picture: Picture, file: BinaryIO) -> bool:
    """Whether the end marker of its format is not where it belongs; behind it may be more, as some cameras write."""
    file.seek(max(0, picture.size - 16))
    return picture.format in _END and _END[picture.format] not in file.read()


def _is_cut(picture: Picture, task: Task) -> bool:
    if not picture.format:  # not even opened, perhaps
        return False
    with open(task.path, 'rb') as file:
        return _lacks_end(picture, file)


def decode_strictly(data: bytes) -> None:
    """Decodes a JPEG file and takes the decoder's warnings for errors, which OpenCV and Pillow do not.

    Of 200 photographs in which 2 to 20 random bytes were overwritten, it notices 193 (quality 95), 194 (progressive)
    and 171 (optimised tables), OpenCV none and Pillow 19, 22 and 11. What cannot be noticed is a change that decodes
    as validly as the original: JPEG has no checksum. Decoding to grey at an eighth of the size reads the same bytes,
    in 0.7 ms for 480 x 360 in place of 1.2.

    Raises:
        ValueError: The decoder raised an error or a warning.
    """
    import simplejpeg  # here: the check before a run does without it

    simplejpeg.decode_jpeg(data, colorspace='GRAY', fastdct=True, min_width=1, min_height=1, min_factor=8, strict=True)


def read_pictures(
    tasks: Sequence[Task], known: Mapping[str, Picture] | None = None, title: str = ''
) -> dict[str, Picture | None]:
    """Reads files in as many processes as there are cores: Pillow's headers are Python, where threads only wait.

    Args:
        tasks: The files.
        known: path -> what is remembered; files as large and as old as then are not read again.
        title: Of the progress bar, which is drawn where stderr is a terminal.

    Returns:
        Path -> what was found, or None where there is no such file.
    """
    known = known or {}
    remembered = {
        task.path: known[task.path] for task in tasks if task.path in known and _holds(known[task.path], task)
    }
    todo = [task for task in tasks if task.path not in remembered]
    console = Console(stderr=True)
    bar = functools.partial(
        track, description=title, total=len(todo), console=console, transient=True, disable=not console.is_terminal
    )
    workers = min(os.cpu_count() or 1, len(todo) // (2 * _CHUNK))
    if workers < 2:
        return remembered | {task.path: read_picture(task) for task in bar(todo)}
    with ProcessPoolExecutor(workers) as pool:
        found = bar(pool.map(read_picture, todo, chunksize=_CHUNK))
        return remembered | {task.path: picture for task, picture in zip(todo, found, strict=True)}


def _holds(picture: Picture, task: Task) -> bool:
    try:
        status = os.stat(task.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (picture.size, picture.mtime_ns) and picture.whole >= task.whole


def memory_of(*names: str) -> Path:
    """Returns the file that remembers the pictures of a data set with these names, as its folders."""
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return base / 'mmseg_resnest' / 'pictures' / f'{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}.json'


def recall(memory: Path) -> dict[str, Picture]:
    """Returns what is remembered; nothing if the file is not there, or is not what ``remember`` writes."""
    try:
        content = json.loads(memory.read_bytes())
        return (
            {path: Picture(*fields) for path, fields in content['files'].items()}
            if content['version'] == _VERSION
            else {}
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def remember(memory: Path, pictures: Mapping[str, Picture | None]) -> None:
    """Writes what was found for ``recall``; where it cannot, the next check reads the files again."""
    content = dict(version=_VERSION, files={path: picture for path, picture in pictures.items() if picture})
    part = memory.with_name(f'{memory.name}.{os.getpid()}')
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content))
        part.replace(memory)
    except OSError:
        pass
