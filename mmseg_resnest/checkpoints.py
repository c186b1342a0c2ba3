"""Where weights come from, and how they are loaded: by name, safely, and strictly."""

import contextlib
import hashlib
import inspect
import io
import os
import pickle
import re
import urllib.parse
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from logging import WARNING
from pathlib import Path, PurePath

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import PretrainedInit, is_model_wrapper, update_init_info
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as runner_checkpoint
from torch import Tensor, nn

from mmseg_resnest.download import DownloadError, download, verified
from mmseg_resnest.options import built_options, command_line, differing_options
from mmseg_resnest.variants import backbone_options

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

    It is looked for in ``$RESNEST_WEIGHTS``, then in torch's cache, then downloaded there. Every process of a run may
    ask at once: one downloads, the others wait for it.

    Args:
        name: A key of ``OFFICIAL``.

    Raises:
        ValueError: The name is not known, or a file's SHA-256 is not the one in its name.
        FileNotFoundError: The file is not there and cannot be downloaded, or ``$RESNEST_WEIGHTS`` is no folder.
    """
    if name not in OFFICIAL:
        raise ValueError(f'{SCHEME}{name}: no such checkpoint; expected one of {", ".join(OFFICIAL)}')
    file_name = f'{name}-{OFFICIAL[name]}.pth'
    given = os.environ.get('RESNEST_WEIGHTS')
    if given and not Path(given).is_dir():
        raise FileNotFoundError(
            f'RESNEST_WEIGHTS={given}: {"a file" if Path(given).exists() else "there is no such folder"}; '
            f'expected the folder that holds {file_name}. Correct the variable, or unset it.'
        )
    if given and (Path(given) / file_name).is_file():
        return verified(Path(given) / file_name, OFFICIAL[name])
    url, path = f'{RELEASE}/{file_name}', Path(torch.hub.get_dir()) / 'checkpoints' / file_name
    try:
        return download(url, path, OFFICIAL[name])
    except DownloadError as error:
        raise FileNotFoundError(
            f'Pretrained weights {file_name} are wanted and could not be downloaded ({error.reason}).\n'
            f'  Get   {url}\n'
            f'  into  {path.parent}  or a folder that $RESNEST_WEIGHTS names,\n'
            f'  or train from scratch:  --cfg-options {FROM_SCRATCH}'
        ) from error


@CheckpointLoader.register_scheme(prefixes=SCHEME)
def load_from_authors(filename: str, map_location: str | None = None) -> dict:
    """Loads ``resnest://NAME``, one of ``OFFICIAL``, for any of MMEngine's loaders."""
    return read_checkpoint(official_file(filename.removeprefix(SCHEME)), map_location or 'cpu')


# Whether files may be unpickled in full; set by guarded_loading.
_pickle_allowed = ContextVar('_pickle_allowed', default=False)


def read_checkpoint(path: str | Path, map_location: str = 'cpu') -> dict:
    """Reads a checkpoint file without running any code that it may carry.

    Within ``guarded_loading(allow_pickle=True)`` what would be refused is unpickled in full, and the log says so.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, is damaged, or holds objects other than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: there is no such checkpoint file')
    if Path(path).suffix == '.safetensors':
        return _read_safetensors(path, map_location)
    check_sums(path)
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file makes torch raise almost anything
        if not _pickle_allowed.get():
            trust = ', or, only if you trust it as a program, let it run its code with --allow-pickle'
            raise ValueError(
                f'{path}: not a checkpoint that can be loaded safely, or a damaged one ({_gist(error)}); '
                'expected a file of torch.save with tensors and plain values. Nothing in it was run. '
                f'Get it again{trust if isinstance(error, pickle.UnpicklingError) else ""}.'
            ) from error
        content = _unpickle(path, map_location, _gist(error))
    weights = content.get('state_dict', content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping):
        raise ValueError(f'{path}: holds a {type(weights).__name__}; expected a state dict or a checkpoint')
    meta = content.get('meta') or {}
    if not (isinstance(meta, Mapping) and isinstance(meta.get(ORIGIN, {}), Mapping) and all(map(_is_str, weights))):
        raise ValueError(f'{path}: its meta is no dict, or its keys are no strings; expected those of a checkpoint')
    return content


def _is_str(key: object) -> bool:
    return isinstance(key, str)


def read_meta(path: str | Path, may_run_code: bool = False) -> dict:
    """Returns a training run's ``meta`` (``iter``, ``epoch``, ``time``, ...) and leaves the tensors on the disk.

    Args:
        path: The file.
        may_run_code: Whether ``guarded_loading(allow_pickle=True)`` allows it here too.

    Raises:
        ValueError: It is no checkpoint that a run can go on from, or the file is cut off or empty.
    """
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:  # as in read_checkpoint
        unsafe = isinstance(error, pickle.UnpicklingError)
        if not (unsafe and may_run_code and _pickle_allowed.get()):
            trust = '; only if you trust it as a program, let it run its code with --allow-pickle' if unsafe else ''
            size = Path(path).stat().st_size
            found = f'{path} ({size} bytes): no checkpoint, or a damaged one ({_gist(error)})'
            raise ValueError(found + trust) from error
        content = _unpickle(path, 'cpu', _gist(error))
    _check_resumable(content, str(path))
    return content['meta']


def check_sums(path: str | Path) -> None:
    """Compares the checksums that torch.save writes into its zip files; torch.load does not look at them.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # torch.load will say what it is: before torch 1.6 checkpoints were no zip files
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip() or _marked_as_folder(file)
    except Exception as error:
        raise ValueError(f'{path}: a damaged checkpoint ({error}). Get it again.') from error
    if damaged:
        raise ValueError(f'{path}: a damaged checkpoint: the checksum or the kind of {damaged} is wrong. Get it again.')


