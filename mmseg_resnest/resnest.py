"""ResNeSt: Split-Attention Networks (Zhang et al., arXiv 2004.08955).

The state dict uses the names of the authors' code (zhanghang1989/ResNeSt), so that their weights load as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmseg_resnest.checkpoints import load_pretrained_backbone
from mmseg_resnest.conv import AvgPool2d
from mmseg_resnest.norm import batch_norm_parts
from mmseg_resnest.ops import conv_relu, weighted_sum
from mmseg_resnest.registry import MODELS
from mmseg_resnest.training_pass import call
from mmseg_resnest.variants import ARCHITECTURES

Norm = Callable[[int], nn.Module]

# output stride -> (strides, dilations) of the four stages
LAYOUTS = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
    32: ((1, 2, 2, 2), (1, 1, 1, 1)),
}
GRAPHS = ('authors', 'mmseg', 'timm')
EXECUTIONS = ('grouped', 'split', 'dense')


class SplitAttentionConv2d(nn.Module):
    r"""A 3x3 convolution into ``radix`` splits, summed with weights that attend to them (paper, section 3.1).

    With splits :math:`U_r` of one cardinal group, :math:`s = \mathrm{GAP}(\sum_r U_r)` and
    :math:`a = \mathrm{fc_2}(\mathrm{ReLU}(\mathrm{BN}(\mathrm{fc_1}(s))))`, the group's output is
    :math:`V_c = \sum_r \mathrm{softmax}_r(a)_{r,c}\, U_{r,c}`; with radix 1 the softmax becomes a sigmoid
    (squeeze-and-excitation). The channels are radix-major: those of one radix index stand together, ordered by group.

    The convolution is stored as one with ``groups * radix`` groups, and executed as ``execution`` says; the result is
    the same.

    Args:
        channels: Input and output channels C.
        radix: Number of splits R of a cardinal group, at least 1.
        groups: Cardinality K.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        norm: Makes a normalisation layer for a number of channels.
        execution: ``'grouped'``, as stored; ``'split'``, a convolution a radix index on tensors of their own;
            ``'dense'``, one convolution without groups, with zeros between them; None: the fastest on the device.
    """

    def __init__(
        self,
        channels: int,
        radix: int,
        groups: int,
        stride: int,
        dilation: int,
        norm: Norm,
        execution: str | None = None,
    ) -> None:
        super().__init__()
        attention_channels = max(channels * radix // 4, 32)
        if channels % (groups * radix) or attention_channels % groups:
            raise ValueError(
                f'ResNeSt: radix={radix} and groups={groups} do not divide a stage of {channels} channels, '
                f'{attention_channels} in its attention; another base_width makes it other ones'
            )
        self.radix = radix
        self.groups = groups
        self.execution = execution
        self.conv = nn.Conv2d(
            channels, channels * radix, 3, stride, dilation, dilation, groups=groups * radix, bias=False
        )
        self.bn0 = norm(channels * radix)
        if execution == 'split' and not isinstance(self.bn0, _BatchNorm):
            raise ValueError(
                f"ResNeSt: radix_conv='split' normalises splits apart, which {type(self.bn0).__name__} does not allow; "
                "give it batch norm, or radix_conv='grouped'"
            )
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(channels, attention_channels, 1, groups=groups)
        self.bn1 = norm(attention_channels)
        self.fc2 = nn.Conv2d(attention_channels, channels * radix, 1, groups=groups)

    def execution_on(self, device: torch.device) -> str:
        """How the convolution is executed there. Measured on H100 and H200, in bfloat16, channels-last."""
        if self.execution is not None:
            return self.execution
        splits_apart = isinstance(self.bn0, _BatchNorm | nn.Identity)  # the identity: folded into the convolution
        if device.type != 'cuda' or self.radix == 1 or not splits_apart:
            return 'grouped'
        return 'dense' if self.conv.in_channels <= 64 else 'split'

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W), or for ``'split'`` its parts (B, C / radix, H, W), to (B, C, H / stride, W / stride)."""
        splits = self._splits(x)
        attention = self._normalise(self._attention(self._pooled(splits)))
        return weighted_sum(splits, attention)

    def _attention(self, pooled: Tensor) -> Tensor:
        """Maps (B, C, 1, 1) to fc2's (B, R * C, 1, 1)."""
        if isinstance(self.bn1, nn.Identity) and self.groups == 1 and not torch.compiler.is_compiling():
            hidden = F.relu(_linear(pooled, self.fc1), inplace=True)  # cuDNN takes longer to launch, and to plan
            return _linear(hidden, self.fc2)
        return self.fc2(self.relu(self.bn1(self.fc1(pooled))))

    def _pooled(self, splits: Sequence[Tensor]) -> Tensor:
        """Returns s (B, C, 1, 1), the mean of the sum of the splits."""
        if self._is_folded() and not torch.compiler.is_compiling():
            means = [split.mean((2, 3), keepdim=True) for split in splits]  # the sum of the splits is never written
            return sum(means[1:], means[0])
        return sum(splits[1:], splits[0]).mean((2, 3), keepdim=True)

    def _is_folded(self) -> bool:
        return isinstance(self.bn0, nn.Identity)

    def _splits(self, x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the splits U_r, each (B, C, H / stride, W / stride)."""
        conv = self.conv
        folded = self._is_folded()
        run = conv_relu if folded else F.conv2d
        steps = conv.stride, conv.padding, conv.dilation
        if not isinstance(x, Tensor):
            weights = conv.weight.chunk(self.radix)
            biases = conv.bias.chunk(self.radix) if folded else [None] * self.radix
            splits = [run(*tensors, *steps, self.groups) for tensors in zip(x, weights, biases, strict=True)]
            return splits if folded else [self.relu(split) for split in batch_norm_parts(splits, self.bn0)]
        if self.execution_on(x.device) == 'dense':
            x = run(x, _without_groups(conv.weight, conv.groups), conv.bias, *steps)
            return (x if folded else self.relu(self.bn0(x))).chunk(self.radix, 1)
        return self.relu(self.bn0(conv(x))).chunk(self.radix, 1)

    def _normalise(self, attention: Tensor) -> Sequence[Tensor]:
        """Turns fc2's (B, K * R * C/K, 1, 1), which is cardinality-major, into R weights (B, C, 1, 1)."""
        if self.radix == 1:
            return (attention.sigmoid(),)
        attention = attention.unflatten(1, (self.groups, self.radix, -1)).softmax(2)
        return [weight.flatten(1, 2) for weight in attention.unbind(2)]


def _conv_norm_relu(
    x: Tensor, conv: nn.Conv2d, norm: nn.Module, shortcut: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """``relu(norm(conv(x)) + shortcut)``; in one kernel, where there is one, once the norm is folded.

    With ``recompute`` a compiler does not store ``conv(x)`` for the gradient, but ``x``.
    """
    if isinstance(norm, nn.Identity):
        return conv_relu(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, shortcut)
    out = norm(checkpoint(conv, x, use_reentrant=False, preserve_rng_state=False) if recompute else conv(x))
    return F.relu(out if shortcut is None else out + shortcut, inplace=True)


def _linear(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Applies a 1x1 convolution to (B, C, 1, 1)."""
    return F.linear(x.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None]


def _without_groups(weight: Tensor, groups: int) -> Tensor:
    """Returns a grouped convolution's weight (O, I / groups, k, k) as (O, I, k, k), zero between the groups."""
    inputs = weight.shape[1]
    parts = [
        F.pad(part, (0, 0, 0, 0, i * inputs, (groups - 1 - i) * inputs)) for i, part in enumerate(weight.chunk(groups))
    ]
    return torch.cat(parts)


class Bottleneck(nn.Module):
    """1x1 -> split attention -> 1x1, each normalised, added to the shortcut (paper, figure 1).

    Args:
        in_channels: Channels of the input.
        planes: A quarter of the channels of the output.
        attention: Makes the block's split-attention convolution from its width, stride and dilation.
        width: Channels of the split-attention convolution.
        stride: Stride of the block; a 3x3 average pool takes it, not the convolution.
        dilation: Dilation of the 3x3 convolution.
        average: Whether the 3x3 average pool ("avd") is there; it blurs where the stride is 1.
        avd_first: Whether that pool comes before the convolution.
        shortcut: The shortcut's projection, or None for the identity.
        norm: Makes a normalisation layer for a number of channels.
        with_cp: Whether to recompute the block in the backward pass instead of storing what is inside.
        recompute_conv3: Whether to recompute the output of the last convolution, where the block is compiled.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        attention: Callable[..., SplitAttentionConv2d],
        width: int,
        stride: int,
        dilation: int,
        average: bool,
        avd_first: bool,
        shortcut: nn.Module | None,
        norm: Norm,
        with_cp: bool,
        recompute_conv3: bool,
    ) -> None:
        super().__init__()
        pool = AvgPool2d(3, stride, padding=1) if average else None
        self.with_cp = with_cp
        self.recompute_conv3 = recompute_conv3
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.avd_first = pool if avd_first else None
        self.conv2 = attention(width, stride=1 if average else stride, dilation=dilation, norm=norm)
        self.avd_last = None if avd_first else pool
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, 4 * planes, H / stride, W / stride)."""
        if self.with_cp and self._is_training():
            # A compiler recomputes values, and writes no buffer twice.
            contexts = {} if torch.compiler.is_compiling() else dict(context_fn=self._checkpoint_contexts)
            # Nothing in a block is random, and a CUDA graph could not store the generator's state.
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False, **contexts)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.conv2.execution_on(x.device) == 'split':
            out = self.conv2([self._before_conv2(part) for part in self._conv1_parts(x)])
        else:
            out = self.conv2(self._before_conv2(_conv_norm_relu(x, self.conv1, self.bn1)))
        if self.avd_last is not None:
            out = self.avd_last(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _conv_norm_relu(out, self.conv3, self.bn3, shortcut, self._recomputes_conv3())

    def _recomputes_conv3(self) -> bool:
        # Uncompiled, batch norm would store its input all the same; a parametrised convolution may have a state.
        # torch.compiler.is_exporting() returns this flag, but is true in all that torch 2.11 compiles.
        compiles = torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag
        chosen = self.recompute_conv3 and not self.with_cp and type(self.conv3) is nn.Conv2d
        return chosen and compiles and self._is_training()

    def _is_training(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _conv1_parts(self, x: Tensor) -> Sequence[Tensor]:
        if isinstance(self.bn1, nn.Identity):
            return _conv_norm_relu(x, self.conv1, self.bn1).chunk(self.conv2.radix, 1)
        parts = batch_norm_parts(self.conv1(x).chunk(self.conv2.radix, 1), self.bn1)
        return [self.relu(part) for part in parts]

    def _before_conv2(self, x: Tensor) -> Tensor:
        return x if self.avd_first is None else self.avd_first(x)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self._running_statistics_kept()

    @contextmanager
    def _running_statistics_kept(self) -> Iterator[None]:
        """The recomputation must not count a batch twice in BN's running statistics: it has copies of them."""
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
        for norm, name, buffer in kept:
            setattr(norm, name, buffer.clone())
        try:
            yield
        finally:
            for norm, name, buffer in kept:
                setattr(norm, name, buffer)


@MODELS.register_module()
class ResNeSt(BaseModule):
    """The ResNeSt backbone: a deep stem and four stages of split-attention bottlenecks.

    Args:
        depth: 14, 26, 50, 101, 200 or 269.
        in_channels: Channels of the image.
        output_stride: How much smaller than the image the last feature map is: 8, 16 or 32. Below 32 the last stages
            dilate instead of striding.
        graph: Whose graph is computed; the parameters are the same. A 3x3 average pool takes the stride of a block.
            ``'authors'`` keeps it at stride 1 in the first block of a dilated stage, as the released models do;
            ``'mmseg'`` has it only where the stride is 2, as mmsegmentation, mmdetection and mmpretrain compute;
            ``'timm'`` as mmseg, and averages 2x2 at stride 1 in the shortcut of a dilated stage. At output stride 32
            the three are one.
        radix: Splits of a cardinal group, at least 1.
        groups: Cardinality.
        base_width: Channels of a cardinal group of the first stage.
        avd_first: Whether the average pool of a block comes before its 3x3 convolution (the "fast" variants).
        out_indices: Which of the stages' feature maps are returned, counted from 0.
        norm_cfg: The normalisation layer's config; ``requires_grad=False`` in it freezes its weights. Group norm needs
            less than 32 groups, as 8: the first stage's attention has 32 channels of one value each.
        norm_eval: Whether batch norm keeps its running statistics in training.
        frozen_stages: -1: nothing is frozen; 0: the stem; n: the stem and the first n stages.
        with_cp: Whether to recompute blocks in the backward pass to save memory.
        recompute_conv3: Whether compiled training recomputes the output of each block's last convolution, which takes
            little time and is the largest tensor of the block, instead of storing it.
        radix_conv: How the split-attention convolutions are executed, as ``SplitAttentionConv2d`` says. Weights and
            results are the same. None: the fastest on the device.
        init_cfg: MMEngine's initialiser. ``dict(type='Pretrained', checkpoint=...)`` is loaded strictly.

    Raises:
        ValueError: An option has a value that is not listed above.
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        output_stride: int = 32,
        graph: str = 'authors',
        radix: int = 2,
        groups: int = 1,
        base_width: int = 64,
        avd_first: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_cfg: dict | None = None,
        norm_eval: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        recompute_conv3: bool = True,
        radix_conv: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        default_init = [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
        ]
        super().__init__(default_init if init_cfg is None else init_cfg)
        _check_choice('depth', depth, ARCHITECTURES)
        _check_choice('output_stride', output_stride, LAYOUTS)
        _check_choice('graph', graph, GRAPHS)
        _check_choice('radix_conv', radix_conv, (None, *EXECUTIONS))
        _check_choice('frozen_stages', frozen_stages, range(-1, 5))
        switches = dict(with_cp=with_cp, recompute_conv3=recompute_conv3, norm_eval=norm_eval, avd_first=avd_first)
        for name, value in switches.items():
            _check_choice(name, value, (False, True))  # 'off' from a command line would switch it on
        for index in out_indices if isinstance(out_indices, Sequence) and out_indices else [out_indices]:
            _check_choice('out_indices', index, range(4))
        for name, value in dict(radix=radix, groups=groups, base_width=base_width).items():
            if type(value) is not int or value < 1:
                raise ValueError(f'ResNeSt: {name}={value!r}; expected an integer of at least 1')

        # What check_options compares with what a checkpoint needs.
        self.depth, self.output_stride, self.graph = depth, output_stride, graph
        self.radix, self.groups, self.base_width, self.avd_first = radix, groups, base_width, avd_first
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        norm = partial(_norm_layer, norm_cfg or dict(type='BN'))
        block = partial(
            Bottleneck,
            attention=partial(SplitAttentionConv2d, radix=radix, groups=groups, execution=radix_conv),
            avd_first=avd_first,
            norm=norm,
            with_cp=with_cp,
            recompute_conv3=recompute_conv3,
        )
        blocks, stem_width = ARCHITECTURES[depth]
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, stem_width, 3, 2, 1, bias=False),
            norm(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, stem_width, 3, 1, 1, bias=False),
            norm(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, stem_width * 2, 3, 1, 1, bias=False),
        )
        self.bn1 = norm(stem_width * 2)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = stem_width * 2
        for i, (stride, dilation) in enumerate(zip(*LAYOUTS[output_stride], strict=True)):
            planes = 64 * 2**i
            stage_block = partial(block, planes=planes, width=int(planes * base_width / 64) * groups)
            average = stride > 1 or (i > 0 and graph == 'authors')
            pool = _shortcut_pool(stride, dilation, graph)
            stage = _make_stage(stage_block, blocks[i], channels, stride, dilation, average, pool)
            self.add_module(f'layer{i + 1}', stage)
            channels = planes * Bottleneck.expansion
        self._freeze()

    def forward(self, x: Tensor, call: Callable = call) -> tuple[Tensor, ...]:
        """Maps an image (B, in_channels, H, W) to the feature maps of ``out_indices``, the finest first.

        Stage i has 256 * 2**i channels and stride 4, 8, 16, 32, but no more than ``output_stride``.

        Args:
            x: The image.
            call: Calls the stem and each block: ``call(block, x)`` returns ``block(x)``.
        """
        x = call(self._stem, x)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = call(block, x)
            features.append(x)
        return tuple(features[i] for i in self.out_indices)

    def _stem(self, x: Tensor) -> Tensor:
        if not isinstance(self.bn1, nn.Identity):
            return self.maxpool(self.relu(self.bn1(self.conv1(x))))
        *before, last = self.conv1
        for conv, norm in zip(before[::3], before[1::3], strict=True):
            x = _conv_norm_relu(x, conv, norm)
        return self.maxpool(_conv_norm_relu(x, last, self.bn1))

    def init_weights(self) -> None:
        """Initialises the weights as ``init_cfg`` says; pretrained ones must fit, key by key.

        Raises:
            FileNotFoundError: The checkpoint is not there and cannot be had.
            ValueError: Keys are missing, left over or of another shape.
        """
        configs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg
        pretrained = [
            cfg for cfg in configs if cfg.get('type') in ('Pretrained', 'mmengine.Pretrained', PretrainedInit)
        ]
        if not pretrained:
            super().init_weights()
        for cfg in pretrained:
            load_pretrained_backbone(self, **{k: v for k, v in cfg.items() if k != 'type'})
            self._is_init = True

    def train(self, mode: bool = True) -> 'ResNeSt':
        """Switches to training, but for what is frozen and, with ``norm_eval``, batch norm's statistics."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [self.conv1, self.bn1] if self.frozen_stages >= 0 else []
        frozen += [getattr(self, f'layer{i}') for i in range(1, self.frozen_stages + 1)]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


def _norm_layer(norm_cfg: dict, channels: int) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]


def _shortcut_pool(stride: int, dilation: int, graph: str) -> nn.Module:
    if stride > 1:
        return AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    if dilation > 1 and graph == 'timm':
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), AvgPool2d(2, 1))
    return nn.Identity()


def _make_stage(
    block: Callable[..., Bottleneck],
    blocks: int,
    in_channels: int,
    stride: int,
    dilation: int,
    average: bool,
    shortcut_pool: nn.Module,
) -> nn.Sequential:
    """Builds a stage: the first block projects the shortcut, and keeps the dilation of the stage before."""
    planes, norm = block.keywords['planes'], block.keywords['norm']
    channels = planes * Bottleneck.expansion
    shortcut = nn.Sequential(shortcut_pool, nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))
    first_dilation = max(dilation // 2, 1)
    first = block(in_channels, stride=stride, dilation=first_dilation, average=average, shortcut=shortcut)
    rest = [block(channels, stride=1, dilation=dilation, average=False, shortcut=None) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _check_choice(name: str, value: int | str, choices: Sequence | dict) -> None:
    is_another_kind = isinstance(value, bool | float) and type(value) not in map(type, choices)  # True == 1 == 1.0
    if is_another_kind or value not in choices:
        raise ValueError(f'ResNeSt: {name}={value!r}; expected one of {", ".join(str(choice) for choice in choices)}')
