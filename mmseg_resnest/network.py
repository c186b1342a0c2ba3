"""The network as evaluation and prediction run it: folded, in half precision, in CUDA graphs, compiled."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmseg_resnest.fold import fold_batch_norms
from mmseg_resnest.inference import cudnn_search
from mmseg_resnest.optim import DTYPES
from mmseg_resnest.segmentor import EncoderDecoder, has_plain_predict, predicts_from_logits

Network = Callable[[Tensor], Tensor]
REPEATS = 4  # of a size before it is captured, which takes about as long as that many runs
GRAPHS = 16  # that are kept, of the sizes used last
LARGE = 1 << 22  # pixels of a batch: a GPU computes as long as Python launches, some 20 ms
FILLED = 1 << 22  # pixels that may be computed for nothing, 23 ms on an H200, where a new size takes 100 and more
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

    Where the decode head or the model predicts by itself, only what comes before the head is folded, and all else stays
    as it is.

    Raises:
        ValueError: Batch norm cannot be folded.
    """
    model.eval()
    head = model.decode_head
    plain = predicts_from_logits(model)
    if not plain:
        speed = replace(speed, dtype='float32', graphs=False)
        itself = model if has_plain_predict(head) else head
        print_log(
            f'{type(itself).__name__} predicts by itself: the network runs in float32, without CUDA graphs',
            logger='current',
        )
    parameter = next(model.backbone.parameters())
    device, dtype = parameter.device, getattr(torch, speed.dtype)
    if speed.fold:
        channels = next(part.in_channels for part in model.backbone.modules() if isinstance(part, nn.Conv2d))
        image = torch.linspace(-2, 2, channels * 96 * 96, device=device, dtype=parameter.dtype)
        image = image.view(1, channels, 96, 96)
        fold_batch_norms(model, partial(model._forward if plain else model.extract_feat, image))
    layout = torch.contiguous_format if device.type == 'cpu' else torch.channels_last
    if plain and (speed.dtype != 'float32' or device.type != 'cpu'):
        for part in (model.backbone, head, *([model.neck] if model.with_neck else [])):
            part.to(dtype=dtype, memory_format=layout)
        model.backbone.register_forward_pre_hook(partial(_cast, dtype, layout))
    if speed.graphs and device.type == 'cuda':
        model.network = GraphedBySize(model._forward, speed.compile)


def _cast(dtype: torch.dtype, layout: torch.memory_format, _: nn.Module, args: tuple) -> tuple:
    """Brings the images, which are a backbone's first argument, to its number format and layout."""
    return args[0].to(dtype, memory_format=layout), *args[1:]


class GraphedBySize:
    """A network that runs from a CUDA graph, compiled or not, where an input's size has come ``REPEATS`` times.

    A batch of ``LARGE`` pixels that is not compiled would not win anything by it. A batch of fewer images than one
    before, as a data set's last of a size, is filled up with zeros until it has come as often: cuDNN plans for each
    number of images anew.

    Args:
        network: Maps images (N, 3, H, W) to logits.
        compiles: Whether the first ``COMPILED`` sizes are compiled.
    """

    def __init__(self, network: Network, compiles: bool) -> None:
        self.network = network
        self.compiled = torch.compile(network, dynamic=False) if compiles else None
        self._compiled_sizes: set[torch.Size] = set()
        self.forget()

    def forget(self) -> None:
        """Begins anew: graphs read weights from where they were when the size was captured."""
        self._seen: Counter[torch.Size] = Counter()
        self._planned: set[torch.Size] = set()
        self._graphs: OrderedDict[torch.Size, Network] = OrderedDict()
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits of their own memory."""
        # Who waits minutes for a size to be compiled gets the fastest algorithms too: from its first run on, for cuDNN
        # keeps what it took first.
        with cudnn_search(enabled=self.compiled is not None):
            return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        size = images.shape
        self._seen[size] += 1
        if size in self._graphs:
            self._graphs.move_to_end(size)
            return self._graphs[size](images)
        if self._seen[size] < REPEATS and (count := self._more_images(size)):
            zeros = images.new_zeros(count - len(images), *size[1:])
            return self._run(torch.cat([images, zeros]))[: len(images)]
        self._planned.discard(size)  # until there was memory for it
        is_large = size.numel() // size[1] >= LARGE
        if self._seen[size] < REPEATS or (is_large and self.compiled is None):
            logits = self.network(images)
        else:
            self._graphs[size] = self._capture(self._choose(size), images)
            logits = self._graphs[size](images)
            if len(self._graphs) > GRAPHS:
                oldest, _ = self._graphs.popitem(last=False)
                self._seen[oldest] = 0  # or sizes that take turns would be captured each time
        self._planned.add(size)
        return logits

    def _more_images(self, size: torch.Size) -> int | None:
        """Returns with how many images a batch of this height and width has run, if not with as many."""
        count, pixels = size[0], size[2] * size[3]
        counts = [other[0] for other in self._planned if other[1:] == size[1:] and other[0] >= count]
        more = min(counts, default=count)
        return more if 0 < (more - count) * pixels <= FILLED else None

    def _choose(self, size: torch.Size) -> Network:
        if self.compiled is None or len(self._compiled_sizes | {size}) > COMPILED:
            return self.network
        self._compiled_sizes.add(size)
        return self.compiled

    def _capture(self, network: Network, images: Tensor) -> Network:
        """Records a run; all graphs share the memory of what is computed inside, for they run one after the other."""
        with torch.inference_mode(False):  # so that replays outside of inference mode may write to it
            static = images.clone()
        with torch.cuda.device(images.device):  # not always the current one, nor that of torch's capture stream
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._stream = stream = self._stream or torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(3 if network is self.compiled else 1):  # compiles, and lets cuDNN choose
                    network(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: meanwhile a loader's thread may pin memory.
            capture = torch.cuda.graph(graph, self._pool, stream, capture_error_mode='thread_local')
            with capture, torch.no_grad():
                output = network(static)

        def replay(images: Tensor) -> Tensor:
            with torch.cuda.device(images.device):
                static.copy_(images)
                graph.replay()
                return output.clone()

        return replay
