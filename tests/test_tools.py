"""tools/train.py and tools/test.py as commands: what they do, and what they say when they cannot."""

import argparse
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from bad_data import LOSSES, spoil
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.datasets import ADE20KDataset
from mmseg.registry import MODELS
from tiny import CAMVID, CLASSES, ENVIRONMENT, OPTIONS, ROOT, Payload, run_tool, write_data_set

from mmseg_resnest.cli import UsageError
from mmseg_resnest.resnest import SplitAttentionConv2d
from mmseg_resnest.segmentor import EncoderDecoder

ADE20K = ROOT / 'configs' / 'pspnet_resnest50_ade20k.py'
# Nobody answers there: weights that are not in the cache cannot be had.
OFFLINE = dict(https_proxy='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9', all_proxy='', no_proxy='')
COMMON = ['--data-root', 'data', '--cfg-options', *OPTIONS]
WITHOUT_VALIDATION = [*COMMON, 'train_cfg.val_interval=9']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with data/ and w/, where ``python tools/train.py`` trained two iterations on it with seed 1."""
    folder = tmp_path_factory.mktemp('trained')
    write_data_set(folder / 'data')
    command = [sys.executable, ROOT / 'tools' / 'train.py', CAMVID, '--work-dir', 'w', '--seed', '1', *COMMON]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (folder / 'stdout').write_text(done.stdout)
    return folder


def succeed(name, *args, cwd, **env) -> str:
    done = run_tool(name, *args, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(path) -> dict:
    return torch.load(path, weights_only=False)['state_dict']


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def losses(work_dir) -> list[float]:
    (scalars,) = work_dir.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


# ----------------------------------------------------------------------------------------------------------- help

OPTIONS_OF = {
    'train': [
        '--resume [PATH]',
        '--fine-tune PATH',
        '--allow-pickle',
        '--amp {bf16,fp16,off}',
        '--seed N',
        '--cfg-options KEY=VALUE',
    ],
    'test': [
        '--tta [',
        '--allow-pickle',
        '--out DIR',
        '--show-dir DIR',
        '--json FILE',
        '--work-dir DIR',
        '--cfg-options KEY=VALUE',
    ],
}


@pytest.mark.parametrize('name', OPTIONS_OF)
def test_help(name, tmp_path):
    text = succeed(name, '--help', cwd=tmp_path, COLUMNS='80')
    usage, _, body = text.partition('options:')
    assert f'python tools/{name}.py configs/deeplabv3_resnest101_ade20k.py' in usage
    assert 'torchrun --nproc-per-node' in usage
    assert '  config ' in usage
    assert name == 'train' or '  checkpoint ' in usage
    for option in [*OPTIONS_OF[name], '--data-root DIR', '--debug']:
        described = body.partition(f'\n  {option}')[2].partition('\n  -')[0]
        assert len(described.split()) >= 4, f'{option} is not explained'
    assert max(map(len, text.splitlines())) <= 100


# ------------------------------------------------------------------------------------------------------- training


def test_training(trained):
    log = (trained / 'stdout').read_text()
    assert f'Trained 2 iterations; checkpoints and the log are in {trained}/w\n' in log
    assert '|   Class    |' in log
    assert '| pedestrian |' in log
    assert 'Iter(val) [1/1]    aAcc: ' in log
    checkpoint = torch.load(trained / 'w' / 'iter_2.pth', weights_only=False)
    assert checkpoint['meta']['iter'] == 2
    assert checkpoint['meta']['seed'] == 1
    assert len(checkpoint['meta']['dataset_meta']['classes']) == CLASSES
    state = checkpoint['state_dict']
    assert state['backbone.layer1.0.conv2.fc2.weight'].shape == (128, 32, 1, 1)  # our names: mmseg's are others
    assert state['decode_head.conv_seg.weight'].shape == (CLASSES, 8, 1, 1)
    assert state['backbone.bn1.num_batches_tracked'] == 2
    assert (trained / 'w' / 'last_checkpoint').read_text() == 'iter_2.pth'
    assert len(losses(trained / 'w')) == 2
    assert all(1 < loss < 1.4 * 2 * math.log(CLASSES) for loss in losses(trained / 'w'))


def test_seed_and_default_format_on_a_cpu(trained, tmp_path):
    """The same seed gives the same weights, bit for bit, in another process too, and a CPU's default is no autocast."""
    again = tmp_path / 'w'
    succeed('train', CAMVID, '--work-dir', again, '--seed', '1', '--amp', 'off', *WITHOUT_VALIDATION, cwd=trained)
    assert losses(again) == losses(trained / 'w')
    assert equal(weights(again / 'iter_2.pth'), weights(trained / 'w' / 'iter_2.pth'))


@pytest.mark.slow
@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_half_precision(amp, trained, tmp_path):
    succeed(
        'train', CAMVID, '--work-dir', tmp_path / 'w', '--seed', '1', '--amp', amp, *WITHOUT_VALIDATION, cwd=trained
    )
    exact, rounded = losses(trained / 'w'), losses(tmp_path / 'w')
    assert rounded[0] != exact[0]
    assert rounded[0] == pytest.approx(exact[0], rel=0.01 if amp == 'bf16' else 0.001)
    checkpoint = torch.load(tmp_path / 'w' / 'iter_2.pth', weights_only=False)
    assert {value.dtype for value in checkpoint['state_dict'].values()} == {torch.float32, torch.int64}
    scaler = checkpoint['optimizer'].get('loss_scaler')
    assert scaler is None if amp == 'bf16' else scaler['scale'] > 1


