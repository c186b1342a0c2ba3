"""FCN with ResNeSt-50 on ADE20K: the authors' model and recipe, 480x480, batch 16, 120 epochs.

    python tools/train.py configs/fcn_resnest50_ade20k_authors.py
    python tools/test.py configs/fcn_resnest50_ade20k_authors.py CHECKPOINT

The batch size is a process's: on N GPUs give train_dataloader.batch_size=16/N with --cfg-options.
GPU hours: 9 on one H200, at 72 images/s and 18 GiB (tools/benchmark.py, random data).
Published: pixel accuracy 80.18, mIoU 42.94, multi-scale and flip (model zoo of zhanghang1989/PyTorch-Encoding).
Not reproduced here yet; ``tools/test.py`` evaluates one scale with sliding windows of 480,
``tools/test.py --tta authors`` as they did.

Generated from configs/fcn_resnest50_ade20k_authors.py by `make configs`; edit that file.
"""

custom_hooks = [
    dict(type='mmseg_resnest.BatchNormCheckHook'),
    dict(type='mmseg_resnest.ProgressBarHook'),
    dict(type='mmseg_resnest.RandomnessHook'),
    dict(type='mmseg_resnest.SignalHook'),
    dict(timeout=600, type='mmseg_resnest.WatchHook'),
]
data_root = 'data/ade/ADEChallengeData2016'
default_hooks = dict(
    checkpoint=dict(
        by_epoch=True,
        interval=10,
        max_keep_ckpts=3,
        save_best='mIoU',
        type='mmseg_resnest.CheckpointHook'),
    logger=dict(interval=50, log_metric_by_epoch=True, type='LoggerHook'),
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
log_processor = dict(by_epoch=True, type='mmseg_resnest.LogProcessor')
model = dict(
    auxiliary_head=dict(
        align_corners=True,
        channels=256,
        in_channels=1024,
        in_index=2,
        loss_decode=dict(
            avg_non_ignore=True, loss_weight=0.2, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=150,
        type='mmseg_resnest.AuthorsFCNHead'),
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
            480,
            480,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=True,
        channels=512,
        in_channels=2048,
        in_index=3,
        loss_decode=dict(
            avg_non_ignore=True, loss_weight=1.0, type='CrossEntropyLoss'),
        norm_cfg=dict(type='BN'),
        num_classes=150,
        type='mmseg_resnest.AuthorsFCNHead'),
    test_cfg=dict(crop_size=(
        480,
        480,
    ), mode='slide', stride=(
        320,
        320,
    )),
    train_cfg=dict(),
    type='mmseg_resnest.EncoderDecoder')
optim_wrapper = dict(
    dtype='bfloat16',
    optimizer=dict(
        fused=True, lr=0.01, momentum=0.9, type='SGD', weight_decay=0.0001),
    paramwise_cfg=dict(
        custom_keys=dict(
            auxiliary_head=dict(lr_mult=10.0), decode_head=dict(
                lr_mult=10.0))),
    type='mmseg_resnest.AutocastOptimWrapper')
param_scheduler = [
    dict(
        begin=0,
        by_epoch=True,
        convert_to_iter_based=True,
        end=120,
        eta_min=0,
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
        data_root='data/ade/ADEChallengeData2016',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                520,
                520,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        reduce_zero_label=True,
        type='ADE20KDataset'),
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
        520,
        520,
    ), type='Resize'),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_cfg = dict(max_epochs=120, type='EpochBasedTrainLoop', val_interval=10)
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        data_root='data/ade/ADEChallengeData2016',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(prob=0.5, type='RandomFlip'),
            dict(
                keep_ratio=True,
                ratio_range=(
                    0.5,
                    2.0,
                ),
                scale=(
                    520,
                    520,
                ),
                type='RandomResize'),
            dict(pad_val=dict(img=0, seg=255), size=(
                480,
                480,
            ), type='Pad'),
            dict(crop_size=(
                480,
                480,
            ), type='mmseg_resnest.RandomCrop'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        reduce_zero_label=True,
        type='ADE20KDataset'),
    drop_last=True,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(shuffle=True, type='DefaultSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(prob=0.5, type='RandomFlip'),
    dict(
        keep_ratio=True,
        ratio_range=(
            0.5,
            2.0,
        ),
        scale=(
            520,
            520,
        ),
        type='RandomResize'),
    dict(pad_val=dict(img=0, seg=255), size=(
        480,
        480,
    ), type='Pad'),
    dict(crop_size=(
        480,
        480,
    ), type='mmseg_resnest.RandomCrop'),
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
        data_root='data/ade/ADEChallengeData2016',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                520,
                520,
            ), type='Resize'),
            dict(type='LoadAnnotations'),
            dict(type='mmseg_resnest.PackByteLabels'),
        ],
        reduce_zero_label=True,
        type='ADE20KDataset'),
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
