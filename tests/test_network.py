"""Fast evaluation on a trained model: exact with every switch off, and what each switch changes."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmseg.apis import init_model
from tiny import ENVIRONMENT, ROOT, run_tool

import mmseg_resnest.network
from mmseg_resnest import demo
from mmseg_resnest.network import GraphedBySize, Speed

CONFIG = ROOT / 'configs' / 'pspnet_resnest14_demo.py'
CLASSES = 12
OPTIONS = ['model.data_preprocessor.size=(64,96)', 'train_cfg.max_iters=60', 'train_cfg.val_interval=60']
OPTIONS += ['param_scheduler.0.end=60', 'default_hooks.checkpoint.interval=60']


def test_a_number_format_that_there_is_not():
    with pytest.raises(ValueError, match="dtype='half'; expected one of bfloat16, float16, float32"):
        Speed(dtype='half')


def test_sizes_that_repeat_are_captured(monkeypatch):
    """The bookkeeping; what a capture is only a GPU shows."""
    captured = []

    def capture(self, network, images):
        captured.append((images.shape[2], network is self.compiled))
        return lambda images: images + 1

    monkeypatch.setattr(GraphedBySize, '_capture', capture)
    monkeypatch.setattr(mmseg_resnest.network, 'GRAPHS', 2)
    monkeypatch.setattr(mmseg_resnest.network, 'COMPILED', 1)
    network = GraphedBySize(lambda images: images + 1, compiles=True)
    for side in (2, 3, 2, 2, 3, 2, 2, 3, 3, 4, 4, 4, 4, 2):
        assert network(torch.zeros(1, 3, side, side)).unique().tolist() == [1]
    # 2 was captured first, compiled; 3 and 4 were too many to compile; for 4 the oldest went, and 2 came back
    assert captured == [(2, True), (3, False), (4, False), (2, True)]


@pytest.mark.gpu
@pytest.mark.parametrize('compiles', [False, True])
def test_graphs_give_what_the_network_gives(compiles):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3, padding=1).cuda()
    network = GraphedBySize(lambda images: conv(images).relu(), compiles)
    with torch.no_grad():
        for i in range(24):
            images = torch.randn(1 + i % 2, 3, 32 + 16 * (i % 3), 40, device='cuda')
            kept = network(images)
            network(torch.zeros_like(images))
            assert torch.allclose(kept, conv(images).relu(), atol=1e-3)
    assert len(network._graphs) == 6


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The demo in small, trained for a minute: a folder with its data and checkpoint."""
    root = tmp_path_factory.mktemp('network')
    demo.generate(root / 'data/demo', train=40, val=8, size=(64, 96))
    demo.generate(root / 'other', train=1, val=5, size=(80, 64))
    for kind in ('images', 'annotations'):  # of another size
        for path in (root / 'other' / kind / 'validation').iterdir():
            path.rename(root / 'data/demo' / kind / 'validation' / f'other_{path.name}')
    done = run_tool(
        'train', CONFIG, '--work-dir', 'w', '--seed', '0', '--skip-data-check', '--cfg-options', *OPTIONS, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return root


def evaluate(trained, *args):
    args = ['w/iter_60.pth', *args, '--json', 'r.json', '--out', 'out']
    done = run_tool('test', CONFIG, *args, cwd=trained)
    assert done.returncode == 0, done.stderr
    return json.loads((trained / 'r.json').read_text())


@pytest.fixture(scope='module')
def exact(trained):
    return evaluate(trained, '--exact')


@pytest.mark.slow
def test_exact_is_mmsegmentations(trained, exact):
    """The confusion matrix of its own model, resized and argmaxed by itself, and the figures of its own metric."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.type = 'mmseg.EncoderDecoder'
    cfg.test_dataloader.dataset.data_root = str(trained / 'data/demo')
    del cfg.test_dataloader.batch_sampler
    cfg.test_dataloader.batch_size = 1
    model = init_model(cfg, str(trained / 'w/iter_60.pth'), 'cpu')
    assert type(model).__module__.startswith('mmseg.')
    evaluator = Evaluator(dict(type='mmseg.IoUMetric'))
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator.dataset_meta = loader.dataset.metainfo
    confusion = np.zeros((CLASSES, CLASSES), int)
    for batch in loader:
        with torch.no_grad():
            samples = model.test_step(batch)
        evaluator.process(samples, batch)
        for sample in samples:
            label, prediction = (x.data.numpy().ravel() for x in (sample.gt_sem_seg, sample.pred_sem_seg))
            np.add.at(confusion, (label[label != 255], prediction[label != 255]), 1)
    assert exact['confusion'] == confusion.tolist()
    figures = evaluator.evaluate(len(loader.dataset))
    assert {name: exact[name] for name in figures} == pytest.approx({name: float(v) for name, v in figures.items()})
    assert exact['mIoU'] > 15


def assert_close(found, exact, pixels, miou):
    """At most a share of the pixels was counted elsewhere, and the mIoU is close."""
    found_matrix, matrix = np.array(found['confusion']), np.array(exact['confusion'])
    assert found_matrix.sum() == matrix.sum()
    assert np.abs(found_matrix - matrix).sum() / 2 <= pixels * matrix.sum()
    assert abs(found['mIoU'] - exact['mIoU']) <= miou + 0.005  # rounded to 0.01


SWITCHES = {
    'batches': (['--no-fold'], 1e-4, 0.01),
    'folding': (['--batch-size', '1'], 1e-4, 0.01),
    'both': ([], 1e-4, 0.01),
    'bfloat16': (['--dtype', 'bfloat16'], 0.02, 0.3),
    'float16': (['--dtype', 'float16'], 0.003, 0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize('switch', SWITCHES)
def test_each_switch(switch, trained, exact):
    args, pixels, miou = SWITCHES[switch]
    found = evaluate(trained, *args)
    changed = np.abs(np.array(found['confusion']) - np.array(exact['confusion'])).sum() / 2
    print(
        f'{switch}: {changed / np.sum(exact["confusion"]):.1e} of the pixels, mIoU {found["mIoU"] - exact["mIoU"]:+.2f}'
    )
    assert_close(found, exact, pixels, miou)


@pytest.mark.slow
@pytest.mark.parametrize(
    'sampler', [[], ['--cfg-options', 'test_dataloader.batch_sampler=None', 'test_dataloader.batch_size=1']]
)
def test_three_processes_count_each_image_once(sampler, trained, exact):
    """13 images: with DefaultSampler two processes repeat one, with ours one has fewer batches."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node=3', '--master-port=0']
    command = [*command, '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0', str(ROOT / 'tools/test.py'), str(CONFIG)]
    command += ['w/iter_60.pth', '--json', 'three.json', *sampler]

    done = subprocess.run(command, cwd=trained, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((trained / 'three.json').read_text())
    assert np.sum(found['confusion']) == np.sum(exact['confusion'])
    assert_close(found, exact, 1e-4, 0.01)
    assert not math.isnan(found['mIoU'])
