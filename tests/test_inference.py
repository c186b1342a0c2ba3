"""The prediction of EncoderDecoder against mmsegmentation's: whole, in windows, padded, mirrored, resized twice."""

import copy
import pickle

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_resnest.inference import DeferredLogits, check_finite, finish
from mmseg_resnest.metrics import IoUMetric
from mmseg_resnest.ops import Placement, place
from mmseg_resnest.segmentor import PREDICT_METHODS, predicts_from_logits

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


def test_mirrored_nobody_knows_how_is_refused():
    """mmsegmentation asserts."""
    _, ours = make_pair('fcn', WHOLE)
    with pytest.raises(ValueError, match=r'^0: flip=True, flip_direction=None; expected horizontal or vertical$'):
        predict(ours, make_batch(flip=True, flip_direction=None))


@pytest.mark.parametrize(
    ('test_cfg', 'message'),
    [
        (dict(mode='silde'), "mode='silde'; expected slide or whole"),
        (SLIDE | dict(stride=(24, 49)), r'stride=\(24, 49\) leaves pixels out .* crop_size=\(40, 48\); expected'),
    ],
)
def test_a_test_cfg_that_cannot_be_meant_is_refused(test_cfg, message):
    _, ours = make_pair('fcn', test_cfg)
    with pytest.raises(ValueError, match=message):
        predict(ours, make_batch())


@pytest.mark.parametrize(
    ('value', 'dtype', 'finite'),
    [
        *((0, dtype, True) for dtype in (torch.float32, torch.float16)),
        *((value, dtype, False) for value in (float('nan'), float('inf')) for dtype in (torch.float32, torch.float16)),
        (-float('inf'), torch.float32, True),
        (-float('inf'), torch.float16, False),
    ],
)
def test_logits_that_are_not_finite_are_told(value, dtype, finite):
    """Those of the second image; minus infinity only rules a class out, where it is not of an overflow."""
    logits = torch.randn(3, CLASSES, 4, 6).to(dtype)
    logits[1, 2, 3, 4] = value
    samples = make_batch(count=3)['data_samples']
    finish(logits, samples, [Placement((32, 48))] * 3, None, None)
    assert [bool(sample.finite) for sample in samples] == [True, finite, True]
    check_finite(samples[0].to_dict())
    if not finite:
        with pytest.raises(ValueError, match=r'^1: the logits are not finite; .* float16.* above 65504 is infinite'):
            check_finite(samples[1])


def test_logits_of_float64_stay_so():
    logits = torch.randn(1, CLASSES, 4, 6, dtype=torch.float64)
    samples = make_batch()['data_samples']
    finish(logits, samples, [Placement((32, 48))], None, None)
    assert torch.equal(samples[0].seg_logits.data, place(logits, Placement((32, 48)))[0])


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


@pytest.mark.parametrize('method', PREDICT_METHODS)
@pytest.mark.parametrize('test_cfg', [WHOLE, SLIDE], ids=['whole', 'slide'])
def test_a_subclass_that_changes_a_step_takes_mmsegmentations_path(test_cfg, method):
    """It goes through the step where mmsegmentation does."""

    def changed(base, calls):
        def step(self, *args, **kwargs):
            calls.append(method)
            return getattr(base, method)(self, *args, **kwargs)

        return type('Changed', (base,), {method: step})

    calls, steps = [], []
    theirs, ours = make_pair('fcn', test_cfg)
    theirs.__class__ = changed(type(theirs), steps)
    ours.__class__ = changed(type(ours), calls)
    (found,), (truth,) = (predict(model, make_batch()) for model in (ours, theirs))
    assert torch.equal(found.pred_sem_seg.data, truth.pred_sem_seg.data)
    assert torch.equal(found.seg_logits.data, truth.seg_logits.data)
    assert calls == steps
    assert predicts_from_logits(make_pair('fcn', test_cfg)[1])
    assert not predicts_from_logits(ours)