def _marked_as_folder(file: zipfile.ZipFile) -> str | None:
    """Returns the first member with DOS's mark of a folder, whose content torch.load leaves unread without a word."""
    return next((member.filename for member in file.infolist() if member.external_attr & 0x10), None)


def _read_safetensors(path: str | Path, map_location: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f'{path}: to read it the package safetensors is needed: pip install safetensors') from error
    try:
        return load_file(path, device=map_location)
    except Exception as error:
        raise ValueError(f'{path}: no safetensors file, or a damaged one ({error}). Get it again.') from error


def _unpickle(path: str | Path, map_location: str, refusal: str) -> object:
    print_log(f'{path}: unpickled in full, which runs any code in it (--allow-pickle): {refusal}', 'current', WARNING)
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:
        raise ValueError(f'{path}: not a checkpoint, or a damaged one ({_gist(error)})') from error


def _gist(error: Exception) -> str:
    """The sentence of torch.load's message that says what it met; the others advise to load unsafely."""
    paragraphs = [text.strip() for text in str(error).split('\n\n') if not text.startswith('Check the documentation')]
    return paragraphs[-1].rpartition('WeightsUnpickler error: ')[2].split('. ')[0] or type(error).__name__


def _harmless_types() -> list:
    """What MMEngine's own checkpoints hold beside tensors: the buffers of its log, its dicts, and numpy's numbers."""
    arrays, scalars = np._core.multiarray._reconstruct, np._core.multiarray.scalar
    return [
        HistoryBuffer,
        ConfigDict,
        # MMEngine pickles a buffer's methods as getattr(HistoryBuffer, name), and lets any file call getattr.
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *(arrays, (arrays, 'numpy.core.multiarray._reconstruct')),  # the name before numpy 2
        *(scalars, (scalars, 'numpy.core.multiarray.scalar')),
        *{type(np.dtype(code)) for code in np.typecodes['AllInteger'] + 'e' + 'f' + 'd' + '?'},
    ]


def _history_buffer_method(owner: type, name: str) -> Callable:
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'the file asks for the attribute {name!r} of {owner!r}')
    return getattr(owner, name)


def plain(value: object) -> object:
    """Returns what a checkpoint is to hold as plain values: mappings and sequences of any kind, paths, strings.

    Functions are left out of mappings, as the formula of a OneCycle schedule, which its constructor sets.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if not inspect.isroutine(item)}
    if isinstance(value, list | deque):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return str(value) if isinstance(value, str | PurePath) else value


def why_refused(content: object) -> str:
    """Returns why a file with this content would not be read without running code in it; '' if it would be."""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        with torch.serialization.safe_globals(_harmless_types()):
            torch.load(file, weights_only=True)
    except Exception as error:  # as in read_checkpoint
        return _gist(error)
    return ''


def model_weights(checkpoint: Mapping, prefix: str = '') -> dict[str, Tensor]:
    """Returns the state dict of a checkpoint: its ``state_dict``, or itself; of ``prefix``, without that prefix."""
    weights = checkpoint.get('state_dict', checkpoint)
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that must fit the module key by key.

    Raises:
        ValueError: Keys are missing, left over or of another shape; the message lists them.
    """
    check_fit(module, weights, source)
    module.load_state_dict(dict(weights))  # without versions, with which torch insists on batch norm's counters


