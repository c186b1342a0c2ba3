"""Picture files: what their headers, and if need be their pixels, say; read in parallel and remembered."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import mmcv
import numpy as np
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track

JPEG = ('JPEG', 'MPO')  # MPO: a JPEG file with further pictures behind the first, as some cameras write them
REMEMBERED_FROM = 1000  # fewer files are read in some 0.1 s
_END = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}
# Formats whose header tells Pillow more than 8 bits, or that have no more; in PPM and JPEG 2000 it reads them as 8.
_TOLD = (*JPEG, 'PNG', 'TIFF', 'BMP', 'WEBP', 'GIF')
_CHUNK = 128  # files that a process is given at a time: their headers take it some 10 ms
_VERSION = 4  # of what is remembered
# Modes of images of 8 bits without alpha; '': Pillow does not know the format, and OpenCV finds such an image in it.
_PLAIN = ('RGB', 'L', 'P', '1', 'CMYK', 'YCbCr', '')
_ALPHA = ('RGBA', 'LA', 'PA', 'RGBa', 'La', 'uint8 of 4 channels')
_TRANSPARENT = ' with transparency'  # behind the mode of an image of which some colour is
# What libjpeg remarks upon and decodes all the same, since nothing of it bears on the pixels of a photograph.
_HARMLESS = ('Invalid SOS parameters', 'Warning: unknown JFIF revision', 'Unknown Adobe color transform')
# The entry of EXIF data, of either byte order, that holds an orientation other than 1.
_ORIENTATION = re.compile(rb'\x12\x01..\x01\0\0\0[\2-\10]|\x01\x12..\0\0\0\x01\0[\2-\10]', re.DOTALL)
_FORTH, _BACK = slice(None), slice(None, None, -1)
# How EXIF's orientations 1 to 4 read rows and columns of a picture, and 5 to 8 those of its transpose.
_FLIPS = ((_FORTH, _FORTH), (_FORTH, _BACK), (_BACK, _BACK), (_BACK, _FORTH))
_TAIL = 1 << 16  # bytes, in which a PNG file's chunks behind its pixels are looked for


class Task(NamedTuple):
    """A file to read.

    Attributes:
        path: Where it is.
        is_label: Whether it is a label map.
        whole: Whether its pixels are wanted beside its header.
        backend: Of MMCV, by which the pipeline decodes it.
        may_turn: Whether the pipeline turns it as EXIF says; TIFF files it always turns.
    """

    path: str
    is_label: bool
    whole: bool
    backend: str = 'pillow'
    may_turn: bool = False


class Picture(NamedTuple):
    """What is known of a file.

    Attributes:
        size: Its length in bytes.
        mtime_ns: When it was last written.
        whole: Whether its pixels were decoded.
        format: Pillow's name, as ``'PNG'``.
        mode: Pillow's name of its channels and depth, as ``'RGB'``, ``'I;16'`` or ``'RGB;16B'``; where only OpenCV
            tells, empty or, for other than 8 bits or with alpha, as ``'float32 of 3 channels'``. For an image with
            transparent colours, as ``'P with transparency'``.
        width: Of the picture as loaded; 0 where the header does not tell.
        height: Likewise.
        channels: Of the picture as loaded; a palette's index is one, for Pillow. 0 where the header does not tell.
        orientation: What loading does to it, as EXIF counts: from 1 (nothing) to 8.
        defect: Why it cannot be read whole; empty if it can.
        unreadable: Why the system did not let it be read; empty if it did.
        remark: Of the decoder, which bears on no pixel.
        values: A decoded label map's [value, number of pixels] in rising order; None for all others.
    """

    size: int
    mtime_ns: int
    whole: bool = False
    format: str = ''
    mode: str = ''
    width: int = 0
    height: int = 0
    channels: int = 0
    orientation: int = 1
    defect: str = ''
    unreadable: str = ''
    remark: str = ''
    values: list[list[int]] | None = None


def read_picture(task: Task) -> Picture | None:
    """Reads a file's header, and its pixels where they are wanted or the header makes them suspicious.

    Suspicious are a file without its format's end marker, a label map whose values the header leaves open (more than 8
    bits; for OpenCV one bit or a palette too), and an image with an orientation, which is what its loader makes of it.

    Returns:
        What was found; None if there is no such file.
    """
    picture = Picture(0, 0)
    try:
        status = os.stat(task.path)
        picture = Picture(status.st_size, status.st_mtime_ns, task.whole)
        if picture.size == 0:
            return picture._replace(defect='0 bytes')
        with open(task.path, 'rb') as file:
            picture = _read_header(picture, file, task)
            picture = _read_pixels(picture, file, task)
    except FileNotFoundError:
        return None
    except ImportError:  # of simplejpeg
        raise
    except Exception as error:  # whatever a decoder raises is the finding; what the header said stays
        found = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):  # decoders' have no number
            return picture._replace(unreadable=found)
        return picture._replace(defect=f'cut off before its end ({found})' if _is_cut(picture, task) else found)
    return picture


def _read_header(picture: Picture, file: BinaryIO, task: Task) -> Picture:
    """Adds what the header says; OpenCV, which loads images, is asked about one that Pillow does not take."""
    try:
        header = Image.open(file)
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        if not task.is_label and (mode := _opencv_mode(file)) is not None:
            return _as_loaded(picture._replace(mode=mode), file, task)
        if isinstance(error, Image.DecompressionBombError):
            raise
        file.seek(0)
        raise ValueError(f'no picture that can be read: it begins with {file.read(16)!r}') from error
    picture = picture._replace(
        format=header.format,
        mode=_mode(header, file, task),
        channels=len(header.getbands()),
        width=header.width,
        height=header.height,
    )
    if header.format == 'TIFF':  # which every decoder turns, whatever it is asked: Pillow's size is that of afterwards
        return picture._replace(orientation=_orientation(header.getexif()))
    return _as_loaded(picture, file, task) if task.may_turn and _has_orientation(header, file, task) else picture


def _mode(header: Image.Image, file: BinaryIO, task: Task) -> str:
    """Returns Pillow's mode of a picture, with what it leaves out."""
    raw_mode = str(header.tile[0][3]) if header.tile else ''
    wide = re.search(r'\w+;16\w*', raw_mode)  # Pillow reads RGB of 16 bits as 8
    if wide and header.mode[0] not in 'IF':
        return wide.group()
    if task.is_label or header.mode not in _PLAIN:
        return header.mode
    if _is_transparent(header):
        return f'{header.mode}{_TRANSPARENT}'
    return (header.format not in _TOLD and _opencv_mode(file)) or header.mode


