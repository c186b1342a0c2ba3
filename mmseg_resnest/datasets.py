"""Data sets: what is checked before a run."""

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmseg.registry import DATASETS


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


def check_folders(loader_name: str, dataset: ConfigDict) -> None:
    """Checks that the folders of a data set are there and hold images and labels.

    Args:
        loader_name: The config's key, for the message.
        dataset: Its ``dataset``.

    Raises:
        FileNotFoundError: A folder is missing or holds no file with the data set's suffix.
    """
    for part in datasets_of(dataset):
        root = Path(part.get('data_root') or '.')
        for prefix, suffix in (('img_path', 'img_suffix'), ('seg_map_path', 'seg_map_suffix')):
            folder = root / part.get('data_prefix', {}).get(prefix, '')
            _check_folder(f'{loader_name}.dataset', root, folder, _suffix(part, suffix))


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