def test_amp_replaces_a_stock_wrapper():
    train = runpy.run_path(str(ROOT / 'tools' / 'train.py'))
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', clip_grad=dict(max_norm=1.0))))
    for amp, dtype in dict(bf16='bfloat16', fp16='float16', off='float32').items():
        train['set_amp'](cfg, amp)
        assert cfg.optim_wrapper == dict(
            type='mmseg_resnest.AutocastOptimWrapper', dtype=dtype, autocast_cpu=True, clip_grad=dict(max_norm=1.0)
        )


def test_resume_from_the_work_dir(trained, tmp_path):
    shutil.copytree(trained / 'w', tmp_path / 'w')
    (tmp_path / 'w' / 'last_checkpoint').write_text(str(tmp_path / 'w' / 'iter_2.pth'))  # as stock MMEngine does
    (tmp_path / 'w' / 'iter_9.pth').write_bytes(b'cut off')
    options = [*WITHOUT_VALIDATION, 'train_cfg.max_iters=3']
    out = succeed('train', CAMVID, '--work-dir', tmp_path / 'w', '--resume', *options, cwd=trained)
    assert f'Not resumed from: {tmp_path}/w/iter_9.pth (7 bytes): no checkpoint, or a damaged one' in out
    assert 'resumed epoch: 0, iter: 2' in out
    assert 'Trained 3 iterations' in out
    before, after = weights(tmp_path / 'w' / 'iter_2.pth'), weights(tmp_path / 'w' / 'iter_3.pth')
    assert after['backbone.bn1.num_batches_tracked'] == 3
    assert not torch.equal(before['backbone.conv1.0.weight'], after['backbone.conv1.0.weight'])


