"""DeepLabV3 with ResNeSt-269 on ADE20K: the authors' model and recipe, 480x480, batch 16, 120 epochs.

    python tools/train.py configs/deeplabv3_resnest269_ade20k_authors.py
    python tools/test.py configs/deeplabv3_resnest269_ade20k_authors.py CHECKPOINT

The batch size is a process's: on N GPUs give train_dataloader.batch_size=16/N with --cfg-options.
GPU hours: 23 on one H200, at 29 images/s and 46 GiB (tools/benchmark.py, random data).
Published: pixel accuracy 82.62, mIoU 47.60, multi-scale and flip (model zoo of zhanghang1989/PyTorch-Encoding).
That is below ResNeSt-200's 48.36; it is what was published.
Not reproduced here yet; ``tools/test.py`` evaluates one scale with sliding windows of 480,
``tools/test.py --tta authors`` as they did.
"""

_base_ = ['_base_/deeplabv3_authors.py', '_base_/ade20k_authors.py', '_base_/schedule_authors.py', '_base_/runtime.py']

model = dict(
    backbone=dict(depth=269, init_cfg=dict(type='Pretrained', checkpoint='resnest://resnest269')),
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
