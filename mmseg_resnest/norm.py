"""Batch norm that is synchronised over the processes, in one message a layer, and that ``torch.compile`` keeps whole.

torch's own SyncBatchNorm calls collectives that the compiler cannot trace: it breaks the graph at every layer.
"""

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives as collectives
from mmengine.model import convert_sync_batchnorm
from mmengine.runner import runner as mmengine_runner
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_resnest.registry import MODELS

SYNC_BN = 'mmseg_resnest.SyncBN'
# torch 2.14 has renamed it, and warns of the old name.
all_gather = getattr(collectives, 'all_gather_single', None) or collectives.all_gather_tensor


@MODELS.register_module('SyncBN')
class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics in training are those of all processes' pixels; plain batch norm on one process.

    Equal to torch's SyncBatchNorm, on CPUs too and with batches of different size. Half precision is normalised by
    statistics in float32. Of one value a channel in all processes, which torch's refuses, the unbiased variance counts
    as 0; where no process has any, the running statistics stay. ``sync_bn='mmseg_resnest.SyncBN'`` in a config makes it
    of every batch norm layer.

    Args:
        num_features: Channels.
        process_group: Those who share statistics; None: all.
        **kwargs: torch's BatchNorm's.
    """

    def __init__(self, num_features: int, process_group: ProcessGroup | None = None, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, ...) to the same shape and dtype."""
        return batch_norm_parts([x], self)[0]

    @staticmethod
    def convert(module: nn.Module) -> nn.Module:
        """Returns the module with every batch norm layer in it replaced by one of this class, of the same tensors."""
        for name, child in module.named_children():
            setattr(module, name, SyncBatchNorm.convert(child))
        if not isinstance(module, _BatchNorm) or isinstance(module, SyncBatchNorm):
            return module
        group = getattr(module, 'process_group', None)
        synced = SyncBatchNorm(module.num_features, group, eps=module.eps, momentum=module.momentum, device='meta')
        synced.affine, synced.track_running_stats = module.affine, module.track_running_stats
        synced._parameters, synced._buffers = module._parameters, module._buffers
        return synced.train(module.training)


def batch_norm_parts(parts: Sequence[Tensor], norm: _BatchNorm | nn.Identity) -> Sequence[Tensor]:
    r"""Normalises consecutive channel ranges of one batch norm layer: :math:`w (x - \mu) / \sigma + b`.

    In training the running statistics are updated as torch does it. The statistics of all parts of a SyncBatchNorm
    travel in one message, those of the gradient in another.

    Args:
        parts: Each (B, C_i, ...), with the channels C_i adding up to ``norm.num_features``.
        norm: The layer. One that is neither in eval mode nor a SyncBatchNorm is torch's, within this process. The
            identity stands where it was folded into a convolution.

    Returns:
        The parts normalised, of the same shapes and dtypes.

    Raises:
        ValueError: The parts have other channels than the layer, or no channel dimension.
    """
    if isinstance(norm, nn.Identity):
        return parts
    channels = [part.shape[1] if part.dim() > 1 else 0 for part in parts]
    if 0 in channels or sum(channels) != norm.num_features:
        shapes = ', '.join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f'batch norm of {norm.num_features} channels; got (B, C, ...) of {shapes}')
    group = _group(norm) if norm.training and isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm) else None
    momentum = _count_batch(norm)
    if group is None:
        return _within_process(parts, channels, norm, momentum)
    mean, var, count = _statistics([part.detach() for part in parts], group)
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            weight = (count > 0).to(norm.running_mean) * momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean), weight)
            norm.running_var.lerp_(unbiased.to(norm.running_var), weight)
    return list(_Normalise.apply(group, norm.eps, mean, var, count, norm.weight, norm.bias, *parts))


