"""ADE20K as the authors train on it (PyTorch-Encoding): long side 520 x [0.5, 2], 480x480 crops, mirrored; no colours.

Tested at long side 520, one scale. Label 0 ("other") is not evaluated.
"""

data_root = 'data/ade/ADEChallengeData2016'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomResize', scale=(520, 520), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='Pad', size=(480, 480), pad_val=dict(img=0, seg=255)),
    dict(type='mmseg_resnest.RandomCrop', crop_size=(480, 480)),
    dict(type='mmseg_resnest.PackByteLabels'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(520, 520), keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: labels keep the original size
    dict(type='mmseg_resnest.PackByteLabels'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ADE20KDataset',
        reduce_zero_label=True,  # 0 ("other") is ignored, 1-150 become 0-149
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
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
        type='ADE20KDataset',
        reduce_zero_label=True,  # 0 ("other") is ignored, 1-150 become 0-149
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg_resnest.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
