"""DeepLabV3 with ResNeSt-101 on Cityscapes: 512x1024, batch 8, 80k iterations (OpenMMLab's recipe).

    python tools/train.py configs/deeplabv3_resnest101_cityscapes.py
    python tools/test.py configs/deeplabv3_resnest101_cityscapes.py CHECKPOINT [--tta]

The batch size is a process's: on N GPUs give train_dataloader.batch_size=8/N with --cfg-options.
GPU hours: 2.5 on one H200, at 70 images/s and 13 GiB (tools/benchmark.py, random data).
Published: mIoU 79.67, with multi-scale and flip 80.51 (mmsegmentation's model zoo, S-101-D8: the same
recipe on its own graph of ResNeSt, ``graph='mmseg'``). Not reproduced here yet.
"""

_base_ = ['_base_/deeplabv3.py', '_base_/cityscapes.py', '_base_/schedule_80k.py', '_base_/runtime.py']

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest101')),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
train_dataloader = dict(batch_size=8)