def _is_transparent(header: Image.Image) -> bool:
    """Whether some colour is: one that is named, or a palette's, of which Pillow gives each one's opacity."""
    found = header.info.get('transparency')
    return bool(found.strip(b'\xff')) if isinstance(found, bytes) else found is not None


def _opencv_mode(file: BinaryIO) -> str | None:
    """Returns the mode of a picture that OpenCV decodes; None if it does not."""
    file.seek(0)  # by name OpenCV crashes where that is no UTF-8
    pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return None
    channels = pixels.shape[2] if pixels.ndim > 2 else 1
    return '' if pixels.dtype == np.uint8 and channels in (1, 3) else f'{pixels.dtype} of {channels} channels'


def loss_when_loaded(picture: Picture) -> str:
    """Returns what an image has that loading it as 8 bits in colour silently drops; empty if nothing."""
    if picture.mode in _PLAIN:
        return ''
    has_alpha = picture.mode in _ALPHA or picture.mode.endswith(_TRANSPARENT)
    return f'{"an alpha channel" if has_alpha else "other numbers than 8 bits"} (mode {picture.mode})'


def _has_orientation(header: Image.Image, file: BinaryIO, task: Task) -> bool:
    """Whether there is an orientation other than 1 that the loader may heed.

    Pillow reads XMP data too, which OpenCV does not; OpenCV reads EXIF data behind a PNG file's pixels, which Pillow's
    header has not reached.
    """
    exif = header.info.get('exif', b'')
    if header.format == 'PNG':
        file.seek(0 if task.whole else max(0, os.fstat(file.fileno()).st_size - _TAIL))
        behind = file.read()
        exif += behind[behind.find(b'eXIf') :] if b'eXIf' in behind else b''
    if _ORIENTATION.search(exif):
        return True
    # Asked for EXIF data that a PNG does not have, Pillow would decode all of it.
    has_tags = {'exif', 'xmp', 'Raw profile type exif'} & header.info.keys()
    return bool(has_tags or task.backend == 'pillow') and _orientation(header.getexif()) != 1


