"""PSPNet with ResNeSt-14 on the embedded demo data set: generated street scenes, 128x192, 12 classes, from scratch.

    make demo

It fits two CPU cores and a few minutes, and a GPU as well.
GPU hours: 0.01 on one H200.
Published: nothing. The README says what was measured.
"""

_base_ = ['_base_/pspnet.py', '_base_/runtime.py']

data_root = 'data/demo'
metainfo = dict(
    classes=(
        'road', 'lane marking', 'pavement', 'building', 'fence', 'pole',
        'traffic sign', 'vegetation', 'sky', 'person', 'car', 'bus',
    ),
    palette=[
        [128, 84, 138], [250, 240, 214], [240, 128, 188], [92, 92, 104], [202, 156, 120], [168, 176, 190],
        [252, 210, 48], [104, 158, 66], [112, 178, 226], [226, 48, 72], [38, 66, 178], [20, 152, 150],
    ],
)  # fmt: skip

model = dict(
    data_preprocessor=dict(size=(128, 192)),
    backbone=dict(depth=14, output_stride=8, base_width=32),
    decode_head=dict(channels=64, num_classes=12),
    auxiliary_head=None,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='mmseg_resnest.PackByteLabels'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,  # at most; images of one size
    batch_sampler=dict(type='mmseg_resnest.EqualSizeBatchSampler'),
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg_resnest.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='mmseg_resnest.AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='AdamW', lr=4e-3, weight_decay=0.01),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-5, begin=0, end=330, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=330, val_interval=330)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=330, save_best=None))
