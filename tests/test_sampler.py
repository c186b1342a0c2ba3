"""Batches of images of one size: what they hold, over several processes, and how sizes are read."""

import itertools

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset
from mmseg.datasets import BaseSegDataset
from torch.utils.data import Subset

import mmseg_resnest.sampler
from mmseg_resnest.sampler import EqualSizeBatchSampler, equal_size_batches, image_sizes

SIZES = [(60, 40), (30, 20), (60, 40), (40, 60), (60, 40), (0, 0), (30, 20), (0, 0)]


@pytest.mark.parametrize('batch_size', [1, 2, 3, 100])
def test_batches(batch_size):
    batches = equal_size_batches(SIZES, batch_size)
    assert sorted(itertools.chain(*batches)) == list(range(len(SIZES)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({SIZES[i] for i in batch}) == 1
        assert SIZES[batch[0]] != (0, 0) or len(batch) == 1
    pixels = [len(batch) * SIZES[batch[0]][0] * SIZES[batch[0]][1] for batch in batches]
    assert pixels == sorted(pixels, reverse=True)
    if batch_size == 100:
        assert batches[:3] == [[0, 2, 4], [3], [1, 6]]


def make_data_set(root, sizes, **options):
    for i, (width, height) in enumerate(sizes):
        image = np.zeros((height, width, 3), np.uint8)
        (root / 'images').mkdir(exist_ok=True, parents=True)
        cv2.imwrite(str(root / f'images/{i:04}.jpg'), image)
    return BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path='images'),
        pipeline=[dict(type='LoadImageFromFile')],
        metainfo=dict(classes=('a',)),
        test_mode=True,
        **options,
    )


@pytest.mark.parametrize('world_size', [1, 2, 3, 7])
def test_each_image_once_over_processes(world_size, tmp_path, monkeypatch):
    data_set = make_data_set(tmp_path, [(60, 40), (30, 20), (60, 40), (40, 60), (60, 40), (30, 20)])
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(mmseg_resnest.sampler, 'get_dist_info', lambda rank=rank: (rank, world_size))
        if rank:  # what the first process has read comes to the others

            def share(objects):
                objects[0] = image_sizes(data_set)

            monkeypatch.setattr(mmseg_resnest.sampler, 'broadcast_object_list', share)
        sampler = EqualSizeBatchSampler(_Of(data_set), batch_size=2)
        assert len(sampler) == len(list(sampler))
        seen += itertools.chain(*sampler)
    assert sorted(seen) == list(range(6))


class _Of:
    def __init__(self, dataset):
        self.dataset = dataset


def test_sizes_are_those_after_loading(tmp_path):
    from PIL import Image

    data_set = make_data_set(tmp_path, [(60, 40), (30, 20), (50, 50)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter when loaded
    Image.open(tmp_path / 'images/0000.jpg').save(tmp_path / 'images/0000.jpg', exif=exif)
    (tmp_path / 'images/0002.jpg').write_bytes(b'')
    assert image_sizes(data_set) == [(40, 60), (30, 20), (0, 0)]
    both = ConcatDataset([data_set, make_data_set(tmp_path / 'other', [(10, 70)])], ignore_keys=['classes'])
    assert image_sizes(both) == [(40, 60), (30, 20), (0, 0), (10, 70)]
    for i, size in enumerate(image_sizes(data_set)[:2]):
        assert data_set[i]['img'].shape[1::-1] == size


def test_a_part_of_a_data_set(tmp_path):
    data_set = make_data_set(tmp_path, [(60, 40), (30, 20), (50, 50), (10, 70)])
    part = Subset(data_set, [3, 0, 1])
    assert image_sizes(part) == [(10, 70), (60, 40), (30, 20)]
    assert image_sizes(Subset(part, [2, 0])) == [(30, 20), (10, 70)]


def test_sizes_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(mmseg_resnest.sampler, 'REMEMBERED_FROM', 2)
    data_set = make_data_set(tmp_path, [(60, 40), (30, 20)])
    assert image_sizes(data_set) == [(60, 40), (30, 20)]
    read = []
    monkeypatch.setattr('mmseg_resnest.picture_files.read_picture', read.append)
    assert image_sizes(data_set) == [(60, 40), (30, 20)]
    assert read == []
    make_data_set(tmp_path, [(60, 40), (31, 20)])
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(mmseg_resnest.sampler, 'REMEMBERED_FROM', 2)
    assert image_sizes(data_set) == [(60, 40), (31, 20)]