def _orientation(tags: Mapping[int, int]) -> int:
    orientation = tags.get(ExifTags.Base.Orientation)
    return orientation if orientation in range(2, 9) else 1  # some cameras write 0


def _as_loaded(picture: Picture, file: BinaryIO, task: Task) -> Picture:
    """Adds how an image is turned when it is loaded, and its size then: decoded with and without its orientation."""
    file.seek(0)
    data = file.read()
    flags = ('color_ignore_orientation', 'color' if task.may_turn else 'color_ignore_orientation')
    stored, loaded = (mmcv.imfrombytes(data, flag, backend=task.backend) for flag in flags)
    if loaded is None:
        raise ValueError(f'{task.backend} cannot decode it')
    turns = (view[flip] for view in (stored, stored.swapaxes(0, 1)) for flip in _FLIPS)
    orientation = next(i for i, turn in enumerate(turns, 1) if np.array_equal(turn, loaded))
    return picture._replace(width=loaded.shape[1], height=loaded.shape[0], orientation=orientation)


def _read_pixels(picture: Picture, file: BinaryIO, task: Task) -> Picture:
    """Decodes a file if it should be, and counts a label map's values; an error says that it is damaged."""
    says_little = picture.mode[:1] in ('I', 'F') or (task.backend != 'pillow' and picture.mode in ('1', 'P'))
    if not picture.format or not (task.whole or (task.is_label and says_little) or _lacks_end(picture, file)):
        return picture
    file.seek(0)
    if task.whole and picture.format in JPEG and not task.is_label:
        return picture._replace(remark=decode_strictly(file.read()))
    if task.whole and picture.format == 'PNG':
        Image.open(file).verify()  # the checksums
    file.seek(0)
    if not task.is_label:
        Image.open(file).load()
        return picture
    label = mmcv.imfrombytes(file.read(), 'unchanged', backend=task.backend)
    if label is None:
        raise ValueError(f'{task.backend} cannot decode it')
    if label.ndim > 2:
        return picture._replace(channels=label.shape[-1])
    return picture._replace(whole=True, values=count_values(label))


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


def decode_strictly(data: bytes) -> str:
    """Decodes a JPEG file and takes the decoder's warnings for errors, which OpenCV and Pillow do not.

    Of several warnings the decoder tells the first.

    Of 200 photographs in which 2 to 20 random bytes were overwritten, it notices 193 (quality 95), 194 (progressive)
    and 171 (optimised tables), OpenCV none and Pillow 19, 22 and 11. What cannot be noticed is a change that decodes
    as validly as the original: JPEG has no checksum. Decoding to grey at an eighth of the size reads the same bytes,
    in 0.7 ms for 480 x 360 in place of 1.2.

    Returns:
        A warning that bears on no pixel; empty if there was none.

    Raises:
        ValueError: The decoder raised an error or another warning.
    """
    import simplejpeg  # here: the check before a run does without it

    options = dict(colorspace='GRAY', fastdct=True, min_width=1, min_height=1, min_factor=8)
    try:
        simplejpeg.decode_jpeg(data, **options, strict=True)
    except ValueError as error:
        if not str(error).startswith(_HARMLESS):
            raise
        simplejpeg.decode_jpeg(data, **options, strict=False)
        return str(error)
    return ''


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
    """Writes what was found for ``recall``; where it cannot, the next check reads the files again.

    A file that could not be read is not remembered: rights and disks change without a new size or time.
    """
    files = {path: picture for path, picture in pictures.items() if picture and not picture.unreadable}
    content = dict(version=_VERSION, files=files)
    part = memory.with_name(f'{memory.name}.{os.getpid()}')
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content))
        part.replace(memory)
    except OSError:
        pass