def test_resume_from_a_file(trained, tmp_path):
    path = trained / 'w' / 'iter_2.pth'
    options = [*WITHOUT_VALIDATION, 'train_cfg.max_iters=3', 'optim_wrapper.optimizer.lr=9']
    out = succeed('train', CAMVID, '--work-dir', tmp_path / 'w', '--resume', path, *options, cwd=trained)
    assert f'Load checkpoint from {path}' in out
    assert 'resumed epoch: 0, iter: 2' in out
    after = torch.load(tmp_path / 'w' / 'iter_3.pth', weights_only=False)
    assert after['meta']['iter'] == 3
    assert after['state_dict']['backbone.bn1.num_batches_tracked'] == 3
    assert after['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.01, rel=0.01)  # the checkpoint's


def test_a_restart_that_has_saved_nothing_goes_back_to_the_named_file_again(trained, tmp_path):
    """And goes on from the newest once it has, though the work dir holds a run of later iterations."""
    work_dir, options = tmp_path / 'w', [*WITHOUT_VALIDATION, 'default_hooks.checkpoint.interval=1']
    succeed('train', CAMVID, '--work-dir', work_dir, '--seed', '1', *options, 'train_cfg.max_iters=1', cwd=trained)
    first = work_dir / 'iter_1.pth'
    shutil.copy(trained / 'w' / 'iter_2.pth', work_dir)
    (work_dir / 'last_checkpoint').write_text('iter_2.pth')
    command = ['train', CAMVID, '--work-dir', work_dir, '--resume', first, '--seed', '1', *options]
    again = dict(cwd=trained, TORCHELASTIC_RESTART_COUNT='1')
    out = succeed(*command, 'train_cfg.max_iters=3', **again)
    assert f'Started again before it saved: from {first} again, not from {work_dir}/iter_2.pth' in out
    assert 'resumed epoch: 0, iter: 1' in out
    out = succeed(*command, 'train_cfg.max_iters=4', **again)
    assert 'Started again before it saved' not in out
    assert 'resumed epoch: 0, iter: 3' in out


def test_resume_with_nothing_there_starts_anew(trained, tmp_path):
    options = ['--seed', '2', *WITHOUT_VALIDATION, 'train_cfg.max_iters=1']
    out = succeed('train', CAMVID, '--work-dir', tmp_path / 'w', '--resume', *options, cwd=trained)
    assert 'to go on from: a new run' in out
    assert losses(tmp_path / 'w')[0] != losses(trained / 'w')[0]  # of another seed
    assert weights(tmp_path / 'w' / 'iter_1.pth')['backbone.bn1.num_batches_tracked'] == 1


@pytest.mark.slow
def test_fine_tuning_that_resumes_where_it_can(trained, tmp_path):
    command = ['--work-dir', tmp_path / 'w', '--fine-tune', trained / 'w' / 'iter_2.pth', '--resume']
    out = succeed('train', CAMVID, *command, *WITHOUT_VALIDATION, 'train_cfg.max_iters=1', cwd=trained)
    assert 'decode_head.conv_seg starts fresh' in out
    out = succeed('train', CAMVID, *command, *WITHOUT_VALIDATION, 'train_cfg.max_iters=2', cwd=trained)
    assert 'resumed epoch: 0, iter: 1' in out
    assert 'starts fresh' not in out


def test_a_config_that_resumes_does_not_change_what_is_tested(trained, tmp_path):
    shutil.copytree(trained / 'w', tmp_path / 'w')
    content = torch.load(trained / 'w' / 'iter_2.pth', weights_only=False)
    torch.save(content, tmp_path / 'other.pth')
    content['state_dict'] = {'nothing': torch.zeros(1)}
    torch.save(content, tmp_path / 'w' / 'iter_2.pth')  # what MMEngine would load, not strictly, in its place
    options = [*COMMON, 'resume=True']
    out = succeed('test', CAMVID, tmp_path / 'other.pth', '--work-dir', tmp_path / 'w', *options, cwd=trained)
    assert 'esumed' not in out
    assert 'size mismatch' not in out
    assert 'unexpected key' not in out


@pytest.mark.parametrize('start', ['--resume', '--fine-tune'])
def test_going_on_with_another_graph_is_refused(trained, tmp_path, start):
    options = [*WITHOUT_VALIDATION, 'model.backbone.graph=mmseg', 'train_cfg.max_iters=3']
    command = ['--work-dir', tmp_path / 'w', start, trained / 'w' / 'iter_2.pth', *options]
    done = run_tool('train', CAMVID, *command, cwd=trained)
    assert done.returncode == 1
    assert "model.backbone.graph: 'authors' needed, 'mmseg' found" in done.stderr


# --------------------------------------------------------------------------------------------------------- testing


def hand_computed(predictions, labels, images: int, num_classes: int, offset: int) -> tuple[dict, dict]:
    """Returns the figures and each class's, in percent, from label maps as PNG whose classes begin at ``offset``."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    paths = sorted(predictions.glob('*.png'))
    assert [path.name for path in paths] == [f'{i}.png' for i in range(images)]
    for path in paths:
        predicted, truth = (cv2.imread(str(p), cv2.IMREAD_UNCHANGED).astype(int) for p in (path, labels / path.name))
        assert predicted.shape == truth.shape
        assert predicted.min() >= offset
        counted = (truth != 255) & (truth >= offset)
        np.add.at(matrix, (truth[counted] - offset, predicted[counted] - offset), 1)
    hits, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    assert (predicted > 0).sum() > 1  # a network that says one class would prove little
    with np.errstate(invalid='ignore'):
        iou, acc = 100 * hits / (true + predicted - hits), 100 * hits / true
    figures = dict(mIoU=np.nanmean(iou), mAcc=np.nanmean(acc), aAcc=100 * hits.sum() / true.sum())
    return figures, dict(IoU=iou, Acc=acc)


def check_json(path, predictions, labels, images, names, offset) -> dict:
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    figures, of_class = hand_computed(predictions, labels, images, len(names), offset)
    assert {name: content[name] for name in figures} == pytest.approx(figures, abs=0.0051)  # two digits
    assert list(content['classes']) == list(names)
    for metric, values in of_class.items():
        found = [content['classes'][name][metric] for name in names]
        assert [math.nan if value is None else value for value in found] == pytest.approx(
            values.tolist(), abs=1e-4, nan_ok=True
        )
    return content


def test_testing(trained, tmp_path):
    args = ['--json', tmp_path / 'deep' / 'r.json', '--out', tmp_path / 'out', '--show-dir', tmp_path / 'show']
    out = succeed('test', CAMVID, 'w/iter_2.pth', *args, *COMMON, cwd=trained)
    names = Config.fromfile(CAMVID).metainfo.classes
    content = check_json(
        tmp_path / 'deep' / 'r.json', tmp_path / 'out', trained / 'data/annotations/validation', 4, names, 0
    )
    assert (content['config'], content['checkpoint'], content['tta']) == (str(CAMVID), 'w/iter_2.pth', None)
    assert content['classes']['bicyclist'] == dict(IoU=None, Acc=None)  # neither labelled nor predicted
    assert out.endswith(f'mIoU {content["mIoU"]:.2f}  mAcc {content["mAcc"]:.2f}  aAcc {content["aAcc"]:.2f}\n')
    (validated,) = re.findall(
        r'Iter\(val\) \[1/1\] +aAcc: (\S+) +mIoU: (\S+) +mAcc: (\S+)', (trained / 'stdout').read_text()
    )
    assert [float(value) for value in validated] == [content[name] for name in ('aAcc', 'mIoU', 'mAcc')]
    pictures = sorted((tmp_path / 'show').rglob('*.png'))
    assert len(pictures) == 4
    assert {cv2.imread(str(picture)).shape for picture in pictures} == {(48, 128, 3)}  # truth and prediction
    assert (trained / 'work_dirs' / 'pspnet_resnest50_camvid').is_dir()  # the default


def test_a_new_run_starts_without_a_remark_where_none_has_saved(tmp_path):
    set_start = runpy.run_path(str(ROOT / 'tools' / 'train.py'))['set_start']
    cfg, args = Config(dict(work_dir=str(tmp_path))), argparse.Namespace(resume=None, fine_tune=None)
    assert set_start(cfg, args) == []
    (tmp_path / 'last_checkpoint').write_text('iter_3.pth')  # of files that are gone
    with pytest.raises(ValueError, match=r'the run has saved .*iter_3\.pth.* move last_checkpoint away to start anew'):
        set_start(cfg, args)


@pytest.mark.parametrize('name', ['w/best_mIoU_iter_3.pth', 'elsewhere/w/iter_3.pth'])
def test_a_new_run_does_not_replace_a_best_checkpoint_or_one_elsewhere(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    set_start = runpy.run_path(str(ROOT / 'tools' / 'train.py'))['set_start']
    hooks = dict(checkpoint=dict(out_dir=str(tmp_path / 'elsewhere')))
    cfg = Config(dict(work_dir=str(tmp_path / 'w'), default_hooks=hooks))
    args = argparse.Namespace(resume=None, fine_tune=None)
    with pytest.raises(UsageError, match=f'{tmp_path / name}: found an earlier run'):
        set_start(cfg, args)
    (tmp_path / name).unlink()
    assert set_start(cfg, args) == []


def test_a_new_run_does_not_replace_the_checkpoints_of_an_earlier_one(trained, tmp_path):
    work_dir = tmp_path / 'w'
    command = ['train', CAMVID, '--work-dir', work_dir, *WITHOUT_VALIDATION, 'train_cfg.max_iters=3']
    shutil.copytree(trained / 'w', work_dir)
    before = {path: path.read_bytes() for path in work_dir.glob('*.*') if path.name != '.lock'}
    done = run_tool(*command, cwd=trained)
    assert done.returncode == 2
    assert f'{work_dir}/iter_2.pth: found an earlier run, whose checkpoints a new one would replace' in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    out = succeed(*command, cwd=trained, SLURM_RESTART_COUNT='1')
    assert 'resumed epoch: 0, iter: 2' in out


@pytest.mark.parametrize('kind', ['mmseg_resnest.EncoderDecoder', 'mmseg.EncoderDecoder', EncoderDecoder])
def test_exact_leaves_layout_and_radix_convolutions_as_they_are(kind):
    """On a GPU ours would make weights channels-last, and run the convolutions in parts."""
    cfg = Config.fromfile(CAMVID)
    cfg.model.backbone.update(depth=14, init_cfg=None)
    cfg.model.type = kind
    runpy.run_path(str(ROOT / 'tools' / 'test.py'))['set_exact'](cfg)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    assert not getattr(model, 'channels_last', False)
    convs = [module for module in model.modules() if isinstance(module, SplitAttentionConv2d)]
    assert {conv.execution_on(torch.device('cuda')) for conv in convs} == {'grouped'}


@pytest.mark.parametrize(('options', 'allowed'), [([], True), (['--exact'], False), (['--no-tf32'], False)])
def test_tf32_is_a_switch(options, allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    tool = runpy.run_path(str(ROOT / 'tools' / 'test.py'))
    args = tool['make_parser']().parse_args([str(CAMVID), 'iter_2.pth', *options])
    tool['configure'](Config.fromfile(CAMVID), args)
    assert torch.backends.cudnn.allow_tf32 is allowed


EVALUATORS = {
    'other figures': (['test_evaluator.iou_metrics=[mDice,mIoU]'], r'\nmIoU \S+  mAcc \S+  aAcc \S+  mDice \S+\n$'),
    'one other figure': (['test_evaluator.iou_metrics=[mDice]'], r'\nmAcc \S+  aAcc \S+  mDice \S+\n$'),
    'prefix': (['test_evaluator.prefix=val'], r'\nval/mIoU \S+  val/mAcc \S+  val/aAcc \S+\n$'),
    'no figures': (
        ['test_evaluator.format_only=True', 'test_evaluator.output_dir=OUT'],
        r'\nformat_only: no figures, the label maps are in OUT\n$',
    ),
}


@pytest.mark.parametrize('case', EVALUATORS)
def test_testing_with_other_figures(case, trained, tmp_path):
    options, printed = EVALUATORS[case]
    options = [option.replace('OUT', str(tmp_path / 'out')) for option in options]
    args = ['--json', tmp_path / 'r.json', '--skip-data-check', *COMMON, *options]
    out = succeed('test', CAMVID, 'w/iter_2.pth', *args, cwd=trained)
    assert re.search(printed.replace('OUT', str(tmp_path / 'out')), out)
    content = json.loads((tmp_path / 'r.json').read_text())
    figures = re.findall(r'(\S+) (\d+\.\d+)', out.splitlines()[-1])
    assert {name: f'{content[name]:.2f}' for name, _ in figures} == dict(figures)
    assert len(list((tmp_path / 'out').glob('*.png'))) == (4 if case == 'no figures' else 0)


def test_testing_with_several_evaluators(trained, tmp_path):
    """Label maps and each class's figures are IoUMetric's, which need not be the first."""
    (tmp_path / 'config.py').write_text(
        f'_base_ = {str(CAMVID)!r}\n'
        f"test_evaluator = [dict(type='DumpResults', out_file_path={str(tmp_path / 'all.pkl')!r}),\n"
        "    dict(type='mmseg_resnest.IoUMetric', iou_metrics=['mIoU'])]\n"
    )
    args = ['--json', tmp_path / 'r.json', '--out', tmp_path / 'out', '--work-dir', tmp_path / 'w', '--skip-data-check']
    succeed('test', tmp_path / 'config.py', 'w/iter_2.pth', *args, *COMMON, cwd=trained)
    names = Config.fromfile(CAMVID).metainfo.classes
    check_json(tmp_path / 'r.json', tmp_path / 'out', trained / 'data/annotations/validation', 4, names, 0)
    assert (tmp_path / 'all.pkl').stat().st_size > 0


@pytest.fixture(scope='module')
def ade20k_checkpoint(tmp_path_factory):
    """Random weights of a small network of 150 classes."""
    cfg = Config.fromfile(ADE20K)
    cfg.model.backbone.update(depth=14, init_cfg=None)
    cfg.model.decode_head.channels = cfg.model.auxiliary_head.channels = 8
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    path = tmp_path_factory.mktemp('ade20k') / 'random.pth'
    torch.save(model.state_dict(), path)
    return path


def test_testing_with_augmentation_on_ade20k(trained, ade20k_checkpoint, tmp_path):
    """PNGs carry ADE20K's own labels, 1-150; with --tta they are those of the merged prediction."""
    found = {}
    for tta, way in {None: (), 'openmmlab': ('--tta',), 'authors': ('--tta', 'authors')}.items():
        folder = tmp_path / str(tta)
        args = ['--json', folder / 'r.json', '--out', folder, *way, '--work-dir', tmp_path / 'w']
        args += [*COMMON, 'test_dataloader.dataset.indices=2', 'test_dataloader.batch_size=2']
        args += ['authors_tta_model.base_size=52', 'authors_tta_model.crop_size=48']
        succeed('test', ADE20K, ade20k_checkpoint, *args, cwd=trained)
        names = ADE20KDataset.METAINFO['classes']
        content = check_json(folder / 'r.json', folder, trained / 'data/annotations/validation', 2, names, 1)
        assert content['tta'] == tta
        found[tta] = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted(folder.glob('*.png'))])
    assert 0 < (found[None] != found['openmmlab']).mean() < 0.9
    assert 0 < (found[None] != found['authors']).mean() < 0.9
    assert 0 < (found['openmmlab'] != found['authors']).mean() < 0.9


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope='module')
def broken(trained):
    """Adds broken files to the folder of ``trained``."""
    (trained / 'syntax.py').write_text('model = dict(\n')
    (trained / 'empty').mkdir()
    (trained / 'garbage.pth').write_bytes(b'garbage' * 100)
    (trained / 'half.pth').write_bytes((trained / 'w' / 'iter_2.pth').read_bytes()[:10_000])
    other = weights(trained / 'w' / 'iter_2.pth')
    other['stem.weight'] = other.pop('backbone.conv1.0.weight')
    other['decode_head.conv_seg.bias'] = torch.zeros(19)
    torch.save(dict(state_dict=other, meta=dict(iter=0, epoch=0), optimizer={}, message_hub={}), trained / 'other.pth')
    torch.save(weights(trained / 'w' / 'iter_2.pth'), trained / 'weights.pth')
    whole = torch.load(trained / 'w' / 'iter_2.pth', weights_only=False)
    whole['meta']['config'] = f'import os\nos.mkdir({str(trained / "made")!r})\n'
    torch.save(whole, trained / 'config.pth')
    return trained


