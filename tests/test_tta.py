"""Test-time augmentation: OpenMMLab's against its own, the authors' against a plain loop that states it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.structures import PixelData
from mmseg.models.segmentors import SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from tiny import ROOT

from mmseg_resnest import tta
from mmseg_resnest.network import Speed, speed_up
from mmseg_resnest.segmentor import EncoderDecoder
from mmseg_resnest.tta import AuthorsTTAModel, TTAModel

CLASSES = 5
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def segmentor_config(**head):
    decode_head = dict(
        type='mmseg_resnest.AuthorsFCNHead',
        in_channels=2048,
        in_index=3,
        channels=8,
        num_classes=CLASSES,
        align_corners=True,
        loss_decode=dict(type='mmseg.CrossEntropyLoss'),
    )
    return dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True),
        backbone=dict(type='mmseg_resnest.ResNeSt', depth=14, output_stride=8, base_width=8),
        decode_head=decode_head | head,
        test_cfg=ConfigDict(mode='whole'),
    )


def settled(model, deviation):
    """Gives batch norm the statistics of a batch, and the classifier logits of about that deviation."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    classifier = model.decode_head.conv_seg
    torch.nn.init.normal_(classifier.weight)
    with torch.no_grad():
        batch = torch.stack([normalised(random_image(48, 48, seed=seed)).float() for seed in range(4)])
        logits = model.train().decode_head(model.backbone(batch))
        classifier.weight *= deviation / logits.std()
        classifier.bias.copy_(-logits.mean((0, 2, 3)) * deviation / logits.std())
    return model.eval()


@pytest.fixture(scope='module')
def segmentor():
    """A ResNeSt with an FCN head."""
    torch.manual_seed(0)
    return settled(MODELS.build(segmentor_config()), 1.5)


def plain_loop(segmentor, image, black, scales, base, crop):
    """The evaluation as it is published, one window and one pass at a time, without a flag or an accumulator shared."""

    def logits(x):
        low = segmentor.decode_head(segmentor.backbone(x))
        return F.interpolate(low, x.shape[2:], mode='bilinear', align_corners=segmentor.align_corners)

    def score(x):
        return torch.exp(logits(x) + torch.flip(logits(torch.flip(x, [3])), [3]))

    def pad(x):
        _, channels, height, width = x.shape
        out = torch.empty(1, channels, max(height, crop), max(width, crop), dtype=x.dtype)
        for channel in range(channels):
            out[0, channel] = black[channel]
        out[:, :, :height, :width] = x
        return out

    height, width = image.shape[1:]
    stride = int(crop * 2 / 3)
    total = 0
    for scale in scales:
        long = math.ceil(base * scale)
        short = int(min(height, width) * long / max(height, width) + 0.5)
        h, w = (long, short) if height > width else (short, long)
        resized = F.interpolate(image[None], (h, w), mode='bilinear', align_corners=True)
        if long <= crop:
            result = score(pad(resized))
        else:
            whole = pad(resized) if short < crop else resized
            full_h, full_w = whole.shape[2:]
            result = torch.zeros(1, CLASSES, full_h, full_w, dtype=image.dtype)
            times = torch.zeros(full_h, full_w, dtype=image.dtype)
            for i in range(math.ceil((full_h - crop) / stride) + 1):
                for j in range(math.ceil((full_w - crop) / stride) + 1):
                    top, left = i * stride, j * stride
                    bottom, right = min(top + crop, full_h), min(left + crop, full_w)
                    window = score(pad(whole[:, :, top:bottom, left:right]))
                    result[:, :, top:bottom, left:right] += window[:, :, : bottom - top, : right - left]
                    times[top:bottom, left:right] += 1
            result = result / times
        total = total + F.interpolate(result[:, :, :h, :w], (height, width), mode='bilinear', align_corners=True)
    return total[0]


def normalised(image):
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (image.flip(0).double() - mean) / std


