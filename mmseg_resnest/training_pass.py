"""How a network runs in training on a GPU: compiled part by part, and replayed as two CUDA graphs."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Network = Callable[[Tensor], tuple[Tensor, ...]]


def call(part: Callable, *args: object) -> object:
    """Calls a part of a network."""
    return part(*args)


def compiled_call(part: Callable, *args: object) -> object:
    """Calls a part of a network compiled; parts of one structure, such as the blocks of a stage, share their code.

    What is not a convolution or a sum over pixels is computed again in the backward pass instead of being stored: it
    is fused with what reads it.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    # A limit of 8 structures is for code that is called with ever new ones; ResNeSt alone has 9.
    with dynamo.patch(recompile_limit=64, optimize_ddp=False), functorch.patch(aggressive_recomputation=True):
        return _compiled()(part, *args)


@cache
def _compiled() -> Callable:
    return torch.compile(call, dynamic=False)


class TrainingGraphs:
    """Replays a network's forward pass and its gradient as CUDA graphs: two launches instead of thousands.

    The graphs are captured for the first batch. They hold its memory for as long as this object lives; the parameters'
    gradients are copies. They are captured anew where parameters or buffers have moved, were frozen or thawed, or a
    part was switched between training and evaluation. A batch of another size runs without graphs.

    Args:
        network: Maps images (N, 3, H, W) to tensors, in autograd; no step of it may wait for the GPU.
        module: Holds the parameters and buffers that ``network`` uses.
    """

    def __init__(self, network: Network, module: nn.Module) -> None:
        self._network = network
        self._module = module
        # Walking the module takes milliseconds, and a GPU waits meanwhile.
        self._tensors = [*module.parameters(), *module.buffers()]
        self._parts = list(module.modules())
        self._state: tuple = ()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns what ``network(images)`` does; the tensors are overwritten by the next call."""
        state = self._read_state()
        if self._state != state:
            self._capture(images)
            self._state = state
        if (images.shape, images.dtype) != (self._images.shape, self._images.dtype):
            return self._network(images)
        return _Replay.apply(self, images, *self._parameters)

    def _read_state(self) -> tuple:
        """What the captured kernels take for granted."""
        tensors = [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._tensors]
        return (_autocast_dtype(), tensors, [part.training for part in self._parts])

    def _capture(self, images: Tensor) -> None:
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._images = images.detach().clone()
        self._warm_up()
        pool = torch.cuda.graph_pool_handle()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: meanwhile a loader's thread may pin memory, and NCCL's look at its events.
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode='thread_local'):
            outputs = self._run()
        self.output_gradients = [torch.empty_like(output) for output in outputs]
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode='thread_local'):
            self.gradients = self._differentiate(outputs, self.output_gradients)
        self.outputs = [output.detach() for output in outputs]

    def _warm_up(self) -> None:
        """Compiles, and lets cuDNN choose; leaves no trace in buffers and random numbers."""
        buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
            for _ in range(3):
                outputs = self._run()
                self._differentiate(outputs, [torch.zeros_like(output) for output in outputs])
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, saved in buffers:
            buffer.copy_(saved)

    def _run(self) -> tuple[Tensor, ...]:
        # Casts that autocast remembers would be of the weights of the capture.
        with torch.autocast('cuda', _autocast_dtype(), enabled=_autocast_dtype() is not None, cache_enabled=False):
            return self._network(self._images)

    def _differentiate(self, outputs: tuple[Tensor, ...], gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.autocast('cuda', enabled=False):
            return torch.autograd.grad(outputs, self._parameters, gradients, allow_unused=True)

    def replay_forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Runs the forward pass."""
        self._images.copy_(images)
        self.forward.replay()
        return tuple(output.detach() for output in self.outputs)

    def replay_backward(self, output_gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Runs the gradient of the last forward pass; returns the parameters' gradients, in tensors of their own."""
        for static, gradient in zip(self.output_gradients, output_gradients, strict=True):
            static.copy_(gradient)
        self.backward.replay()
        return [None if gradient is None else gradient.clone() for gradient in self.gradients]


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, graphs: TrainingGraphs, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        return graphs.replay_forward(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graphs.replay_backward(gradients)