ADVICE = 'Use the config that the checkpoint was trained with, or the checkpoint that belongs to this config.'


def check_fit(module: nn.Module, weights: Mapping[str, Tensor], source: str, advice: str = ADVICE) -> None:
    """Checks that a state dict fits a module key by key.

    As in torch's own strict loading, files from before torch 0.4.1 may lack batch norm's counters of batches.

    Args:
        module: What is to be filled.
        weights: The state dict.
        source: The file, for the message.
        advice: What to do about a misfit, for the message.

    Raises:
        ValueError: Keys are missing, left over or of another shape; the message lists them.
    """
    expected = module.state_dict()
    problems = {
        'missing in the file': [
            key for key in expected if key not in weights and not key.endswith('num_batches_tracked')
        ],
        'left over in the file': [key for key in weights if key not in expected],
        'of another shape': [
            f'{key}: {_shape(weights[key])} in the file, {_shape(expected[key])} in the model'
            for key in other_shapes(module, weights)
        ],
    }
    listing = ''.join(
        f'\n  {len(keys)} {kind}: ' + ', '.join(keys[:8]) + (', ...' if len(keys) > 8 else '')
        for kind, keys in problems.items()
        if keys
    )
    if listing:
        raise ValueError(f'{source} does not fit {type(module).__name__}:{listing}\n{advice}')


