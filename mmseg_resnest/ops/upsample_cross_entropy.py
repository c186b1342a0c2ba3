"""Bilinear upsampling of logits fused with their cross-entropy: full-resolution logits are never stored."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from mmseg_resnest.ops.bilinear import Axis, bilinear_axis

AVERAGES = ('all', 'valid')
IMPLEMENTATIONS = ('triton', 'torch')
# The plain path holds so many interpolated logits at a time: 64 MiB in float32.
CHUNK = 1 << 24


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    average: str = 'all',
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of bilinearly upsampled logits, and the pixel accuracy.

    With ``z = interpolate(logits, labels.shape[1:])`` and the pixels p that are not ignored::

        loss = sum_p sum_c -w[c] * y[p, c] * log_softmax(z)[p, c] / denominator
        y[p, c] = (1 - label_smoothing) * (c == labels[p]) + label_smoothing / C

    The denominator is the number of all pixels of this rank, as in mmsegmentation's CrossEntropyLoss (``'all'``), or
    the sum of ``w[labels[p]]`` over the pixels that are not ignored, as in torch (``'valid'``), 1 where that is 0. That
    sum is over all ranks, divided by their number: DDP's mean of the ranks' gradients is then that of one process with
    all images. There is no second derivative: ``create_graph=True`` is a RuntimeError.

    Args:
        logits: (N, C, h, w), bfloat16, float16, float32 or float64, any strides; up to 32,767 classes. Computed in
            float32 (float64).
        labels: (N, H, W), uint8 or int64: a class or ``ignore_index``. Of any other value the plain path raises a
            ValueError; a kernel cannot, and the loss becomes NaN.
        ignore_index: The label of the pixels that do not count.
        class_weight: (C,) weights w of the classes, 0 or more, without gradient; None: 1. Only those on a CPU are
            checked: a GPU would have to wait.
        label_smoothing: The share of the target that is spread over all classes, 0 to 1.
        align_corners: As in ``torch.nn.functional.interpolate``.
        average: ``'all'`` or ``'valid'``.
        impl: ``'triton'`` or ``'torch'``; None: Triton on a GPU, in float32 and below.

    Returns:
        The loss, a float32 (float64) scalar, 0 if every pixel is ignored; and the percentage of the pixels that are
        not ignored whose label has the largest logit, or one as large, a float32 scalar without gradient, 100 if every
        pixel is ignored, as mmsegmentation has it.

    Raises:
        ValueError: A shape, dtype or option is not one of those above.
    """
    _check(logits, labels, class_weight, label_smoothing, average, impl)
    if impl is None:
        impl = 'triton' if logits.is_cuda and logits.dtype != torch.float64 else 'torch'
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = None if class_weight is None else class_weight.detach().to(logits.device, dtype)
    options = (ignore_index, label_smoothing, align_corners)
    total, weights, correct, valid = _UpsampleCrossEntropy.apply(logits, labels, weight, options, impl)
    if average == 'all':
        denominator = labels.numel()
    else:
        weights = _mean_over_ranks(weights)
        denominator = torch.where(weights > 0, weights, 1)
    # The kernels' sums are float64: the mean is rounded once.
    return (total / denominator).to(dtype), torch.where(valid > 0, 100 * correct / valid, 100).to(dtype)


def _check(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    average: str,
    impl: str | None,
) -> None:
    batches = logits.ndim == 4 and labels.ndim == 3 and len(logits) == len(labels)
    if not (batches and logits.numel() and labels.numel()):
        raise ValueError(
            f'upsample_cross_entropy: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}; '
            'expected (N, C, h, w) and (N, H, W), none empty'
        )
    if logits.shape[1] > 32767:  # the kernels keep a label as int16
        raise ValueError(f'upsample_cross_entropy: {logits.shape[1]} classes; expected at most 32767')
    if not logits.is_floating_point() or labels.dtype not in (torch.uint8, torch.int64):
        raise ValueError(
            f'upsample_cross_entropy: logits {logits.dtype}, labels {labels.dtype}; '
            'expected floating point, and uint8 or int64'
        )
    if class_weight is not None and class_weight.shape != logits.shape[1:2]:
        raise ValueError(
            f'upsample_cross_entropy: class_weight {tuple(class_weight.shape)}; '
            f'expected one of {logits.shape[1]} classes'
        )
    if class_weight is not None and class_weight.device.type == 'cpu' and not (class_weight >= 0).all():  # nor NaN
        raise ValueError(f'upsample_cross_entropy: class_weight from {class_weight.amin():g}; expected 0 or more')
    if not 0 <= label_smoothing <= 1:  # nor nan
        raise ValueError(f'upsample_cross_entropy: label_smoothing={label_smoothing}; expected 0 to 1')
    if average not in AVERAGES or impl not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f'upsample_cross_entropy: average={average!r}, impl={impl!r}; '
            f'expected one of {AVERAGES} and one of {IMPLEMENTATIONS} or None'
        )


