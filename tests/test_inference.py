"""The prediction of EncoderDecoder against mmsegmentation's: whole, in windows, padded, mirrored, resized twice."""

import copy
import pickle

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_resnest.inference import DeferredLogits

CLASSES = 7
HEADS = {
    'fcn': dict(type='FCNHead', num_classes=CLASSES),
    'aligned': dict(type='mmseg_resnest.AuthorsFCNHead', num_classes=CLASSES, align_corners=True),
    'binary': dict(type='FCNHead', num_classes=2, out_channels=1, threshold=0.45),
}
SLIDE = dict(mode='slide', crop_size=(40, 48), stride=(24, 32))
WHOLE = dict(mode='whole')


def make_pair(head, test_cfg, preprocessor=None):
    """Returns mmsegmentation's model and ours, with the same random weights and settled statistics."""
    torch.manual_seed(0)
    common = dict(in_channels=2048, in_index=3, channels=8, norm_cfg=dict(type='BN'))
    binary = head == 'binary'
    config = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3, **(preprocessor or {})),
        backbone=dict(type='mmseg_resnest.ResNeSt', depth=14, output_stride=8, base_width=8),
        decode_head=common | HEADS[head] | dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=binary)),
        test_cfg=ConfigDict(test_cfg),
    )
    theirs = MODELS.build(copy.deepcopy(config))
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    torch.nn.init.normal_(theirs.decode_head.conv_seg.weight)
    with torch.no_grad():
        theirs.train()._forward(torch.randn(4, 3, 64, 64))
    ours = MODELS.build(copy.deepcopy(config) | dict(type='mmseg_resnest.EncoderDecoder'))
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def make_batch(size=(64, 88), count=1, **meta):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(count)]
    meta = dict(ori_shape=size, img_shape=size, pad_shape=size) | meta
    return dict(inputs=images, data_samples=[SegDataSample(metainfo=dict(meta, img_path=f'{i}')) for i in range(count)])


def predict(model, batch):
    return model.test_step(copy.deepcopy(batch))


def assert_same(found, truth):
    assert len(found) == len(truth)
    for ours, theirs in zip(found, truth, strict=True):
        logits = theirs.seg_logits.data
        assert logits.std() > 0.05
        assert ours.pred_sem_seg.data.dtype == torch.uint8
        assert ours.pred_sem_seg.shape == theirs.pred_sem_seg.shape
        assert (ours.seg_logits.data - logits).abs().max() <= 1e-5 * max(logits.abs().max(), 1)
        different = ours.pred_sem_seg.data != theirs.pred_sem_seg.data
        if len(logits) > 1:
            best = logits.topk(2, dim=0).values
            assert (((best[0] - best[1]) < 1e-4) | ~different[0]).all()
        assert different.float().mean() < 1e-3
        assert ours.img_path == theirs.img_path


BATCHES = {
    'as large as the file': make_batch(),
    'two, of a smaller file': make_batch(count=2, ori_shape=(50, 70)),
    'of a larger file, mirrored': make_batch(ori_shape=(100, 131), flip=True, flip_direction='horizontal'),
    'upside down': make_batch(flip=True, flip_direction='vertical'),
    'not mirrored': make_batch(flip=False, flip_direction=None),
    'odd': make_batch(size=(61, 83), ori_shape=(77, 104)),
}


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('head', HEADS)
def test_equals_mmsegmentation(head, test_cfg):
    # in float64: in float32 the rounding of windows in batches alone comes to the bound, with some numbers of threads
    theirs, ours = (model.double() for model in make_pair(head, test_cfg))
    for batch in BATCHES.values():
        assert_same(predict(ours, batch), predict(theirs, batch))


@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
def test_padded(test_cfg):
    theirs, ours = make_pair('fcn', test_cfg, dict(test_cfg=dict(size_divisor=32)))
    for batch in (BATCHES['odd'], BATCHES['two, of a smaller file']):
        assert_same(predict(ours, batch), predict(theirs, batch))


def test_an_image_smaller_than_a_window():
    theirs, ours = make_pair('fcn', SLIDE)
    batch = make_batch(size=(33, 70))
    assert_same(predict(ours, batch), predict(theirs, batch))


def test_images_of_different_files_in_a_batch():
    theirs, ours = make_pair('fcn', WHOLE)
    batch = make_batch(count=3)
    for sample, shape in zip(batch['data_samples'], [(50, 70), (64, 88), (50, 70)], strict=True):
        sample.set_metainfo(dict(ori_shape=shape))
    assert_same(predict(ours, batch), predict(theirs, batch))


def test_without_samples():
    theirs, ours = make_pair('fcn', WHOLE)
    inputs = torch.randn(2, 3, 64, 88)
    with torch.no_grad():
        found, truth = (model.predict(inputs) for model in (ours, theirs))
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one.pred_sem_seg.data, other.pred_sem_seg.data)
        assert torch.equal(one.seg_logits.data, other.seg_logits.data)


@pytest.mark.parametrize('batch', BATCHES)
def test_exact_labels(batch):
    """mmsegmentation's own on a network without information, where rounding decides many pixels."""
    theirs, ours = make_pair('fcn', WHOLE | dict(upsample_argmax='exact'))
    for model in (theirs, ours):
        model.decode_head.conv_seg.weight.data *= 1e-6
    for one, other in zip(predict(ours, BATCHES[batch]), predict(theirs, BATCHES[batch]), strict=True):
        assert torch.equal(one.pred_sem_seg.data, other.pred_sem_seg.data)


def test_windows_run_together():
    _, ours = make_pair('fcn', SLIDE)
    sizes = []
    ours.network = lambda windows: (sizes.append(tuple(windows.shape)), ours._forward(windows))[1]
    predict(ours, make_batch(size=(64, 120)))  # tops 0, 24; lefts 0, 32, 64, 72
    assert sizes == [(8, 3, 40, 48)]


def test_a_head_that_predicts_by_itself_takes_mmsegmentations_path():
    _, ours = make_pair('fcn', WHOLE)

    class Head(type(ours.decode_head)):
        def predict(self, inputs, batch_img_metas, test_cfg):
            return super().predict(inputs, batch_img_metas, test_cfg) * 0 - torch.arange(CLASSES)[:, None, None]

    ours.decode_head.__class__ = Head
    (sample,) = predict(ours, make_batch())
    assert (sample.pred_sem_seg.data == 0).all()
    assert sample.seg_logits.data[6].unique().tolist() == [-6]


def test_deferred_logits_are_plain_once_read():
    calls = []

    def compute():
        calls.append(1)
        return torch.arange(24.0).view(2, 3, 4)

    sample = SegDataSample(seg_logits=DeferredLogits(compute, (3, 4)))
    assert sample.to_dict()['seg_logits'] == {}
    assert not calls
    assert sample.seg_logits.data[1, 2, 3] == sample.seg_logits.data.max() == 23
    assert len(calls) == 1
    assert sample.seg_logits.shape == (3, 4)
    for change in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.cpu(), lambda x: x.numpy()):
        changed = change(SegDataSample(seg_logits=DeferredLogits(compute, (3, 4)))).seg_logits
        assert type(changed) is PixelData
        assert changed.data[1, 2, 3] == 23
    with pytest.raises(AttributeError):
        getattr(sample.seg_logits, 'other')  # noqa: B009
