"""FCN with ResNeSt-50 on ADE20K: the authors' model and recipe, 480x480, batch 16, 120 epochs.

    python tools/train.py configs/fcn_resnest50_ade20k_authors.py
    python tools/test.py configs/fcn_resnest50_ade20k_authors.py CHECKPOINT

The batch size is a process's: on N GPUs give train_dataloader.batch_size=16/N with --cfg-options.
GPU hours: 9 on one H200, at 72 images/s and 18 GiB (tools/benchmark.py, random data).
Published: pixel accuracy 80.18, mIoU 42.94, multi-scale and flip (model zoo of zhanghang1989/PyTorch-Encoding).
Not reproduced here yet; ``tools/test.py`` evaluates one scale with sliding windows of 480,
``tools/test.py --tta authors`` as they did.
"""

_base_ = ['_base_/fcn_authors.py', '_base_/ade20k_authors.py', '_base_/schedule_authors.py', '_base_/runtime.py']

model = dict(
    backbone=dict(depth=50, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest50')),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_epochs=120)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0, begin=0, end=120, by_epoch=True, convert_to_iter_based=True)
]
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=10), logger=dict(log_metric_by_epoch=True))
log_processor = dict(by_epoch=True)
