"""OpenMMLab's schedule: SGD, 160k iterations, polynomial decay to a floor of 1e-4, evaluation every 16000."""

optim_wrapper = dict(
    type='mmseg_resnest.AutocastOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True),
)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=1e-4, begin=0, end=160000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
