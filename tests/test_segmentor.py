"""EncoderDecoder against mmsegmentation's: the same names, values and gradients on the same weights."""

import copy
import functools

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from mmengine.structures import PixelData
from mmseg.models.backbones import ResNet
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import DiceLoss
from mmseg.models.segmentors import CascadeEncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_resnest import ResNeSt
from mmseg_resnest.segmentor import LOSS_METHODS, EncoderDecoder, why_not_fused
from mmseg_resnest.training_pass import call

CLASSES = 7
COMMON = dict(num_classes=CLASSES, channels=16, norm_cfg=dict(type='BN'), dropout_ratio=0)
HEADS = {
    'fcn': dict(type='FCNHead', in_channels=2048, in_index=3),
    'pspnet': dict(type='PSPHead', in_channels=2048, in_index=3),
    'deeplabv3': dict(type='ASPPHead', in_channels=2048, in_index=3, dilations=(1, 12, 24, 36)),
    'deeplabv3plus': dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=2048,
        in_index=3,
        dilations=(1, 12, 24, 36),
        c1_in_channels=256,
        c1_channels=8,
    ),
    'authors': dict(type='mmseg_resnest.AuthorsDeepLabV3Head', in_channels=2048, in_index=3, dilations=(12, 24, 36)),
}
AUXILIARY = dict(type='FCNHead', in_channels=1024, in_index=2, num_convs=1, **COMMON)


def make_config(head, loss, auxiliary):
    common = {key: value for key, value in COMMON.items() if head != 'authors' or key != 'dropout_ratio'}
    return dict(
        type='EncoderDecoder',
        backbone=dict(type='mmseg_resnest.ResNeSt', depth=14, output_stride=8, norm_cfg=dict(type='BN')),
        decode_head=dict(HEADS[head], align_corners=head == 'authors', loss_decode=loss, **common),
        auxiliary_head=auxiliary,
        test_cfg=ConfigDict(mode='whole'),
    )


def make_pair(config):
    """Returns mmsegmentation's model and ours, with the same weights, in training but without dropout."""
    torch.manual_seed(0)
    theirs = MODELS.build(copy.deepcopy(config)).train()
    ours = MODELS.build(copy.deepcopy(config) | dict(type='mmseg_resnest.EncoderDecoder')).train()
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
                module.p = 0
    return theirs, ours


def make_batch(label_dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for share in (0.1, 0.6):  # unevenly ignored
        labels = torch.randint(0, CLASSES, (1, 64, 96), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < share] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels.to(label_dtype))))
    return torch.randn(2, 3, 64, 96, generator=generator), samples


def run(model, batch):
    losses = model.loss(*batch)
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses, gradients


def assert_same(config):
    """Ours gets labels as our loaders give them."""
    theirs, ours = make_pair(config)
    (losses, gradients), (found, found_gradients) = run(theirs, make_batch()), run(ours, make_batch(torch.uint8))
    assert found.keys() == losses.keys()
    for name, value in losses.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize('head', HEADS)
def test_equals_mmsegmentation(head):
    assert_same(make_config(head, dict(type='CrossEntropyLoss', loss_weight=0.7), AUXILIARY))


@pytest.mark.parametrize(
    'loss',
    [
        dict(type='CrossEntropyLoss', avg_non_ignore=True),
        dict(type='CrossEntropyLoss', class_weight=[0.5, 1.0, 2.0, 1.0, 1.5, 0.1, 3.0], loss_name='loss_weighted'),
    ],
)
def test_equals_mmsegmentation_for_other_averages(loss):
    assert_same(make_config('fcn', loss, None))


def test_equals_mmsegmentation_where_every_pixel_is_ignored():
    images, samples = make_batch()
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    results = [
        model.loss(images, samples) for model in make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    ]
    assert [{name: float(value) for name, value in losses.items()} for losses in results] == [
        {'decode.loss_ce': 0.0, 'decode.acc_seg': 100.0}
    ] * 2


def test_equals_mmsegmentation_with_two_auxiliary_heads():
    two = [AUXILIARY, dict(AUXILIARY, in_channels=512, in_index=1, loss_decode=dict(type='CrossEntropyLoss'))]
    assert_same(make_config('fcn', dict(type='CrossEntropyLoss'), two))


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(loss_decode=dict(type='DiceLoss')), 'DiceLoss is not'),
        (dict(loss_decode=[dict(type='CrossEntropyLoss'), dict(type='DiceLoss')]), 'ModuleList is not'),
        (dict(loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)), 'no mean softmax'),
        (dict(loss_decode=dict(type='CrossEntropyLoss', class_weight=[1.0] * 6 + [-0.5])), 'weight is negative'),
        (dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)), 'a sampler chooses'),
        (
            dict(
                type='EncHead',
                in_channels=[1024, 2048],
                in_index=(2, 3),
                num_codes=4,
                loss_se_decode=dict(type='CrossEntropyLoss', use_sigmoid=True),
            ),
            'its own',
        ),
    ],
)
def test_other_losses_take_the_path_of_mmsegmentation(change, reason):
    config = make_config('fcn', dict(type='CrossEntropyLoss'), None)
    config['decode_head'] |= change
    assert reason in why_not_fused(MODELS.build(copy.deepcopy(config)).decode_head)
    assert_same(config)


