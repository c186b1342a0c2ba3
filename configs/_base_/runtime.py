"""What every run shares: the log, the checkpoints, the environment. Unprefixed types are mmsegmentation's."""

default_scope = 'mmseg'
default_hooks = dict(
    runtime_info=dict(type='mmseg_resnest.RuntimeInfoHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmseg_resnest.CheckpointHook', by_epoch=False, interval=8000, max_keep_ckpts=3, save_best='mIoU'
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    # A bad sample, or a loss that is not finite, stops the run; 'skip' goes on without it.
    samples=dict(type='mmseg_resnest.SampleCheckHook', on_bad_sample='stop'),
    nonfinite=dict(type='mmseg_resnest.NonFiniteHook', action='stop', limit=10),
)
custom_hooks = [
    dict(type='mmseg_resnest.BatchNormCheckHook'),
    dict(type='mmseg_resnest.ProgressBarHook'),
    # A resumed run is the same run; SIGTERM, SIGINT and SIGUSR1 save before they end it; a rank that hangs is named.
    dict(type='mmseg_resnest.RandomnessHook'),
    dict(type='mmseg_resnest.SignalHook'),
    dict(type='mmseg_resnest.WatchHook', timeout=600),
]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl', timeout=1800),  # seconds, of one collective
)
# Batch norm is synchronised when several processes train, and plain in one.
sync_bn = 'mmseg_resnest.SyncBN'
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_processor = dict(type='mmseg_resnest.LogProcessor', by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False

tta_model = dict(type='mmseg_resnest.TTAModel')
