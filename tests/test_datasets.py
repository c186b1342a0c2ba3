"""The check of a data set's folders before a run, and moving a config's data sets to another root."""

import re

import pytest
from mmengine.config import Config, ConfigDict
from mmseg.datasets import BaseSegDataset, CityscapesDataset
from mmseg.registry import DATASETS

from mmseg_resnest.datasets import check_classes, check_folders, datasets_of, set_data_root


@DATASETS.register_module()
class TiffDataset(BaseSegDataset):
    """A user's data set, which hides its suffixes."""

    def __init__(self, **kwargs):
        super().__init__(img_suffix='.tiff', seg_map_suffix='.tiff', **kwargs)


@pytest.fixture
def root(tmp_path):
    """ADE20K's layout with one pair of files, and Cityscapes' beside it."""
    for name in (
        'images/training/a.jpg',
        'annotations/training/a.png',
        'leftImg8bit/train/zurich/a_leftImg8bit.png',
        'gtFine/train/zurich/a_gtFine_labelTrainIds.png',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def ade(root, **options):
    prefix = dict(img_path='images/training', seg_map_path='annotations/training')
    return ConfigDict(type='ADE20KDataset', data_root=str(root), data_prefix=prefix, **options)


def cityscapes(root, **options):
    prefix = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
    return ConfigDict(type='CityscapesDataset', data_root=str(root), data_prefix=prefix, **options)


def wrapped(*parts):
    concatenated = ConfigDict(type='ConcatDataset', datasets=list(parts))
    return ConfigDict(type='RepeatDataset', times=3, dataset=concatenated)


def test_what_is_there_passes(root):
    for data_set in (ade(root), cityscapes(root), wrapped(ade(root), cityscapes(root))):
        assert check_folders('train_dataloader', data_set) is None


def test_paths_without_a_root(root, monkeypatch):
    monkeypatch.chdir(root)
    data_set = ade(root)
    del data_set['data_root']
    check_folders('train_dataloader', data_set)
    data_set.data_prefix = dict(img_path=str(root / 'images'), seg_map_path=str(root / 'annotations'))
    check_folders('train_dataloader', data_set)
    data_set.data_prefix.img_path = 'image'
    with pytest.raises(
        FileNotFoundError, match=r'image does not exist; \. holds annotations, gtFine, images, leftImg8bit'
    ):
        check_folders('train_dataloader', data_set)


FIX = 'Put the data set there, or say where it is with --data-root DIR.'


def message(data_set, loader='val_dataloader'):
    with pytest.raises(FileNotFoundError) as error:
        check_folders(loader, data_set)
    return str(error.value)


def test_missing_root(root):
    none = root / 'none'
    assert message(ade(none)) == f'val_dataloader.dataset: data_root {str(none)!r} does not exist. {FIX}'
    assert message(ade(none), 'train_dataloader').startswith('train_dataloader.dataset: data_root')
    file = root / 'images/training/a.jpg'
    assert f'data_root {str(file)!r} is a file, not a folder. {FIX}' in message(ade(file))


def test_linked_folders_are_followed(root):
    (root / 'elsewhere').mkdir()
    (root / 'images/training/a.jpg').rename(root / 'elsewhere/a.jpg')
    assert 'holds no *.jpg' in message(ade(root))
    (root / 'images/training/city').symlink_to(root / 'elsewhere')
    check_folders('val_dataloader', ade(root))


@pytest.mark.parametrize(
    ('data_set', 'classes'),
    [
        (dict(type='ADE20KDataset'), 150),
        (dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b', 'c'))), 3),
        (dict(type='RepeatDataset', times=2, dataset=dict(type='CityscapesDataset')), 19),
    ],
)
def test_heads_with_other_classes_are_refused(data_set, classes):
    def config(decode: int, auxiliary: int) -> Config:
        heads = dict(decode_head=dict(num_classes=decode), auxiliary_head=dict(num_classes=auxiliary))
        return Config(dict(model=heads, test_dataloader=dict(dataset=data_set)))

    check_classes('test_dataloader', config(classes, classes))
    with pytest.raises(ValueError, match=f'model.decode_head.num_classes=7, but test_dataloader.dataset has {classes}'):
        check_classes('test_dataloader', config(7, classes))
    with pytest.raises(ValueError, match=r'model.auxiliary_head.num_classes=7, but'):
        check_classes('test_dataloader', config(classes, 7))


def test_empty_root(root):
    (root / 'empty').mkdir()
    folder = root / 'empty' / 'images/training'
    assert message(ade(root / 'empty')) == (
        f'val_dataloader.dataset: {folder} does not exist; {root}/empty holds nothing. {FIX}'
    )


def test_another_layout(root):
    (root / 'annotations/training').rename(root / 'annotations/train')
    assert message(ade(root)) == (
        f'val_dataloader.dataset: {root}/annotations/training does not exist; '
        f'{root} holds annotations, gtFine, images, leftImg8bit. {FIX}'
    )


@pytest.mark.parametrize('make', [ade, lambda root, **options: wrapped(cityscapes(root), ade(root, **options))])
def test_wrong_suffix(root, make):
    assert message(make(root, img_suffix='.png')) == (
        f'val_dataloader.dataset: {root}/images/training holds no *.png (found: .jpg). {FIX}'
    )
    assert message(make(root, seg_map_suffix='_label.png')) == (
        f'val_dataloader.dataset: {root}/annotations/training holds no *_label.png (found: .png). {FIX}'
    )


def test_folder_without_files(root):
    (root / 'images/training/a.jpg').unlink()
    assert 'images/training holds no *.jpg (found: nothing)' in message(ade(root))


def test_a_class_has_its_own_suffixes(root):
    labels = root / 'gtFine/train/zurich/a_gtFine_labelTrainIds.png'
    labels.rename(labels.with_name('a_gtFine_labelIds.png'))  # the official files, before their conversion
    assert message(cityscapes(root)) == (
        f'val_dataloader.dataset: {root}/gtFine/train holds no *_gtFine_labelTrainIds.png (found: .png). {FIX}'
    )
    check_folders('val_dataloader', cityscapes(root, seg_map_suffix='_gtFine_labelIds.png'))
    pure_python = cityscapes(root)
    pure_python.type = CityscapesDataset  # a class, as in MMEngine's pure-Python configs
    assert '*_gtFine_labelTrainIds.png' in message(pure_python)


def test_a_class_that_hides_its_suffixes_is_not_refused(root):
    data_set = ade(root)
    data_set.type = 'TiffDataset'
    check_folders('train_dataloader', data_set)
    (root / 'images/training/a.jpg').unlink()
    assert re.search(r'images/training holds no \* \(found: nothing\)', message(data_set))


def test_a_misspelt_class_is_left_to_the_registry(root):
    data_set = ade(root)
    data_set.type = 'ADE20kDataset'
    check_folders('train_dataloader', data_set)


def test_wrappers_are_looked_into(root):
    first, second = ade(root), cityscapes(root)
    assert list(datasets_of(wrapped(first, wrapped(second)))) == [first, second]
    assert list(datasets_of(first)) == [first]
    assert message(wrapped(first, ade(root / 'none'))).startswith('val_dataloader.dataset: data_root')


def test_set_data_root():
    cfg = Config(
        dict(
            train_dataloader=dict(batch_size=2, dataset=wrapped(ade('a'), cityscapes('b'))),
            val_dataloader=dict(dataset=ade('a')),
            test_dataloader=None,
            other=dict(dataset=ade('a')),
        )
    )
    set_data_root(cfg, 'new')
    parts = cfg.train_dataloader.dataset.dataset.datasets
    assert [part.data_root for part in parts] == ['new', 'new']
    assert [part.type for part in parts] == ['ADE20KDataset', 'CityscapesDataset']
    assert 'data_root' not in cfg.train_dataloader.dataset
    assert cfg.val_dataloader.dataset.data_root == 'new'
    assert cfg.other.dataset.data_root == 'a'
    assert cfg.test_dataloader is None
