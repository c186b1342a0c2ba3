"""What stands beside this project in a comparison: mmsegmentation's model, and segmentation_models.pytorch's.

Also what a comparison refuses, because one side alone would have it.
"""

from inspect import signature
from pathlib import Path
from types import ModuleType

import mmseg
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import nn

from mmseg_resnest.resnest import ARCHITECTURES, ResNeSt

# How ours runs, which mmsegmentation's segmentor and backbone do not know.
SWITCHES = ('fused_loss', 'channels_last', 'compiled', 'cuda_graphs')
BACKBONE_SWITCHES = ('radix_conv', 'recompute_conv3')
# The overrides that both sides of a comparison heed, or that say only how ours runs.
COMPARABLE = (
    'train_dataloader.batch_size', 'model.data_preprocessor.size', 'model.backbone.depth', 'model.backbone.init_cfg',
    *(f'model.backbone.{switch}' for switch in BACKBONE_SWITCHES), *(f'model.{switch}' for switch in SWITCHES),
)  # fmt: skip
COMPARABLE_WITH = dict(
    mmseg=(*COMPARABLE, 'model.backbone.graph', 'model.decode_head.conv_cfg'),
    smp=(*COMPARABLE, 'model.decode_head.num_classes'),
)


def check_peer(cfg: Config, task: str, peer: str) -> None:
    """Refuses a comparison with a peer that is not there, or has no such model.

    Args:
        cfg: The config.
        task: ``'train'``, ``'test'`` or ``'learn'``.
        peer: ``'mmseg'`` or ``'smp'``.

    Raises:
        ImportError: It is not there.
        ValueError: It has no such model.
    """
    check_backbone(cfg.model.backbone)
    if peer == 'smp':
        import_smp()
        if task == 'test':  # in training ours gets its head
            check_smp_head(cfg.model)
    elif task == 'train':
        mmseg_config(cfg)
    else:
        mmseg_backbone(cfg.model.backbone)


def check_options(options: dict, against: str) -> None:
    """Refuses overrides that could change one side of a comparison alone.

    Args:
        options: The overrides.
        against: ``'mmseg'`` or ``'smp'``.

    Raises:
        ValueError: There is one.
    """
    known = COMPARABLE_WITH[against]
    for key in options:
        if key not in known:
            raise ValueError(
                f'--cfg-options {key}: not one that --against {against} compares; expected one of {", ".join(known)}'
            )


def mmseg_config(cfg: Config) -> Config:
    """Returns mmsegmentation's own config of the same head, data set and depth.

    Raises:
        ValueError: It has none.
    """
    names = {
        'FCNHead': 'fcn',
        'PSPHead': 'pspnet',
        'ASPPHead': 'deeplabv3',
        'DepthwiseSeparableASPPHead': 'deeplabv3plus',
    }
    head = names.get(cfg.model.decode_head.type)
    data = {150: 'ade20k', 19: 'cityscapes'}.get(cfg.model.decode_head.num_classes)
    folder = Path(mmseg.__file__).parent / '.mim/configs/resnest'
    found = sorted(folder.glob(f'*_{head}_*{data}*.py'))
    if not found:
        raise ValueError(f'mmsegmentation has no ResNeSt config of {cfg.model.decode_head.type} on this data set')
    theirs = Config.fromfile(found[0])
    theirs.model.pretrained = None
    theirs.model.backbone = mmseg_backbone(cfg.model.backbone)
    theirs.model.data_preprocessor.size = cfg.model.data_preprocessor.size
    return theirs


def mmseg_backbone(ours: dict) -> dict:
    """Returns the config of mmsegmentation's ResNeSt at output stride 8, as its model zoo has it for depth 101.

    Args:
        ours: The config of this project's, of the same depth.

    Raises:
        ValueError: mmsegmentation's has no such depth, or ours has other options.
    """
    check_backbone(ours)
    depths, depth = ARCHITECTURES.keys() & MODELS.get('mmseg.ResNeSt').arch_settings, ours['depth']
    if depth not in depths:
        raise ValueError(f"mmsegmentation's ResNeSt has no depth {depth}, but {', '.join(map(str, sorted(depths)))}")
    return dict(
        type='mmseg.ResNeSt', depth=depth, stem_channels=64 if depth == 50 else 128, radix=2, reduction_factor=4,
        avg_down_stride=True, num_stages=4, out_indices=(0, 1, 2, 3), dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='BN'), norm_eval=False, style='pytorch', contract_dilation=True,
    )  # fmt: skip


