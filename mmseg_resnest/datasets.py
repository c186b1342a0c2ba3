"""Data sets: what a config says about them. ``dataset_check`` looks into their files."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS, TRANSFORMS


def datasets_of(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Yields the data sets that a config's ``dataset`` holds, those inside wrappers too."""
    inner = dataset.get('datasets', dataset.get('dataset'))
    if inner is None:
        yield dataset
    else:
        for part in [inner] if isinstance(inner, Mapping) else inner:
            yield from datasets_of(part)


def set_data_root(cfg: Config, root: str) -> None:
    """Lets every data set of a config lie in ``root``."""
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(loader):
            for dataset in datasets_of(cfg[loader].dataset):
                dataset.data_root = root


@dataclass(frozen=True)
class Split:
    """The files of a data set and what its labels mean, as mmsegmentation has it.

    Attributes:
        name: The config's key, as ``'train_dataloader.dataset'``.
        pairs: The paths of each image and of its label map, or None where labels are not loaded.
        classes: Their names.
        meaning: (256,) uint8: what the pipeline makes of each value of a label map: a class's index, ``ignored``, or
            a number that is neither.
        ignored: The label that the loss ignores.
        reduce_zero_label: As the data set has it.
        label_map: Likewise; it is part of ``meaning``.
        loading: The pipeline's transforms that load images and label maps; empty where its files cannot be judged.
        folders: Where images and label maps are; empty unless the pairs are all files there.
        suffixes: Of images and label maps.
        unread: Why its files cannot be judged; empty if they can.
    """

    name: str
    pairs: list[tuple[str, str | None]]
    classes: tuple[str, ...]
    meaning: np.ndarray
    ignored: int
    reduce_zero_label: bool
    label_map: Mapping[int, int] | None
    loading: tuple[BaseTransform, ...]
    folders: tuple[str, ...]
    suffixes: tuple[str, str]
    unread: str

    @property
    def image_backend(self) -> str:
        """MMCV's backend that decodes images."""
        return _backend(self.loading[0])

    @property
    def label_backend(self) -> str:
        """MMCV's backend that decodes label maps."""
        return _backend(self.loading[-1])

    @property
    def may_turn(self) -> bool:
        """Whether images are turned as EXIF says; label maps are not."""
        return self.loading[0].color_type in ('color', 'grayscale') and self.image_backend in ('cv2', 'pillow')


def _backend(loader: BaseTransform) -> str:
    return loader.imdecode_backend or mmcv.image.io.imread_backend


def splits_of(cfg: Config, loaders: Sequence[str]) -> list[Split]:
    """Builds the data sets of a config's loaders, without their pipelines; those inside wrappers one by one.

    Beside the training set's, a data set that two loaders share comes once, under both names.
    """
    splits: list[Split] = []
    for loader in loaders:
        parts = list(datasets_of(cfg[loader].dataset))
        for number, part in enumerate(parts, start=1):
            name = f'{loader}.dataset' + (f' ({number} of {len(parts)})' if len(parts) > 1 else '')
            split = _build(name, part, cfg)
            same = [s for s in splits if s.pairs == split.pairs and not s.name.startswith('train_')]
            if same and (same[0].classes, same[0].meaning.tobytes()) == (split.classes, split.meaning.tobytes()):
                splits[splits.index(same[0])] = replace(split, name=f'{same[0].name}, {name}')
            else:
                splits.append(split)
    return splits


