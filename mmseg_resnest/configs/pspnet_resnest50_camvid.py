"""PSPNet with ResNeSt-50 on CamVid: the worked example of a custom data set (docs/custom_dataset.md).

    python tools/train.py configs/pspnet_resnest50_camvid.py --data-root DIR
    python tools/test.py configs/pspnet_resnest50_camvid.py CHECKPOINT --data-root DIR

CamVid in ADE20K's folder layout: 480x360 road scenes, 367 to train and 101 to validate, 11 classes, 255 not labelled.
GPU hours: 0.07 on one H200 (250 s, evaluation included; 101 s where torch has compiled it before).
Published: nothing for this model and recipe. Measured from scratch (model.backbone.init_cfg=None): mIoU 43.8, the mean
of five seeds with graph='mmseg' (docs/training_speed.md); 45.98, one seed before training was compiled.

Generated from configs/pspnet_resnest50_camvid.py by `make configs`; edit that file.
"""

custom_hooks = [
    dict(type='mmseg_resnest.BatchNormCheckHook'),
    dict(type='mmseg_resnest.ProgressBarHook'),
    dict(type='mmseg_resnest.RandomnessHook'),
    dict(type='mmseg_resnest.SignalHook'),
    dict(timeout=600, type='mmseg_resnest.WatchHook'),
]
data_root = 'data/camvid'
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False,
        interval=500,
        max_keep_ckpts=3,
        save_best='mIoU',
        type='mmseg_resnest.CheckpointHook'),
    logger=dict(interval=50, log_metric_by_epoch=False, type='LoggerHook'),
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
        'sky',
        'building',
        'pole',
        'road',
        'pavement',
        'tree',
        'sign',
        'fence',
        'car',
        'pedestrian',
        'bicyclist',
    ),
    palette=[
        [
            128,
            128,
            128,
        ],
        [
            128,
            0,
            0,
        ],
        [
            192,
            192,
            128,
        ],
        [
            128,
            64,
            128,
        ],
        [
            60,
            40,
            222,
        ],
        [
            128,
            128,
            0,
        ],
        [
            192,
            128,
            128,
        ],
        [
            64,
            64,
            128,
        ],
        [
            64,
            0,
            128,
        ],
        [
            64,
            64,
            0,
        ],
        [
            0,
            128,
            192,
        ],
    ])
model = dict(
    auxiliary_head=dict(
        align_corners=False,
        channels=256,
        concat_input=False,
        dropout_ratio=0.1,
        in_channels=1024,
        in_index=2,
        loss_decode=dict(loss_weight=0.4, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=11,
        num_convs=1,
        type='FCNHead'),
    backbone=dict(
        depth=50,
        init_cfg=dict(checkpoint='resnest://resnest50', type='Pretrained'),
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
            360,
            480,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=512,
        dropout_ratio=0.1,
        in_channels=2048,
        in_index=3,
        loss_decode=dict(loss_weight=1.0, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=11,
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
    optimizer=dict(
        fused=True, lr=0.01, momentum=0.9, type='SGD', weight_decay=0.0005),
    type='mmseg_resnest.AutocastOptimWrapper')
param_scheduler = [
    dict(
        begin=0,
        by_epoch=False,
        end=1000,
        eta_min=0.0001,
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
        data_root='data/camvid',
        img_suffix='.jpg',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'pole',
                'road',
                'pavement',
                'tree',
                'sign',
                'fence',
                'car',
                'pedestrian',
                'bicyclist',
            ),
            palette=[
                [
                    128,
                    128,
                    128,
                ],
                [
                    128,
                    0,
                    0,
                ],
                [
                    192,
                    192,
                    128,
                ],
                [
                    128,
                    64,
                    128,
                ],
                [
                    60,
                    40,
                    222,
                ],
                [
                    128,
                    128,
                    0,
                ],
                [
                    192,
                    128,
                    128,
                ],
                [
                    64,
                    64,
                    128,
                ],
                [
                    64,
                    0,
                    128,
                ],
                [
                    64,
                    64,
                    0,
                ],
                [
                    0,
                    128,
                    192,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                480,
                360,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        seg_map_suffix='.png',
        type='BaseSegDataset'),
    num_workers=8,
    persistent_workers=True,
    sampler=dict(shuffle=False, type='DefaultSampler'))
test_evaluator = dict(
    iou_metrics=[
        'mIoU',
    ], type='mmseg_resnest.IoUMetric')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(
        480,
        360,
    ), type='Resize'),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_cfg = dict(max_iters=1000, type='IterBasedTrainLoop', val_interval=500)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        data_root='data/camvid',
        img_suffix='.jpg',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'pole',
                'road',
                'pavement',
                'tree',
                'sign',
                'fence',
                'car',
                'pedestrian',
                'bicyclist',
            ),
            palette=[
                [
                    128,
                    128,
                    128,
                ],
                [
                    128,
                    0,
                    0,
                ],
                [
                    192,
                    192,
                    128,
                ],
                [
                    128,
                    64,
                    128,
                ],
                [
                    60,
                    40,
                    222,
                ],
                [
                    128,
                    128,
                    0,
                ],
                [
                    192,
                    128,
                    128,
                ],
                [
                    64,
                    64,
                    128,
                ],
                [
                    64,
                    0,
                    128,
                ],
                [
                    64,
                    64,
                    0,
                ],
                [
                    0,
                    128,
                    192,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(
                keep_ratio=True,
                ratio_range=(
                    0.5,
                    2.0,
                ),
                scale=(
                    480,
                    360,
                ),
                type='RandomResize'),
            dict(
                cat_max_ratio=0.75,
                crop_size=(
                    360,
                    480,
                ),
                type='mmseg_resnest.RandomCrop'),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='mmseg_resnest.PhotoMetricDistortion'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        seg_map_suffix='.png',
        type='BaseSegDataset'),
    num_workers=8,
    persistent_workers=True,
    sampler=dict(shuffle=True, type='InfiniteSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        keep_ratio=True,
        ratio_range=(
            0.5,
            2.0,
        ),
        scale=(
            480,
            360,
        ),
        type='RandomResize'),
    dict(
        cat_max_ratio=0.75,
        crop_size=(
            360,
            480,
        ),
        type='mmseg_resnest.RandomCrop'),
    dict(prob=0.5, type='RandomFlip'),
    dict(type='mmseg_resnest.PhotoMetricDistortion'),
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
        data_root='data/camvid',
        img_suffix='.jpg',
        metainfo=dict(
            classes=(
                'sky',
                'building',
                'pole',
                'road',
                'pavement',
                'tree',
                'sign',
                'fence',
                'car',
                'pedestrian',
                'bicyclist',
            ),
            palette=[
                [
                    128,
                    128,
                    128,
                ],
                [
                    128,
                    0,
                    0,
                ],
                [
                    192,
                    192,
                    128,
                ],
                [
                    128,
                    64,
                    128,
                ],
                [
                    60,
                    40,
                    222,
                ],
                [
                    128,
                    128,
                    0,
                ],
                [
                    192,
                    128,
                    128,
                ],
                [
                    64,
                    64,
                    128,
                ],
                [
                    64,
                    0,
                    128,
                ],
                [
                    64,
                    64,
                    0,
                ],
                [
                    0,
                    128,
                    192,
                ],
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                480,
                360,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        seg_map_suffix='.png',
        type='BaseSegDataset'),
    num_workers=8,
    persistent_workers=True,
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