DEPTHS = 'ResNeSt: depth=18; expected one of 14, 26, 50, 101, 200, 269'
LISTING = [
    'other.pth does not fit EncoderDecoder:',
    '  1 missing in the file: backbone.conv1.0.weight',
    '  1 left over in the file: stem.weight',
    '  1 of another shape: decode_head.conv_seg.bias: (19,) in the file, (11,) in the model',
]
UNSAFE = 'not a checkpoint that can be loaded safely, or a damaged one ('
BAD_INPUT = {
    'no config': (2, 'train', [], 'the following arguments are required: config'),
    'wrong config path': (
        2,
        'train',
        [f'{CAMVID}x'],
        f'{CAMVID}x: there is no such config file; did you mean {CAMVID}, ',
    ),
    'syntax error': (2, 'train', ['syntax.py'], "syntax.py: not a valid config: '(' was never closed"),
    'misspelt key': (
        2,
        'train',
        [CAMVID, *COMMON, 'modle.backbone.depth=50'],
        'nothing reads modle at the top of a config; did',
    ),
    'no pair': (2, 'test', [CAMVID, 'w/iter_2.pth', '--cfg-options', 'a'], 'expected KEY=VALUE; got a'),
    'wrong number format': (2, 'train', [CAMVID, '--amp', 'fp8'], "invalid choice: 'fp8'"),
    'no checkpoint': (
        2,
        'test',
        [CAMVID, 'w/none.pth', *COMMON],
        'w/none.pth: there is no such checkpoint; its folder has w/iter_2.pth',
    ),
    'folder for the figures': (2, 'test', [CAMVID, 'w/iter_2.pth', '--json', 'w', *COMMON], '--json w: a folder;'),
    'figures in a file': (
        2,
        'test',
        [CAMVID, 'w/iter_2.pth', '--json', 'w/iter_2.pth/r.json', *COMMON],
        'w/iter_2.pth: the folder cannot be written (File exists); expected another',
    ),
    'other classes': (
        1,
        'train',
        [CAMVID, *COMMON, 'model.decode_head.num_classes=3'],
        'model.decode_head.num_classes=3, but train_dataloader.dataset has 11 classes (sky, building, pole, road',
    ),
    'to fine-tune and to resume': (
        2,
        'train',
        [CAMVID, '--fine-tune', 'w/iter_2.pth', '--resume', 'w/iter_2.pth', *COMMON],
        '--fine-tune starts a run, and --resume goes on with that of w/iter_2.pth; give one of them',
    ),
    'to fine-tune and, in the config, to resume': (
        2,
        'train',
        [CAMVID, '--fine-tune', 'w/iter_2.pth', *COMMON, 'resume=True', 'load_from=w/iter_1.pth'],
        '--fine-tune starts a run, and the config (resume, load_from) goes on with that of w/iter_1.pth; give one',
    ),
    'no checkpoint to fine-tune': (
        2,
        'train',
        [CAMVID, '--fine-tune', 'none.pth', *COMMON],
        'none.pth: there is no such checkpoint',
    ),
    'no checkpoint to resume': (
        2,
        'train',
        [CAMVID, '--resume', 'none.pth', *COMMON],
        'none.pth: there is no such checkpoint',
    ),
    'exact and another format': (
        2,
        'test',
        [CAMVID, 'w/iter_2.pth', '--exact', '--dtype', 'bfloat16', *COMMON],
        '--dtype: expected not with --exact, which switches off all that makes evaluation fast',
    ),
    'exact and compiled': (2, 'test', [CAMVID, 'w/iter_2.pth', '--exact', '--compile', *COMMON], '--compile: expected'),
    'exact and batches': (
        2,
        'test',
        [CAMVID, 'w/iter_2.pth', '--exact', '--batch-size', '2', *COMMON],
        '--batch-size: expected not with --exact',
    ),
    'no batch': (2, 'test', [CAMVID, 'w/iter_2.pth', '--batch-size', '0', *COMMON], '--batch-size 0: expected 1 or mo'),
    'no augmentation': (2, 'test', [CAMVID, 'w/iter_2.pth', '--tta', *COMMON], 'has no tta_pipeline'),
    'unknown augmentation': (2, 'test', [CAMVID, 'w/iter_2.pth', '--tta', 'flip'], "--tta: invalid choice: 'flip'"),
    'no data root': (1, 'train', [CAMVID, '--data-root', 'none'], "data_root 'none' does not exist. Put the data set"),
    'no data root to test': (1, 'test', [CAMVID, 'w/iter_2.pth', '--data-root', 'none'], "data_root 'none' does not"),
    'empty data root': (
        1,
        'train',
        [CAMVID, '--data-root', 'empty'],
        'empty/images/training does not exist; empty holds',
    ),
    'wrong suffix': (
        1,
        'train',
        [CAMVID, *COMMON, 'val_dataloader.dataset.img_suffix=.jpeg'],
        'val_dataloader.dataset: data/images/validation holds no *.jpeg (found: .jpg).',
    ),
    'unknown depth': (1, 'train', [CAMVID, *COMMON, 'model.backbone.depth=18'], DEPTHS),
    'unknown depth to test': (1, 'test', [CAMVID, 'w/iter_2.pth', *COMMON, 'model.backbone.depth=18'], DEPTHS),
    'unknown output stride': (
        1,
        'train',
        [CAMVID, *COMMON, 'model.backbone.output_stride=12'],
        'ResNeSt: output_stride=12; expected one of 8, 16, 32',
    ),
    'misspelt option': (
        1,
        'train',
        [CAMVID, *COMMON, 'model.backbone.dpeth=50'],
        "unexpected keyword argument 'dpeth'",
    ),
    'one image for batch norm': (
        1,
        'train',
        [CAMVID, *COMMON, 'train_dataloader.batch_size=1'],
        'train_dataloader.batch_size=1, but 29 batch norm layers train (the first: backbone.conv1.1): one image has no',
    ),
    'garbage': (1, 'test', [CAMVID, 'garbage.pth', *COMMON], f'garbage.pth: {UNSAFE}'),
    'garbage to resume': (1, 'train', [CAMVID, '--resume', 'half.pth', *COMMON], f'half.pth: {UNSAFE}'),
    'config to resume': (
        1,
        'train',
        [CAMVID, '--resume', 'config.pth', *COMMON],
        'config.pth: its meta.config is code',
    ),
    'weights to resume': (
        1,
        'train',
        [CAMVID, '--resume', 'weights.pth', *COMMON],
        'weights.pth: no checkpoint of a training run: it has no message_hub, no meta, no optimizer',
    ),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input(case, broken):
    code, name, args, message = BAD_INPUT[case]
    done = run_tool(name, *args, cwd=broken)
    assert done.returncode == code
    printed = done.stderr.partition(f'{name}.py: error: ')[2]
    assert message in printed
    assert len(printed.splitlines()) <= len(message.splitlines()) + 2  # one message, with its fix and the hint
    assert printed.endswith('(--debug shows where this happened.)\n') == (code == 1)
    assert 'Traceback' not in done.stderr + done.stdout
    assert not (broken / 'made').exists()


TESTED = ['truncated JPEG', 'garbage JPEG', 'different sizes', 'EXIF rotation', 'label out of range', *LOSSES]


@pytest.mark.parametrize('row', TESTED)
def test_testing_stops_at_bad_data(row, trained, tmp_path, monkeypatch):
    shutil.copytree(trained / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    line = spoil(Path('data'), 'validation', '2', row)
    done = run_tool('test', CAMVID, trained / 'w' / 'iter_2.pth', *COMMON, cwd=tmp_path)
    assert done.returncode == 1
    assert line in done.stderr.partition('test.py: error: 1 error in 4 pairs of images and label maps:')[2]
    assert 'mIoU' not in done.stdout


@pytest.mark.parametrize('skipped', [[], ['--skip-data-check']])
def test_testing_an_empty_folder(skipped, trained, tmp_path):
    for kind in ('images', 'annotations'):
        (tmp_path / 'data' / kind / 'validation').mkdir(parents=True)
    done = run_tool('test', CAMVID, trained / 'w' / 'iter_2.pth', *skipped, *COMMON, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        'test.py: error: test_dataloader.dataset: data/images/validation holds no *.jpg (found: nothing). Put the data '
        'set there, or say where it is with --data-root DIR.' in done.stderr
    )


# ------------------------------------------------------------------------------------------- what a run starts from

FROM_SCRATCH = 'model.backbone.init_cfg=None'
NO_BACKBONE = [option for option in COMMON if not option.startswith('model.backbone.')]
PRETRAINED = [option for option in COMMON if option != FROM_SCRATCH]
# Where a tool reads a checkpoint FILE -> the tool, its arguments, and the listing for other.pth.
PATHS = {
    'test': ('test', [CAMVID, 'FILE', *COMMON], LISTING),
    '--resume': ('train', [CAMVID, '--resume', 'FILE', *COMMON], LISTING),
    '--fine-tune': ('train', [CAMVID, '--fine-tune', 'FILE', *COMMON], LISTING[:3]),
    'load_from': ('train', [CAMVID, *COMMON, 'load_from=FILE'], LISTING),
    'load_from and resume': ('train', [CAMVID, *COMMON, 'load_from=FILE', 'resume=True'], LISTING),
    'init_cfg of the backbone': (
        'train',
        [CAMVID, *PRETRAINED, 'model.backbone.init_cfg.checkpoint=FILE', 'model.backbone.init_cfg.prefix=backbone'],
        ['other.pth (backbone) does not fit ResNeSt:', '  1 missing in the file: conv1.0.weight'],
    ),
    'init_cfg of another backbone': (
        'train',
        ['foreign.py', *NO_BACKBONE, 'model.backbone.init_cfg.checkpoint=FILE'],
        ['other.pth does not fit ResNet:', '  100 missing in the file: conv1.weight, bn1.weight, '],
    ),
    'init_cfg of a head': (
        'train',
        [
            *(CAMVID, *COMMON, 'model.decode_head.init_cfg.type=Pretrained'),
            *('model.decode_head.init_cfg.checkpoint=FILE', 'model.decode_head.init_cfg.prefix=decode_head.'),
        ],
        [
            'other.pth (decode_head.) does not fit PSPHead:',
            '  1 of another shape: conv_seg.bias: (19,) in the file, (11,) in the model',
        ],
    ),
    'init_cfg of the segmentor': (
        'train',
        [CAMVID, *COMMON, 'model.init_cfg.type=Pretrained', 'model.init_cfg.checkpoint=FILE'],
        LISTING,
    ),
}


def paths(*fast: str) -> list:
    """Returns all of PATHS, marked as slow but for those named; test_checkpoints.py has them within a process."""
    return [path if path in fast else pytest.param(path, marks=pytest.mark.slow) for path in PATHS]


@pytest.fixture(scope='module')
def files(broken):
    """Adds checkpoints and configs to the folder of ``trained``."""
    whole = torch.load(broken / 'w' / 'iter_2.pth', weights_only=False)
    torch.save(whole | dict(more=Payload(broken / 'made')), broken / 'hidden.pth')
    state = whole['state_dict']
    part = {key: value for key, value in state.items() if key.startswith('backbone.')}
    torch.save(part, broken / 'prefixed.pth')
    torch.save({key.removeprefix('backbone.'): value for key, value in part.items()}, broken / 'backbone.pth')
    whole['meta']['dataset_meta']['classes'] = [f'class {i}' for i in range(CLASSES)]
    torch.save(whole, broken / 'renamed.pth')
    head = f"_base_ = '{CAMVID}'\n"
    (broken / 'foreign.py').write_text(
        f"{head}backbone = dict(_delete_=True, type='ResNet', depth=18, init_cfg=dict(type='Pretrained'))\n"
        'model = dict(backbone=backbone, decode_head=dict(in_channels=512), auxiliary_head=dict(in_channels=256))\n'
    )
    (broken / 'twelve.py').write_text(
        f'{head}'
        "metainfo = dict(classes=(*_base_.metainfo.classes, 'lane'), palette=[*_base_.metainfo.palette, [1, 2, 3]])\n"
        'model = dict(decode_head=dict(num_classes=12), auxiliary_head=dict(num_classes=12))\n'
        'train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(metainfo=metainfo))\n'
    )
    (broken / 'no_auxiliary.py').write_text(f'{head}model = dict(auxiliary_head=None)\n')
    return broken


def start(path: str, file: str, *more: str, cwd) -> subprocess.CompletedProcess:
    name, args, _ = PATHS[path]
    return run_tool(name, *[str(arg).replace('FILE', file) for arg in args], *more, cwd=cwd)


def message_of(done: subprocess.CompletedProcess) -> str:
    """Returns what a tool that ended with exit code 1 and no trace says."""
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr + done.stdout
    return done.stderr.partition('.py: error: ')[2]


@pytest.mark.parametrize('path', paths('test', '--resume', 'load_from', 'init_cfg of the segmentor'))
def test_code_in_a_checkpoint_is_refused_before_it_runs(path, files):
    message = message_of(start(path, 'hidden.pth', cwd=files))
    assert message.startswith(f'hidden.pth: {UNSAFE}Trying to load unsupported GLOBAL ')
    assert '.mkdir' in message
    assert 'Nothing in it was run.' in message
    assert '--allow-pickle' in message
    assert not (files / 'made').exists()


@pytest.mark.parametrize('path', paths('test', '--resume', '--fine-tune', 'init_cfg of the backbone'))
def test_what_does_not_fit_is_listed(path, files):
    message = message_of(start(path, 'other.pth', cwd=files))
    assert message.startswith('\n'.join(PATHS[path][2]))
    assert len(message.splitlines()) <= len(LISTING) + 2


@pytest.mark.parametrize(
    'path', ['test', *[pytest.param(path, marks=pytest.mark.slow) for path in ('--resume', '--fine-tune')]]
)
def test_code_in_a_checkpoint_runs_where_it_is_allowed(path, files, tmp_path):
    options = ['train_cfg.max_iters=3', '--work-dir', str(tmp_path / 'w'), '--allow-pickle']
    done = start(path, 'hidden.pth', *options, cwd=files)
    try:
        assert done.returncode == 0, done.stderr
        assert 'hidden.pth: unpickled in full, which runs any code in it (--allow-pickle): ' in done.stdout
        assert (files / 'made').exists()
    finally:
        (files / 'made').rmdir()


def parameters(state: dict) -> dict:
    return {key: value for key, value in state.items() if key.endswith(('weight', 'bias'))}


ONE_STEP_OF_NOTHING = [*WITHOUT_VALIDATION, 'train_cfg.max_iters=1', 'optim_wrapper.optimizer.lr=0']


def test_testing_says_that_the_classes_are_others(files):
    out = succeed('test', CAMVID, 'renamed.pth', *COMMON, cwd=files)
    assert 'renamed.pth was trained for other classes: class 0, class 1, ' in out


def test_fine_tuning_to_other_classes(files, tmp_path):
    args = ['twelve.py', '--fine-tune', 'w/iter_2.pth', '--work-dir', tmp_path / 'w', *ONE_STEP_OF_NOTHING]
    out = succeed('train', *args, cwd=files)
    before, after = (parameters(weights(path)) for path in (files / 'w' / 'iter_2.pth', tmp_path / 'w' / 'iter_1.pth'))
    fresh = [f'{head}.conv_seg.{key}' for head in ('decode_head', 'auxiliary_head') for key in ('weight', 'bias')]
    assert [key for key in after if key not in before or not torch.equal(after[key], before[key])] == fresh
    assert [len(after[key]) for key in fresh] == [12] * 4
    assert all(f'{head}.conv_seg starts fresh: 11 classes in the file, 12 here' in out for head in ('head', 'ary_head'))
    assert out.count('starts fresh') == 2
    assert 'w/iter_2.pth was trained for other classes: sky, ' in out
    assert 'bicyclist; the data set has sky, ' in out
    assert 'do not match exactly' not in out  # what MMEngine says of a checkpoint that does not fit


def test_starting_from_a_checkpoint(files, tmp_path):
    """``load_from`` takes all weights, but nothing of the run; with --resume that comes only when there is no later."""
    args = [CAMVID, '--resume', '--work-dir', tmp_path / 'w', *ONE_STEP_OF_NOTHING, 'load_from=renamed.pth']
    out = succeed('train', *args, cwd=files)
    assert 'to go on from: a new run' in out
    assert equal(*(parameters(weights(path)) for path in (files / 'renamed.pth', tmp_path / 'w' / 'iter_1.pth')))
    assert 'starts fresh' not in out
    assert 'renamed.pth was trained for other classes: class 0, class 1, ' in out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (
            ['twelve.py', *COMMON, 'load_from=w/iter_2.pth'],
            'auxiliary_head.conv_seg.bias: (11,) in the file, (12,) in the model\n'
            'For other classes --fine-tune w/iter_2.pth loads all but the classifiers, which start fresh.',
        ),
        (
            ['no_auxiliary.py', '--fine-tune', 'w/iter_2.pth', *[o for o in COMMON if 'auxiliary' not in o]],
            'running_var, auxiliary_head.convs.0.bn.num_batches_tracked\n'
            'Use the config that the checkpoint was trained with, or ',
        ),
        (
            [CAMVID, '--fine-tune', 'backbone.pth', *COMMON],
            'backbone.pth holds a backbone and no decode_head; expected a whole segmentor. Load it into the backbone: '
            'model.backbone.init_cfg=dict(type="Pretrained", checkpoint="backbone.pth")',
        ),
        (
            [CAMVID, *COMMON, 'load_from=prefixed.pth'],
            'model.backbone.init_cfg=dict(type="Pretrained", checkpoint="prefixed.pth", prefix="backbone.")',
        ),
    ],
)
def test_checkpoint_of_something_else(args, message, files):
    assert message in message_of(run_tool('train', *args, cwd=files))


