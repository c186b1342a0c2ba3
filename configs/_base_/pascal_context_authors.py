"""Pascal Context as the authors train on it (PyTorch-Encoding): 59 classes, 480x480 crops of long side 520 x [0.5, 2].

Mirrored; no colours. Tested at long side 520, one scale. Label 0 ("background") is not evaluated. The classes stand in
the order of their ids in the original annotation, which is alphabetical, here as in the authors' code: its labels are
the sorted ids' places, less one for the background. tools/prepare_dataset.py pascal_context writes such labels.
"""

data_root = 'data/VOCdevkit/VOC2010'
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
        type='PascalContextDataset59',
        reduce_zero_label=True,  # 0 ("background") is ignored, 1-59 become 0-58
        data_root=data_root,
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassContext'),
        ann_file='ImageSets/SegmentationContext/train.txt',
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
        type='PascalContextDataset59',
        reduce_zero_label=True,  # 0 ("background") is ignored, 1-59 become 0-58
        data_root=data_root,
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassContext'),
        ann_file='ImageSets/SegmentationContext/val.txt',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmseg_resnest.IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