def random_image(*size, seed=0):
    """A BGR image of coarse blocks and noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(1, 3, 4, 5, generator=generator) * 200
    image = F.interpolate(blocks, size)[0] + torch.rand(3, *size, generator=generator) * 55
    return image.to(torch.uint8)


def agrees(predicted, scores) -> bool:
    """Whether each pixel has a class of the highest score, up to float32's rounding."""
    return bool((scores.gather(0, predicted) >= scores.amax(0) * (1 - 1e-4)).all())


# At a base of 52 and windows of 48: shrunk and grown, of one window, of two in a row or in a column, of four, of six.
SIZES = {'landscape': (60, 90), 'portrait': (91, 37), 'small': (20, 30), 'odd': (41, 53), 'square': (64, 64)}


@pytest.mark.parametrize('type_', ['mmseg.EncoderDecoder', 'mmseg_resnest.EncoderDecoder'])
@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_scores_are_those_of_the_plain_loop(size, type_, segmentor):
    module = MODELS.build(segmentor_config() | dict(type=type_)).double().eval()
    module.load_state_dict(segmentor.state_dict())
    model = AuthorsTTAModel(module, scales=(0.5, 1.0, 1.75), base_size=52, crop_size=48)
    image, black = normalised(random_image(*size)), normalised(torch.zeros(3, 1, 1))
    found, expected = model(image, black), plain_loop(module, image, black, (0.5, 1.0, 1.75), 52, 48)
    assert found.dtype == torch.float64
    assert found.shape == (CLASSES, *size)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found.argmax(0).unique().numel() > 2


@torch.no_grad()
def test_logits_are_resized_as_the_head_says_and_test_cfg_has_no_say():
    config = segmentor_config(align_corners=False)
    config['test_cfg'] = dict(mode='slide', crop_size=(16, 16), stride=(8, 8))
    model = AuthorsTTAModel(config, scales=(1.0, 1.5), base_size=40, crop_size=33).double().eval()
    image, black = normalised(random_image(50, 40)), normalised(torch.zeros(3, 1, 1))
    expected = plain_loop(model.module, image, black, (1.0, 1.5), 40, 33)
    torch.testing.assert_close(model(image, black), expected, rtol=1e-9, atol=0)


@torch.no_grad()
def test_windows_of_each_scale(segmentor):
    """30x40 becomes 20x26, 29x39 (one window), 39x52 (two), 49x65, 59x78 (2x2), 68x91 (2x3), each with its mirror."""
    windows = []
    with segmentor.backbone.register_forward_pre_hook(lambda module, args: windows.append(args[0].shape)):
        model = AuthorsTTAModel(segmentor, base_size=52, crop_size=48)
        model(torch.zeros(3, 30, 40), torch.zeros(3, 1, 1))
    assert windows == [(2 * count, 3, 48, 48) for count in (1, 1, 2, 4, 4, 4, 2)]  # four pairs at a time


@pytest.mark.parametrize(('dtype', 'agreeing'), [('float32', 0.999), ('bfloat16', 0.95)])
@torch.no_grad()
def test_our_segmentor_runs_as_it_was_sped_up(dtype, agreeing, segmentor):
    """In another number format than float32 it is the segmentor that knows what its network takes."""
    module = MODELS.build(segmentor_config() | dict(type='mmseg_resnest.EncoderDecoder'))
    module.load_state_dict(segmentor.state_dict())
    speed_up(module, Speed(dtype=dtype))
    image, black = normalised(random_image(60, 90)).float(), normalised(torch.zeros(3, 1, 1)).float()
    found = AuthorsTTAModel(module, base_size=52, crop_size=48)(image, black)
    expected = AuthorsTTAModel(segmentor, base_size=52, crop_size=48)(image, black)
    assert agreeing <= (found.argmax(0) == expected.argmax(0)).float().mean()
    assert (found.log() - expected.log()).abs().max() < (1e-3 if dtype == 'float32' else 2)
    assert not torch.equal(found, expected)


def test_defaults_are_the_authors(segmentor):
    model = AuthorsTTAModel(segmentor)
    assert (model.scales, model.base_size, model.crop_size, model.stride) == (SCALES, 520, 480, 320)
    cityscapes = Config.fromfile(ROOT / 'configs' / '_base_' / 'cityscapes.py').authors_tta_model
    assert MODELS.build(dict(**cityscapes, module=segmentor)).scales == (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25)


