"""Label maps of images: paths, arrays or tensors, of any sizes, by the path that evaluation takes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from numpy import ndarray
from torch import Tensor

from mmseg_resnest.checkpoints import check_options, load_strictly, model_weights, read_checkpoint
from mmseg_resnest.datasets import datasets_of
from mmseg_resnest.inference import are_finite, check_finite
from mmseg_resnest.network import Speed, default_speed, speed_up
from mmseg_resnest.picture_files import Task, loss_when_loaded, read_picture

Image = str | Path | ndarray | Tensor
EXPECTED = 'expected a picture of 8 bits, grey or colour, that decodes whole'
AHEAD = 4  # batches of images that are sorted by size


class Predictor:
    """Segments images with a trained model.

        predictor = Predictor('configs/deeplabv3_resnest101_ade20k.py', 'iter_160000.pth')
        labels = predictor('street.jpg')                  # (H, W) uint8
        first, second = predictor(['a.jpg', array])       # of any sizes
        for labels in predictor(video_frames()):          # an iterator stays one
            ...

    Images of one size run together, never padded. Arrays are (H, W, 3) uint8, BGR, as OpenCV reads them; tensors
    (3, H, W) uint8, RGB, as torchvision does. A file is turned as its EXIF orientation says.

    Args:
        config: A config, or its path.
        checkpoint: Its weights, which must fit.
        device: ``'cuda'``, ``'cuda:1'``, ``'cpu'``; None: a GPU if there is one.
        speed: How the network runs; None: ``network.default_speed``.
        batch_size: Images that run together, at most.

    Attributes:
        classes: Their names.
        palette: (classes, 3) uint8, RGB.

    Raises:
        ValueError: ``batch_size`` is less than 1, or the checkpoint does not fit; the message says what does not.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        device: str | torch.device | None = None,
        speed: Speed | None = None,
        batch_size: int = 8,
    ) -> None:
        cfg = config.copy() if isinstance(config, Config) else Config.fromfile(config)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        kind = cfg.model.type
        if (kind if isinstance(kind, type) else MODELS.get(kind)) is EncoderDecoder:
            cfg.model.type = 'mmseg_resnest.EncoderDecoder'
        self.device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size}; expected 1 or more')
        self.batch_size = batch_size
        self.model = MODELS.build(cfg.model)
        content = read_checkpoint(checkpoint)
        load_strictly(self.model, model_weights(content), str(checkpoint))
        check_options(content, self.model, str(checkpoint))
        self.model.to(self.device)
        speed_up(self.model, speed or default_speed(self.device))
        dataset = next(datasets_of(cfg.test_dataloader.dataset))
        self.classes, self.palette = _classes(content, dataset, self.model.num_classes)
        steps = [t for t in dataset.pipeline if not _name(t).endswith('LoadAnnotations')]
        self._from_file = Compose([TRANSFORMS.build(step) for step in steps])
        rest = [step for step in steps if not _name(step).endswith('LoadImageFromFile')]
        self._from_array = Compose([TRANSFORMS.build(step) for step in [dict(type='LoadImageFromNDArray'), *rest]])

    def __call__(self, images: Image | Iterable[Image]) -> ndarray | list[ndarray] | Iterator[ndarray]:
        """Returns the label map (H, W) of an image, those of a list, or an iterator over those of an iterator.

        An iterator is read ``AHEAD * batch_size`` images at a time, and those of one size run together. Where one is
        bad, the label maps of all before it come first, and then the error.

        Raises:
            ValueError: An image is not one of 8 bits, does not decode, or has another shape; the message names it.
        """
        if isinstance(images, str | Path | ndarray | Tensor) or not isinstance(images, Iterable):
            return next(self._stream([images]))
        if isinstance(images, Iterator):
            return self._stream(images)
        return list(self._stream(images))

    def _stream(self, images: Iterable[Image]) -> Iterator[ndarray]:
        stream, error = map(self.prepare, images), None
        while error is None:
            group = []
            try:
                for item in islice(stream, AHEAD * self.batch_size):
                    group.append(item)
            except Exception as found:  # an image's, or the iterator's own
                error = found
            if not group and error is None:
                return
            yield from self.predict(group)
        raise error

    def prepare(self, image: Image) -> dict:
        """Loads and transforms an image, in any thread.

        Raises:
            ValueError: It cannot be predicted; the message names it, what was found and what was expected.
        """
        if isinstance(image, str | Path):
            check_image(image)
            try:
                return self._from_file(dict(img_path=str(image)))
            except Exception as error:  # whatever a decoder or a transform raises
                found = f'{type(error).__name__}: {" ".join(str(error).split())}'
                raise ValueError(f'{image}: {found}; {EXPECTED}') from error
        array = image.detach().cpu().permute(1, 2, 0).numpy()[..., ::-1] if _is_picture(image) else image
        if not isinstance(array, ndarray) or array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            found = f' {tuple(image.shape)}, {image.dtype}' if isinstance(image, ndarray | Tensor) else ''
            raise ValueError(
                f'an image is {type(image).__name__}{found}; expected a path, an array (H, W, 3) uint8, BGR, or a '
                'tensor (3, H, W) uint8, RGB'
            )
        if 0 in array.shape:
            raise ValueError(f'an image is {tuple(image.shape)}; expected at least one pixel')
        return self._from_array(dict(img=np.ascontiguousarray(array)))

    @torch.no_grad()
    def predict(self, prepared: Sequence[dict]) -> list[ndarray]:
        """Returns the label maps of prepared images, those of one size in batches; in one thread at a time.

        Raises:
            ValueError: The logits of an image are not finite.
        """
        by_size = defaultdict(list)
        for i, item in enumerate(prepared):
            by_size[item['inputs'].shape].append(i)
        labels: dict[int, ndarray] = {}
        for group in by_size.values():
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                batch = {key: [prepared[i][key] for i in part] for key in ('inputs', 'data_samples')}
                for i, sample in zip(part, self.model.test_step(batch), strict=True):
                    labels[i] = sample.pred_sem_seg.data[0].cpu().numpy()
                    if 'finite' not in sample:  # of a head or a model that predicts by itself
                        sample.finite = are_finite(sample.seg_logits.data[None])
                    check_finite(sample)
        return [labels[i] for i in range(len(prepared))]


