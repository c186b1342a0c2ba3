"""Where weights come from, and how they are loaded: by name, safely, and strictly."""

import hashlib
import os
import pickle
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

SCHEME = 'resnest://'
RELEASE = 'https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1'
# The authors' ImageNet weights: name -> first 8 digits of the file's SHA-256.
OFFICIAL = {
    'resnest50': '528c19ca',
    'resnest101': '22405ba7',
    'resnest200': '75117900',
    'resnest269': '0cc87c48',
    'resnest50_fast_1s1x64d': 'd8fbf808',
    'resnest50_fast_2s1x64d': '44938639',
    'resnest50_fast_4s1x64d': 'f74f3fc3',
    'resnest50_fast_1s2x40d': '32830b84',
    'resnest50_fast_2s2x40d': '9d126481',
    'resnest50_fast_4s2x40d': '41d14ed0',
    'resnest50_fast_1s4x24d': 'd4a4f76f',
}
ORIGIN = 'mmseg_resnest'  # the key in a converted checkpoint's meta that says where it comes from
FROM_SCRATCH = 'model.backbone.init_cfg=None'


def official_file(name: str) -> Path:
    """Returns the verified file of one of the authors' checkpoints, downloading it if need be.

    It is looked for in ``$RESNEST_WEIGHTS``, then in torch's cache, then downloaded there.

    Args:
        name: A key of ``OFFICIAL``.

    Raises:
        ValueError: The name is not known, or a file's SHA-256 is not the one in its name.
        FileNotFoundError: The file is not there and cannot be downloaded.
    """
    if name not in OFFICIAL:
        raise ValueError(f'{SCHEME}{name}: no such checkpoint; expected one of {", ".join(OFFICIAL)}')
    file_name = f'{name}-{OFFICIAL[name]}.pth'
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    given = os.environ.get('RESNEST_WEIGHTS')
    for folder in [Path(given), cache] if given else [cache]:
        if (folder / file_name).is_file():
            return _verified(folder / file_name, OFFICIAL[name])
    if os.environ.get('LOCAL_RANK', '0') == '0':  # one process a machine
        _download(f'{RELEASE}/{file_name}', cache / file_name, OFFICIAL[name])
    barrier()
    return cache / file_name


def _verified(path: Path, sha256_prefix: str) -> Path:
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if not found.startswith(sha256_prefix):
        raise ValueError(
            f'{path}: the file is damaged or another one: its SHA-256 begins with {found[:8]}, '
            f'expected {sha256_prefix}. Delete it and get it again.'
        )
    return path


def _download(url: str, path: Path, sha256_prefix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    print_log(f'Downloading {url} to {path}', logger='current')
    try:
        # torch writes aside, verifies the hash and renames: a broken download is never taken for the file.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f'Pretrained weights {path.name} are wanted and could not be downloaded ({error}).\n'
            f'  Get   {url}\n'
            f'  into  {path.parent}  or a folder that $RESNEST_WEIGHTS names,\n'
            f'  or train from scratch:  --cfg-options {FROM_SCRATCH}'
        ) from error


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_official(filename: str, map_location: str | None = None) -> dict:
    """Loads ``resnest://NAME``, one of ``OFFICIAL``, for any of MMEngine's loaders."""
    return read_checkpoint(official_file(filename.removeprefix(SCHEME)), map_location or 'cpu')


def read_checkpoint(path: str | Path, map_location: str = 'cpu') -> dict:
    """Reads a checkpoint file without running any code that it may carry.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, is damaged, or holds objects other than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: there is no such checkpoint file')
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise ValueError(
            f'{path}: not a checkpoint that can be loaded safely, or a damaged one ({_gist(error)}); '
            'expected a file of torch.save with tensors and plain values'
        ) from error
    weights = content.get('state_dict', content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping):
        raise ValueError(f'{path}: holds a {type(weights).__name__}; expected a state dict or a checkpoint')
    return content


def _gist(error: Exception) -> str:
    """The sentence of torch.load's message that says what it met; the others advise to load unsafely."""
    paragraphs = [text.strip() for text in str(error).split('\n\n') if not text.startswith('Check the documentation')]
    return paragraphs[-1].rpartition('WeightsUnpickler error: ')[2].split('. ')[0] or type(error).__name__