def deferred(**metainfo):
    """Returns a sample whose logits are 0 to 23, and a list of when they were computed."""
    calls = []

    def compute():
        calls.append(1)
        return torch.arange(24.0).view(2, 3, 4)

    logits = DeferredLogits(compute, (3, 4))
    logits.set_metainfo(metainfo)
    return SegDataSample(seg_logits=logits), calls


def test_deferred_logits_are_plain_once_read():
    sample, calls = deferred()
    assert sample.seg_logits.shape == (3, 4)
    assert not calls
    assert sample.seg_logits.data[1, 2, 3] == sample.seg_logits.data.max() == 23
    assert len(calls) == 1
    with pytest.raises(AttributeError):
        getattr(sample.seg_logits, 'other')  # noqa: B009


@pytest.mark.parametrize(
    'copied',
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.clone(), lambda x: x.cpu()],
)
def test_copies_of_deferred_logits_are_plain(copied):
    sample, _ = deferred(scale=2)
    plain = copied(sample.seg_logits)
    assert type(plain) is PixelData
    assert plain.data[1, 2, 3] == 23
    assert plain.scale == 2
    assert type(copy.deepcopy(sample).seg_logits) is type(sample.numpy().seg_logits) is PixelData


@pytest.mark.parametrize(
    'read',
    [
        lambda x: x.values()[0],
        lambda x: dict(x.items())['data'],
        lambda x: dict(x.all_items())['data'],
        lambda x: x.get('data'),
        lambda x: x.pop('data'),
        lambda x: x[:, :].data,
        lambda x: x[:3, :4].data,
        lambda x: x.to_dict()['data'],
        lambda x: SegDataSample(seg_logits=x).to_dict()['seg_logits']['data'],
        lambda x: dict(**x.to_dict())['data'],
        lambda x: copy.deepcopy(x.to_dict())['data'],
        lambda x: pickle.loads(pickle.dumps(x.to_dict()))['data'],
    ],
)
def test_every_way_to_deferred_logits(read):
    sample, calls = deferred()
    assert torch.equal(read(sample.seg_logits), torch.arange(24.0).view(2, 3, 4))
    assert len(calls) == 1


def test_deferred_logits_are_not_computed_to_know_their_keys():
    sample, calls = deferred(scale=2)
    logits, as_dict = sample.seg_logits, sample.to_dict()['seg_logits']
    assert logits.keys() == ['data']
    assert logits.all_keys() == list(as_dict) == ['scale', 'data']
    assert 'data' in logits
    assert 'data' in as_dict
    assert 'other' not in as_dict
    assert as_dict['scale'] == 2
    assert as_dict.get('other') is None
    assert len(as_dict) == 2
    assert not calls
    assert logits[:, 1:2].shape == (3, 1)
    logits.pop('data')
    assert logits.keys() == []
    assert 'data' not in sample.to_dict()['seg_logits']
    with pytest.raises(AttributeError):
        logits.data  # noqa: B018


@pytest.mark.parametrize('reads', [False, True])
def test_evaluation_computes_logits_where_a_metric_reads_them(reads):
    class MeanLogit(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results += [sample['seg_logits']['data'].mean().item() for sample in data_samples]

        def compute_metrics(self, results):
            return dict(mean=sum(results) / len(results))

    sample, calls = deferred()
    labels = torch.zeros(1, 3, 4, dtype=torch.uint8)
    sample.set_data(dict(pred_sem_seg=PixelData(data=labels), gt_sem_seg=PixelData(data=labels)))
    evaluator = Evaluator([IoUMetric(), *([MeanLogit()] if reads else [])])
    evaluator.dataset_meta = dict(classes=('a', 'b'))
    evaluator.process([sample])
    figures = evaluator.evaluate(1)
    assert figures.get('mean') == (11.5 if reads else None)
    assert len(calls) == reads
