"""How a network runs in training on a GPU: compiled part by part, and replayed as two CUDA graphs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

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
    gradients are copies. They are captured anew where parameters, buffers or parts have been moved, exchanged, frozen
    or thawed, or a part was switched between training and evaluation or given another ``forward``. Numbers that a part
    reads, such as the momentum of batch norm, and its hooks stay those of the capture: no Python runs in a replay. A
    batch of another size runs without graphs, and so does a network that has nothing to train, exchanges its own
    buffers, or reads parameters from elsewhere than its modules.

    Args:
        network: Maps images (N, 3, H, W) to tensors, in autograd; no step of it may wait for the GPU.
        module: Holds the parameters and buffers that ``network`` uses.
    """

    def __init__(self, network: Network, module: nn.Module) -> None:
        self._network = network
        self._module = module
        self._parts: list[nn.Module] = []
        self._state: tuple = ()
        self._capture: Capture | None = None
        self._is_refused = False
        self._said: set[str] = set()

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns what ``network(images)`` does; the tensors are overwritten by the next call.

        Raises:
            RuntimeError: The network cannot be captured; or, in the backward pass, the outputs are not those of the
                last call, or were differentiated before, or a second derivative is asked for.
        """
        if not self._is_refused and self._state != self._read_state():
            self._renew(images)
        capture = self._capture
        if capture is None:
            return self._network(images)
        if (images.shape, images.dtype) != (capture.images.shape, capture.images.dtype):
            self._say_once(
                f'images of another size than {tuple(capture.images.shape)}, the first ones, run without them'
            )
            return self._network(images)
        return _Replay.apply(capture, images, *capture.parameters)

    def _read_state(self) -> tuple:
        """What the captured kernels take for granted. Half a millisecond: ``modules()`` alone takes several."""
        parts = [
            (type(part), vars(part).get('forward'), part.training, *map(id, part._modules.values()))
            for part in self._parts
        ]
        tensors = [tensor for part in self._parts for tensor in (*part._parameters.values(), *part._buffers.values())]
        facts = [(id(t), t.data_ptr(), t.requires_grad) for t in tensors if t is not None]
        return (_autocast_dtype(), facts, parts)

    def _renew(self, images: Tensor) -> None:
        self._capture = None  # the next needs as much memory
        self._parts = list(self._module.modules())
        capture = Capture(self._network, self._module, images)
        if capture.obstacle:
            self._say_once(f'the network runs without them: {capture.obstacle}')
            self._is_refused = capture.exchanges_buffers  # which would look like a change at each step
        else:
            self._capture = capture
        self._state = self._read_state()

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            print_log(f'CUDA graphs: {what}', logger='current')
        self._said.add(what)


def held_by_graphs() -> Counter[tuple[int, int]]:
    """Returns what each pool of CUDA graphs keeps for the next replay alone: bytes that no tensor has."""
    held = Counter()
    if torch.cuda.is_available() and torch.cuda.get_allocator_backend() == 'native':  # no other tells
        for segment in torch.cuda.memory_snapshot():
            held[tuple(segment['segment_pool_id'])] += segment['total_size'] - segment['allocated_size']
    del held[0, 0]  # of what is in no graph
    return held


class Capture:
    """The two CUDA graphs of a network and a batch, and the tensors that they read and write.

    Attributes:
        images: The batch.
        parameters: What is differentiated with respect to.
        outputs: The network's.
        trained: The indices of those outputs that depend on the parameters.
        obstacle: Why the graphs cannot be used; empty if they can.
        exchanges_buffers: Whether that is because the network puts other tensors in the place of its buffers.
        pending: The number of the forward pass whose gradient can be computed; None: of none.
    """

    def __init__(self, network: Network, module: nn.Module, images: Tensor) -> None:
        self._network = network
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.images = images.detach().clone()
        self._passes = 0
        self.pending: int | None = None
        with _untouched_buffers(module) as are_exchanged, _stand_ins(module, self.parameters) as self._leaves:
            self.trained = self._warm_up()
            if self.trained and not self.obstacle:
                self._record()
            self.exchanges_buffers = are_exchanged()
            if self.exchanges_buffers:
                self.obstacle = 'it exchanges its own buffers'

    def _warm_up(self) -> list[int]:
        """Compiles, lets cuDNN choose, and finds obstacles; leaves the random numbers as they were.

        Returns:
            ``trained``.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([torch.cuda.current_device()]), torch.cuda.stream(stream):
            for _ in range(3):
                outputs = self._run()
                gradients = [torch.zeros_like(output) for output in outputs if output.requires_grad]
                found = self._differentiate(outputs, gradients, [*self._leaves, *self.parameters]) if gradients else []
        torch.cuda.current_stream().wait_stream(stream)
        self.obstacle = '' if found else 'it has nothing to train'
        if any(gradient is not None for gradient in found[len(self._leaves) :]):
            self.obstacle = 'it reads parameters from elsewhere than its modules'
        return [i for i, output in enumerate(outputs) if output.requires_grad]

    def _record(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            # thread_local: meanwhile a loader's thread may pin memory, and NCCL's look at its events.
            with torch.cuda.graph(self._forward, pool=pool, capture_error_mode='thread_local'):
                outputs = self._run()
            self._output_gradients = [torch.empty_like(outputs[i]) for i in self.trained]
            with torch.cuda.graph(self._backward, pool=pool, capture_error_mode='thread_local'):
                self._gradients = self._differentiate(outputs, self._output_gradients, self._leaves)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = error.__context__ or error  # leaving a capture that has failed raises an error of its own
            raise RuntimeError(
                f'the network cannot be captured as CUDA graphs ({cause}); model.cuda_graphs=False trains it without'
            ) from error
        self.outputs = [output.detach() for output in outputs]

    def _run(self) -> tuple[Tensor, ...]:
        # Casts that autocast remembers would be of the weights of the capture.
        with torch.autocast('cuda', _autocast_dtype(), enabled=_autocast_dtype() is not None, cache_enabled=False):
            return self._network(self.images)

    def _differentiate(
        self, outputs: tuple[Tensor, ...], gradients: list[Tensor], leaves: list[nn.Parameter]
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of leaves, given those of the outputs that depend on parameters."""
        trained = [output for output in outputs if output.requires_grad]
        with torch.autocast('cuda', enabled=False):
            return torch.autograd.grad(trained, leaves, gradients, allow_unused=True)

    def replay_forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Runs the forward pass."""
        self.images.copy_(images)
        self._forward.replay()
        self._passes += 1
        self.pending = self._passes
        return tuple(output.detach() for output in self.outputs)

    def replay_backward(self, number: int, output_gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Runs the gradient of a forward pass; returns the parameters' gradients, in tensors of their own."""
        if number != self.pending:
            raise RuntimeError(
                'CUDA graphs: backward of another forward pass than the last, or a second one of it, whose tensors are '
                'overwritten. Call backward once after each forward pass, or set model.cuda_graphs=False'
            )
        self.pending = None
        for i, static in zip(self.trained, self._output_gradients, strict=True):
            static.copy_(output_gradients[i])
        self._backward.replay()
        found = [gradient for gradient in self._gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in found]
        torch._foreach_copy_(copies, found)  # one by one, a millisecond
        remaining = iter(copies)
        return [None if gradient is None else next(remaining) for gradient in self._gradients]


@contextmanager
def _untouched_buffers(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Gives a module its buffers back, and their values; yields what tells whether others have taken their place."""
    buffers = [
        (part._buffers, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    yield lambda: any(place[name] is not buffer for place, name, buffer, _ in buffers)
    for place, name, buffer, value in buffers:
        place[name] = buffer.copy_(value)


@contextmanager
def _stand_ins(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Puts others of the same memory in the places of a module's parameters, and yields them.

    Autograd ties a parameter that somebody observes, as DistributedDataParallel does, to the stream that it was first
    used on, which a capture must leave alone.
    """
    twins = {id(parameter): nn.Parameter(parameter.detach()) for parameter in parameters}
    places = [(part._parameters, name) for part in module.modules() for name in part._parameters]
    taken = [(place, name, place[name]) for place, name in places if id(place[name]) in twins]
    for place, name, parameter in taken:
        place[name] = twins[id(parameter)]
    try:
        yield list(twins.values())
    finally:
        for place, name, parameter in taken:
            place[name] = parameter


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, capture: Capture, images: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        outputs = capture.replay_forward(images)
        ctx.capture, ctx.number = capture, capture.pending
        ctx.mark_non_differentiable(*(output for i, output in enumerate(outputs) if i not in capture.trained))
        return outputs

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('CUDA graphs: no second derivative (create_graph=True); set model.cuda_graphs=False')
        return None, None, *ctx.capture.replay_backward(ctx.number, gradients)
