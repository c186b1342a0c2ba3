"""What a line of the log says of the GPU's memory."""

from collections.abc import Mapping

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

    _held: Mapping = {}
    _peak = 0

    def _get_max_memory(self, runner: Runner) -> int:
        held = held_by_graphs()
        # What graphs held at the last line too: while one is captured, tensors have what it holds afterwards.
        kept = sum(min(size, self._held.get(pool, 0)) for pool, size in held.items())
        self._peak = max(self._peak, super()._get_max_memory(runner) + kept // 2**20)
        self._held = held
        return self._peak