def samples_of(images):
    return [
        SegDataSample(
            metainfo=dict(ori_shape=image.shape[1:], img_path=f'{i}.jpg'),
            gt_sem_seg=PixelData(data=torch.zeros(1, *image.shape[1:], dtype=torch.int64)),
        )
        for i, image in enumerate(images)
    ]


def test_a_batch_of_images_of_several_sizes(segmentor):
    images = [random_image(45, 70), random_image(70, 33, seed=1)]
    model = AuthorsTTAModel(segmentor, base_size=52, crop_size=48)
    found = model.test_step(dict(inputs=images, data_samples=samples_of(images)))
    assert [sample.img_path for sample in found] == ['0.jpg', '1.jpg']
    for image, sample in zip(images, found, strict=True):
        predicted = sample.pred_sem_seg.data
        assert predicted.dtype == torch.int64
        assert predicted.shape == sample.gt_sem_seg.data.shape
        assert not sample.gt_sem_seg.data.any()
        with torch.no_grad():
            x, black = normalised(image).float(), normalised(torch.zeros(3, 1, 1)).float()
            assert agrees(predicted, plain_loop(segmentor, x, black, SCALES, 52, 48))


def test_padding_of_the_data_preprocessor_is_cut_off(segmentor):
    image = random_image(45, 70)
    model = AuthorsTTAModel(segmentor, base_size=52, crop_size=48)
    data = dict(inputs=[image], data_samples=samples_of([image]))
    expected = model.test_step(data)[0].pred_sem_seg.data
    segmentor.data_preprocessor.test_cfg = dict(size_divisor=32)
    try:
        assert torch.equal(model.test_step(data)[0].pred_sem_seg.data, expected)
    finally:
        segmentor.data_preprocessor.test_cfg = None


@torch.no_grad()
def test_large_logits_do_not_overflow():
    """In float32 the exponential of the sum of two logits of 45 is infinite, and resizing it nan."""
    torch.manual_seed(1)
    segmentor = settled(MODELS.build(segmentor_config()), 4)
    model = AuthorsTTAModel(segmentor, scales=(0.5, 1.5), base_size=40, crop_size=33)
    image, black = normalised(random_image(30, 40)), normalised(torch.zeros(3, 1, 1))
    found = model(image.float(), black.float())
    authors = plain_loop(segmentor, image.float(), black.float(), (0.5, 1.5), 40, 33)
    exact = plain_loop(segmentor.double(), image, black, (0.5, 1.5), 40, 33)
    assert authors.isnan().any()
    assert found.max() > torch.finfo(torch.float32).max
    assert found.isfinite().all()
    assert (found.argmax(0) == exact.argmax(0)).float().mean() > 0.999


def test_scores_that_are_not_finite_are_refused(segmentor):
    image = random_image(45, 70)
    model = AuthorsTTAModel(copy.deepcopy(segmentor), scales=(1.0,), base_size=52, crop_size=48)
    model.module.decode_head.conv_seg.bias.data[0] = 355
    with pytest.raises(ValueError, match=r"0\.jpg: scores are not finite; .* 354\. The model's weights are damaged"):
        model.test_step(dict(inputs=[image], data_samples=samples_of([image])))


def test_one_logit_a_pixel_is_refused():
    loss = dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True)
    config = segmentor_config(num_classes=2, out_channels=1, threshold=0.5, loss_decode=loss)
    with pytest.raises(ValueError, match=r'decode_head\.out_channels=1; expected one for each of at least two classes'):
        AuthorsTTAModel(config)


def test_an_image_that_the_pipeline_resized_is_refused(segmentor):
    image = random_image(45, 70)
    samples = samples_of([image])
    samples[0].set_metainfo(dict(ori_shape=(90, 140)))
    with pytest.raises(ValueError, match=r'0\.jpg: 45x70 pixels after the test pipeline, 90x140 in the file; expected'):
        AuthorsTTAModel(segmentor).test_step(dict(inputs=[image], data_samples=samples))


# ---------------------------------------------------------------------------------------------------- OpenMMLab's


