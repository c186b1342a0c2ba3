"""Every way in which data is known to go wrong, each with what the check says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

PAIR = 'Get the file again from where it comes, or remove it and its partner.'
LOSS = (
    'expected 8 bits, grey or colour. The loader keeps the upper 8 of 16 bits, and no alpha; write 8 bits without it, '
    'as you mean it.'
)


class Row(NamedTuple):
    """How to spoil an image and its label map, and the line of the finding; only decoding tells what is ``hidden``."""

    spoil: Callable[[Path, Path], object]
    line: str
    hidden: bool = False


def cut(path: Path, bytes_off: int) -> None:
    path.write_bytes(path.read_bytes()[:-bytes_off])


def overwrite(path: Path) -> None:
    """Overwrites 20 bytes in the middle, which a decoder gets over."""
    before, data = cv2.imread(str(path)), bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(range(20))
    path.write_bytes(data)
    assert (cv2.imread(str(path)) != before).mean() > 0.1


def paint(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites a picture."""
    cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def with_value(value: int, dtype: type = np.uint8) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what sets the upper half of a label map."""

    def change(label: np.ndarray) -> np.ndarray:
        label = label.astype(dtype)
        label[:24] = value
        return label

    return change


def turn(path: Path, orientation: int) -> None:
    """Sets the EXIF orientation."""
    image, exif = Image.open(path), Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


ROWS = {
    'truncated JPEG': Row(
        lambda image, label: cut(image, 900),
        '{image}: cut off before its end (',
    ),
    'garbage JPEG': Row(
        lambda image, label: image.write_text('<html>404 Not Found</html>'),
        "{image}: no picture that can be read: it begins with b'<html>404 Not Fo'; expected a picture that decodes "
        'whole. ' + PAIR,
    ),
    'corrupt bytes in a JPEG': Row(
        lambda image, label: overwrite(image),
        '{image}: Corrupt JPEG data: ',
        hidden=True,
    ),
    'JPEG of 0 bytes': Row(
        lambda image, label: image.write_bytes(b''),
        '{image}: 0 bytes; expected a picture that decodes whole. ' + PAIR,
    ),
    'PNG of 0 bytes': Row(
        lambda image, label: label.write_bytes(b''),
        '{label}: 0 bytes; expected a picture that decodes whole. ' + PAIR,
    ),
    'truncated PNG': Row(
        lambda image, label: cut(label, 60),
        '{label}: cut off before its end (',
    ),
    'corrupt bytes in a PNG': Row(
        lambda image, label: overwrite_png(label),
        '{label}: broken PNG file',
    ),
    'missing image': Row(
        lambda image, label: image.unlink(),
        '{image}: no such file; expected the image of {label}. Put the image there, rename what was found, or set '
        'img_suffix; without it the pair is silently left out.',
    ),
    '.jpeg beside .jpg': Row(
        lambda image, label: image.rename(image.with_suffix('.jpeg')),
        '{image}: no such file (but {stem}.jpeg); expected the image of {label}. Put the image there, rename what was '
        'found, or set img_suffix; without it the pair is silently left out.',
    ),
    'missing label map': Row(
        lambda image, label: label.rename(label.with_suffix('.bmp')),
        '{label}: no such file (but {stem}.bmp); expected the label map of {image}. Put the label map there, rename '
        'what was found, or set seg_map_suffix; or remove the image.',
    ),
    'different sizes': Row(
        lambda image, label: paint(image, lambda pixels: pixels[:40]),
        '{image}: 64x40, its label map {label} 64x48 (width x height); expected the same size. Pair the right files, '
        'or export the label map anew.',
    ),
    'EXIF rotation': Row(
        lambda image, label: turn(image, 6),
        '{image}: EXIF orientation 6, by which it is turned when loaded, and its label map {label} is not; expected '
        'orientation 1. Where the label was drawn on the image as stored, remove the tag (exiftool -Orientation= '
        'FILE); where on the image as it is shown, turn the pixels (mogrify -auto-orient FILE).',
    ),
    'label out of range': Row(
        lambda image, label: paint(label, with_value(199)),
        '{label}: value 199 in 50 % of its pixels; expected 0-10, 255: 11 classes, and what is ignored. Correct the '
        'label map; or name all classes in metainfo.classes, and set num_classes of the heads.',
    ),
    '16-bit PNG': Row(
        lambda image, label: paint(label, with_value(1203, np.uint16)),
        '{label}: values to 1203 (I;16), which wrap to 8 bits: 1203 becomes 179; expected values of 8 bits. Write 8 '
        'bits; where these are instance numbers, take the file with the classes.',
    ),
    'RGB PNG': Row(
        lambda image, label: paint(label, lambda pixels: cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)),
        "{label}: 3 channels (RGB); expected one channel. Write one channel: each pixel's class by number, not by "
        'colour (docs/custom_dataset.md).',
    ),
    'JPEG for labels': Row(
        lambda image, label: label.write_bytes(cv2.imencode('.jpg', cv2.imread(str(label), 0) // 255)[1].tobytes()),
        '{label}: a JPEG file; expected PNG. JPEG changes the numbers at the borders of classes; write PNG from the '
        'original labels.',
    ),
}


# What loading drops from an image: an error in a test, a warning in training.
LOSSES = {
    '16-bit image': Row(
        lambda image, label: convert(image, lambda pixels: pixels.astype(np.uint16) * 257),
        '{image}: other numbers than 8 bits (mode RGB;16B); ' + LOSS,
    ),
    'image with alpha': Row(
        lambda image, label: convert(image, lambda pixels: cv2.cvtColor(pixels, cv2.COLOR_BGR2BGRA)),
        '{image}: an alpha channel (mode RGBA); ' + LOSS,
    ),
    'image with a transparent colour': Row(
        lambda image, label: Image.open(image).save(image, format='PNG', transparency=(0, 0, 0)),
        '{image}: an alpha channel (mode RGB with transparency); ' + LOSS,
    ),
}


def convert(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites a picture as PNG, under its name."""
    path.write_bytes(cv2.imencode('.png', change(cv2.imread(str(path))))[1].tobytes())


def overwrite_png(path: Path) -> None:
    """Flips a bit of the compressed pixels' checksum."""
    data = bytearray(path.read_bytes())
    data[-13] ^= 1
    path.write_bytes(data)


def spoil(root: Path, split: str, name: str, row: str) -> str:
    """Spoils a pair and returns its finding's line."""
    image, label = root / 'images' / split / f'{name}.jpg', root / 'annotations' / split / f'{name}.png'
    rows = ROWS | LOSSES
    rows[row].spoil(image, label)
    return rows[row].line.format(image=image, label=label, stem=name)