def _mean_over_ranks(value: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


class _UpsampleCrossEntropy(torch.autograd.Function):
    """Sums over the pixels: the loss, the weights of the labels, the right pixels, the pixels that are not ignored.

    The gradient is computed together with the loss, up to the factor that only backward knows.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        options: tuple[int, float, bool],
        impl: str,
    ) -> tuple[Tensor, ...]:
        if impl == 'triton':
            from mmseg_resnest.ops.upsample_cross_entropy_triton import sums_and_gradient
        else:
            sums_and_gradient = _sums_and_gradient
        sums, gradient = sums_and_gradient(logits, labels, weight, *options, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.like = torch.empty_like(logits, device='meta')
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: FunctionCtx, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable lets a penalty of the gradient through, as one that depends on nothing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                'upsample_cross_entropy: it has no second derivative (create_graph=True); take interpolate and '
                'cross_entropy, which the segmentor does with fused_loss=False'
            )
        (gradient,) = ctx.saved_tensors
        result = torch.empty_strided(ctx.like.shape, ctx.like.stride(), dtype=ctx.like.dtype, device=gradient.device)
        return torch.mul(gradient, factor, out=result), None, None, None, None


def _sums_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    needs_gradient: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The sums and the gradient in plain PyTorch, a few rows of an image at a time."""
    if weight is None:
        weight = torch.ones_like(logits[0, :, 0, 0], dtype=torch.promote_types(logits.dtype, torch.float32))
    height, width = labels.shape[1:]
    columns = _to(bilinear_axis(logits.shape[3], width, align_corners), weight)
    rows = _to(bilinear_axis(logits.shape[2], height, align_corners), weight)
    step = max(CHUNK // (logits.shape[1] * width), 1)
    sums = weight.new_zeros(4)
    gradients = []
    for image, image_labels in zip(logits, labels, strict=True):
        image = image.detach().to(weight.dtype).requires_grad_(needs_gradient)
        gradient = torch.zeros_like(image)
        for start in range(0, height, step):
            chunk = slice(start, start + step)
            with torch.set_grad_enabled(needs_gradient):
                z = _upsample(image, Axis(*(part[chunk] for part in rows)), columns)
                chunk_sums = _chunk_sums(z, image_labels[chunk].long(), weight, ignore_index, label_smoothing)
                if needs_gradient:
                    gradient += torch.autograd.grad(chunk_sums[0], image)[0]
            sums += chunk_sums.detach()
        gradients.append(gradient)
    return tuple(sums.unbind()), torch.stack(gradients) if needs_gradient else None


def _to(axis: Axis, like: Tensor) -> Axis:
    return Axis(axis.left.to(like.device), axis.right.to(like.device), axis.weight.to(like))


def _upsample(image: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Maps (C, h, w) to the rows of (C, H, W) that ``rows`` describes."""
    image = torch.lerp(image[:, rows.left], image[:, rows.right], rows.weight[:, None])
    return torch.lerp(image[..., columns.left], image[..., columns.right], columns.weight)


def _chunk_sums(z: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    valid = labels != ignore_index
    known = torch.where(valid, labels, 0)
    if known.numel() and not 0 <= int(known.amin()) <= int(known.amax()) < len(z):
        raise ValueError(
            f'upsample_cross_entropy: labels from {int(known.amin())} to {int(known.amax())}; '
            f'expected 0 to {len(z) - 1}, or {ignore_index} where ignored'
        )
    loss = F.cross_entropy(
        z[None], torch.where(valid, labels, -100)[None], weight, reduction='sum', label_smoothing=label_smoothing
    )
    right = valid & (z.gather(0, known[None])[0] >= z.amax(0))
    return torch.stack([loss, (weight[known] * valid).sum(), right.sum().to(loss), valid.sum().to(loss)])