def augmented(sizes, count=1, ori_shape=(45, 60)):
    """Returns a batch as TestTimeAug and the collation make it: each size, plain and mirrored."""
    inputs, samples = [], []
    for size in sizes:
        for flip in (False, True):
            images = [random_image(*size, seed=seed) for seed in range(count)]
            inputs.append([image.flip(2) if flip else image for image in images])
            meta = dict(ori_shape=ori_shape, img_shape=size, pad_shape=size)
            meta |= dict(flip=flip, flip_direction='horizontal' if flip else None)
            labels = [torch.full((1, *ori_shape), i) for i in range(count)]
            samples.append(
                [
                    SegDataSample(metainfo=dict(meta, img_path=f'{i}'), gt_sem_seg=PixelData(data=label))
                    for i, label in enumerate(labels)
                ]
            )
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize('type_', ['mmseg.EncoderDecoder', 'mmseg_resnest.EncoderDecoder'])
@pytest.mark.parametrize(('count', 'together'), [(1, 1), (2, 2), (3, 2)])
def test_openmmlabs_equals_mmsegmentation(segmentor, count, together, type_, monkeypatch):
    monkeypatch.setattr(tta, 'SCORES', together * CLASSES * 45 * 60)
    module = MODELS.build(segmentor_config() | dict(type=type_)).eval()
    module.load_state_dict(segmentor.state_dict())
    batch = augmented([(24, 32), (45, 60), (67, 90)], count)
    with torch.no_grad():
        truth = SegTTAModel(segmentor).test_step(copy.deepcopy(batch))
        stock = SegTTAModel(module).test_step(copy.deepcopy(batch))
    found = TTAModel(module).test_step(copy.deepcopy(batch))
    kept = [[sample.seg_logits.data for sample in predict_all(segmentor, batch, i)] for i in range(count)]
    for i, (ours, other, theirs) in enumerate(zip(found, stock, truth, strict=True)):
        mean = sum(logits.softmax(0) for logits in kept[i]) / len(kept[i])
        assert (ours.seg_logits.data - mean).abs().max() <= 1e-5
        best = mean.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-5
        assert clear.float().mean() > 0.99
        for sample in (ours, other):
            assert torch.equal(sample.pred_sem_seg.data[0][clear].long(), theirs.pred_sem_seg.data[0][clear])
        assert ours.pred_sem_seg.shape == theirs.pred_sem_seg.shape
        assert (ours.gt_sem_seg.data == i).all()
        assert ours.img_path == theirs.img_path == f'{i}'


def predict_all(model, batch, image):
    """Returns a prediction an augmentation, each by itself."""
    batch = copy.deepcopy(batch)
    return [
        model.test_step(dict(inputs=[inputs[image]], data_samples=[samples[image]]))[0]
        for inputs, samples in zip(batch['inputs'], batch['data_samples'], strict=True)
    ]


def test_openmmlabs_runs_images_of_one_size_together(segmentor):
    sizes = []
    module = copy.deepcopy(segmentor)
    module.backbone.register_forward_hook(lambda _, args, out: sizes.append(tuple(args[0].shape)))
    TTAModel(module).test_step(augmented([(24, 32), (45, 60)], count=2))
    assert sizes == [(4, 3, 24, 32), (4, 3, 45, 60)]


def test_openmmlabs_keeps_the_sums_of_few_large_images(segmentor, monkeypatch):
    sizes = []
    module = copy.deepcopy(segmentor)
    module.backbone.register_forward_hook(lambda _, args, out: sizes.append(tuple(args[0].shape)))
    monkeypatch.setattr(tta, 'SCORES', 3 * CLASSES * 45 * 60 - 1)
    TTAModel(module).test_step(augmented([(24, 32), (45, 60)], count=3))
    assert sizes == [(4, 3, 24, 32), (4, 3, 45, 60), (2, 3, 24, 32), (2, 3, 45, 60)]
    sizes.clear()
    monkeypatch.setattr(tta, 'SCORES', 1)
    TTAModel(module).test_step(augmented([(24, 32)], count=2))
    assert sizes == [(2, 3, 24, 32)] * 2


