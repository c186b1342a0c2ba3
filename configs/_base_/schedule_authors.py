"""The authors' schedule (PyTorch-Encoding, train_dist): SGD, polynomial decay to 0; the heads learn ten times faster.

The leaf says how many epochs.
"""

optim_wrapper = dict(
    type='mmseg_resnest.AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True),
    paramwise_cfg=dict(custom_keys={'decode_head': dict(lr_mult=10.0), 'auxiliary_head': dict(lr_mult=10.0)}),
)
train_cfg = dict(type='EpochBasedTrainLoop', val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
