"""PSPNet with ResNeSt-50 on Cityscapes: 512x1024, batch 8, 80k iterations (OpenMMLab's recipe).

    python tools/train.py configs/pspnet_resnest50_cityscapes.py
    python tools/test.py configs/pspnet_resnest50_cityscapes.py CHECKPOINT [--tta]

The batch size is a process's: on N GPUs give train_dataloader.batch_size=8/N with --cfg-options.
GPU hours: 8 on one H200, at 24 images/s and 13 GiB (tools/benchmark.py, random data).
Published: nothing for this depth and recipe.
"""

_base_ = ['_base_/pspnet.py', '_base_/cityscapes.py', '_base_/schedule_80k.py', '_base_/runtime.py']

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(depth=50, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest50')),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
train_dataloader = dict(batch_size=8)
