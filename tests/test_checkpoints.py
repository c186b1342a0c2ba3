"""Where weights come from, and that nothing is loaded that is damaged, dangerous or does not fit."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import BaseModel, BaseModule, PretrainedInit
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as runner_checkpoint
from mmseg.registry import MODELS
from tiny import ENVIRONMENT, Payload
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from web import Site

import mmseg_resnest.download
from mmseg_resnest import ResNeSt, checkpoints
from mmseg_resnest.checkpoints import (
    OFFICIAL,
    ORIGIN,
    _hold_averages_strictly,
    check_options,
    guarded_loading,
    load_pretrained_backbone,
    load_strictly,
    model_weights,
    official_file,
    read_checkpoint,
)

# ------------------------------------------------------------------------------------------------- by official name


def test_official_names_and_hashes():
    variants = '1s1x64d 2s1x64d 4s1x64d 1s2x40d 2s2x40d 4s2x40d 1s4x24d'
    assert list(OFFICIAL) == [f'resnest{depth}' for depth in (50, 101, 200, 269)] + [
        f'resnest50_fast_{variant}' for variant in variants.split()
    ]
    assert all(re.fullmatch('[0-9a-f]{8}', prefix) for prefix in OFFICIAL.values())
    assert OFFICIAL['resnest101'] == '22405ba7'
    assert checkpoints.RELEASE == 'https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1'


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, no $RESNEST_WEIGHTS, and a release page on a port where nobody answers; yields the cache."""
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(checkpoints, 'RELEASE', f'http://127.0.0.1:{port}/weights')
    monkeypatch.setattr(mmseg_resnest.download, '_WAITS', (0.01,))
    monkeypatch.delenv('RESNEST_WEIGHTS', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@pytest.fixture
def small_release(monkeypatch, tmp_path):
    """Makes a small file pass for resnest50's; yields its bytes and its name."""
    torch.save({'a': torch.tensor([1.0, 2.0])}, tmp_path / 'small.pth')
    content = (tmp_path / 'small.pth').read_bytes()
    prefix = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setitem(OFFICIAL, 'resnest50', prefix)
    return content, f'resnest50-{prefix}.pth'


def put(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_file_in_the_cache_is_found(offline, small_release):
    content, name = small_release
    path = put(offline, name, content)
    assert official_file('resnest50') == path
    assert CheckpointLoader.load_checkpoint('resnest://resnest50')['a'].tolist() == [1.0, 2.0]


def test_resnest_weights_comes_before_the_cache(offline, small_release, monkeypatch, tmp_path):
    content, name = small_release
    put(offline, name, content)
    mine = put(tmp_path / 'mine', name, content)
    monkeypatch.setenv('RESNEST_WEIGHTS', str(tmp_path / 'mine'))
    assert official_file('resnest50') == mine
    mine.unlink()
    assert official_file('resnest50') == offline / name


def test_resnest_weights_is_a_folder(offline, small_release, monkeypatch, tmp_path):
    content, name = small_release
    path = put(offline, name, content)
    monkeypatch.setenv('RESNEST_WEIGHTS', '')
    assert official_file('resnest50') == path
    for value, found in ((path, 'a file'), (tmp_path / 'none', 'there is no such folder')):
        monkeypatch.setenv('RESNEST_WEIGHTS', str(value))
        with pytest.raises(FileNotFoundError) as error:  # not ignored, though the cache has the file
            official_file('resnest50')
        assert str(error.value) == (
            f'RESNEST_WEIGHTS={value}: {found}; expected the folder that holds {name}. '
            'Correct the variable, or unset it.'
        )


@pytest.mark.parametrize('where', ['cache', 'RESNEST_WEIGHTS'])
def test_wrong_hash_is_refused(offline, small_release, monkeypatch, tmp_path, where):
    content, name = small_release
    folder = offline if where == 'cache' else tmp_path / 'mine'
    path = put(folder, name, content + b'x')
    monkeypatch.setenv('RESNEST_WEIGHTS', '' if where == 'cache' else str(folder))
    found = hashlib.sha256(content + b'x').hexdigest()[:8]
    with pytest.raises(ValueError, match=rf'{path}: .* SHA-256 begins with {found}, expected {OFFICIAL["resnest50"]}'):
        official_file('resnest50')
    assert path.read_bytes() == content + b'x'  # the user's file is the user's to delete


@pytest.mark.parametrize('name', ['resnest18', 'resnest50.pth', '', 'resnest50_fast'])
def test_unknown_name(name):
    with pytest.raises(
        ValueError, match=f'resnest://{name}: no such checkpoint; expected one of resnest50, .*fast_1s4x'
    ):
        CheckpointLoader.load_checkpoint(f'resnest://{name}')


def test_unreachable_file_says_what_to_do(offline):
    with pytest.raises(FileNotFoundError) as error:
        official_file('resnest101')
    message = str(error.value)
    assert 'Pretrained weights resnest101-22405ba7.pth are wanted and could not be downloaded (' in message
    assert f'Get   {checkpoints.RELEASE}/resnest101-22405ba7.pth\n' in message
    assert f'into  {offline}  or a folder that $RESNEST_WEIGHTS names' in message
    assert message.endswith('train from scratch:  --cfg-options model.backbone.init_cfg=None')
    assert not any(offline.iterdir())


@pytest.fixture
def site(offline, small_release, monkeypatch):
    """The release page, with the small file."""
    with Site(small_release[0]) as site:
        monkeypatch.setattr(checkpoints, 'RELEASE', site.url)
        yield site


def test_download_by_name(site, offline, small_release):
    content, name = small_release
    site.cuts = [700]
    for _ in range(2):
        assert CheckpointLoader.load_checkpoint('resnest://resnest50')['a'].tolist() == [1.0, 2.0]
    assert (offline / name).read_bytes() == content
    assert site.sent == [(None, 700), ('bytes=700-', len(content) - 700)]


DAMAGED_SITES = {
    'truncated': (dict(cuts=[700, 0]), r'the connection ended after 700 of \d+ bytes'),
    'tampered': (dict(content=b'x' * 2000), r'2000 bytes came whose SHA-256 begins with 5c0e0ea4, expected \w{8}'),
    'missing': (dict(statuses=[404]), r'HTTP status 404 \(Not Found\), expected 200'),
    'a web page': (dict(kind='text/html'), r'a web page came \(Content-Type text/html\), expected the file'),
}


@pytest.mark.parametrize('what', DAMAGED_SITES)
def test_nothing_damaged_is_taken_for_the_file(what, site, offline, small_release):
    _, name = small_release
    damage, reason = DAMAGED_SITES[what]
    healthy = {key: getattr(site, key) for key in damage}
    vars(site).update(damage)
    with pytest.raises(FileNotFoundError, match=rf'{name} are wanted and could not be downloaded \({reason}\)\.\n'):
        CheckpointLoader.load_checkpoint('resnest://resnest50')
    assert [path.name for path in offline.iterdir()] == [f'{name}.part'] * (what == 'truncated')
    vars(site).update(healthy)
    assert CheckpointLoader.load_checkpoint('resnest://resnest50')['a'].tolist() == [1.0, 2.0]
    assert [path.name for path in offline.iterdir()] == [name]


CONFIG = """
model = dict(
    backbone=dict(
        type='mmseg_resnest.ResNeSt', depth=14, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest14')
    )
)
"""


@pytest.fixture
def backbone_release(site, monkeypatch, tmp_path):
    """A release of a ResNeSt-14, which nobody has published; yields its weights, which the file CONFIG asks for."""
    weights = ResNeSt(14).state_dict() | {'fc.weight': torch.zeros(10, 2048), 'fc.bias': torch.zeros(10)}
    torch.save(weights, tmp_path / 'weights.pth')
    site.content = (tmp_path / 'weights.pth').read_bytes()
    monkeypatch.setitem(OFFICIAL, 'resnest14', hashlib.sha256(site.content).hexdigest()[:8])
    (tmp_path / 'config.py').write_text(CONFIG)
    return weights


def test_init_cfg_of_a_config(backbone_release, site, offline, tmp_path):
    backbone = MODELS.build(Config.fromfile(tmp_path / 'config.py').model.backbone)
    assert site.sent == []
    backbone.init_weights()
    assert site.sent == [(None, len(site.content))]
    assert all(torch.equal(value, backbone_release[key]) for key, value in backbone.state_dict().items())


# A tool of somebody else's, who knows of us only what the config says.
STOCK_TOOL = """
import sys
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import CheckpointLoader
from mmseg.registry import MODELS

cfg = Config.fromfile('config.py')
assert not any(name.startswith('mmseg_resnest') for name in sys.modules)
backbone = MODELS.build(cfg.model.backbone)
checkpoints = sys.modules['mmseg_resnest.checkpoints']
checkpoints.RELEASE, checkpoints.OFFICIAL['resnest14'] = sys.argv[1:]
backbone.init_weights()
weights = torch.load('weights.pth')
assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
assert CheckpointLoader.load_checkpoint('resnest://resnest14').keys() == weights.keys()
"""


@pytest.mark.slow
def test_by_name_in_a_tool_that_never_imported_us(backbone_release, site, offline, tmp_path):
    command = [sys.executable, '-c', STOCK_TOOL, site.url, OFFICIAL['resnest14']]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert site.sent == [(None, len(site.content))]
    assert [path.name for path in offline.iterdir()] == [f'resnest14-{OFFICIAL["resnest14"]}.pth']


# -------------------------------------------------------------------------------------------------------- reading


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth: there is no such checkpoint file'):
        read_checkpoint(tmp_path / 'none.pth')


def whole_file(path):
    torch.save({'a': torch.zeros(1000)}, path)
    return path.read_bytes()


DAMAGED = {
    'empty': lambda path: b'',
    'garbage': lambda path: b'garbage' * 100,
    'a web page': lambda path: b'<!DOCTYPE html><html><body>404</body></html>',
    'half a file': lambda path: whole_file(path)[:2000],
    'the end missing': lambda path: whole_file(path)[:-10],
    'a bare pickle': lambda path: pickle.dumps({'a': np.zeros(3)}, protocol=0),
}


def test_a_flipped_bit_is_noticed(tmp_path):
    content = bytearray(whole_file(tmp_path / 'whole.pth'))
    content[len(content) // 2] ^= 1
    (tmp_path / 'bad.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'bad.pth: a damaged checkpoint'):
        read_checkpoint(tmp_path / 'bad.pth')


def test_averages_that_are_missing_are_no_reason_to_start_anew():
    hook = EMAHook()
    runner = SimpleNamespace(hooks=[hook])
    with pytest.raises(ValueError, match=r'x.pth: has no averaged weights'):
        _hold_averages_strictly(runner, {}, 'x.pth')
    _hold_averages_strictly(runner, dict(ema_state_dict={}), 'x.pth')
    assert hook.strict_load


@pytest.mark.parametrize('what', DAMAGED)
def test_damaged_file(what, tmp_path):
    path = tmp_path / 'bad.pth'
    path.write_bytes(DAMAGED[what](path))
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f'{path}: not a checkpoint that can be loaded safely, or a damaged one (')
    assert (
        '; expected a file of torch.save with tensors and plain values. Nothing in it was run. Get it again' in message
    )
    # Only what is a pickle, as far as one can see, could be read in full.
    assert ('--allow-pickle' in message) == (what in ('garbage', 'a web page', 'a bare pickle'))
    assert '()' not in message
    assert 'weights_only' not in message  # torch advises to switch safety off


@settings(max_examples=60, deadline=None)
@given(legacy=st.booleans(), place=st.floats(0, 0.999), value=st.integers(0, 255), cut=st.booleans())
def test_no_damage_ends_in_another_error(legacy, place, value, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp('fuzz') / 'bad.pth'
    torch.save({'a': torch.zeros(3), 'b': [1, 's']}, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    content[at:] = b'' if cut else bytes([value]) + content[at + 1 :]
    path.write_bytes(content)
    try:
        assert isinstance(read_checkpoint(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize('place', ['alone', 'state_dict', 'meta'])
def test_code_is_not_run(place, tmp_path):
    path, made = tmp_path / 'evil.pth', tmp_path / 'made'
    content = {'state_dict': {'a': torch.zeros(1)}, place: Payload(made)}
    torch.save(Payload(made) if place == 'alone' else content, path)
    with pytest.raises(ValueError, match=r'evil.pth: not a checkpoint that can be loaded safely.*GLOBAL \w+\.mkdir'):
        read_checkpoint(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the file is as bad as it should be


class GetattrOf:
    """Unpickled, gives an attribute of a harmless type: the first step out of it."""

    def __init__(self, owner, name):
        self.args = owner, name

    def __reduce__(self):
        return getattr, self.args


@pytest.mark.parametrize('name', ['__init__', '__class__', 'update'])
def test_getattr_reaches_only_the_methods_of_mmengines_buffer(name, tmp_path):
    from mmengine.logging import HistoryBuffer

    torch.save({'a': GetattrOf(HistoryBuffer, name)}, tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match=f'the file asks for the attribute {name!r} of .*HistoryBuffer'):
        read_checkpoint(tmp_path / 'evil.pth')
    torch.save({'a': GetattrOf(HistoryBuffer, 'mean')}, tmp_path / 'good.pth')
    assert read_checkpoint(tmp_path / 'good.pth') == {'a': HistoryBuffer.mean}


@pytest.mark.parametrize(
    ('content', 'kind'), [([1, 2], 'list'), (torch.zeros(2), 'Tensor'), ({'state_dict': [3]}, 'list'), (5, 'int')]
)
def test_other_content(content, kind, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=f'x.pth: holds an? {kind}; expected a state dict or a checkpoint'):
        read_checkpoint(tmp_path / 'x.pth')


class Line(BaseModel):
    """A model of MMEngine's: a line through points."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x, y, mode):
        return dict(loss=(self.linear(x) - y).square().mean())


def test_checkpoint_of_a_stock_run_is_read(tmp_path):
    data_set = TensorDataset(torch.arange(4.0).view(4, 1), torch.ones(4, 1))
    runner = Runner(
        Line(),
        work_dir=str(tmp_path),
        train_dataloader=DataLoader(data_set, batch_size=2, sampler=DefaultSampler(data_set, seed=0)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='LinearLR', start_factor=0.5, end=2),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        default_scope='mmengine',
    )
    runner.message_hub.update_info('numbers', dict(scalar=np.float64(0.5), array=np.arange(3)))
    runner.train()
    checkpoint = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert (checkpoint['meta']['epoch'], checkpoint['meta']['iter']) == (2, 4)
    assert torch.equal(checkpoint['state_dict']['linear.weight'], runner.model.linear.weight.cpu())
    momentum = checkpoint['optimizer']['state'][0]['momentum_buffer']
    state = runner.optim_wrapper.optimizer.state[runner.model.linear.weight]
    assert torch.equal(momentum, state['momentum_buffer'].cpu())
    losses = checkpoint['message_hub']['log_scalars']['train/loss']
    assert losses.data[0].tolist() == runner.message_hub.get_scalar('train/loss').data[0].tolist()
    assert len(losses.data[0]) == 4
    assert losses.mean() == pytest.approx(losses.data[0].mean())
    numbers = checkpoint['message_hub']['runtime_info']['numbers']
    assert numbers['scalar'] == 0.5
    assert numbers['array'].tolist() == [0, 1, 2]


# -------------------------------------------------------------------------------------------------------- loading


def test_model_weights():
    state = {'backbone.a': torch.tensor(1.0), 'head.backbone.a': torch.tensor(2.0)}
    for checkpoint in (state, {'state_dict': state, 'meta': {}}):
        assert model_weights(checkpoint) == state
        assert model_weights(checkpoint, 'backbone.') == {'a': state['backbone.a']}
        assert model_weights(checkpoint, 'other.') == {}


def test_fitting_weights_are_loaded():
    module = nn.Linear(2, 1)
    load_strictly(module, {'weight': torch.tensor([[1.0, 2.0]]), 'bias': torch.tensor([3.0])}, 'x.pth')
    assert module(torch.tensor([[10.0, 100.0]])).item() == 213


def test_every_key_that_does_not_fit_is_listed():
    module = nn.ModuleDict({'a': nn.Linear(2, 1), 'b': nn.Linear(2, 3)})
    before = {key: value.clone() for key, value in module.state_dict().items()}
    weights = {
        'a.weight': torch.zeros(1, 2),
        'b.weight': torch.zeros(4, 2),
        'b.bias': torch.zeros(3),
        'c': torch.ones(1),
    }
    with pytest.raises(ValueError) as error:
        load_strictly(module, weights, 'x.pth')
    assert str(error.value).splitlines() == [
        'x.pth does not fit ModuleDict:',
        '  1 missing in the file: a.bias',
        '  1 left over in the file: c',
        '  1 of another shape: b.weight: (4, 2) in the file, (3, 2) in the model',
        'Use the config that the checkpoint was trained with, or the checkpoint that belongs to this config.',
    ]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())  # nothing was loaded


def test_plain_numbers_are_no_weights():
    with pytest.raises(ValueError, match=r'1 of another shape: weight: \(\) in the file, \(1, 1\) in the model'):
        load_strictly(nn.Linear(1, 1, bias=False), {'weight': 5}, 'x.pth')


def test_old_files_may_lack_the_counters_of_batch_norm():
    module, file = nn.BatchNorm1d(2), nn.BatchNorm1d(2).state_dict()
    file['running_mean'] += 3
    del file['num_batches_tracked']
    load_strictly(module, file, 'x.pth')
    assert module.running_mean.tolist() == [3, 3]
    del file['running_var']
    with pytest.raises(ValueError, match='1 missing in the file: running_var\n'):
        load_strictly(module, file, 'x.pth')


def test_a_long_listing_is_cut():
    with pytest.raises(ValueError, match=r'  10 left over in the file: k0, k1, k2, k3, k4, k5, k6, k7, \.\.\.\n'):
        load_strictly(nn.Identity(), {f'k{i}': torch.zeros(1) for i in range(10)}, 'x.pth')


def test_pretrained_backbone_drops_a_classifier_and_nothing_else(tmp_path, offline, small_release):
    weights = {'weight': torch.tensor([[5.0]]), 'fc.weight': torch.zeros(9, 1), 'fc.bias': torch.zeros(9)}
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in weights.items()}}, tmp_path / 'x.pth')
    backbone = nn.Linear(1, 1, bias=False)
    load_pretrained_backbone(backbone, str(tmp_path / 'x.pth'), prefix='backbone.')
    assert backbone.weight.item() == 5
    with pytest.raises(ValueError, match=r'1 missing in the file: weight\n  3 left over in the file: '):
        load_pretrained_backbone(backbone, str(tmp_path / 'x.pth'))
    content, name = small_release
    put(offline, name, content)
    with pytest.raises(ValueError, match='resnest://resnest50 does not fit Linear'):
        load_pretrained_backbone(backbone, 'resnest://resnest50')


def test_pretrained_backbone_runs_no_code(tmp_path):
    torch.save({'weight': Payload(tmp_path / 'made')}, tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='loaded safely'):
        load_pretrained_backbone(nn.Linear(1, 1), str(tmp_path / 'evil.pth'))
    assert not (tmp_path / 'made').exists()


def test_options_of_a_converted_checkpoint_are_held_against_the_model():
    model = nn.Module()
    model.backbone, model.decode_head = nn.Module(), nn.Module()
    model.backbone.graph, model.decode_head.align_corners = 'authors', True
    options = {'backbone.graph': 'authors', 'decode_head.align_corners': True, 'auxiliary_head.align_corners': True}
    content = dict(meta={ORIGIN: dict(source='encoding-fcn', options=options)})
    check_options(content, model, 'x.pth')
    check_options(dict(meta={}), model, 'x.pth')
    check_options({}, model, 'x.pth')
    model.decode_head.align_corners = False
    with pytest.raises(ValueError, match=r'x.pth \(encoding-fcn\) .*\n  model.decode_head.align_corners: True needed'):
        check_options(content, model, 'x.pth')


# ---------------------------------------------------------------------------------------------- MMEngine's own loaders


@pytest.fixture
def evil(tmp_path):
    """A file of good weights that makes a folder ``made`` when it is unpickled."""
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(1, 1)), more=Payload(tmp_path / 'made')), path)
    return path


@pytest.fixture
def addresses(evil, tmp_path, monkeypatch, offline):
    """Makes the file known to every scheme of MMEngine's that needs no client of a company; yields its addresses."""
    with Site(evil.read_bytes()) as site:
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
        known = dict(evil='evil.pth', web=f'{site.url}/web.pth')
        (tmp_path / 'open_mmlab.json').write_text(json.dumps(known))
        monkeypatch.setattr(runner_checkpoint, 'get_torchvision_models', lambda: known)
        monkeypatch.setattr(runner_checkpoint, 'get_mmcls_models', lambda: known)
        yield {
            'a file': str(evil),
            'http': known['web'],
            'torchvision': 'torchvision://web',
            'modelzoo': 'modelzoo://web',
            'openmmlab, a file': 'openmmlab://evil',
            'open-mmlab, http': 'open-mmlab://web',
            'mmcls': 'mmcls://web',
        }


SCHEMES = ['a file', 'http', 'torchvision', 'modelzoo', 'openmmlab, a file', 'open-mmlab, http', 'mmcls']


@pytest.mark.parametrize('scheme', SCHEMES)
def test_guarded_loaders_run_no_code(scheme, addresses, tmp_path):
    refusal = r'(evil|web)\.pth: not a checkpoint that can be loaded safely.* GLOBAL \w+\.mkdir .*--allow-pickle'
    with guarded_loading(), pytest.raises(ValueError, match=refusal):
        CheckpointLoader.load_checkpoint(addresses[scheme])
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('scheme', SCHEMES)
def test_code_runs_where_it_is_allowed(scheme, addresses, tmp_path, caplog):
    with guarded_loading(allow_pickle=True), logged(caplog):
        content = CheckpointLoader.load_checkpoint(addresses[scheme])
    assert (tmp_path / 'made').exists()
    assert content['state_dict'] == ({} if scheme == 'mmcls' else dict(weight=torch.ones(1, 1)))
    (warning,) = [record for record in caplog.records if record.levelname == 'WARNING' and 'pickle' in record.message]
    assert '.pth: unpickled in full, which runs any code in it (--allow-pickle): ' in warning.message
    assert 'mkdir' in warning.message


@contextlib.contextmanager
def logged(caplog):
    """Lets caplog see what goes to MMEngine's current logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('scheme', ['a file', 'http'])
def test_stock_loaders_are_as_they_were(scheme, addresses, tmp_path):
    """They run the code: importing this package changes no other tool, and a guard that ended leaves nothing behind."""
    stock = dict(vars(runner_checkpoint)), dict(vars(PretrainedInit))
    with pytest.raises(ZeroDivisionError), guarded_loading(allow_pickle=True):
        assert vars(PretrainedInit) != stock[1]
        raise ZeroDivisionError
    assert (dict(vars(runner_checkpoint)), dict(vars(PretrainedInit))) == stock
    CheckpointLoader.load_checkpoint(addresses[scheme])
    assert (tmp_path / 'made').exists()
    with pytest.raises(ValueError, match='loaded safely'):
        read_checkpoint(addresses['a file'])


def test_guards_in_guards(evil):
    with guarded_loading(allow_pickle=True):
        with guarded_loading(), pytest.raises(ValueError, match='loaded safely'):
            read_checkpoint(evil)
        read_checkpoint(evil)


@pytest.mark.parametrize('what', DAMAGED)
def test_damaged_file_where_code_is_allowed(what, tmp_path):
    path = tmp_path / 'bad.pth'
    path.write_bytes(DAMAGED[what](path))
    with guarded_loading(allow_pickle=True), pytest.raises(ValueError, match=r'bad\.pth: not a checkpoint, or a dam'):
        read_checkpoint(path)


def test_pretrained_backbone_by_http_is_safe_in_stock_tools(addresses, tmp_path):
    with pytest.raises(ValueError, match='loaded safely'):
        load_pretrained_backbone(nn.Linear(1, 1, bias=False), addresses['http'])
    assert not (tmp_path / 'made').exists()


def test_named_weights_run_no_code(offline, evil, monkeypatch, tmp_path):
    monkeypatch.setitem(OFFICIAL, 'resnest50', hashlib.sha256(evil.read_bytes()).hexdigest()[:8])
    put(offline, f'resnest50-{OFFICIAL["resnest50"]}.pth', evil.read_bytes())
    with pytest.raises(ValueError, match='loaded safely'):
        CheckpointLoader.load_checkpoint('resnest://resnest50')
    assert not (tmp_path / 'made').exists()


class Head(BaseModule):
    """Somebody's module, with MMEngine's own ``init_weights``."""

    def __init__(self, **init_cfg):
        super().__init__(init_cfg)
        self.linear = nn.Linear(2, 1)


@pytest.mark.parametrize('name', ['Pretrained', PretrainedInit])
@pytest.mark.parametrize('prefix', [None, 'decode_head', 'decode_head.'])
def test_guarded_pretrained_initialiser_is_strict(name, prefix, tmp_path):
    path = tmp_path / 'x.pth'
    start = 'decode_head.' if prefix else ''
    file = {f'{start}linear.weight': torch.tensor([[5.0, 6.0]]), f'{start}linear.bias': torch.tensor([7.0])}
    file |= {'auxiliary_head.x': torch.zeros(1)} if prefix else {'fc.weight': torch.zeros(3)}
    torch.save(dict(state_dict=file), path)
    head = Head(type=name, checkpoint=str(path), prefix=prefix)
    with guarded_loading():
        head.init_weights()
    assert (head.linear.weight.tolist(), head.linear.bias.tolist()) == ([[5, 6]], [7])
    assert head.is_init

    file[f'{start}linear.more'] = file.pop(f'{start}linear.bias')
    torch.save(dict(state_dict=file), path)
    head = Head(type=name, checkpoint=str(path), prefix=prefix)
    with guarded_loading(), pytest.raises(ValueError) as error:
        head.init_weights()
    assert str(error.value).splitlines()[:3] == [
        f'{path} ({prefix}) does not fit Head:' if prefix else f'{path} does not fit Head:',
        '  1 missing in the file: linear.bias',
        '  1 left over in the file: linear.more',
    ]
    head.init_weights()  # MMEngine's own: half of it, without an error
    assert head.linear.weight.tolist() == [[5, 6]]


def test_guarded_pretrained_initialiser_checks_the_options_of_a_segmentor(tmp_path):
    model = Head(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    model.backbone, model.decode_head = nn.Module(), nn.Module()
    model.decode_head.align_corners = False
    meta = {ORIGIN: dict(source='encoding-fcn', options={'decode_head.align_corners': True})}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'x.pth')
    with guarded_loading(), pytest.raises(ValueError, match=r'model\.decode_head\.align_corners: True needed, False'):
        model.init_weights()


def test_numpys_older_names_are_read(tmp_path):
    """As MMEngine's checkpoints have them that were written with numpy 1."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    path = tmp_path / 'old.pth'
    torch.save(dict(state_dict={}, buffer=buffer, scalar=np.int16(3)), tmp_path / 'new.pth')
    with zipfile.ZipFile(tmp_path / 'new.pth') as new, zipfile.ZipFile(path, 'w') as old:
        for name in new.namelist():
            content = new.read(name)
            renamed = content.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')
            assert name.endswith('data.pkl') == (renamed != content)
            old.writestr(name, renamed)
    content = read_checkpoint(path)
    assert content['buffer'].data[0].tolist() == [1, 2]
    assert content['scalar'] == 3
