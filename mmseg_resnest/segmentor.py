"""The segmentation model that finishes the logits of any mmsegmentation head, in one place."""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature

import torch
from mmengine.logging import print_log
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss, cross_entropy
from mmseg.models.segmentors import EncoderDecoder as _EncoderDecoder
from mmseg.structures import SegDataSample
from mmseg.utils import OptSampleList, SampleList, add_prefix
from torch import Tensor, nn

from mmseg_resnest.inference import cudnn_search, finish, placement_of, slide
from mmseg_resnest.ops import Placement, upsample_cross_entropy
from mmseg_resnest.registry import MODELS
from mmseg_resnest.resnest import ResNeSt
from mmseg_resnest.training_pass import TrainingGraphs, call, compiled_call

# The methods through which mmsegmentation's EncoderDecoder computes its losses, and cascades change them.
LOSS_METHODS = ('extract_feat', '_decode_head_forward_train', '_auxiliary_head_forward_train')
# Those through which it predicts, and the one by which this project's gets logits.
PREDICT_METHODS = ('inference', 'whole_inference', 'encode_decode', 'postprocess_result', '_forward')


@MODELS.register_module()
class EncoderDecoder(_EncoderDecoder):
    """mmsegmentation's EncoderDecoder whose training never stores full-resolution logits.

    A head whose loss is the softmax cross-entropy of its upsampled logits is finished by
    ``ops.upsample_cross_entropy``; any other takes mmsegmentation's own path. The log says once which. The criterion of
    a fused loss is not called, and so no hook that is registered on it. Names and values of the losses are
    mmsegmentation's, but where a loss is averaged over what is not ignored (``avg_non_ignore``, ``class_weight``): that
    is counted over all ranks.

    On a GPU training runs channels-last, compiled and as CUDA graphs; a CPU does none of it.

    Args:
        *args: mmsegmentation's EncoderDecoder's.
        fused_loss: Whether to fuse the losses that can be.
        channels_last: Whether weights and images are channels-last on a GPU.
        compiled: Whether to compile the blocks of the backbone and the heads on a GPU, at the first batch.
        cuda_graphs: Whether to capture the network's forward and backward pass, at the first batch. Their memory is
            kept. Heads whose losses are not fused run outside of them.
        **kwargs: mmsegmentation's EncoderDecoder's.

    Raises:
        ValueError: A switch is neither True nor False.
    """

    def __init__(
        self,
        *args,
        fused_loss: bool = True,
        channels_last: bool = True,
        compiled: bool = True,
        cuda_graphs: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        switches = dict(fused_loss=fused_loss, channels_last=channels_last, compiled=compiled, cuda_graphs=cuda_graphs)
        for name, value in switches.items():
            if type(value) is not bool:  # 'off' from a command line would switch it on
                raise ValueError(f'EncoderDecoder: {name}={value!r}; expected True or False')
        self.channels_last = channels_last
        self.compiled = compiled
        self.cuda_graphs = cuda_graphs
        self.fused_loss = fused_loss
        self._graphs: TrainingGraphs | None = None
        self._reasons: dict[str, str] = {}
        self._fused: list[str] = []

    def __getstate__(self) -> dict:
        """Copies, as an average of the weights makes them, capture graphs of their own, and predict as the model is."""
        return super().__getstate__() | dict(_graphs=None, network=None)

    def _apply(self, *args, **kwargs) -> 'EncoderDecoder':
        """Forgets graphs of predictions: where the model is moved or converted, its weights may get another place."""
        if self.network is not None:
            self.network.forget()
        return super()._apply(*args, **kwargs)

    def to(self, *args, **kwargs) -> 'EncoderDecoder':
        """Moves the model; on a GPU its weights become channels-last."""
        return super().to(*args, **kwargs)._lay_out()

    def cuda(self, device: int | str | torch.device | None = None) -> 'EncoderDecoder':
        """Moves the model; its weights become channels-last."""
        return super().cuda(device)._lay_out()

    def _lay_out(self) -> 'EncoderDecoder':
        if self.channels_last and next(self.parameters()).is_cuda:
            super().to(memory_format=torch.channels_last)
        return self

    def _heads(self) -> dict[str, nn.Module]:
        """Returns the heads under the prefixes of their losses."""
        if not self.with_auxiliary_head:
            return dict(decode=self.decode_head)
        if isinstance(self.auxiliary_head, nn.ModuleList):
            return dict(decode=self.decode_head) | {f'aux_{i}': head for i, head in enumerate(self.auxiliary_head)}
        return dict(decode=self.decode_head, aux=self.auxiliary_head)

    def forward(self, inputs: Tensor, data_samples: OptSampleList = None, mode: str = 'tensor') -> dict | list | Tensor:
        """As mmsegmentation's; a subclass with a loss of its own gets int64 labels, as mmsegmentation has them."""
        if mode == 'loss' and not keeps(self, EncoderDecoder, 'loss'):
            widen_labels(data_samples)
        return super().forward(inputs, data_samples, mode)

    def loss(self, inputs: Tensor, data_samples: SampleList) -> dict[str, Tensor]:
        """Returns the losses and accuracies of all heads for images (N, 3, H, W).

        A subclass that changes how mmsegmentation's EncoderDecoder gets there takes its path.
        """
        self._choose_paths()
        if 'model' in self._reasons:
            widen_labels(data_samples)
            return super().loss(inputs, data_samples)
        outputs = self._run_network(inputs)
        logits = dict(zip(self._fused, outputs, strict=False))
        features = outputs[len(self._fused) :]
        if features:
            widen_labels(data_samples)
        losses = {}
        for name, head in self._heads().items():
            if name in logits:
                head_losses = fused_loss(head, logits[name], head._stack_batch_gt(data_samples).squeeze(1))
            else:
                head_losses = head.loss(features, data_samples, self.train_cfg)
            losses |= add_prefix(head_losses, name)
        return losses

    def _choose_paths(self) -> None:
        """Finds out which path the loss of each head takes, and logs it where that is new."""
        changed = [name for name in LOSS_METHODS if not keeps(self, _EncoderDecoder, name)]
        if changed:
            reasons = dict(model=f'{type(self).__name__} has a {changed[0]} of its own')
        elif self.fused_loss:
            reasons = {name: why_not_fused(head) for name, head in self._heads().items()}
        else:
            reasons = dict.fromkeys(self._heads(), 'fused_loss=False')
        if reasons != self._reasons:
            for name, reason in reasons.items():
                part = self if changed else self._heads()[name]
                path = f"mmsegmentation's own: {reason}" if reason else 'fused with the upsampling'
                print_log(f'{name}: {type(part).__name__}, loss {path}', logger='current')
            self._reasons = reasons
            self._fused = [name for name, reason in reasons.items() if not reason]
            self._graphs = None

    def _run_network(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns what ``_network`` does, by the fastest way that is switched on."""
        if images.is_cuda and self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not (images.is_cuda and self.cuda_graphs and torch.is_grad_enabled()):
            return self._network(images)
        if self._graphs is None:
            self._graphs = TrainingGraphs(self._network, self)
        return self._graphs(images)

    def _network(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the logits of the heads whose loss is fused and, if there are others, the feature maps."""
        run = compiled_call if images.is_cuda and self.compiled else call
        in_parts = _lets_call_its_parts(self.backbone)
        features = self.backbone(images, call=run) if in_parts else run(self.backbone, images)
        if self.with_neck:
            features = run(self.neck, features)
        heads = self._heads()
        logits = [run(heads[name], features) for name in self._fused]
        return (*logits, *(features if len(logits) < len(heads) else ()))

    # What maps images (N, 3, H, W) to low-resolution logits in prediction, if not the model as it is: network.py's.
    network: Callable[[Tensor], Tensor] | None = None

    def predict(self, inputs: Tensor, data_samples: OptSampleList = None) -> SampleList:
        """Adds the label map of each image, as mmsegmentation's EncoderDecoder does, from low-resolution logits.

        ``seg_logits`` are computed when they are first read. ``test_cfg.upsample_argmax`` chooses an implementation;
        ``'exact'`` gives mmsegmentation's label map to the last pixel. A head with a ``predict`` of its own takes
        mmsegmentation's path, and so does a subclass that changes how mmsegmentation's EncoderDecoder predicts.

        Args:
            inputs: (N, 3, H, W), normalised.
            data_samples: Those of the images; None: images are as large as their files, and samples are made.

        Returns:
            The samples with ``pred_sem_seg`` (1, H, W), uint8 for up to 256 classes, ``seg_logits`` (C, H, W), and
            ``finite``: whether the logits are (``inference.check_finite``).
        """
        if not predicts_from_logits(self):
            with cudnn_search(enabled=False):
                return super().predict(inputs, data_samples)
        samples = [SegDataSample() for _ in inputs] if data_samples is None else data_samples
        logits, placements = self.placed_logits(inputs, samples)
        threshold = self.decode_head.threshold if self.out_channels == 1 else None
        finish(logits, samples, placements, threshold, self.test_cfg.get('upsample_argmax'))
        return samples

    def placed_logits(self, inputs: Tensor, samples: SampleList) -> tuple[Tensor, list[Placement]]:
        """Returns logits (N, C, h, w) of images (N, 3, H, W), and how those of each come to lie on its image.

        They are full-resolution ones for ``test_cfg.mode='slide'``.

        Raises:
            ValueError: ``test_cfg.mode`` is none.
        """
        mode = self.test_cfg.get('mode', 'whole')
        if mode not in ('slide', 'whole'):
            raise ValueError(f'model.test_cfg.mode={mode!r}; expected slide or whole')
        if mode == 'slide':
            via = inputs.shape[2:]
            logits = self.slide_inference(inputs, [sample.metainfo for sample in samples])
        else:
            first = samples[0].metainfo
            via = first.get('pad_shape') or first.get('img_shape') or inputs.shape[2:]
            logits = self.low_resolution_logits(inputs)
        return logits, [placement_of(sample, tuple(via[:2]), self.align_corners) for sample in samples]

    def low_resolution_logits(self, inputs: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to the decode head's logits (N, C, h, w); cuDNN does not search."""
        with cudnn_search(enabled=False):
            return self._forward(inputs) if self.network is None else self.network(inputs)

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Returns the logits (N, C, H, W) of images, averaged over windows that the network gets in batches."""
        if not predicts_from_logits(self):
            return super().slide_inference(inputs, batch_img_metas)
        crop_size, stride = self.test_cfg.crop_size, self.test_cfg.stride
        return slide(
            self.low_resolution_logits, inputs, crop_size, stride, self.out_channels, align_corners=self.align_corners
        )


def widen_labels(samples: SampleList) -> None:
    """Makes the label maps of samples int64, as torch's losses take them, where PackByteLabels has left them uint8."""
    for sample in samples:
        if 'gt_sem_seg' in sample:  # a head may learn from something else
            sample.gt_sem_seg.data = sample.gt_sem_seg.data.long()


def keeps(part: nn.Module, owner: type, *methods: str) -> bool:
    """Whether methods are those that ``owner`` has: no subclass has others, and the object itself neither."""
    # Not by the bound method's function, which is another to torch.compile, and the same if borrowed from a sibling.
    return all(name not in vars(part) and getattr(type(part), name, None) is getattr(owner, name) for name in methods)


def _lets_call_its_parts(backbone: nn.Module) -> bool:
    """Whether the caller of a backbone can call its parts: a subclass of ResNeSt may have a plain ``forward``.

    One that was put on the object is a whole: MMEngine's activation checkpointing trains nothing unless it is compiled
    together with what it wraps.
    """
    if not isinstance(backbone, ResNeSt) or 'forward' in vars(backbone):
        return False
    return 'call' in signature(type(backbone).forward, follow_wrapped=False).parameters


def has_plain_predict(head: nn.Module) -> bool:
    """Whether a head's prediction is its upsampled output, as BaseDecodeHead has it."""
    return keeps(head, BaseDecodeHead, 'predict', 'predict_by_feat')


def predicts_from_logits(model: _EncoderDecoder) -> bool:
    """Whether a segmentor's prediction is its head's upsampled output, as mmsegmentation's EncoderDecoder has it."""
    return keeps(model, _EncoderDecoder, *PREDICT_METHODS) and has_plain_predict(model.decode_head)


def why_not_fused(head: nn.Module) -> str:
    """Returns why a head's loss is not what ``fused_loss`` computes; empty if it is."""
    loss = getattr(head, 'loss_decode', None)
    if not keeps(head, BaseDecodeHead, 'loss', 'loss_by_feat', '_stack_batch_gt'):
        return f'{type(head).__name__} has a loss of its own'
    if head.sampler is not None:
        return 'a sampler chooses pixels'
    if type(loss) is not CrossEntropyLoss:
        return f"{type(loss).__name__} is not mmsegmentation's CrossEntropyLoss alone"
    if loss.use_sigmoid or loss.use_mask or loss.reduction != 'mean':
        return 'it is no mean softmax cross-entropy'
    if loss.cls_criterion is not cross_entropy or not keeps(loss, CrossEntropyLoss, 'forward'):
        return 'its criterion was replaced'
    if loss.class_weight is not None and min(loss.class_weight) < 0:
        return 'a class weight is negative'
    return ''


def fused_loss(head: BaseDecodeHead, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns a head's loss and accuracy, as ``BaseDecodeHead.loss_by_feat`` names them.

    Args:
        head: A head for which ``why_not_fused`` knows no reason.
        logits: (N, C, h, w), its output.
        labels: (N, H, W).
    """
    criterion = head.loss_decode
    weight = None
    if criterion.class_weight is not None:
        weight = _on_device(tuple(map(float, criterion.class_weight)), logits.device)
    loss, accuracy = upsample_cross_entropy(
        logits,
        labels,
        ignore_index=head.ignore_index,
        class_weight=weight,
        align_corners=head.align_corners,
        # mmsegmentation divides by the labels' weights where classes have any
        average='valid' if criterion.avg_non_ignore or weight is not None else 'all',
    )
    return {criterion.loss_name: criterion.loss_weight * loss, 'acc_seg': accuracy}


@lru_cache(maxsize=16)  # a copy at each step would wait for the GPU
@torch.inference_mode(False)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
