"""PSPNet with ResNeSt-50 on CamVid: the worked example of a custom data set (docs/custom_dataset.md).

    python tools/train.py configs/pspnet_resnest50_camvid.py --data-root DIR
    python tools/test.py configs/pspnet_resnest50_camvid.py CHECKPOINT --data-root DIR

CamVid in ADE20K's folder layout: 480x360 road scenes, 367 to train and 101 to validate, 11 classes, 255 not labelled.
GPU hours: 0.07 on one H200 (250 s, evaluation included; 101 s where torch has compiled it before).
Published: nothing for this model and recipe. Measured from scratch (model.backbone.init_cfg=None): mIoU 43.8, the mean
of five seeds with graph='mmseg' (docs/training_speed.md); 45.98, one seed before training was compiled.
"""

_base_ = ['_base_/pspnet.py', '_base_/runtime.py']

data_root = 'data/camvid'
metainfo = dict(
    classes=(
        'sky', 'building', 'pole', 'road', 'pavement', 'tree',
        'sign', 'fence', 'car', 'pedestrian', 'bicyclist',
    ),
    palette=[
        [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
        [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
    ],
)  # fmt: skip

model = dict(
    data_preprocessor=dict(size=(360, 480)),
    backbone=dict(depth=50, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest50')),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='mmseg_resnest.RandomCrop', crop_size=(360, 480), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='mmseg_resnest.PhotoMetricDistortion'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,  # at most; images of one size
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg_resnest.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='mmseg_resnest.AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end=1000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=500))
