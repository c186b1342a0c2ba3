"""What a line of the log says of the GPU's memory."""

from mmengine.runner import LogProcessor as _LogProcessor
from mmengine.runner import Runner

from mmseg_resnest.registry import LOG_PROCESSORS


@LOG_PROCESSORS.register_module()
class LogProcessor(_LogProcessor):
    """MMEngine's LogProcessor, whose ``memory`` is the largest since the start, in MB, as a batch size is chosen by.

    MMEngine's is the largest since the last line: a CUDA graph that is replayed allocates nothing, so that from the
    second line on only what lies outside of the graphs would be counted.
    """

    _peak = 0

    def _get_max_memory(self, runner: Runner) -> int:
        self._peak = max(self._peak, super()._get_max_memory(runner))
        return self._peak
