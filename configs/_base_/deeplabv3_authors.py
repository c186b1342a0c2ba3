"""DeepLabV3 as the authors of ResNeSt build it (PyTorch-Encoding), with their auxiliary FCN head.

Their loss is averaged over the pixels that are not ignored.
"""

model = dict(
    type='mmseg_resnest.EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(480, 480),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(type='mmseg_resnest.ResNeSt', depth=50, output_stride=8, norm_cfg=dict(type='BN')),
    decode_head=dict(
        type='mmseg_resnest.AuthorsDeepLabV3Head',
        channels=256,
        dilations=(12, 24, 36),
        in_channels=2048,
        in_index=3,
        num_classes=150,
        norm_cfg=dict(type='BN'),
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0, avg_non_ignore=True),
    ),
    auxiliary_head=dict(
        type='mmseg_resnest.AuthorsFCNHead',
        channels=256,
        in_channels=1024,
        in_index=2,
        num_classes=150,
        norm_cfg=dict(type='BN'),
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.2, avg_non_ignore=True),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(480, 480), stride=(320, 320)),
)
