"""DeepLabV3+ with ResNeSt-101 on Cityscapes: 512x1024, batch 8, 80k iterations (OpenMMLab's recipe).

    python tools/train.py configs/deeplabv3plus_resnest101_cityscapes.py
    python tools/test.py configs/deeplabv3plus_resnest101_cityscapes.py CHECKPOINT [--tta]

The batch size is a process's: on N GPUs give train_dataloader.batch_size=8/N with --cfg-options.
GPU hours: 8 on one H200, at 22 images/s and 26 GiB (tools/benchmark.py, random data).
Published: mIoU 79.62, with multi-scale and flip 80.27 (mmsegmentation's model zoo, S-101-D8: the same
recipe on its own graph of ResNeSt, ``graph='mmseg'``). Not reproduced here yet.

Generated from configs/deeplabv3plus_resnest101_cityscapes.py by `make configs`; edit that file.
"""

authors_tta_model = dict(
    base_size=2048,
    crop_size=768,
    scales=(
        0.75,
        1.0,
        1.25,
        1.5,
        1.75,
        2.0,
        2.25,
    ),
    type='mmseg_resnest.AuthorsTTAModel')
custom_hooks = [
    dict(type='mmseg_resnest.BatchNormCheckHook'),
    dict(type='mmseg_resnest.ProgressBarHook'),
    dict(type='mmseg_resnest.RandomnessHook'),
    dict(type='mmseg_resnest.SignalHook'),
    dict(timeout=600, type='mmseg_resnest.WatchHook'),
]
data_root = 'data/cityscapes'
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False,
        interval=8000,
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
        num_classes=19,
        num_convs=1,
        type='FCNHead'),
    backbone=dict(
        depth=101,
        init_cfg=dict(checkpoint='resnest://resnest101', type='Pretrained'),
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
            512,
            1024,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        c1_channels=48,
        c1_in_channels=256,
        channels=512,
        dilations=(
            1,
            12,
            24,
            36,
        ),
        dropout_ratio=0.1,
        in_channels=2048,
        in_index=3,
        loss_decode=dict(loss_weight=1.0, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=19,
        type='DepthwiseSeparableASPPHead'),
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
        end=80000,
        eta_min=0.0001,
        power=0.9,
        type='PolyLR'),
]
resume = False
sync_bn = 'mmseg_resnest.SyncBN'
test_cfg = dict(type='TestLoop')
test_dataloader = dict(
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    batch_size=4,
    dataset=dict(
        data_prefix=dict(
            img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        data_root='data/cityscapes',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                2048,
                1024,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='CityscapesDataset'),
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
        2048,
        1024,
    ), type='Resize'),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_cfg = dict(max_iters=80000, type='IterBasedTrainLoop', val_interval=8000)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_prefix=dict(
            img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        data_root='data/cityscapes',
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
                    2048,
                    1024,
                ),
                type='RandomResize'),
            dict(
                cat_max_ratio=0.75,
                crop_size=(
                    512,
                    1024,
                ),
                type='mmseg_resnest.RandomCrop'),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='mmseg_resnest.PhotoMetricDistortion'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='CityscapesDataset'),
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
            2048,
            1024,
        ),
        type='RandomResize'),
    dict(
        cat_max_ratio=0.75,
        crop_size=(
            512,
            1024,
        ),
        type='mmseg_resnest.RandomCrop'),
    dict(prob=0.5, type='RandomFlip'),
    dict(type='mmseg_resnest.PhotoMetricDistortion'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
tta_model = dict(type='mmseg_resnest.TTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        transforms=[
            [
                dict(keep_ratio=True, scale_factor=0.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=0.75, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.25, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.75, type='Resize'),
            ],
            [
                dict(direction='horizontal', prob=0.0, type='RandomFlip'),
                dict(direction='horizontal', prob=1.0, type='RandomFlip'),
            ],
            [
                dict(type='mmseg_resnest.PackByteLabels'),
            ],
        ],
        type='mmseg_resnest.ImageTestTimeAug'),
]
val_cfg = dict(type='ValLoop')
val_dataloader = dict(
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    batch_size=4,
    dataset=dict(
        data_prefix=dict(
            img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        data_root='data/cityscapes',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                2048,
                1024,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        type='CityscapesDataset'),
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
