"""mmseg_resnest.benchmark.peers: the other side is what it is for its users, and what it is not beside is refused."""

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models import EncoderDecoder as MMSegEncoderDecoder
from mmseg.models import ResNeSt as MMSegResNeSt
from mmseg.registry import MODELS
from tiny import CAMVID, ROOT

from mmseg_resnest.benchmark.peers import COMPARABLE_WITH, check_backbone, check_options, mmseg_config


def config(path=ROOT / 'configs' / 'deeplabv3_resnest50_ade20k.py'):
    init_default_scope('mmseg')
    return Config.fromfile(path)


def test_mmsegmentations_side_is_its_own_model():
    """Its config of the same head and data set, in our depth, and with its own optimiser."""
    cfg = config()
    theirs = mmseg_config(cfg)
    model = MODELS.build(theirs.model)
    assert type(model) is MMSegEncoderDecoder
    assert type(model.backbone) is MMSegResNeSt
    assert len(model.backbone.layer3) == 6  # depth 50
    assert (model.decode_head.num_classes, theirs.model.decode_head.type) == (150, 'ASPPHead')
    assert theirs.optim_wrapper.optimizer.lr == cfg.optim_wrapper.optimizer.lr


@pytest.mark.parametrize(
    'same',
    [
        dict(norm_cfg=dict(type='BN', requires_grad=True)),
        dict(norm_cfg=dict(type='SyncBN')),
        dict(norm_cfg=None),
        dict(norm_eval=False, with_cp=False, frozen_stages=-1, out_indices=[0, 1, 2, 3]),
        dict(graph='mmseg', radix_conv='grouped', recompute_conv3=False, init_cfg=dict(type='Pretrained')),
    ],
)
def test_a_backbone_that_a_peer_has(same):
    check_backbone(dict(type='mmseg_resnest.ResNeSt', depth=50, output_stride=8) | same)


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (dict(output_stride=16), 'output_stride=16: the other side would not get it; expected 8'),
        (dict(output_stride=32), 'output_stride=32: the other side would not get it; expected 8'),
        (dict(with_cp=True), 'with_cp=True: the other side would not get it; expected False'),
        (dict(norm_cfg=dict(type='BN', requires_grad=False)), 'norm_cfg=.*: the other side would not get it; expected'),
        (dict(norm_cfg=dict(type='GN', num_groups=8)), 'norm_cfg=.*: the other side would not get it; expected'),
        (dict(avd_first=True), 'avd_first=True: the other side would not get it; expected False'),
        (dict(strides=(1, 2, 2, 2)), r'strides=\(1, 2, 2, 2\): the other side would not get it'),
        (dict(depth=152), 'depth=152: expected one of 14, 26, 50, 101, 200, 269'),
        (dict(type='mmseg.ResNeSt'), "type='mmseg.ResNeSt': expected mmseg_resnest.ResNeSt"),
    ],
)
def test_a_backbone_that_no_peer_has(other, message):
    with pytest.raises(ValueError, match=rf'model\.backbone\.{message}'):
        check_backbone(dict(type='mmseg_resnest.ResNeSt', depth=50, output_stride=8) | other)
    with pytest.raises(ValueError, match='output_stride=32'):
        check_backbone(dict(type='mmseg_resnest.ResNeSt', depth=50))


@pytest.mark.parametrize('against', COMPARABLE_WITH)
def test_overrides_of_one_side_are_not_compared(against):
    common = {'train_dataloader.batch_size': 4, 'model.compiled': False}
    own = {'mmseg': 'model.decode_head.conv_cfg', 'smp': 'model.decode_head.num_classes'}
    check_options(common | {own.pop(against): None}, against)
    (other,) = own.values()
    with pytest.raises(ValueError, match=f'--cfg-options {other}: not one that --against {against} compares'):
        check_options({other: None}, against)


def test_a_config_that_mmsegmentation_lacks():
    with pytest.raises(ValueError, match='mmsegmentation has no ResNeSt config of PSPHead on this data set'):
        mmseg_config(config(CAMVID))
