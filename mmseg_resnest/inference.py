"""From the network's logits to data samples, as mmsegmentation's EncoderDecoder does it: whole images and windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from mmseg_resnest.ops import Placement, place, upsample_argmax

WINDOWS = 8  # that the network gets at a time


@contextmanager
def cudnn_search(enabled: bool) -> Iterator[None]:
    """Has cuDNN try its algorithms for each new size of images, or take those that it thinks best.

    Trying them takes seconds a size, 7 to 10 for ResNeSt-101 in float16 and batches of eight on an H200: more than a
    data set of many sizes can win back.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class DeferredLogits(PixelData):
    """A sample's ``seg_logits``: full-resolution logits that are computed, and stored, when ``data`` is first read.

    Args:
        compute: Returns them, (C, H, W).
        shape: H and W.
    """

    def __init__(self, compute: Callable[[], Tensor], shape: tuple[int, int]) -> None:
        super().__init__()
        object.__setattr__(self, '_compute', compute)
        object.__setattr__(self, '_shape', shape)
        self._data_fields.add('data')

    def __getattr__(self, name: str) -> Any:
        """Finds what is not there yet: ``data``, unless it was popped."""
        if name != 'data' or name not in self._data_fields:
            raise AttributeError(f'{type(self).__name__} has no {name}')
        self.data = self._compute()
        return self.data

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self._shape

    def __getitem__(self, item: Sequence[int | slice]) -> PixelData:
        """Returns a plain part."""
        return self.clone()[item]

    def new(self, **kwargs: Any) -> PixelData:
        """Returns a plain copy, on whatever device or in whatever format it is asked for."""
        return self.clone().new(**kwargs)

    def clone(self) -> PixelData:
        """Returns a plain copy."""
        return _plain(self.metainfo, dict(self.items()))

    def pop(self, *args: Any) -> Any:
        """Computes what it removes."""
        self.get(args[0])
        return super().pop(*args)

    def to_dict(self) -> Mapping[str, Any]:
        """Returns a mapping that computes ``data`` when it is read: MMEngine asks for one of each sample."""
        return DeferredDict(self)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Lets copies and pickles be plain, too."""
        return _plain, (self.metainfo, dict(self.items()))


def _plain(metainfo: dict, data: dict) -> PixelData:
    return PixelData(metainfo=metainfo, **data)


class DeferredDict(Mapping):
    """``DeferredLogits`` as metrics get them; copies and pickles are a plain dict.

    Args:
        logits: Whose fields it has.
    """

    def __init__(self, logits: DeferredLogits) -> None:
        self.logits = logits

    def __getitem__(self, key: str) -> Any:
        """Returns a field, computed if it must be."""
        if key not in self.logits:
            raise KeyError(key)
        return getattr(self.logits, key)

    def __contains__(self, key: object) -> bool:
        """Whether there is such a field; it is not computed."""
        return key in self.logits

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the fields."""
        return iter(self.logits.all_keys())

    def __len__(self) -> int:
        """Returns how many fields there are."""
        return len(self.logits.all_keys())

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Computes the fields."""
        return dict, (dict(self),)


def placement_of(sample: SegDataSample, via: tuple[int, int], align_corners: bool) -> Placement:
    """Returns how a sample's logits come to lie on its image.

    Args:
        sample: With the keys of PackSegInputs; its image may be padded or mirrored.
        via: The network's input, padding included, as mmsegmentation's heads resize to it.
        align_corners: The head's.

    Raises:
        ValueError: It is mirrored, but ``flip_direction`` does not say how.
    """
    meta = sample.metainfo
    flip = meta.get('flip_direction') if meta.get('flip') else None
    if meta.get('flip') and flip not in ('horizontal', 'vertical'):
        raise ValueError(f'{meta.get("img_path")}: flip=True, flip_direction={flip}; expected horizontal or vertical')
    return Placement(
        tuple(meta.get('ori_shape', via))[:2],
        via,
        tuple(meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))),
        flip,
        align_corners,
    )


def finish(
    logits: Tensor,
    samples: Sequence[SegDataSample],
    placements: Sequence[Placement],
    threshold: float | None,
    impl: str | None,
) -> None:
    """Adds to each sample what mmsegmentation does: ``pred_sem_seg`` (1, H, W), and ``seg_logits`` (C, H, W), deferred.

    Labels are uint8 for up to 256 classes. One channel becomes a probability. ``finite``, a scalar on the device, is
    what ``check_finite`` looks at.

    Args:
        logits: (N, C, h, w).
        samples: N of them.
        placements: Of each sample's logits.
        threshold: For one channel.
        impl: Of ``upsample_argmax``.
    """
    finite = are_finite(logits)
    for placement in dict.fromkeys(placements):
        same = [i for i, other in enumerate(placements) if other == placement]
        part = logits if len(same) == len(logits) else logits[same]
        labels, _ = upsample_argmax(part, placement, threshold=threshold, impl=impl)
        for i, label in zip(same, labels, strict=True):
            samples[i].pred_sem_seg = PixelData(data=label[None])
            compute = _deferred(logits[i : i + 1], placement, threshold)
            samples[i].seg_logits = DeferredLogits(compute, placement.size)
            samples[i].finite = finite[i]


def are_finite(logits: Tensor) -> Tensor:
    """Returns (N,), of logits (N, C, H, W): whether none of an image's is nan, infinite, or in float16 minus infinite.

    Else minus infinity rules a class out; float16 also reaches it where an activation overflows.
    """
    if logits.dtype == torch.float16:
        logits = logits.abs()
    return (logits < float('inf')).all(dim=(1, 2, 3))


def check_finite(sample: Mapping) -> None:
    """Refuses a prediction from logits that are not finite: its labels are of no class in particular, mostly class 0.

    It waits for the device.

    Raises:
        ValueError: They are not.
    """
    if not sample.get('finite', True):
        raise ValueError(
            f'{sample.get("img_path") or "an image without a path"}: the logits are not finite; expected numbers. In '
            'float16, in which a GPU predicts unless told otherwise, an activation above 65504 is infinite: take '
            "bfloat16 or float32 (--dtype, Speed(dtype='float32')). If they are not finite in float32 the weights are "
            'damaged, or their training diverged'
        )


def _deferred(logits: Tensor, placement: Placement, threshold: float | None) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        with torch.no_grad():
            placed = place(logits.to(torch.promote_types(logits.dtype, torch.float32)), placement)[0]
            return placed if threshold is None else placed.sigmoid()

    return compute


def slide(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    crop_size: tuple[int, int],
    stride: tuple[int, int],
    channels: int,
    align_corners: bool,
) -> Tensor:
    """Averages the logits of overlapping windows, as mmsegmentation's ``slide_inference`` does.

    Windows run through the network together, and their logits are added to the one full-size tensor in place.

    Args:
        network: Maps images (B, 3, h, w) to logits (B, channels, h', w').
        inputs: (N, 3, H, W).
        crop_size: Height and width of a window; a smaller image is one window.
        stride: Steps from one window to the next.
        channels: Of the logits.
        align_corners: Whether the logits are resized to the window so.

    Returns:
        (N, channels, H, W), float32 at least.

    Raises:
        ValueError: Windows leave pixels out.
    """
    if any(step > crop for step, crop in zip(stride, crop_size, strict=True)):
        raise ValueError(
            f'model.test_cfg: stride={tuple(stride)} leaves pixels out between windows of crop_size='
            f'{tuple(crop_size)}; expected a stride no larger than the window'
        )
    count, _, height, width = inputs.shape
    size = min(crop_size[0], height), min(crop_size[1], width)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    total = inputs.new_zeros((count, channels, height, width), dtype=dtype)
    covered = inputs.new_zeros((height, width), dtype=dtype)
    corners = [
        (top, left) for top in _starts(height, size[0], stride[0]) for left in _starts(width, size[1], stride[1])
    ]
    for group in _groups(corners, max(WINDOWS // count, 1)):
        windows = torch.cat([inputs[..., top : top + size[0], left : left + size[1]] for top, left in group])
        logits = place(network(windows).to(dtype), Placement(size, align_corners=align_corners))
        for (top, left), part in zip(group, logits.split(count), strict=True):
            total[..., top : top + size[0], left : left + size[1]] += part
            covered[top : top + size[0], left : left + size[1]] += 1
    return total.div_(covered)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """Returns where windows begin; the last ends with the image."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, length - crop) for i in range(count)]


def _groups(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