@pytest.mark.parametrize('loss', [dict(type='CrossEntropyLoss'), dict(type='DiceLoss')])
def test_log_says_which_path(loss, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    model = MODELS.build(make_config('fcn', loss, AUXILIARY) | dict(type='mmseg_resnest.EncoderDecoder'))
    assert 'FCNHead, loss' not in caplog.text  # a model that only predicts has nothing to say
    for _ in range(2):
        model.loss(*make_batch())
    log = caplog.text
    assert log.count('aux: FCNHead') == 1
    assert 'aux: FCNHead, loss fused with the upsampling' in log
    expected = 'DiceLoss is not' if loss['type'] == 'DiceLoss' else 'decode: FCNHead, loss fused'
    assert expected in log


@pytest.mark.parametrize('switch', ['fused_loss', 'channels_last', 'compiled', 'cuda_graphs'])
def test_switches_change_nothing_on_a_cpu(switch):
    config = make_config('fcn', dict(type='CrossEntropyLoss'), AUXILIARY) | dict(type='mmseg_resnest.EncoderDecoder')
    results = []
    for options in (dict(), {switch: False}):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(config) | options).train()
        results.append(run(model, make_batch()))
        assert model._graphs is None
    (losses, gradients), (found, found_gradients) = results
    assert found.keys() == losses.keys()
    same = torch.equal if switch != 'fused_loss' else torch.allclose
    for name, value in losses.items():
        assert same(found[name], value), name
    for name, gradient in gradients.items():
        if switch == 'fused_loss':
            assert (found_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
        else:
            assert torch.equal(found_gradients[name], gradient), name


@pytest.mark.parametrize('step', LOSS_METHODS)
def test_a_subclass_that_changes_a_step_takes_the_path_of_mmsegmentation(step, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    calls = []

    def changed(self, *args, **kwargs):
        calls.append(step)
        return getattr(super(Changed, self), step)(*args, **kwargs)

    Changed = type('Changed', (EncoderDecoder,), {step: changed})
    config = make_config('fcn', dict(type='CrossEntropyLoss'), AUXILIARY)
    theirs, _ = make_pair(config)
    config.pop('type')
    ours = Changed(**config).train()
    ours.load_state_dict(theirs.state_dict())
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0
    (losses, _), (found, _) = run(theirs, make_batch()), run(ours, make_batch(torch.uint8))
    assert calls == [step]
    assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in losses.items()}
    assert f"model: Changed, loss mmsegmentation's own: Changed has a {step} of its own" in caplog.text


def test_a_subclass_may_learn_from_something_else_than_labels():
    class Changed(EncoderDecoder):
        def _decode_head_forward_train(self, inputs, data_samples):
            return dict(loss_size=inputs[-1].square().mean() * data_samples[0].weight)

    config = make_config('fcn', dict(type='CrossEntropyLoss'), None)
    config.pop('type')
    model = Changed(**config).train()
    losses = model.loss(torch.randn(2, 3, 64, 96), [SegDataSample(metainfo=dict(weight=w)) for w in (2, 3)])
    assert losses['loss_size'] > 0


class Relabels(FCNHead):
    """Numbers that one byte does not hold: 255 * 2, and -100."""

    def _stack_batch_gt(self, batch_data_samples):
        labels = super()._stack_batch_gt(batch_data_samples) * 2
        return torch.where(labels == 510, self.ignore_index, labels // 2)


def test_a_head_that_stacks_labels_by_itself_gets_them_as_mmsegmentation_has_them(monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, 'Relabels', Relabels)
    config = make_config('fcn', dict(type='CrossEntropyLoss'), None)
    config['decode_head'].update(type='Relabels', ignore_index=-100)
    assert_same(config)


def test_a_subclass_with_a_loss_of_its_own_gets_labels_as_mmsegmentation_has_them():
    class Changed(EncoderDecoder):
        def loss(self, inputs, data_samples):
            return self._decode_head_forward_train(self.extract_feat(inputs), data_samples)

    config = make_config('fcn', dict(type='CrossEntropyLoss'), None)
    theirs, _ = make_pair(config)
    config.pop('type')
    ours = Changed(**config).train()
    ours.load_state_dict(theirs.state_dict())
    losses = [model(*make_batch(dtype), mode='loss') for model, dtype in ((theirs, torch.int64), (ours, torch.uint8))]
    assert losses[1] == losses[0]


def twice(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def replace_criterion(model):
    criterion = model.decode_head.loss_decode
    criterion.cls_criterion = twice(criterion.cls_criterion)


def replace_loss_by_feat(model):
    loss_by_feat = model.decode_head.loss_by_feat
    model.decode_head.loss_by_feat = lambda *args: dict(loss_x=loss_by_feat(*args)['loss_ce'] * 2)


def replace_features(model):
    extract_feat = model.extract_feat
    model.extract_feat = lambda inputs: [x * 2 for x in extract_feat(inputs)]


@pytest.mark.parametrize(
    'change',
    [
        replace_criterion,
        replace_loss_by_feat,
        replace_features,
        lambda model: setattr(model.decode_head.loss_decode, 'forward', twice(model.decode_head.loss_decode.forward)),
    ],
)
def test_what_is_replaced_in_an_object_is_computed(change):
    theirs, ours = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    plain, _ = run(ours, make_batch())
    ours.zero_grad()
    change(theirs)
    change(ours)
    (losses, gradients), (found, found_gradients) = run(theirs, make_batch()), run(ours, make_batch(torch.uint8))
    assert {name: float(value) for name, value in found.items()} == {n: float(v) for n, v in losses.items()}
    assert {n: float(v) for n, v in found.items()} != {n: float(v) for n, v in plain.items()}
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name


def test_a_subclass_of_the_backbone_may_have_a_plain_forward():
    class Halved(ResNeSt):
        def forward(self, x):
            return tuple(feature / 2 for feature in super().forward(x))

    theirs, ours = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    for model in (theirs, ours):
        model.backbone.__class__ = Halved
    (losses, _), (found, _) = run(theirs, make_batch()), run(ours, make_batch())
    assert torch.allclose(found['decode.loss_ce'], losses['decode.loss_ce'], rtol=1e-4)


def test_what_is_borrowed_from_another_object_is_computed():
    theirs, ours = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    other = copy.deepcopy(theirs.decode_head)
    other.loss_decode.loss_weight = 5
    theirs.decode_head.loss_by_feat = ours.decode_head.loss_by_feat = other.loss_by_feat
    (losses, _), (found, _) = run(theirs, make_batch()), run(ours, make_batch())
    assert float(found['decode.loss_ce']) == float(losses['decode.loss_ce'])


class PassesCallOn(ResNeSt):
    def forward(self, x, mask=None, *, call=None):
        return super().forward(x, call)


class Decorated(ResNeSt):
    @functools.wraps(ResNeSt.forward)
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(('kind', 'in_parts'), [(ResNeSt, True), (PassesCallOn, True), (Decorated, False)])
def test_a_backbone_that_takes_call_runs_part_by_part(kind, in_parts, monkeypatch):
    _, model = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    model.backbone.__class__ = kind
    called = []
    monkeypatch.setattr('mmseg_resnest.segmentor.call', lambda part, *args: (called.append(part), part(*args))[1])
    model.loss(*make_batch())
    backbone = model.backbone
    blocks = [*backbone.layer1, *backbone.layer2, *backbone.layer3, *backbone.layer4]
    assert called == [*([backbone._stem, *blocks] if in_parts else [backbone]), model.decode_head]


def test_activation_checkpointing_of_the_backbone_trains_it_when_compiled(monkeypatch):
    _, model = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    turn_on_activation_checkpointing(model, ['backbone'])
    monkeypatch.setattr('mmseg_resnest.segmentor.call', torch.compile(call, backend='aot_eager'))
    _, gradients = run(model, make_batch())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    torch._dynamo.reset()


@pytest.mark.parametrize('entry', ['predict', 'test_step'])
def test_torch_compile_leaves_prediction_on_its_path(entry):
    _, model = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    model.eval()
    images = make_batch()[0]
    samples = [SegDataSample(metainfo=dict(ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96))) for _ in images]
    args = (images, samples) if entry == 'predict' else (dict(inputs=images, data_samples=samples),)
    with torch.no_grad():
        found = torch.compile(getattr(model, entry), backend='eager')(*args)
    assert [sample.pred_sem_seg.data.dtype for sample in found] == [torch.uint8] * len(images)
    assert all(sample.finite for sample in found)


@pytest.mark.parametrize('switch', ['fused_loss', 'channels_last', 'compiled', 'cuda_graphs'])
def test_a_switch_is_true_or_false(switch):
    config = make_config('fcn', dict(type='CrossEntropyLoss'), None) | dict(type='mmseg_resnest.EncoderDecoder')
    with pytest.raises(ValueError, match=f"{switch}='off'; expected True or False"):
        MODELS.build(config | {switch: 'off'})


def test_a_cascade_takes_the_path_of_mmsegmentation():
    """mmsegmentation's, whose second head reads the first one's logits too."""
    head = make_config('fcn', dict(type='CrossEntropyLoss'), None)['decode_head']
    second = dict(
        type='OCRHead',
        in_channels=2048,
        in_index=3,
        ocr_channels=8,
        loss_decode=dict(type='CrossEntropyLoss'),
        **COMMON,
    )
    backbone = dict(type='mmseg_resnest.ResNeSt', depth=14, output_stride=8, norm_cfg=dict(type='BN'))
    Cascade = type('Cascade', (CascadeEncoderDecoder, EncoderDecoder), {})
    model = Cascade(num_stages=2, backbone=backbone, decode_head=[head, second], test_cfg=ConfigDict(mode='whole'))
    losses, gradients = run(model.train(), make_batch(torch.uint8))
    assert {'decode_0.loss_ce', 'decode_1.loss_ce'} <= losses.keys()
    assert len(gradients) == sum(1 for _ in model.parameters())
    with torch.no_grad():
        (sample, _) = model.eval().predict(make_batch()[0])
    assert sample.pred_sem_seg.shape == (64, 96)


def test_a_loss_that_is_exchanged_is_computed(caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    theirs, ours = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    ours.loss(*make_batch())
    theirs.decode_head.loss_decode, ours.decode_head.loss_decode = DiceLoss(), DiceLoss()
    (losses, _), (found, _) = run(theirs, make_batch()), run(ours, make_batch())
    assert found.keys() == losses.keys()
    assert torch.equal(found['decode.loss_dice'], losses['decode.loss_dice'])
    assert caplog.text.count('decode: FCNHead, loss') == 2


def test_fused_loss_can_be_switched_off(caplog, monkeypatch):
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handlers', [caplog.handler])
    config = make_config('fcn', dict(type='CrossEntropyLoss'), AUXILIARY)
    model = MODELS.build(config | dict(type='mmseg_resnest.EncoderDecoder', fused_loss=False))
    model.loss(*make_batch())
    assert caplog.text.count("mmsegmentation's own: fused_loss=False") == 2


@pytest.mark.parametrize('neck', [None, dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=32, num_outs=4)])
def test_backbone_of_another_library(neck):
    config = make_config('fcn', dict(type='CrossEntropyLoss'), None)
    config['backbone'] = dict(type='ResNet', depth=18, norm_cfg=dict(type='BN'), norm_eval=False)
    config['neck'] = neck
    config['decode_head'] |= dict(in_channels=32 if neck else 512)
    assert_same(config)
    assert isinstance(make_pair(config)[1].backbone, ResNet)


def test_fused_heads_get_logits_and_others_features():
    """The second of three heads has a loss that is not fused: it gets the feature maps."""
    dice = dict(AUXILIARY, in_channels=512, in_index=1, loss_decode=dict(type='DiceLoss'))
    config = make_config('fcn', dict(type='CrossEntropyLoss'), [dice, AUXILIARY])
    assert_same(config)
    _, ours = make_pair(config)
    ours.loss(*make_batch())
    outputs = ours._run_network(make_batch()[0])
    assert ours._fused == ['decode', 'aux_1']
    assert [output.shape[1] for output in outputs] == [CLASSES, CLASSES, 256, 512, 1024, 2048]


def test_predicts_as_mmsegmentation():
    theirs, ours = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    inputs, _ = make_batch()
    with torch.no_grad():
        expected, found = (model.eval().predict(inputs) for model in (theirs, ours))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)


@pytest.mark.parametrize('head', ['fcn', 'one that predicts by itself'])
@torch.no_grad()
def test_prediction_does_not_search_for_algorithms(head, monkeypatch):
    """Which would take seconds for each size; training goes on as it was."""
    _, model = make_pair(make_config('fcn', dict(type='CrossEntropyLoss'), None))
    if head != 'fcn':
        predict = type(model.decode_head).predict
        monkeypatch.setattr(type(model.decode_head), 'predict', lambda *args: predict(*args))
    searches = []
    model.backbone.register_forward_hook(lambda *_: searches.append(torch.backends.cudnn.benchmark))
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    model.eval().predict(make_batch()[0])
    assert searches == [False]
    assert torch.backends.cudnn.benchmark
