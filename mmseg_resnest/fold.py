"""Batch norm folded into the convolutions before it, for prediction."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmseg_resnest.resnest import Bottleneck, SplitAttentionConv2d

Run = Callable[[], Tensor | Sequence[Tensor]]


def fold_batch_norms(model: nn.Module, run: Run) -> int:
    """Folds every batch norm of a model that follows a convolution into it, for good.

    Which follows which is seen in a run: a norm whose input is a convolution's output, both used once. The scale of a
    channel multiplies the convolution's weights to it, also where it is grouped, as the radix convolution is, however
    that is executed.

    Args:
        model: In evaluation mode.
        run: Runs it, or a part, on any input; what else is not folded. The output, or each, is compared.

    Returns:
        How many were folded.

    Raises:
        ValueError: An output has changed by more than a thousandth of its largest value: something else reads a
            convolution's output too. The model is then unusable.
    """
    with _grouped(model), _whole_float32():
        pairs, before = _pairs(model, run)
    for conv, norm in pairs:
        _fold(conv, norm)
    folded = {id(norm) for _, norm in pairs}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in folded:
                setattr(module, name, nn.Identity())
    _merge_shortcut_biases(model)
    with torch.no_grad(), _whole_float32():
        errors = [
            (new - old).abs().max() / old.abs().max().clamp(min=1e-30)
            for new, old in zip(_listed(run()), _listed(before), strict=True)
        ]
    error = torch.stack(errors).max()
    if not error < 1e-3:
        raise ValueError(
            f'folding {len(pairs)} batch norms changed the output by {float(error):.2g} of its largest value; expected '
            'less than 1e-3: a convolution is read by more than its batch norm, or the weights are not finite. '
            'Predict without folding'
        )
    return len(pairs)


def _merge_shortcut_biases(model: nn.Module) -> None:
    """Lets a block's last convolution add the bias of its shortcut's projection too, which saves a pass over it."""
    for block in model.modules():
        if isinstance(block, Bottleneck) and isinstance(block.downsample, nn.Sequential):
            projection = block.downsample[1]
            if projection.bias is not None and block.conv3.bias is not None:
                bias = block.conv3.bias + projection.bias
                block.conv3.bias, projection.bias = nn.Parameter(bias, requires_grad=False), None


def _listed(output: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [output] if isinstance(output, Tensor) else output


@contextmanager
def _grouped(model: nn.Module) -> Iterator[None]:
    """Runs radix convolutions as the modules they are stored as: other executions pass by the hooks of their norms."""
    convs = [module for module in model.modules() if isinstance(module, SplitAttentionConv2d)]
    executions = [conv.execution for conv in convs]
    for conv in convs:
        conv.execution = 'grouped'
    try:
        yield
    finally:
        for conv, execution in zip(convs, executions, strict=True):
            conv.execution = execution


def _whole_float32() -> AbstractContextManager:
    """TF32 alone changes the output by about as much as the check allows."""
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)


def _pairs(model: nn.Module, run: Run) -> tuple[list[tuple[nn.Conv2d, _BatchNorm]], Tensor | Sequence[Tensor]]:
    """Returns the convolutions and the norms that read them, and the output of the run."""
    # By the tensor's id: it is kept, so that no other gets it. Its version counts what has been done to it in place.
    outputs: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []
    calls: Counter[nn.Module] = Counter()

    def after_conv(conv: nn.Conv2d, _: tuple, output: Tensor) -> None:
        calls[conv] += 1
        outputs[id(output)] = conv, output, output._version

    def before_norm(norm: _BatchNorm, inputs: tuple[Tensor]) -> None:
        calls[norm] += 1
        conv, _, version = outputs.get(id(inputs[0]), (None, None, None))
        if conv and inputs[0]._version == version and not norm.training and norm.running_var is not None:
            pairs.append((conv, norm))

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        with torch.inference_mode(False), torch.no_grad():  # versions are not counted in inference mode
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1], result


def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Sets ``w * s`` and ``(b - mean) * s + bias`` with ``s = weight / sqrt(var + eps)``, computed in float64."""
    parts = (conv.weight, conv.bias, norm.running_mean, norm.running_var)
    parts = (None if part is None else part.detach().double() for part in parts)
    affine = (None if part is None else part.detach().double() for part in (norm.weight, norm.bias))
    weight, bias = fuse_conv_bn_weights(*parts, norm.eps, *affine)
    dtype = conv.weight.dtype
    conv.weight, conv.bias = (nn.Parameter(part.to(dtype), requires_grad=False) for part in (weight, bias))
