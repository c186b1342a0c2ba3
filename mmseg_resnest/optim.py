"""The optimiser wrapper that autocasts on whatever device the model is, and makes no step from what is not finite."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmseg_resnest.registry import OPTIM_WRAPPERS

DTYPES = ('bfloat16', 'float16', 'float32')


@dataclass(frozen=True)
class StepCheck:
    """What a step was judged by.

    Attributes:
        finite: Whether the losses since the last step and the gradient norm are finite on every rank, or a loss scaler
            deals with what is not; if False, no step was made.
        losses_finite: Whether the losses are, on every rank; those that ``backward`` has not seen count as finite.
        own_losses_finite: Whether this rank's losses are.
        grad_norm: The norm of all gradients, unscaled, before clipping.
        loss_scaler: The state of the loss scaler that the losses were scaled by; empty but in float16.
    """

    finite: bool
    losses_finite: bool
    own_losses_finite: bool
    grad_norm: float
    loss_scaler: dict


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper that runs the model in ``torch.autocast`` on its own device: one config serves all.

    A CPU stays in float32 unless ``autocast_cpu``: without bf16 units a training step is 19 times slower there
    (ResNeSt-14, 8 x 96 x 160, two cores: 10.7 s against 0.56 s). MMEngine's AmpOptimWrapper refuses a CPU.

    A step is made only if the losses since the last one and the norm of the gradients are finite, on all ranks; else
    the weights stay as they are, bit for bit, and the gradients are dropped. In float16 overflown gradients are the
    loss scaler's business, which skips the step and halves the scale, as long as that is above 1. NonFiniteHook acts on
    ``last_check``; without it a step that is not finite raises. The check reads one tensor a step from the device,
    in ``_read``. With it the ranks agree on a signal to stop: ``signal`` is this rank's, 0 if it had none, and
    ``agreed_signal`` the largest of all ranks at the last step.

    Where ``paramwise_cfg`` is set MMEngine makes a group of each parameter. They stay groups, but torch's optimisers
    step once for all of the same options: 544 groups of fused SGD cost a CPU core 2 to 4 ms, not 14 to 25.

    Args:
        dtype: What is autocast to: ``'bfloat16'``, ``'float16'`` (with a scaled loss) or ``'float32'`` (no autocast).
        autocast_cpu: Whether to autocast on a CPU too.
        **kwargs: OptimWrapper's.

    Raises:
        ValueError: ``dtype`` is another one, ``accumulative_counts`` no integer of at least 1, or ``autocast_cpu``
            neither True nor False.
    """

    def __init__(self, dtype: str = 'bfloat16', autocast_cpu: bool = False, **kwargs) -> None:
        if dtype not in DTYPES:
            raise ValueError(f'AutocastOptimWrapper: dtype={dtype!r}; expected one of {", ".join(DTYPES)}')
        counts = kwargs.get('accumulative_counts', 1)
        if type(counts) is not int or counts < 1:
            raise ValueError(f'AutocastOptimWrapper: accumulative_counts={counts!r}; expected an integer of at least 1')
        if type(autocast_cpu) is not bool:  # 'off' from a command line would switch it on
            raise ValueError(f'AutocastOptimWrapper: autocast_cpu={autocast_cpu!r}; expected True or False')
        super().__init__(**kwargs)
        # A Runner makes ConfigDicts of them, which are 40 times as slow to read.
        self.optimizer.param_groups[:] = map(dict, self.optimizer.param_groups)
        self.device_type = self.optimizer.param_groups[0]['params'][0].device.type
        self.dtype = getattr(torch, dtype)
        self.enabled = dtype != 'float32' and (autocast_cpu or self.device_type != 'cpu')
        self.loss_scaler = torch.amp.GradScaler(self.device_type, enabled=self.enabled and dtype == 'float16')
        self.last_check: StepCheck | None = None
        self.raises = True  # until a hook says that it reads last_check
        self.signal = self.agreed_signal = 0
        self._losses_finite: Tensor | None = None  # since the last step

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a forward pass: autocast, and no gradient synchronisation while gradients accumulate."""
        with super().optim_context(model), torch.autocast(self.device_type, self.dtype, enabled=self.enabled):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Accumulates the gradients of the (scaled) loss."""
        finite = loss.detach().isfinite()
        self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs) -> None:
        """Unscales and clips the gradients and, if all is finite, updates the parameters.

        Raises:
            ValueError: A loss or the gradient norm is not finite, and no hook looks after it.
        """
        self.loss_scaler.unscale_(self.optimizer)
        own_losses_finite, losses_finite, grads_finite, norm = self._read(self._clip_grad())
        scaler, steps = self.loss_scaler, losses_finite and grads_finite
        finite = steps or (losses_finite and scaler.get_scale() > 1)  # 1 without a scaler
        self.last_check = StepCheck(
            finite, losses_finite, own_losses_finite, norm, {} if finite else scaler.state_dict()
        )
        if steps:
            with _together(self.optimizer):
                scaler.step(self.optimizer, **kwargs)
            scaler.update()
        else:  # by itself it would not halve the scale where only the norm overflows
            scaler.update(scaler.get_scale() / 2)
        if not finite and self.raises:
            raise ValueError(
                f'no step was made: the loss is {"" if losses_finite else "not "}finite, the gradient norm {norm}. '
                "default_hooks=dict(nonfinite=dict(type='mmseg_resnest.NonFiniteHook')) tells more, and can skip"
            )

    def _clip_grad(self) -> Tensor:
        """Clips the gradients if asked to; returns the norm of all of them before that, a scalar on their device."""
        params = [p for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
        if self.clip_grad_kwargs and self.grad_name == 'grad_norm':
            return self.clip_func(params, **self.clip_grad_kwargs)
        norm = nn.utils.get_total_norm([p.grad for p in params])
        if self.clip_grad_kwargs:
            self.clip_func(params, **self.clip_grad_kwargs)
        return norm

    def _read(self, grad_norm: Tensor) -> tuple[bool, bool, bool, float]:
        """Reads the check from the device, the one synchronisation of a step.

        Args:
            grad_norm: Scalar.

        Returns:
            Whether this rank's losses, all ranks' losses and all ranks' gradients are finite; the norm.
        """
        losses_finite, self._losses_finite = self._losses_finite, None
        # None where the caller has called the loss's own backward
        own = grad_norm.new_ones(()) if losses_finite is None else losses_finite.to(grad_norm)
        agreed = torch.stack([own, grad_norm.isfinite().to(grad_norm), grad_norm.new_full((), -self.signal)])
        all_reduce(agreed, 'min')  # nothing on one process
        own, *flags, signal, norm = torch.stack([own, *agreed, grad_norm]).tolist()
        self.agreed_signal = -int(signal)
        if self.clip_grad_kwargs and self.grad_name == 'grad_norm' and math.isfinite(norm):
            self.message_hub.update_scalar('train/grad_norm', norm)
        return bool(own), *map(bool, flags), norm

    def state_dict(self) -> dict:
        """The optimiser's state and, in float16, the loss scaler's."""
        scaler = dict(loss_scaler=self.loss_scaler.state_dict()) if self.loss_scaler.is_enabled() else {}
        return super().state_dict() | scaler

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what ``state_dict`` gave, or a stock wrapper's state."""
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.loss_scaler.is_enabled():
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


@contextmanager
def _together(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Shows an optimiser of torch's its parameters in as few groups as there are different options.

    Another library's optimiser may keep something in its groups.
    """
    groups = optimizer.param_groups
    if type(optimizer).__module__.startswith('torch.optim.'):
        together: list[tuple[dict, list]] = []
        for group in groups:
            options = dict(group)
            options.pop('param_names', None)
            params = options.pop('params')
            found = next((others for other, others in together if other == options), None)
            if found is None:
                together.append((options, list(params)))
            else:
                found += params
        optimizer.param_groups = [dict(options, params=params) for options, params in together]
    try:
        yield
    finally:
        optimizer.param_groups = groups