def _build(name: str, part: ConfigDict, cfg: Config) -> Split:
    head = cfg.model.get('decode_head')
    head = head[-1] if isinstance(head, Sequence) else head or {}
    images, labels = _loading(part.get('pipeline', []))
    unread = _why_unread(part)
    data_set = DATASETS.build(dict(part, pipeline=[], lazy_init=True, _scope_=cfg.get('default_scope')))
    data_set.serialize_data = False  # which fails on an empty list, and costs a garbage collection
    data_set.full_init()
    pairs = [data_set.get_data_info(i) for i in range(len(data_set))]
    if labels is not None and any('seg_map_path' not in pair for pair in pairs):
        raise ValueError(f'{name}: its pipeline loads labels, but data_prefix has no seg_map_path; add their folder')
    classes = data_set.metainfo.get('classes') or map(str, range(head.get('num_classes', 256)))
    reduced = getattr(data_set, 'reduce_zero_label', False)
    return Split(
        name=name,
        pairs=[(pair['img_path'], pair.get('seg_map_path') if labels is not None else None) for pair in pairs],
        classes=tuple(classes),
        meaning=_meaning(reduced, getattr(data_set, 'label_map', None)),
        ignored=head.get('ignore_index', 255),
        reduce_zero_label=reduced,
        label_map=getattr(data_set, 'label_map', None),
        loading=() if unread else tuple(TRANSFORMS.build(loader) for loader in (images, labels) if loader),
        folders=_folders(data_set) if labels is not None else (),
        suffixes=(getattr(data_set, 'img_suffix', ''), getattr(data_set, 'seg_map_suffix', '')),
        unread=unread,
    )


def _meaning(reduce_zero_label: bool, label_map: Mapping[int, int] | None) -> np.ndarray:
    """Returns what mmsegmentation's LoadAnnotations makes of the values 0 to 255."""
    values = np.arange(256, dtype=np.uint8)
    if reduce_zero_label:
        values = np.r_[255, values[:254], 255].astype(np.uint8)  # 0 and 255 are ignored, n becomes n - 1
    meaning = values.copy()
    for old, new in (label_map or {}).items():
        meaning[values == old] = new
    return meaning


def _folders(data_set: BaseDataset) -> tuple[str, ...]:
    """Returns the folders of which the data set takes all images; none if it takes some, or is found otherwise."""
    from mmseg.datasets import BaseSegDataset  # here: importing it prints to stdout, which cli.run prevents

    takes_all = getattr(type(data_set), 'load_data_list', None) is BaseSegDataset.load_data_list
    takes_all &= not data_set.ann_file or os.path.isdir(data_set.ann_file)
    if not takes_all or data_set._indices is not None or data_set.filter_cfg:
        return ()
    return data_set.data_prefix['img_path'], data_set.data_prefix.get('seg_map_path', '')


def _transforms(pipeline: Sequence) -> Iterator[Mapping]:
    """Yields a pipeline's transforms, those inside others too."""
    for transform in pipeline:
        if isinstance(transform, Mapping):
            yield transform
            yield from _transforms(transform.get('transforms', []))
        elif isinstance(transform, Sequence):
            yield from _transforms(transform)


def _kind(transform: Mapping) -> type:
    """Returns a transform's class; ``type`` itself for one that the registry will report."""
    kind = transform['type'] if isinstance(transform['type'], type) else TRANSFORMS.get(transform['type'])
    return kind or type


def _loading(pipeline: Sequence) -> tuple[Mapping | None, Mapping | None]:
    """Returns the transforms that load images and label maps, or None."""
    first = {}
    for transform in _transforms(pipeline):
        for kind in (LoadImageFromFile, LoadAnnotations):
            if issubclass(_kind(transform), kind):
                first.setdefault(kind, transform)
    return first.get(LoadImageFromFile), first.get(LoadAnnotations)


def _is_remote(part: ConfigDict) -> bool:
    return (part.get('backend_args') or {}).get('backend', 'local') != 'local'


def _why_unread(part: ConfigDict) -> str:
    """Returns why our way of reading says nothing about a data set's; empty if it does."""
    if _is_remote(part):
        return f'backend_args={dict(part.backend_args)}'
    for transform in _transforms(part.get('pipeline', [])):
        kind = _kind(transform)
        known = kind.__module__.startswith(('mmcv.', 'mmseg.', 'mmseg_resnest.'))
        known &= issubclass(kind, LoadImageFromFile | LoadAnnotations)
        if kind.__name__.startswith('Load') and not (known and transform.get('imdecode_backend') != 'tifffile'):
            return f'{kind.__name__} in its pipeline'
    return '' if _loading(part.get('pipeline', []))[0] else 'no loader of images in its pipeline'


