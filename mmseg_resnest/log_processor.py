"""What a line of the log says of the GPU's memory."""

from mmengine.runner import LogProcessor as _LogProcessor
from mmengine.runner import Runner

from mmseg_resnest.registry import LOG_PROCESSORS
from mmseg_resnest.training_pass import held_by_graphs


@LOG_PROCESSORS.register_module()
class LogProcessor(_LogProcessor):
    """MMEngine's LogProcessor, whose ``memory`` is the most that was needed since the start, in MB.

    MMEngine's is the most that tensors had since the last line: a CUDA graph that is replayed allocates nothing, so
    that from the second line on only what lies outside of the graphs would be counted.
    """

    _held = 0
    _peak = 0

    def _get_max_memory(self, runner: Runner) -> int:
        # What graphs held at the last line: while they are captured, tensors have it.
        self._peak = max(self._peak, super()._get_max_memory(runner) + self._held)
        self._held = held_by_graphs() // 2**20
        return self._peak