def test_debug_shows_the_stack(broken):
    done = run_tool('train', CAMVID, '--data-root', 'none', '--debug', cwd=broken)
    assert done.returncode == 1
    assert done.stderr.count('Traceback (most recent call last)') == 1
    assert 'in check_folders' in done.stderr
    assert "FileNotFoundError: train_dataloader.dataset: data_root 'none' does not exist." in done.stderr


def test_weights_that_cannot_be_had(trained, tmp_path):
    options = [option for option in OPTIONS if not option.startswith('model.backbone.')]
    args = [CAMVID, '--work-dir', tmp_path / 'w', '--data-root', 'data', '--cfg-options', *options]
    done = run_tool('train', *args, cwd=trained, TORCH_HOME=str(tmp_path), RESNEST_WEIGHTS='', **OFFLINE)
    assert done.returncode == 1
    printed = done.stderr.partition('train.py: error: ')[2].splitlines()
    assert printed[0].startswith('Pretrained weights resnest50-528c19ca.pth are wanted and could not be downloaded (')
    assert [line.split() for line in printed[1:]] == [
        [
            'Get',
            'https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1/resnest50-528c19ca.pth',
        ],
        ['into', f'{tmp_path}/hub/checkpoints', 'or', 'a', 'folder', 'that', '$RESNEST_WEIGHTS', 'names,'],
        ['or', 'train', 'from', 'scratch:', '--cfg-options', 'model.backbone.init_cfg=None'],
        ['(--debug', 'shows', 'where', 'this', 'happened.)'],
    ]
    assert 'Traceback' not in done.stderr


def test_a_worker_that_fails_says_which_file(broken, tmp_path):
    shutil.copytree(broken / 'data', tmp_path / 'data')
    for path in (tmp_path / 'data/images/training').iterdir():
        path.write_bytes(b'no image')
    options = ['--skip-data-check', *COMMON, 'train_dataloader.num_workers=1']
    done = run_tool('train', CAMVID, '--work-dir', 'w', *options, cwd=tmp_path)
    assert done.returncode == 1
    printed = done.stderr.partition('train.py: error: ')[2]
    assert 'data/images/training/' in printed
    assert len(printed.splitlines()) == 2
    assert 'Traceback' not in done.stderr