def check_folders(loader_name: str, dataset: ConfigDict) -> None:
    """Checks that the folders of a data set are there and hold images and labels, and that its list is there.

    Args:
        loader_name: The config's key, for the message.
        dataset: Its ``dataset``.

    Raises:
        FileNotFoundError: A folder is missing or holds no file with the data set's suffix, or there is no ann_file.
    """
    for part in datasets_of(dataset):
        if _is_remote(part):
            continue
        root = Path(part.get('data_root') or '.')
        folders = part.get('data_prefix') or dict(img_path='', seg_map_path='')
        for prefix, suffix in (('img_path', 'img_suffix'), ('seg_map_path', 'seg_map_suffix')):
            if folders.get(prefix) is not None:  # a data set without labels has no seg_map_path
                _check_folder(f'{loader_name}.dataset', root, root / folders[prefix], _suffix(part, suffix))
        if part.get('ann_file') and not (root / part.ann_file).exists():
            raise FileNotFoundError(
                f'{loader_name}.dataset: ann_file {root / part.ann_file} does not exist; expected a list of names, one '
                'a line, without suffix. Put it there, or leave ann_file out to take all files.'
            )


def check_classes(loader_name: str, cfg: Config) -> None:
    """Checks that the heads have as many classes as a loader's data sets.

    Raises:
        ValueError: They do not; it would train, and evaluate, other classes than it says.
    """
    heads = [('decode_head', cfg.model.get('decode_head')), ('auxiliary_head', cfg.model.get('auxiliary_head'))]
    for part in datasets_of(cfg[loader_name].dataset):
        kind = part.type if isinstance(part.type, type) else DATASETS.get(part.type)
        classes = (part.get('metainfo') or {}).get('classes') or getattr(kind, 'METAINFO', {}).get('classes')
        for name, head in heads:
            if classes and isinstance(head, Mapping) and head.get('num_classes', len(classes)) != len(classes):
                raise ValueError(
                    f'model.{name}.num_classes={head.num_classes}, but {loader_name}.dataset has {len(classes)} '
                    f'classes ({", ".join(classes[:4])}, ...); set one of them, and the other loaders alike'
                )


def _suffix(dataset: ConfigDict, name: str) -> str:
    """The data set's own suffix, or its class's default; empty where neither says."""
    if dataset.get(name):
        return dataset[name]
    kind = dataset.type if isinstance(dataset.type, type) else DATASETS.get(dataset.type)
    parameter = inspect.signature(kind).parameters.get(name) if kind else None
    return parameter.default if parameter else ''  # a class that hides it, or that the registry will report


def _check_folder(key: str, root: Path, folder: Path, suffix: str) -> None:
    fix = 'Put the data set there, or say where it is with --data-root DIR'
    if not root.is_dir():
        what = 'is a file, not a folder' if root.exists() else 'does not exist'
        raise FileNotFoundError(f'{key}: data_root {str(root)!r} {what}. {fix}.')
    if not folder.is_dir():
        found = ', '.join(sorted(p.name for p in root.iterdir())[:8]) or 'nothing'
        raise FileNotFoundError(f'{key}: {folder} does not exist; {root} holds {found}. {fix}.')
    files = [name for _, _, names in os.walk(folder, followlinks=True) for name in names]
    if not any(name.endswith(suffix) for name in files):
        found = ', '.join(sorted({Path(name).suffix or name for name in files})[:8]) or 'nothing'
        raise FileNotFoundError(f'{key}: {folder} holds no *{suffix} (found: {found}). {fix}.')