class Predicts(EncoderDecoder):
    """Doubts the first class in the end."""

    def predict(self, inputs, data_samples=None):
        samples = super().predict(inputs, data_samples)
        for sample in samples:
            sample.seg_logits.data[0] -= 1000
        return samples


class Encodes(EncoderDecoder):
    """Doubts it at first."""

    def encode_decode(self, inputs, batch_img_metas):
        logits = super().encode_decode(inputs, batch_img_metas)
        logits[:, 0] -= 1000
        return logits


@pytest.mark.parametrize('type_', [Predicts, Encodes])
@pytest.mark.parametrize('of_the_object', [False, True])
def test_openmmlabs_with_a_segmentor_that_predicts_by_itself(segmentor, type_, of_the_object):
    module = type_(**{k: v for k, v in segmentor_config().items() if k != 'type'}).eval()
    module.load_state_dict(segmentor.state_dict())
    if of_the_object:
        other = module
        module = EncoderDecoder(**{k: v for k, v in segmentor_config().items() if k != 'type'}).eval()
        module.predict = other.predict
    (sample,) = TTAModel(module).test_step(augmented([(24, 32), (45, 60)]))
    assert sample.seg_logits.data[0].max() == 0
    assert (sample.pred_sem_seg.data > 0).all()


def test_openmmlabs_with_an_implementation_that_there_is_not(segmentor):
    module = MODELS.build(segmentor_config() | dict(type='mmseg_resnest.EncoderDecoder'))
    module.test_cfg = dict(mode='whole', upsample_argmax='exakt')
    with pytest.raises(ValueError, match="impl='exakt'; expected one of"):
        TTAModel(module.eval()).test_step(augmented([(24, 32)]))


class Wrapper(torch.nn.Module):
    """What MMEngine asks of a model, and no more."""

    def __init__(self, module):
        super().__init__()
        self.test_step, self.out_channels, self.decode_head = module.test_step, module.out_channels, module.decode_head


def test_openmmlabs_asks_for_a_test_step_alone(segmentor):
    batch = augmented([(24, 32), (45, 60)])
    (wrapped,), (plain,) = (TTAModel(m).test_step(copy.deepcopy(batch)) for m in (Wrapper(segmentor), segmentor))
    assert torch.equal(wrapped.seg_logits.data, plain.seg_logits.data)


@pytest.mark.parametrize(('value', 'dtype'), [(torch.nan, torch.float32), (-torch.inf, torch.float16)])
def test_openmmlabs_tells_of_logits_that_are_not_finite(value, dtype):
    """Those of one augmentation of one image."""
    module = MODELS.build(segmentor_config() | dict(type='mmseg_resnest.EncoderDecoder')).eval()
    placed_logits = module.placed_logits

    def damaged(inputs, samples):
        logits, placements = placed_logits(inputs, samples)
        if inputs.shape[2] == 45:
            logits[1, 2, 0, 0] = value
        return logits.to(dtype), placements

    module.placed_logits = damaged
    samples = TTAModel(module).test_step(augmented([(24, 32), (45, 60)], count=3))
    assert [bool(sample.finite) for sample in samples] == [True, False, True]


def test_openmmlabs_with_one_channel():
    """The mean of the probabilities; SegTTAModel's sigmoid of a probability would call every pixel positive."""
    torch.manual_seed(0)
    module = MODELS.build(
        segmentor_config(
            num_classes=2,
            out_channels=1,
            threshold=0.5,
            loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=True),
        )
        | dict(type='mmseg_resnest.EncoderDecoder')
    )
    module = settled(module, 3)
    batch = augmented([(24, 32), (45, 60)])
    (sample,) = TTAModel(module).test_step(copy.deepcopy(batch))
    mean = torch.stack([sample.seg_logits.data for sample in predict_all(module, batch, 0)]).mean(0)
    assert (sample.seg_logits.data - mean).abs().max() <= 1e-5
    assert torch.equal(sample.pred_sem_seg.data, (sample.seg_logits.data > 0.5).byte())
    assert 0.05 < sample.pred_sem_seg.data.float().mean() < 0.95