def _harmless_types() -> list:
    """What MMEngine's own checkpoints hold beside tensors: the buffers of its log, and numpy's numbers."""
    return [
        HistoryBuffer,
        # MMEngine pickles a buffer's methods as getattr(HistoryBuffer, name), and lets any file call getattr.
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        np._core.multiarray._reconstruct,
        np._core.multiarray.scalar,
        *(type(np.dtype(name)) for name in ('bool', 'uint8', 'int32', 'int64', 'float32', 'float64')),
    ]


def _history_buffer_method(owner: type, name: str) -> Callable:
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'the file asks for the attribute {name!r} of {owner!r}')
    return getattr(owner, name)


def model_weights(checkpoint: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """Returns the state dict of a checkpoint: its ``state_dict``, or itself; of ``prefix``, without that prefix."""
    weights = checkpoint.get('state_dict', checkpoint)
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must fit the module key by key.

    Raises:
        ValueError: Keys are missing, left over or of another shape; the message lists them.
    """
    expected = module.state_dict()
    problems = {
        'missing in the file': [key for key in expected if key not in weights],
        'left over in the file': [key for key in weights if key not in expected],
        'of another shape': [
            f'{key}: {tuple(weights[key].shape)} in the file, {tuple(value.shape)} in the model'
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    listing = ''.join(
        f'\n  {len(keys)} {kind}: ' + ', '.join(keys[:8]) + (', ...' if len(keys) > 8 else '')
        for kind, keys in problems.items()
        if keys
    )
    if listing:
        raise ValueError(
            f'{source} does not fit {type(module).__name__}:{listing}\n'
            'Use the config that the checkpoint was trained with, or the checkpoint that belongs to this config.'
        )
    module.load_state_dict(weights)


def check_options(checkpoint: Mapping, model: nn.Module, source: str) -> None:
    """Checks that a model computes what a converted checkpoint needs: pools have no keys that could fail to fit.

    Args:
        checkpoint: As read; one that was not converted asks for nothing.
        model: A segmentation model.
        source: The file, for the message.

    Raises:
        ValueError: An option differs, and the outputs would not be those of the weights' source.
    """
    origin = checkpoint.get('meta', {}).get(ORIGIN, {})
    for key, needed in origin.get('options', {}).items():
        part, name = key.split('.')
        found = vars(getattr(model, part)).get(name, needed)  # a head's type is told by its keys
        if found != needed:
            raise ValueError(
                f'{source} comes from {origin["source"]} and needs model.{key}={needed!r}, found {found!r}: '
                'the outputs would be others. Set it in the config, or with --cfg-options.'
            )


def load_pretrained_backbone(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Loads pretrained weights into a backbone strictly; a classifier's ``fc.*`` in the file is dropped and said.

    Args:
        backbone: The module to fill.
        checkpoint: ``resnest://NAME``, a file, or anything else that MMEngine's CheckpointLoader takes.
        prefix: The backbone's name where the file holds a larger model, as ``'backbone'``.
        map_location: Where the tensors are put first.
    """
    if '://' in checkpoint:
        content = CheckpointLoader.load_checkpoint(checkpoint, map_location, logger='current')
    else:
        content = read_checkpoint(checkpoint, map_location)
    weights = model_weights(content, f'{prefix.rstrip(".")}.' if prefix else '')
    classifier = [key for key in weights if key.startswith('fc.')]
    for key in classifier:
        del weights[key]
    graph = content.get('meta', {}).get(ORIGIN, {}).get('options', {}).get('backbone.graph')
    if graph and backbone.output_stride < 32 and graph != backbone.graph:  # at 32 the graphs are one
        raise ValueError(f'{checkpoint} needs model.backbone.graph={graph!r}, found {backbone.graph!r}')
    load_strictly(backbone, weights, checkpoint)
    dropped = f'; dropped the classifier: {", ".join(classifier)}' if classifier else ''
    print_log(f'Loaded pretrained {type(backbone).__name__} from {checkpoint}{dropped}', logger='current')
