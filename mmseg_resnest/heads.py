"""The heads of the authors' segmentation models (zhanghang1989/PyTorch-Encoding).

mmsegmentation's ASPPHead has one 3x3 bottleneck where the authors have a 1x1 projection and a 3x3 block, and its
FCNHead drops whole channels where theirs drops single values. The submodules carry the authors' names, but for the
classifier, which is mmsegmentation's ``conv_seg``.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from mmseg_resnest.registry import MODELS


def _conv_norm_relu(
    in_channels: int, channels: int, kernel_size: int, conv_cfg: dict | None, norm_cfg: dict, dilation: int = 1
) -> list[nn.Module]:
    shape = dict(kernel_size=kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation)
    return [
        build_conv_layer(conv_cfg, in_channels, channels, **shape, bias=False),
        build_norm_layer(norm_cfg, channels)[1],
        nn.ReLU(inplace=True),
    ]


class GlobalPooling(nn.Module):
    """The image-level branch of ASPP: the mean over the image, 1x1 convolution, norm, ReLU, spread back over it."""

    def __init__(self, in_channels: int, channels: int, conv_cfg: dict | None, norm_cfg: dict) -> None:
        super().__init__()
        self.gap = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *_conv_norm_relu(in_channels, channels, 1, conv_cfg, norm_cfg)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, channels, H, W), equal at every place."""
        return self.gap(x).expand(-1, -1, *x.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3, arXiv 1706.05587) as the authors of ResNeSt build it.

    Args:
        in_channels: Channels of the feature map.
        channels: Channels of each branch and of the output.
        dilations: Dilations of the 3x3 branches; a 1x1 and an image-level branch are added to them.
        conv_cfg: The convolutions' config; None: torch's.
        norm_cfg: The normalisation layer's config.
    """

    def __init__(
        self, in_channels: int, channels: int, dilations: Sequence[int], conv_cfg: dict | None, norm_cfg: dict
    ) -> None:
        super().__init__()
        layers = (conv_cfg, norm_cfg)
        branches = [nn.Sequential(*_conv_norm_relu(in_channels, channels, 1, *layers))]
        branches += [nn.Sequential(*_conv_norm_relu(in_channels, channels, 3, *layers, d)) for d in dilations]
        branches.append(GlobalPooling(in_channels, channels, *layers))
        self.branch_names = [f'b{i}' for i in range(len(branches))]
        for name, branch in zip(self.branch_names, branches, strict=True):
            self.add_module(name, branch)
        self.project = nn.Sequential(
            *_conv_norm_relu(channels * len(branches), channels, 1, *layers), nn.Dropout2d(0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, channels, H, W)."""
        return self.project(torch.cat([getattr(self, name)(x) for name in self.branch_names], dim=1))


class _AuthorsHead(BaseDecodeHead):
    """What both heads share: the classifier's dropout is theirs, of single values, and so is its initialisation."""

    def __init__(self, *, norm_cfg: dict | None = None, **kwargs) -> None:
        kwargs.setdefault('init_cfg', None)
        kwargs.setdefault('conv_cfg', dict(type='mmseg_resnest.DilatedConv2d'))
        super().__init__(norm_cfg=norm_cfg or dict(type='BN'), dropout_ratio=0, **kwargs)

    def _block(self, in_channels: int) -> nn.Sequential:
        layers = _conv_norm_relu(in_channels, self.channels, 3, self.conv_cfg, self.norm_cfg)
        return nn.Sequential(*layers, nn.Dropout(0.1))


@MODELS.register_module()
class AuthorsDeepLabV3Head(_AuthorsHead):
    """DeepLabV3's head: ASPP, a 3x3 convolution and a classifier.

    Args:
        dilations: Dilations of ASPP's 3x3 branches.
        norm_cfg: The normalisation layer's config, by default BN.
        **kwargs: BaseDecodeHead's; the authors have ``channels=256`` and ``align_corners=True``. ``conv_cfg`` is by
            default DilatedConv2d's; None: torch's convolutions, of the same names and values.
    """

    def __init__(self, *, dilations: Sequence[int] = (12, 24, 36), norm_cfg: dict | None = None, **kwargs) -> None:
        super().__init__(norm_cfg=norm_cfg, **kwargs)
        self.dilations = tuple(dilations)
        self.aspp = ASPP(self.in_channels, self.channels, dilations, self.conv_cfg, self.norm_cfg)
        self.block = self._block(self.channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps the backbone's feature maps to logits (B, num_classes, H, W) at the resolution of ``in_index``."""
        return self.conv_seg(self.block(self.aspp(self._transform_inputs(inputs))))


@MODELS.register_module()
class AuthorsFCNHead(_AuthorsHead):
    """FCN's head, and the auxiliary one: a 3x3 convolution and a classifier.

    Args:
        norm_cfg: The normalisation layer's config, by default BN.
        **kwargs: BaseDecodeHead's; the authors have a quarter of ``in_channels`` as ``channels``.
    """

    def __init__(self, *, norm_cfg: dict | None = None, **kwargs) -> None:
        super().__init__(norm_cfg=norm_cfg, **kwargs)
        self.conv5 = self._block(self.in_channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps the backbone's feature maps to logits (B, num_classes, H, W) at the resolution of ``in_index``."""
        return self.conv_seg(self.conv5(self._transform_inputs(inputs)))
