"""The network in training: code that blocks share, and CUDA graphs that compute what the network does."""

import copy
import pickle

import pytest
import torch
from mmseg.registry import MODELS
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmseg_resnest import launch, training_pass
from mmseg_resnest.resnest import ResNeSt
from mmseg_resnest.training_pass import Capture, TrainingGraphs, _stand_ins, _untouched_buffers


def test_blocks_of_a_stage_share_their_code(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(training_pass.call, dynamic=False, backend='eager')
    monkeypatch.setattr(training_pass, '_compiled', lambda: compiled)
    model = ResNeSt(depth=50, radix_conv='split').train()
    with torch.autocast('cpu', torch.bfloat16):
        features = model(torch.randn(2, 3, 32, 32), training_pass.compiled_call)
    sum(feature.sum() for feature in features).backward()
    assert counters['stats']['unique_graphs'] == 9  # the stem, and for each stage its first block and the others
    assert not counters['graph_break']
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_parts_compute_the_same(monkeypatch):
    """With the compiler's front end and partition, and torch's own kernels."""
    torch._dynamo.reset()
    compiled = torch.compile(training_pass.call, dynamic=False, backend='aot_eager_decomp_partition')
    monkeypatch.setattr(training_pass, '_compiled', lambda: compiled)
    torch.manual_seed(0)
    model = ResNeSt(depth=14, output_stride=8, radix_conv='split').double().train()
    image = torch.randn(2, 3, 32, 32).double()
    results = []
    for call in (training_pass.call, training_pass.compiled_call):
        twin = copy.deepcopy(model)
        features = twin(image, call)
        features[-1].square().sum().backward()
        gradients = [p.grad for name, p in twin.named_parameters() if 'fc1.bias' not in name]  # before BN: 0
        results.append((*features, *gradients, *twin.buffers()))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()
        # Single values may cancel: their error is one of what they were summed from.
        assert torch.allclose(a, b, rtol=1e-8, atol=max(1e-10, 1e-12 * b.abs().max().item()))
    torch._dynamo.reset()


def test_copies_of_a_segmentor_make_graphs_of_their_own():
    head = dict(type='FCNHead', in_channels=2048, in_index=3, channels=8, num_classes=3, num_convs=1)
    model = MODELS.build(
        dict(
            type='mmseg_resnest.EncoderDecoder', backbone=dict(type='mmseg_resnest.ResNeSt', depth=14), decode_head=head
        )
    )
    model._graphs = TrainingGraphs(model._network, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._graphs is None
        assert twin.state_dict().keys() == model.state_dict().keys()
    assert model._graphs is not None


@pytest.mark.parametrize(
    'change',
    [
        lambda model: setattr(model, 'head', nn.Conv2d(8, 4, 1)),
        lambda model: setattr(model.head, 'weight', nn.Parameter(model.head.weight.detach().clone())),
        lambda model: setattr(model.head.weight, 'data', model.head.weight.data.clone()),
        lambda model: setattr(model.body[1], 'running_mean', torch.zeros(8)),
        lambda model: model.head.requires_grad_(False),
        lambda model: model.body[1].eval(),
        lambda model: model.body.append(nn.Identity()),
        lambda model: setattr(model.head, 'forward', lambda x: x),
        lambda model: setattr(model.head, '__class__', type('Other', (nn.Conv2d,), {})),
    ],
)
def test_changes_of_a_network_are_seen(change):
    model = Small()
    graphs = TrainingGraphs(model, model)
    graphs._parts = list(model.modules())
    before = graphs._read_state()
    model.body[0].weight.data += 1  # in place, as an optimiser and load_state_dict do
    assert graphs._read_state() == before
    change(model)
    assert graphs._read_state() != before


def test_buffers_are_given_back_with_their_values():
    norm = nn.BatchNorm2d(2)
    mean = norm.running_mean
    with _untouched_buffers(norm) as are_exchanged:
        norm(torch.randn(4, 2, 3, 3))
        assert not are_exchanged()
        norm.running_mean = torch.ones(2)
        assert are_exchanged()
    assert norm.running_mean is mean
    assert (mean == 0).all()
    assert norm.num_batches_tracked == 0


def test_stand_ins_have_the_gradients_and_leave_the_parameters_alone():
    model = Small()
    model.tied = model.head  # counted once
    model.body[0].bias.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = [name for name, _ in model.named_parameters()]
    before = list(model.parameters())
    with _stand_ins(model, parameters) as twins:
        loss = sum(output.square().mean() for output in model(torch.randn(2, 3, 8, 8)))
        gradients = torch.autograd.grad(loss, [*twins, *parameters], allow_unused=True)
    assert all(gradient is not None for gradient in gradients[: len(twins)])
    assert not any(gradient is not None for gradient in gradients[len(twins) :])
    for twin, parameter in zip(twins, parameters, strict=True):
        assert twin.data_ptr() == parameter.data_ptr()
        assert twin is not parameter
    assert [name for name, _ in model.named_parameters()] == names
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError), _stand_ins(model, parameters):
        raise RuntimeError
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


class Small(nn.Module):
    """A network with what a capture could spoil: batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images):
        features = self.body(images)
        return self.head(features), features


def make_small(dropout=0.0):
    torch.manual_seed(0)
    model = Small().cuda().train()
    model.body[3].p = dropout
    return model


def step(model, network, images):
    outputs = network(images)
    sum(output.square().mean() for output in outputs).backward()
    return [output.detach().clone() for output in outputs]


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 16, 16, generator=generator).cuda() for _ in range(count)]


def assert_same_gradients(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_graphs_compute_what_the_network_does():
    plain, graphed = make_small(), make_small()
    graphs = TrainingGraphs(graphed, graphed)
    for images in batches(3):
        plain.zero_grad()
        graphed.zero_grad()
        for a, b in zip(step(graphed, graphs, images), step(plain, plain, images), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert_same_gradients(graphed, plain)
    assert graphed.body[1].num_batches_tracked == 3  # the warm-up left no trace
    assert torch.allclose(graphed.body[1].running_var, plain.body[1].running_var)


class Graphed(nn.Module):
    """A network that replays graphs of itself, as a segmentor does."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.graphs = TrainingGraphs(network, network)

    def forward(self, images):
        return self.graphs(images)


@pytest.mark.gpu
@pytest.mark.parametrize('options', [{}, launch.PARALLEL], ids=['plain', 'as runs have it'])
def test_under_distributed_data_parallel(options, tmp_path):
    """Which ties the parameters to the stream that it is made on."""
    store = torch.distributed.FileStore(str(tmp_path / 'store'))
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        plain, graphed = make_small(), make_small()
        parallel = DistributedDataParallel(Graphed(graphed), device_ids=[torch.cuda.current_device()], **options)
        for images in batches(3):
            plain.zero_grad()
            graphed.zero_grad()
            step(plain, plain, images)
            step(graphed, parallel, images)
            assert_same_gradients(graphed, plain)
        assert parallel.module.graphs._capture is not None
    finally:
        torch.distributed.destroy_process_group()


class Keeping(Small):
    """Reads a parameter from a list of its own, as torch's LSTM does."""

    def __init__(self):
        super().__init__()
        self.kept = [self.head.weight]

    def forward(self, images):
        features = self.body(images)
        return F.conv2d(features, self.kept[0], self.head.bias), features


@pytest.mark.gpu
def test_parameters_read_from_elsewhere_are_trained_without_graphs():
    model = Keeping().cuda().train()
    graphs = TrainingGraphs(model, model)
    step(model, graphs, batches(1)[0])
    assert graphs._capture is None
    assert model.head.weight.grad.norm() > 0


@pytest.mark.gpu
def test_a_second_derivative_is_refused():
    network = make_small()
    output = TrainingGraphs(network, network)(*batches(1))[0]
    with pytest.raises(RuntimeError, match='no second derivative'):
        torch.autograd.grad(output.sum(), list(network.parameters()), create_graph=True, allow_unused=True)


@pytest.mark.gpu
def test_gradients_accumulate():
    plain, graphed = make_small(), make_small()
    graphs = TrainingGraphs(graphed, graphed)
    for images in batches(3):
        step(plain, plain, images)
        step(graphed, graphs, images)
    assert_same_gradients(graphed, plain)


@pytest.mark.gpu
def test_random_numbers_are_those_of_a_run_without_a_capture():
    model = make_small(dropout=0.5)
    graphs = TrainingGraphs(model, model)
    torch.cuda.manual_seed(3)
    graphs._renew(batches(1)[0])
    after = torch.rand(4, device='cuda')
    torch.cuda.manual_seed(3)
    assert torch.equal(after, torch.rand(4, device='cuda'))
    first, second = (step(model, graphs, batches(1)[0])[1] for _ in range(2))
    assert not torch.equal(first == 0, second == 0)  # dropout draws anew in every replay


@pytest.mark.gpu
def test_another_batch_size_runs_without_graphs():
    plain, graphed = make_small(), make_small()
    graphs = TrainingGraphs(graphed, graphed)
    for images in (*batches(1), *batches(1, size=2), *batches(1)):
        plain.zero_grad()
        graphed.zero_grad()
        step(plain, plain, images)
        step(graphed, graphs, images)
        assert_same_gradients(graphed, plain)


@pytest.mark.gpu
def test_what_has_changed_is_captured_anew():
    plain, graphed = make_small(), make_small()
    graphs = TrainingGraphs(graphed, graphed)
    images = batches(1)[0]
    step(graphed, graphs, images)
    for model in (plain, graphed):
        model.head.requires_grad_(False)
        model.body[1].eval()
        model.body[0].weight.data = model.body[0].weight.data + 1
        model.zero_grad()
    for buffer, other in zip(plain.buffers(), graphed.buffers(), strict=True):
        buffer.copy_(other)
    step(plain, plain, images)
    step(graphed, graphs, images)
    assert graphed.head.weight.grad is None
    assert torch.allclose(graphed.body[0].weight.grad, plain.body[0].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize('graphed', [False, True])
def test_outputs_that_nothing_trains(graphed):
    """The features of a frozen body, which a head of its own loss reads beside the logits."""
    model = make_small()
    model.body.requires_grad_(False)
    images = batches(1)[0]
    logits, features = (TrainingGraphs(model, model) if graphed else model)(images)
    assert logits.requires_grad and not features.requires_grad
    logits.square().mean().backward()
    assert model.head.weight.grad.norm() > 0
    assert model.body[0].weight.grad is None
    model.head.requires_grad_(False)  # nothing is left
    assert not any(output.requires_grad for output in TrainingGraphs(model, model)(images))


@pytest.mark.gpu
def test_only_the_last_forward_pass_has_a_gradient_and_only_one():
    model = make_small()
    graphs = TrainingGraphs(model, model)
    images = batches(1)[0]
    first, second = graphs(images)[0].sum(), graphs(images)[0].sum()
    with pytest.raises(RuntimeError, match=r'another forward pass than the last.*cuda_graphs=False'):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='a second one of it'):
        second.backward()


class Averaging(Small):
    """Exchanges a buffer in each forward pass, as mmsegmentation's EMAHead does."""

    def __init__(self):
        super().__init__()
        self.register_buffer('average', torch.zeros(()))

    def forward(self, images):
        self.average = 0.5 * self.average + images.mean().detach()
        return super().forward(images)


@pytest.mark.gpu
def test_a_network_that_exchanges_its_buffers_runs_without_graphs(monkeypatch):
    """And is captured once, to find that out."""
    captured = []
    monkeypatch.setattr(training_pass, 'Capture', lambda *args: captured.append(Capture(*args)) or captured[-1])
    model = Averaging().cuda().train()
    graphs = TrainingGraphs(model, model)
    expected = 0
    for images in batches(3):
        graphs(images)
        expected = 0.5 * expected + images.mean()
        assert torch.isclose(model.average, expected)
    assert [capture.obstacle for capture in captured] == ['it exchanges its own buffers']


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_says_how_to_go_on():
    model = make_small()

    def network(images):
        return (model(images)[0] * torch.rand(1).to(images.device),)

    with pytest.raises(RuntimeError, match=r'cannot be captured as CUDA graphs \(.+\); model\.cuda_graphs=False'):
        TrainingGraphs(network, model)(batches(1)[0])