def check_image(path: str | Path) -> None:
    """Raises a ValueError if a file is not a picture of 8 bits without alpha that decodes whole."""
    picture = read_picture(Task(str(path), False, False, 'cv2', True))
    if picture is None:
        raise ValueError(f'{path}: there is no such file; {EXPECTED}')
    if found := picture.defect or picture.unreadable:
        raise ValueError(f'{path}: {found}; {EXPECTED}')
    if found := loss_when_loaded(picture):
        raise ValueError(f'{path}: {found}; {EXPECTED}. Convert it, as you mean it')


def _is_picture(image: Image) -> bool:
    return isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3


def _name(transform: dict) -> str:
    return transform['type'] if isinstance(transform['type'], str) else transform['type'].__name__


def _classes(checkpoint: dict, dataset: dict, count: int) -> tuple[tuple[str, ...], ndarray]:
    """Returns names and colours: the checkpoint's, else the data set's, else numbers and colours drawn from a seed."""
    kind = dataset.type if isinstance(dataset.type, type) else DATASETS.get(dataset.type)
    sources = ((checkpoint.get('meta') or {}).get('dataset_meta'), dataset.get('metainfo'), kind.METAINFO)
    fitting = [meta for meta in sources if meta and len(meta.get('classes') or ()) == count]
    names = tuple(fitting[0]['classes']) if fitting else tuple(map(str, range(count)))
    palette = fitting[0].get('palette') if fitting else None
    if palette is None or len(palette) != count:
        palette = np.random.default_rng(0).integers(0, 256, (count, 3))
    return names, np.asarray(palette, np.uint8)
