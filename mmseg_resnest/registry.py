"""Child registries of every MMEngine root, under the scope ``mmseg_resnest``.

MMEngine finds this module by its name when it meets ``type='mmseg_resnest.X'``, in any OpenMMLab library: a config
needs no ``custom_imports``. A text config inherited as ``mmseg_resnest::...`` has its parts stamped with our scope by
MMEngine, so here a name without a prefix that is not ours means mmsegmentation's, as it does in the config itself.
"""

from mmengine.registry import Registry, root


class ResNeStRegistry(Registry):
    """A registry of the scope ``mmseg_resnest`` that falls back to mmsegmentation's registry of the same kind."""

    def get(self, key: str) -> type | None:
        """Finds a name without a prefix here, then where mmsegmentation would: with it, then in MMEngine's root."""
        self.import_from_location()
        if '.' not in key and key not in self.module_dict:
            import mmseg.registry  # noqa: F401  (imported for the child registries that it adds to the roots)

            # Before the root: mmcv's LoadAnnotations, Resize and RandomFlip are there, and know no label maps.
            sibling = self.parent.children.get('mmseg')
            if sibling is not None:
                return sibling.get(key)
        return super().get(key)


def _child_of(parent: Registry, *modules: str) -> ResNeStRegistry:
    """Makes the child of one root; ``modules`` of this package register into it when it is first asked."""
    # Without a location MMEngine would try to import `mmseg_resnest.utils`.
    locations = [f'mmseg_resnest.{module}' for module in modules] or ['mmseg_resnest']
    return ResNeStRegistry(parent.name, parent=parent, scope='mmseg_resnest', locations=locations)


MODELS = _child_of(root.MODELS, 'conv', 'resnest', 'heads', 'tta', 'segmentor', 'norm')
OPTIM_WRAPPERS = _child_of(root.OPTIM_WRAPPERS, 'optim')
HOOKS = _child_of(root.HOOKS, 'hooks', 'checkpointing', 'randomness', 'signals', 'watch')
METRICS = _child_of(root.METRICS, 'metrics')

RUNNERS = _child_of(root.RUNNERS)
RUNNER_CONSTRUCTORS = _child_of(root.RUNNER_CONSTRUCTORS)
LOOPS = _child_of(root.LOOPS)
STRATEGIES = _child_of(root.STRATEGIES)
DATASETS = _child_of(root.DATASETS)
DATA_SAMPLERS = _child_of(root.DATA_SAMPLERS, 'sampler')
TRANSFORMS = _child_of(root.TRANSFORMS, 'transforms')
MODEL_WRAPPERS = _child_of(root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child_of(root.WEIGHT_INITIALIZERS)
OPTIMIZERS = _child_of(root.OPTIMIZERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child_of(root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _child_of(root.PARAM_SCHEDULERS)
EVALUATOR = _child_of(root.EVALUATOR)
TASK_UTILS = _child_of(root.TASK_UTILS)
VISUALIZERS = _child_of(root.VISUALIZERS)
VISBACKENDS = _child_of(root.VISBACKENDS)
LOG_PROCESSORS = _child_of(root.LOG_PROCESSORS, 'log_processor')
INFERENCERS = _child_of(root.INFERENCERS)
FUNCTIONS = _child_of(root.FUNCTIONS)