def _group(norm: _BatchNorm) -> ProcessGroup | None:
    """Returns those who share the statistics; None if this process is alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _count_batch(norm: _BatchNorm) -> Tensor | float:
    """Counts a training batch; returns the weight that its statistics get in the running ones."""
    if not (norm.training and norm.track_running_stats):
        return 0.0
    norm.num_batches_tracked.add_(1)
    # As a tensor: reading it would break the graph.
    return 1 / norm.num_batches_tracked.to(norm.running_mean) if norm.momentum is None else norm.momentum


def _within_process(
    parts: list[Tensor], channels: list[int], norm: _BatchNorm, momentum: Tensor | float
) -> list[Tensor]:
    """torch's batch norm of each part, with its range of the layer's tensors."""
    tracks = not norm.training or norm.track_running_stats
    momentum = float(momentum)
    tensors = (*((norm.running_mean, norm.running_var) if tracks else (None, None)), norm.weight, norm.bias)
    ranges = zip(*([None] * len(parts) if t is None else t.split(channels) for t in tensors), strict=True)
    training = norm.training or norm.running_mean is None
    return [F.batch_norm(part, *its, training, momentum, norm.eps) for part, its in zip(parts, ranges, strict=True)]


def _statistics(parts: list[Tensor], group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean and variance (biased) of each channel over all processes, (C,), and the count, a scalar.

    Deviations from each process's own mean are summed, and combined as Chan et al. (1979) do: squares of large numbers
    are never subtracted from one another.
    """
    count = parts[0].numel() // parts[0].shape[1]
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    if count:
        local = [torch.var_mean(part.to(dtype), _all_but_channels(part), correction=0) for part in parts]
        var, mean = (torch.cat(tensors) for tensors in zip(*local, strict=True))
    else:  # a process without images still takes part
        var = mean = parts[0].new_zeros(sum(part.shape[1] for part in parts), dtype=dtype)
    message = torch.cat([mean, var, mean.new_full((1,), count)])
    gathered = all_gather(message, 0, group).view(-1, len(message))
    means, variances, counts = gathered.split([len(mean), len(mean), 1], 1)
    total = counts.sum()
    divisor = total.clamp(min=1)
    mean = (means * counts).sum(0) / divisor
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / divisor, total


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _along_channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 2))


class _Normalise(torch.autograd.Function):
    r"""Normalises by statistics of the parts themselves, as the gradient knows.

    With :math:`\hat x = (x - \mu) / \sigma` and means over all processes' pixels,
    :math:`dx = w / \sigma \, (dy - \mathrm{mean}(dy) - \hat x \, \mathrm{mean}(\hat x \, dy))`. The gradients of weight
    and bias are this process's own, which the data-parallel wrapper averages as all others.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        group: ProcessGroup,
        eps: float,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.affine = group, (weight is not None, bias is not None)
        ctx.save_for_backward(mean, (var + eps).rsqrt(), count, weight, *parts)
        channels = [part.shape[1] for part in parts]
        weights, biases = ([None] * len(parts) if t is None else t.split(channels) for t in (weight, bias))
        ranges = zip(parts, mean.split(channels), var.split(channels), weights, biases, strict=True)
        return tuple(F.batch_norm(*tensors, training=False, eps=eps) for tensors in ranges)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, invstd, count, weight, *parts = ctx.saved_tensors
        channels = [part.shape[1] for part in parts]
        triples = list(zip(gradients, parts, mean.split(channels), invstd.split(channels), strict=True))
        sums = torch.cat(
            [dy.to(mean).sum(_all_but_channels(x)) for dy, x, _, _ in triples]
            + [(dy * _normalised(x, m, s)).sum(_all_but_channels(x)) for dy, x, m, s in triples]
        )
        means = (collectives.all_reduce(sums, 'sum', ctx.group) / count).view(2, -1)
        scale = invstd if weight is None else invstd * weight
        ranges = zip(triples, scale.split(channels), *(m.split(channels) for m in means), strict=True)
        inputs = [
            ((dy - _along_channels(a, x) - _normalised(x, m, s) * _along_channels(b, x)) * _along_channels(w, x)).to(x)
            for (dy, x, m, s), w, a, b in ranges
        ]
        for_bias, for_weight = sums.chunk(2)
        has_weight, has_bias = ctx.affine
        return (*[None] * 5, for_weight if has_weight else None, for_bias if has_bias else None, *inputs)


def _normalised(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (x - _along_channels(mean, x)) * _along_channels(invstd, x)


def _convert(module: nn.Module, implementation: str = 'torch') -> nn.Module:
    return (
        SyncBatchNorm.convert(module) if implementation == SYNC_BN else convert_sync_batchnorm(module, implementation)
    )


# MMEngine's Runner converts to two kinds by name; this adds ours, in every tool that builds a model of this package.
mmengine_runner.convert_sync_batchnorm = _convert
