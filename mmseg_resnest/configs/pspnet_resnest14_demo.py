"""PSPNet with ResNeSt-14 on the embedded demo data set: generated street scenes, 128x192, 12 classes, from scratch.

    make demo

It fits two CPU cores and a few minutes, and a GPU as well.
GPU hours: 0.01 on one H200.
Published: nothing. The README says what was measured.

Generated from configs/pspnet_resnest14_demo.py by `make configs`; edit that file.
"""

custom_hooks = [
    dict(type='mmseg_resnest.BatchNormCheckHook'),
    dict(type='mmseg_resnest.ProgressBarHook'),
    dict(type='mmseg_resnest.RandomnessHook'),
    dict(type='mmseg_resnest.SignalHook'),
    dict(timeout=600, type='mmseg_resnest.WatchHook'),
]
data_root = 'data/demo'
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False,
        interval=330,
        max_keep_ckpts=3,
        save_best=None,
        type='mmseg_resnest.CheckpointHook'),
    logger=dict(interval=10, log_metric_by_epoch=False, type='LoggerHook'),
    nonfinite=dict(
        action='stop', limit=10, type='mmseg_resnest.NonFiniteHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    runtime_info=dict(type='mmseg_resnest.RuntimeInfoHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    samples=dict(on_bad_sample='stop', type='mmseg_resnest.SampleCheckHook'),
    timer=dict(type='IterTimerHook'),
    visualization=dict(type='SegVisualizationHook'))
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    dist_cfg=dict(backend='nccl', timeout=1800),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
load_from = None
log_level = 'INFO'
log_processor = dict(by_epoch=False, type='mmseg_resnest.LogProcessor')
metainfo = dict(
    classes=(
        'road',
        'lane marking',
        'pavement',
        'building',
        'fence',
        'pole',
        'traffic sign',
        'vegetation',
        'sky',
        'person',
        'car',
        'bus',
    ),
    palette=[
        [
            128,
            84,
            138,
        ],
        [
            250,
            240,
            214,
        ],
        [
            240,
            128,
            188,
        ],
        [
            92,
            92,
            104,
        ],
        [
            202,
            156,
            120,
        ],
        [
            168,
            176,
            190,
        ],
        [
            252,
            210,
            48,
        ],
        [
            104,
            158,
            66,
        ],
        [
            112,
            178,
            226,
        ],
        [
            226,
            48,
            72,
        ],
        [
            38,
            66,
            178,
        ],
        [
            20,
            152,
            150,
        ],
    ])
model = dict(
    auxiliary_head=None,
    backbone=dict(
        base_width=32,
        depth=14,
        norm_cfg=dict(type='BN'),
        output_stride=8,
        type='mmseg_resnest.ResNeSt'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            128,
            192,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=64,
        dropout_ratio=0.1,
        in_channels=2048,
        in_index=3,
        loss_decode=dict(loss_weight=1.0, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=12,
        pool_scales=(
            1,
            2,
            3,
            6,
        ),
        type='PSPHead'),
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='mmseg_resnest.EncoderDecoder')
optim_wrapper = dict(
    dtype='bfloat16',
    optimizer=dict(lr=0.004, type='AdamW', weight_decay=0.01),
    type='mmseg_resnest.AutocastOptimWrapper')
param_scheduler = [
    dict(
        begin=0,
        by_epoch=False,
        end=330,
        eta_min=1e-05,
        power=0.9,
        type='PolyLR'),
]
resume = False
sync_bn = 'mmseg_resnest.SyncBN'
test_cfg = dict(type='TestLoop')
test_dataloader = dict(
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    batch_size=8,
    dataset=dict(
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        data_root='data/demo',
        metainfo=dict(
            classes=(
                'road',
                'lane marking',
                'pavement',
                'building',
                'fence',
                'pole',
                'traffic sign',
                'vegetation',
                'sky',
                'person',
                'car',
                'bus',
            ),
            palette=[
                [
                    128,
                    84,
                    138,
                ],
                [
                    250,
                    240,
                    214,
                ],
                [
                    240,
                    128,
                    188,
                ],
                [
                    92,
                    92,
                    104,
                ],
                [
                    202,
                    156,
                    120,
                ],
                [
                    168,
                    176,
                    190,
                ],
                [
                    252,
                    210,
                    48,
                ],
                [
                    104,
                    158,
                    66,
                ],
                [
                    112,
                    178,
                    226,
                ],
                [
                    226,
                    48,
                    72,
                ],
                [
                    38,
                    66,
                    178,
                ],
                [
                    20,
                    152,
                    150,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='BaseSegDataset'),
    num_workers=0,
    sampler=dict(shuffle=False, type='DefaultSampler'))
test_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ], type='mmseg_resnest.IoUMetric')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_cfg = dict(max_iters=330, type='IterBasedTrainLoop', val_interval=330)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        data_root='data/demo',
        metainfo=dict(
            classes=(
                'road',
                'lane marking',
                'pavement',
                'building',
                'fence',
                'pole',
                'traffic sign',
                'vegetation',
                'sky',
                'person',
                'car',
                'bus',
            ),
            palette=[
                [
                    128,
                    84,
                    138,
                ],
                [
                    250,
                    240,
                    214,
                ],
                [
                    240,
                    128,
                    188,
                ],
                [
                    92,
                    92,
                    104,
                ],
                [
                    202,
                    156,
                    120,
                ],
                [
                    168,
                    176,
                    190,
                ],
                [
                    252,
                    210,
                    48,
                ],
                [
                    104,
                    158,
                    66,
                ],
                [
                    112,
                    178,
                    226,
                ],
                [
                    226,
                    48,
                    72,
                ],
                [
                    38,
                    66,
                    178,
                ],
                [
                    20,
                    152,
                    150,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='BaseSegDataset'),
    num_workers=0,
    sampler=dict(shuffle=True, type='InfiniteSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(prob=0.5, type='RandomFlip'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
tta_model = dict(type='mmseg_resnest.TTAModel')
val_cfg = dict(type='ValLoop')
val_dataloader = dict(
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    batch_size=8,
    dataset=dict(
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        data_root='data/demo',
        metainfo=dict(
            classes=(
                'road',
                'lane marking',
                'pavement',
                'building',
                'fence',
                'pole',
                'traffic sign',
                'vegetation',
                'sky',
                'person',
                'car',
                'bus',
            ),
            palette=[
                [
                    128,
                    84,
                    138,
                ],
                [
                    250,
                    240,
                    214,
                ],
                [
                    240,
                    128,
                    188,
                ],
                [
                    92,
                    92,
                    104,
                ],
                [
                    202,
                    156,
                    120,
                ],
                [
                    168,
                    176,
                    190,
                ],
                [
                    252,
                    210,
                    48,
                ],
                [
                    104,
                    158,
                    66,
                ],
                [
                    112,
                    178,
                    226,
                ],
                [
                    226,
                    48,
                    72,
                ],
                [
                    38,
                    66,
                    178,
                ],
                [
                    20,
                    152,
                    150,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='BaseSegDataset'),
    num_workers=0,
    sampler=dict(shuffle=False, type='DefaultSampler'))
val_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ], type='mmseg_resnest.IoUMetric')
visualizer = dict(
    name='visualizer',
    type='SegLocalVisualizer',
    vis_backends=[
        dict(type='LocalVisBackend'),
    ])