def other_shapes(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys that a module and a state dict share, with different shapes."""
    expected = module.state_dict()
    return [key for key in expected if key in weights and _shape(weights[key]) != _shape(expected[key])]


def _shape(value: object) -> tuple[int, ...]:
    return tuple(getattr(value, 'shape', ()))  # somebody's state dict may hold plain numbers


def check_options(checkpoint: Mapping, module: nn.Module, source: str, part: str = '') -> None:
    """Checks that a model computes what a checkpoint is for: pools, for one, have no keys that could fail to fit.

    Args:
        checkpoint: As read. A converted one carries the options that it needs, and so does one of our own runs.
        module: A segmentation model, or one part of it.
        source: The checkpoint's file or ``resnest://NAME``.
        part: Which part the module is, as ``'backbone'``; empty: the whole.

    Raises:
        ValueError: Options differ, and the outputs would not be those of the weights' source; the message lists them.
    """
    origin = origin_of(checkpoint, source) if part != 'backbone' else backbone_origin(checkpoint, module, source)
    differing = differing_options(module, origin.get('options', {}), part)
    if differing:
        needed = {key: origin['options'][key] for key in differing}
        listing = ''.join(f'\n  model.{key}: {needed[key]!r} needed, {differing[key]!r} found' for key in differing)
        raise ValueError(
            f'{source} ({origin.get("source")}) is for another model than this, whose outputs would be wrong:'
            f'{listing}\nChange the config, or add:  {command_line(needed)}'
        )


def origin_of(checkpoint: Mapping, source: str = '') -> Mapping:
    """Returns what a checkpoint says of itself: its ``source`` and the ``options`` that it needs; empty: nothing."""
    name = source.removeprefix(SCHEME)
    if source.startswith(SCHEME) and name in OFFICIAL:
        return dict(source='official', options=backbone_options(name, 'authors'))
    return (checkpoint.get('meta') or {}).get(ORIGIN) or {}


def backbone_origin(checkpoint: Mapping, backbone: nn.Module, source: str) -> Mapping:
    """Returns a backbone's origin; where the file does not say it, by its hash, and else with a word in the log.

    Raises:
        ValueError: The file has the name of one of the authors' and is not that one.
    """
    origin = origin_of(checkpoint, source)
    if origin or not Path(source).is_file():
        return origin
    found = official_name(Path(source))
    if found:
        return dict(source='official', options=backbone_options(found, 'authors'))
    taken = {key: value for key, value in vars(backbone).items() if key in ('graph', 'avd_first')}
    print_log(
        f'{source} does not say whose weights it holds; they are taken for those of a backbone with {taken}. '
        'tools/convert_checkpoint.py finds out, or asks, and notes it in the file',
        'current',
        WARNING,
    )
    return {}


def official_name(path: Path) -> str:
    """Returns which of ``OFFICIAL`` a file is, by its SHA-256; empty: none.

    Raises:
        ValueError: It has the name of one and is not that one.
    """
    with path.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    for name, prefix in OFFICIAL.items():
        if sha256.startswith(prefix):
            return name
        if path.name == f'{name}-{prefix}.pth':
            raise ValueError(
                f'{path}: the file is damaged or another one: its SHA-256 begins with {sha256[:8]}, expected {prefix}. '
                'Get it again, or, if it is meant to be another one, give it another name.'
            )
    return ''


def load_pretrained(
    module: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> Mapping:
    """Loads pretrained weights strictly; a classifier's ``fc.*`` that the module has no place for is dropped and said.

    Args:
        module: What is to be filled.
        checkpoint: ``resnest://NAME``, a file, or anything else that MMEngine's CheckpointLoader takes.
        prefix: The module's name where the file holds a larger model, as ``'backbone'``.
        map_location: Where the tensors are put first.

    Returns:
        The whole checkpoint.
    """
    if '://' in checkpoint:
        with guarded_loading(_pickle_allowed.get()):
            content = CheckpointLoader.load_checkpoint(checkpoint, map_location, logger='current')
    else:
        content = read_checkpoint(checkpoint, map_location)
    weights = model_weights(content, f'{prefix.rstrip(".")}.' if prefix else '')
    dropped = _drop_classifier(weights, module)
    load_strictly(module, weights, f'{checkpoint} ({prefix})' if prefix else checkpoint)
    print_log(f'Loaded pretrained {type(module).__name__} from {checkpoint}{dropped}', logger='current')
    return content


def _drop_classifier(weights: dict[str, Tensor], module: nn.Module) -> str:
    """Removes an image classifier's last layer if the module has no place for it, and says so."""
    classifier, expected = 'backbone.fc.' if hasattr(module, 'backbone') else 'fc.', module.state_dict()
    dropped = [key for key in weights if key.startswith(classifier) and key not in expected]
    for key in dropped:
        del weights[key]
    return f'; dropped the classifier: {", ".join(dropped)}' if dropped else ''


def load_pretrained_backbone(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Loads pretrained weights into our backbone, as ``load_pretrained`` does, and checks the options they need."""
    content = load_pretrained(backbone, checkpoint, prefix, map_location)
    check_options(content, backbone, checkpoint, 'backbone')


@contextlib.contextmanager
def guarded_loading(allow_pickle: bool = False) -> Iterator[None]:
    """Makes MMEngine's own loading safe and strict for a while; the tools run in it.

    Within, every scheme of its CheckpointLoader reads as ``read_checkpoint`` does, where its own ``_safe_torch_load``
    falls back to running a file's code and ``load_url`` does so at once; and ``init_cfg=dict(type='Pretrained')`` of
    any module is loaded strictly.

    Args:
        allow_pickle: Whether files that ``read_checkpoint`` refuses are unpickled in full, which runs any code in them.
    """
    ours = {
        (runner_checkpoint, '_safe_torch_load'): read_checkpoint,
        (runner_checkpoint, 'load_url'): _read_url,
        (PretrainedInit, '__call__'): _initialise_strictly,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(_pickle_allowed.reset, _pickle_allowed.set(allow_pickle))
        for (owner, name), function in ours.items():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, function)
        yield


def _read_url(url: str, model_dir: str | None = None, map_location: str = 'cpu', progress: bool = True) -> dict:
    """Downloads and reads; the hash in OpenMMLab's and torch's names, as ``name-1a2b3c4d.pth``, is verified."""
    folder = Path(model_dir or Path(torch.hub.get_dir()) / 'checkpoints')
    name = Path(urllib.parse.urlparse(url).path).name
    if not name:
        raise ValueError(f'{url}: names no file; expected an address that ends with the name of a checkpoint')
    sha256 = re.search(r'[-_]([0-9a-f]{8,64})\.\w+$', name)
    if sha256:
        return read_checkpoint(download(url, folder / name, sha256[1]), map_location)
    # Without a hash two runs' iter_80000.pth would be one file in the cache.
    path = download(url, folder / f'{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}')
    try:
        return read_checkpoint(path, map_location)
    except ValueError:
        path.unlink()  # nothing else tells whether it is what was meant
        raise


def _initialise_strictly(self: PretrainedInit, module: nn.Module) -> None:
    content = load_pretrained(module, self.checkpoint, self.prefix, self.map_location)
    if self.prefix or hasattr(module, 'decode_head'):
        check_options(content, module, self.checkpoint, (self.prefix or '').rstrip('.'))
    if hasattr(module, '_params_init_info'):
        update_init_info(module, init_info=self._get_init_info())


class StrictLoading(Hook):
    """Holds the checkpoint from which a run starts against the model, before MMEngine loads it, which is not strict.

    In the checkpoints of the run it notes the options that no key or shape tells, for ``check_options``.

    Args:
        source: The file, for the messages.
        resume: Whether the run goes on from it, with its optimiser and its iteration.
        fine_tune: Whether the classifiers (``conv_seg`` of each head) start fresh.
    """

    priority = 'VERY_HIGH'  # before EMAHook takes its copy

    def __init__(self, source: str, resume: bool = False, fine_tune: bool = False) -> None:
        self.source, self.resume, self.fine_tune = source, resume, fine_tune

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Leaves in the checkpoint what is to be loaded, and raises a ValueError if that does not fit."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if self.resume:
            _check_resumable(checkpoint, self.source)
            _hold_averages_strictly(runner, checkpoint, self.source)
        weights = checkpoint.get('state_dict', checkpoint)
        _check_has_heads(weights, model, self.source)
        print_log(f'Starting from {self.source}{_drop_classifier(weights, model)}', 'current')
        advice, others = ADVICE, other_shapes(model, weights)
        if self.fine_tune:
            _start_classifiers_fresh(weights, model)
        elif others and not self.resume and all('.conv_seg.' in key for key in others):
            advice = f'For other classes --fine-tune {self.source} loads all but the classifiers, which start fresh.'
        check_fit(model, weights, self.source, advice)
        check_options(checkpoint, model, self.source)
        compare_classes(checkpoint, runner.train_dataloader.dataset.metainfo, self.source)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Adds the options that the model was built with."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint['meta'][ORIGIN] = dict(source='a run of this package', options=built_options(model))


def _check_resumable(checkpoint: Mapping, source: str) -> None:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'{source}: holds a {type(checkpoint).__name__}; expected a checkpoint of a training run')
    missing = {'meta', 'message_hub', 'optimizer'} - checkpoint.keys()
    if missing:
        raise ValueError(f'{source}: no checkpoint of a training run: it has no {", no ".join(sorted(missing))}')
    meta = checkpoint['meta']
    counts = [meta.get(key) for key in ('iter', 'epoch')] if isinstance(meta, Mapping) else [None]
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(f'{source}: no checkpoint of a training run: its meta has no whole numbers iter and epoch')
    if 'config' in meta:  # never written by MMEngine, and run by it as Python
        raise ValueError(f'{source}: its meta.config is code, which MMEngine would run; no training run writes it')


def _hold_averages_strictly(runner: Runner, checkpoint: Mapping, source: str) -> None:
    """Lets EMAHook, which loads after this, refuse averages that do not fit; without any it would start anew."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.strict_load = True
            if 'ema_state_dict' not in checkpoint:
                raise ValueError(
                    f'{source}: has no averaged weights (ema_state_dict), which EMAHook goes on from; expected a '
                    'checkpoint of a run with EMAHook. Take it out of custom_hooks, or start with load_from'
                )


def _check_has_heads(weights: Mapping, model: nn.Module, source: str) -> None:
    parts = {key.split('.')[0] for key in weights}
    of_backbone = dict(getattr(model, 'backbone', nn.Module()).named_children())
    if 'decode_head' not in parts and parts & {'backbone', *of_backbone}:
        prefix = ', prefix="backbone."' if 'backbone' in parts else ''
        raise ValueError(
            f'{source} holds a backbone and no decode_head; expected a whole segmentor. Load it into the backbone: '
            f'model.backbone.init_cfg=dict(type="Pretrained", checkpoint="{source}"{prefix})'
        )


def _start_classifiers_fresh(weights: dict, model: nn.Module) -> None:
    """Puts the model's own classifiers into a state dict in the place of the file's."""
    own = model.state_dict()
    for name in [name for name, _ in model.named_modules() if name.endswith('.conv_seg')]:
        count = len(weights[f'{name}.weight']) if f'{name}.weight' in weights else 'none'
        print_log(f'{name} starts fresh: {count} classes in the file, {len(own[f"{name}.weight"])} here', 'current')
        weights.update({key: value for key, value in own.items() if key.startswith(f'{name}.')})


def compare_classes(checkpoint: Mapping, metainfo: Mapping, source: str) -> None:
    """Warns, in the log, if a checkpoint was trained for other classes than a data set's, be it as many.

    Args:
        checkpoint: As read; MMEngine's say their classes, and so do converted ones where they are known.
        metainfo: The data set's.
        source: The file, for the message.
    """
    theirs = ((checkpoint.get('meta') or {}).get('dataset_meta') or {}).get('classes')
    ours = metainfo.get('classes')
    if theirs and ours and list(theirs) != list(ours):
        print_log(
            f'{source} was trained for other classes: {", ".join(theirs)}; the data set has {", ".join(ours)}',
            'current',
            WARNING,
        )
