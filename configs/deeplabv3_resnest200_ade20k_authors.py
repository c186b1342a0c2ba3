"""DeepLabV3 with ResNeSt-200 on ADE20K: the authors' model and recipe, 480x480, batch 16, 180 epochs.

    python tools/train.py configs/deeplabv3_resnest200_ade20k_authors.py
    python tools/test.py configs/deeplabv3_resnest200_ade20k_authors.py CHECKPOINT

The batch size is a process's: on N GPUs give train_dataloader.batch_size=16/N with --cfg-options.
GPU hours: 30 on one H200, at 34 images/s and 36 GiB (tools/benchmark.py, random data).
Published: pixel accuracy 82.45, mIoU 48.36, multi-scale and flip (model zoo of zhanghang1989/PyTorch-Encoding).
Not reproduced here yet; ``tools/test.py`` evaluates one scale with sliding windows of 480,
``tools/test.py --tta authors`` as they did.
"""

_base_ = ['_base_/deeplabv3_authors.py', '_base_/ade20k_authors.py', '_base_/schedule_authors.py', '_base_/runtime.py']

model = dict(
    backbone=dict(depth=200, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest200')),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_epochs=180)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0, begin=0, end=180, by_epoch=True, convert_to_iter_based=True)
]
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10), logger=dict(log_metric_by_epoch=True))
log_processor = dict(by_epoch=True)