def check_backbone(ours: dict) -> None:
    """Refuses another backbone than our ResNeSt, and options that a peer's would not get: plain, at output stride 8.

    Raises:
        ValueError: It is another, or there is one.
    """
    if ours['type'] not in ('mmseg_resnest.ResNeSt', ResNeSt):
        raise ValueError(f'model.backbone.type={ours["type"]!r}: expected mmseg_resnest.ResNeSt')
    if ours.get('depth') not in ARCHITECTURES:
        raise ValueError(
            f'model.backbone.depth={ours.get("depth")!r}: expected one of {", ".join(map(str, ARCHITECTURES))}'
        )
    defaults = {name: parameter.default for name, parameter in signature(ResNeSt).parameters.items()}
    plain = defaults | dict(output_stride=8, norm_cfg=dict(type='BN', requires_grad=True))
    ours = defaults | ours
    ours['norm_cfg'] = plain['norm_cfg'] | (ours['norm_cfg'] or {})
    if ours['norm_cfg']['type'] == 'SyncBN':  # one process has it here
        ours['norm_cfg']['type'] = 'BN'
    for key, value in ours.items():
        found = tuple(value) if isinstance(value, list) else value
        if key not in ('type', 'depth', 'init_cfg', 'graph', *BACKBONE_SWITCHES) and found != plain.get(key):
            wanted = f'; expected {plain[key]!r}' if key in plain else ''
            raise ValueError(f'model.backbone.{key}={value!r}: the other side would not get it{wanted}')


def take_mmseg_model(model: dict) -> None:
    """Puts mmsegmentation's own segmentor, backbone and convolutions in a model's config.

    Raises:
        ValueError: It has no such backbone.
    """
    model.type = 'mmseg.EncoderDecoder'
    model.backbone = mmseg_backbone(model.backbone)
    for heads in (model.decode_head, model.get('auxiliary_head') or []):
        for head in heads if isinstance(heads, list) else [heads]:
            head.conv_cfg = None  # the authors' heads here have one by default
    for switch in SWITCHES:
        model.pop(switch, None)


def mmseg_pipeline(pipeline: list[dict]) -> list[dict]:
    """Returns a pipeline of mmsegmentation's own transforms; for test-time augmentation they load each label anew."""
    steps = [dict(step, type=step['type'].removeprefix('mmseg_resnest.')) for step in pipeline]
    for step in steps:
        if step['type'] == 'PackByteLabels':
            step['type'] = 'PackSegInputs'
        elif step['type'] == 'ImageTestTimeAug':
            steps = [other for other in steps if other['type'] != 'LoadAnnotations']
            packed = [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]
            step.update(type='TestTimeAug', transforms=[*step['transforms'][:-1], *packed])
    return steps


def drop_hooks(cfg: Config) -> None:
    """Takes this project's hooks and its log's format out of a config, where MMEngine's take over."""
    for name, hook in list(cfg.default_hooks.items()):
        if hook and hook.type.startswith('mmseg_resnest.'):
            cfg.default_hooks.pop(name)
    cfg.custom_hooks = []
    if 'mmseg_resnest.' in str((cfg.get('log_processor') or {}).get('type')):
        cfg.log_processor.pop('type')


def import_smp() -> ModuleType:
    """Returns segmentation_models.pytorch.

    Raises:
        ImportError: The package is not there.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        needed = 'segmentation_models.pytorch: pip install segmentation-models-pytorch'
        raise ImportError(f'--against smp needs {needed}') from error
    return smp


def check_smp_head(model: dict) -> None:
    """Refuses what predicts with another head than segmentation_models.pytorch's, or not whole images.

    Raises:
        ValueError: It does.
    """
    kind, mode = model.decode_head.type, model.get('test_cfg', {}).get('mode', 'whole')
    if kind not in ('ASPPHead', 'mmseg_resnest.AuthorsDeepLabV3Head') or mode != 'whole':
        raise ValueError(
            f'model.decode_head.type={kind!r}, model.test_cfg.mode={mode!r}: '
            "segmentation_models.pytorch's side is DeepLabV3 on whole images"
        )


def smp_model(cfg: Config, channels: int) -> nn.Module:
    """Returns segmentation_models.pytorch's DeepLabV3 on timm's ResNeSt, of the config's depth and classes.

    Raises:
        ImportError: The package is not there.
    """
    depth = cfg.model.backbone.depth
    return import_smp().DeepLabV3(
        encoder_name=f'tu-resnest{depth}{"e" if depth > 50 else "d"}',
        encoder_weights=None,
        encoder_output_stride=8,
        decoder_channels=channels,
        decoder_atrous_rates=(12, 24, 36),
        classes=cfg.model.decode_head.num_classes,
    )
