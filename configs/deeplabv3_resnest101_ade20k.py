"""DeepLabV3 with ResNeSt-101 on ADE20K: 512x512, batch 16, 160k iterations (OpenMMLab's recipe).

    python tools/train.py configs/deeplabv3_resnest101_ade20k.py
    python tools/test.py configs/deeplabv3_resnest101_ade20k.py CHECKPOINT [--tta]

The batch size is a process's: on N GPUs give train_dataloader.batch_size=16/N with --cfg-options.
GPU hours: 5.3 on one H200, at 135 images/s and 13 GiB (tools/benchmark.py, random data).
Published: mIoU 45.71, with multi-scale and flip 46.59 (mmsegmentation's model zoo, S-101-D8: the same
recipe on its own graph of ResNeSt, ``graph='mmseg'``). Not reproduced here yet.
"""

_base_ = ['_base_/deeplabv3.py', '_base_/ade20k.py', '_base_/schedule_160k.py', '_base_/runtime.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest101')),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=16)
