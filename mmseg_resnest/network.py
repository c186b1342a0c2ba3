"""The network as evaluation and prediction run it: folded, in half precision, in CUDA graphs, compiled."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmseg_resnest.fold import fold_batch_norms
from mmseg_resnest.optim import DTYPES
from mmseg_resnest.segmentor import EncoderDecoder

Network = Callable[[Tensor], Tensor]
REPEATS = 4  # of a size before it is captured, which takes about as long as that many runs
GRAPHS = 16  # that are kept, of the sizes used last
COMPILED = 8  # sizes, as many as torch compiles of one function


@dataclass(frozen=True)
class Speed:
    """How a network predicts; all of it off is the model as it is.

    Attributes:
        fold: Whether batch norm is folded into the convolutions.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``, of weights and activations.
        graphs: Whether sizes that repeat run from CUDA graphs; on a CPU they never do.
        compile: Whether those are compiled first, one to two minutes a size; on a CPU never.
    """

    fold: bool = True
    dtype: str = 'float32'
    graphs: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f'dtype={self.dtype!r}; expected one of {", ".join(DTYPES)}')


def default_speed(device: torch.device) -> Speed:
    """Returns float16 on a GPU; a CPU computes it slowly."""
    return Speed(dtype='float32' if device.type == 'cpu' else 'float16')


def speed_up(model: EncoderDecoder, speed: Speed) -> None:
    """Makes a model with all its weights predict as ``speed`` says, for good; it is put into evaluation mode.

    Raises:
        ValueError: Batch norm cannot be folded.
    """
    model.eval()
    parameter = next(model.backbone.parameters())
    device, dtype = parameter.device, getattr(torch, speed.dtype)
    if speed.fold:
        image = torch.linspace(-2, 2, 3 * 96 * 96, device=device, dtype=parameter.dtype).view(1, 3, 96, 96)
        fold_batch_norms(model, lambda: model._forward(image))
    layout = torch.contiguous_format if device.type == 'cpu' else torch.channels_last
    if speed.dtype != 'float32' or device.type != 'cpu':
        for part in (model.backbone, model.decode_head, *([model.neck] if model.with_neck else [])):
            part.to(dtype=dtype, memory_format=layout)
    network = _Cast(model._forward, dtype, layout)
    model.network = GraphedBySize(network, speed.compile) if speed.graphs and device.type == 'cuda' else network


class _Cast:
    """A network whose input is brought to its number format and layout."""

    def __init__(self, network: Network, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.network, self.dtype, self.layout = network, dtype, layout

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype, memory_format=self.layout))


class GraphedBySize:
    """A network that runs from a CUDA graph, compiled or not, where an input's size has come ``REPEATS`` times.

    Args:
        network: Maps images (N, 3, H, W) to logits.
        compiles: Whether the first ``COMPILED`` sizes are compiled.
    """

    def __init__(self, network: Network, compiles: bool) -> None:
        self.network = network
        self.compiled = torch.compile(network, dynamic=False) if compiles else None
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: OrderedDict[torch.Size, Network] = OrderedDict()
        self._compiled_sizes: set[torch.Size] = set()
        self._pool: tuple[int, int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits of their own memory."""
        size = images.shape
        self._seen[size] += 1
        if size in self._graphs:
            self._graphs.move_to_end(size)
            return self._graphs[size](images)
        if self._seen[size] < REPEATS:
            return self.network(images)
        self._graphs[size] = self._capture(self._choose(size), images)
        if len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)
        return self._graphs[size](images)

    def _choose(self, size: torch.Size) -> Network:
        if self.compiled is None or len(self._compiled_sizes | {size}) > COMPILED:
            return self.network
        self._compiled_sizes.add(size)
        return self.compiled

    def _capture(self, network: Network, images: Tensor) -> Network:
        """Records a run; all graphs share the memory of what is computed inside, for they run one after the other."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        static = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):  # compiles, and lets cuDNN choose
                network(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: meanwhile a loader's thread may pin memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode='thread_local'), torch.no_grad():
            output = network(static)

        def replay(images: Tensor) -> Tensor:
            static.copy_(images)
            graph.replay()
            return output.clone()

        return replay
