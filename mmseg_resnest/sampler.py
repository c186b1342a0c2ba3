"""The order of evaluation: batches of images of one size, each image once, over any number of processes."""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dist import broadcast_object_list, get_dist_info
from torch.utils.data import Sampler, Subset

from mmseg_resnest.picture_files import REMEMBERED_FROM, Task, memory_of, read_pictures, recall, remember
from mmseg_resnest.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class EqualSizeBatchSampler(Sampler):
    """Batches of images of one size: ResNeSt pools over the whole image, so that padding one changes its logits.

    The sizes are those of the files as they are loaded, read from their headers, and remembered for data sets of
    ``REMEMBERED_FROM`` files or more. The largest batches come first and the processes take turns, so that they end
    together; each image comes once, and a process may get a batch less than another.

    Args:
        sampler: Of which only the data set is taken: one of MMEngine, one that concatenates such, or a Subset.
        batch_size: Images in a batch, at most.
    """

    def __init__(self, sampler: Sampler, batch_size: int) -> None:
        rank, world_size = get_dist_info()
        sizes = [image_sizes(sampler.dataset) if rank == 0 else None]
        broadcast_object_list(sizes)
        self.batch_size = batch_size
        self.batches = equal_size_batches(sizes[0], batch_size)[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the indices of each batch."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Returns the number of this process's batches."""
        return len(self.batches)


def equal_size_batches(sizes: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Returns the indices of images of one size in batches, those with the most pixels first.

    A size that is not known, (0, 0), makes a batch of its own.
    """
    groups = defaultdict(list)
    for i, size in enumerate(sizes):
        groups[size if all(size) else i].append(i)
    batches = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]

    def work(batch: list[int]) -> tuple:
        width, height = sizes[batch[0]]
        return -width * height * len(batch), width, batch

    return sorted(batches, key=work)


def image_sizes(dataset: Any) -> list[tuple[int, int]]:
    """Returns the width and height of each image of a data set as its pipeline loads it; (0, 0) if it is unreadable."""
    loader = _loader(dataset)
    backend, turns = loader.imdecode_backend or 'cv2', loader.color_type in ('color', 'grayscale')
    paths = [_path(dataset, i) for i in range(len(dataset))]
    tasks = [Task(path, False, False, backend, turns) for path in dict.fromkeys(paths)]
    if len(tasks) < REMEMBERED_FROM:
        pictures = read_pictures(tasks, title='image sizes')
    else:
        memory = memory_of('sizes', backend, str(turns), *sorted({os.path.dirname(os.path.abspath(p)) for p in paths}))
        known = recall(memory)
        pictures = read_pictures(tasks, known, 'image sizes')
        if pictures != known:
            remember(memory, pictures)
    return [(picture.width, picture.height) if (picture := pictures[path]) else (0, 0) for path in paths]


def _path(dataset: Any, i: int) -> str:
    if isinstance(dataset, Subset):
        return _path(dataset.dataset, dataset.indices[i])
    return dataset.get_data_info(i)['img_path']


def _loader(dataset: Any) -> LoadImageFromFile:
    """Returns the transform that loads images, of the first data set inside of wrappers."""
    while hasattr(dataset, 'datasets') or hasattr(dataset, 'dataset'):
        dataset = dataset.datasets[0] if hasattr(dataset, 'datasets') else dataset.dataset
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    return next((t for t in transforms if isinstance(t, LoadImageFromFile)), None) or LoadImageFromFile()
