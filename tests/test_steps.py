"""A training step as a file, and the search for where it is not finite."""

import random

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_resnest.checkpoints import read_checkpoint
from mmseg_resnest.steps import FirstNonFinite, files_of, random_state, read_step, save_step, set_random_state


def make_batch():
    sample = SegDataSample(metainfo=dict(img_path='a.jpg', ori_shape=(4, 6), flip=None, scale=np.float32(0.5)))
    sample.gt_sem_seg = PixelData(data=torch.arange(24).view(1, 4, 6))
    return dict(inputs=[torch.full((3, 4, 6), 7, dtype=torch.uint8)], data_samples=[sample])


def test_a_step_goes_through_a_file_without_pickles(tmp_path):
    model = nn.BatchNorm2d(3)
    batches = [dict(batch=make_batch(), random=random_state(), losses=dict(loss=float('nan')))]
    save_step(tmp_path / 'step.pth', model, batches, iteration=3, dtype='bfloat16', loss_scaler={})
    assert read_checkpoint(tmp_path / 'step.pth')['step']['iteration'] == 3
    weights, step = read_step(tmp_path / 'step.pth')
    assert weights.keys() == model.state_dict().keys()
    assert (step['dtype'], step['loss_scaler']) == ('bfloat16', {})
    batch = step['batches'][0]['batch']
    assert torch.equal(batch['inputs'][0], make_batch()['inputs'][0])
    (sample,) = batch['data_samples']
    assert type(sample) is SegDataSample
    assert sample.metainfo == dict(img_path='a.jpg', ori_shape=(4, 6), flip=None, scale=0.5)
    assert torch.equal(sample.gt_sem_seg.data, torch.arange(24).view(1, 4, 6))
    assert files_of(batch) == ['a.jpg']
    assert files_of(dict(inputs=torch.zeros(2))) == files_of((1, 2)) == []


def test_random_states_go_through_a_file(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    batches = [dict(batch={}, random=random_state(), losses={})]
    expected = draw()
    save_step(tmp_path / 'step.pth', nn.Identity(), batches)
    assert draw() != expected
    set_random_state(read_step(tmp_path / 'step.pth')[1]['batches'][0]['random'])
    assert draw() == expected


def test_a_view_does_not_take_its_storage_along(tmp_path):
    view = torch.zeros(1000, 1000)[:2]
    save_step(tmp_path / 'step.pth', nn.Identity(), [dict(batch=dict(inputs=view))])
    assert (tmp_path / 'step.pth').stat().st_size < 100_000


def test_another_file_is_refused(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'iter_1.pth')
    with pytest.raises(ValueError, match=r'iter_1\.pth: holds no training step; expected a nonfinite_iter_N\.pth'):
        read_step(tmp_path / 'iter_1.pth')


class Root(nn.Module):
    """A square root at zero, where its slope is infinite."""

    def forward(self, x):
        return (x * 0).sqrt()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.ReLU(inplace=True))


def test_first_output_that_is_not_finite():
    model = make_model()
    model[2].bias.data[0] = float('inf')
    first = FirstNonFinite(model)
    model(torch.ones(1, 3)).sum()
    assert (first.output, first.gradient) == ('2', None)


def test_first_gradient_that_is_not_finite():
    """Backwards that is the root's input, the output of the layer before it."""
    model = nn.Sequential(*make_model(), nn.Linear(3, 3), Root())
    first = FirstNonFinite(model)
    model(torch.ones(1, 3)).sum().backward()
    assert (first.output, first.gradient) == (None, '4')


def test_nothing_to_find():
    model = make_model()
    first = FirstNonFinite(model)
    model(torch.ones(1, 3)).sum().backward()
    assert (first.output, first.gradient) == (None, None)
