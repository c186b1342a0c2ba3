"""Synchronised batch norm: two processes compute what torch's batch norm does on both batches at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import build_norm_layer
from mmengine.runner import runner as mmengine_runner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmseg_resnest.norm import SyncBatchNorm, batch_norm_parts

CHANNELS = [4, 3, 5]
# What two processes run: the layer's options, and the compiler's backend; it must keep all in one graph.
CASES = {
    'plain': (dict(), None),
    'cumulative': (dict(momentum=None), None),
    'untracked': (dict(track_running_stats=False), None),
    'not affine': (dict(affine=False), None),
    'compiled': (dict(), 'inductor'),
    'compiled cumulative': (dict(momentum=None), 'aot_eager'),
}
WORLD = 2


def batches(sizes, dtype=torch.float64):
    """For each process the parts of its batch, with a mean that is large beside the deviation; and a gradient each."""
    generator = torch.Generator().manual_seed(1)

    def draw(size, offset):
        return [
            (torch.randn(size, c, 6, 5, generator=generator, dtype=torch.float64) + offset).to(dtype) for c in CHANNELS
        ]

    return [(draw(size, 1000), draw(size, 0)) for size in sizes]


def layer(kind, options, dtype=torch.float64):
    norm = kind(sum(CHANNELS), **options).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 2, len(parameter)))
    return norm


def run_layer(function, norm, parts, gradients):
    """Two training batches; returns outputs, input gradients, parameter gradients and buffers, in that order."""
    for part in parts:
        part.requires_grad_()
    function([part.detach() * 2 for part in parts], norm)  # the running statistics see another batch first
    outputs = function(parts, norm)
    loss = sum((out * g.to(out)).sum() for out, g in zip(outputs, gradients, strict=True))
    loss.backward()
    return dict(
        outputs=[out.detach() for out in outputs],
        inputs=[part.grad for part in parts],
        parameters=[parameter.grad for parameter in norm.parameters()],
        buffers=[buffer.clone() for buffer in norm.buffers()],
    )


def two_processes(sizes, results):
    """One process of two: runs every case and writes what it got."""
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    for name, (options, backend) in CASES.items():
        torch._dynamo.reset()
        function = torch.compile(batch_norm_parts, fullgraph=True, backend=backend) if backend else batch_norm_parts
        found = run_layer(function, layer(SyncBatchNorm, options), *batches(sizes)[rank])
        torch.save(found, results / f'{name}_{rank}.pt')
    half = run_layer(batch_norm_parts, layer(SyncBatchNorm, {}, torch.float32), *batches(sizes, torch.bfloat16)[rank])
    torch.save(half, results / f'half_{rank}.pt')
    torch.save([buffers_after(values) for values in ([1.0], [])], results / f'few_{rank}.pt')
    messages = count_messages(batches(sizes)[rank])
    (results / f'messages_{rank}.txt').write_text(' '.join(messages))
    torch.distributed.destroy_process_group()


def buffers_after(values):
    """The running statistics after rank 0 has had these values of the one channel, and the other none."""
    norm = SyncBatchNorm(1)
    mine = values if torch.distributed.get_rank() == 0 else []
    norm(torch.tensor(mine).view(-1, 1, 1, 1))
    return [norm.running_mean.item(), norm.running_var.item()]


def count_messages(batch):
    """The collectives of one forward and backward pass."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == '_c10d_functional' and function.__name__.startswith('all_'):
                calls.append(function.__name__.split('.')[0])
            return function(*args, **(kwargs or {}))

    norm = layer(SyncBatchNorm, {})
    parts, gradients = batch
    parts = [part.requires_grad_() for part in parts]
    with Record():
        outputs = batch_norm_parts(parts, norm)
        torch.autograd.backward(outputs, gradients)
    return calls


def two_gpus(sizes):
    """One process of two, each on a GPU of its own: ours and torch's own SyncBatchNorm, by NCCL."""
    rank = int(os.environ['RANK'])
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group('nccl')

    def torchs(parts, norm):
        return norm(torch.cat(parts, 1)).split(CHANNELS, 1)

    for name, (options, backend) in CASES.items():
        torch._dynamo.reset()
        function = torch.compile(batch_norm_parts, fullgraph=True, backend=backend) if backend else batch_norm_parts
        results = []
        for kind, run in ((SyncBatchNorm, function), (nn.SyncBatchNorm, torchs)):
            parts, gradients = ([tensor.cuda() for tensor in tensors] for tensors in batches(sizes)[rank])
            results.append(run_layer(run, layer(kind, options).cuda(), parts, gradients))
        for key, truth in results[1].items():
            # Without images torch's has no gradients, where ours are 0 or empty.
            truth = [torch.zeros_like(mine) if t is None else t for mine, t in zip(results[0][key], truth, strict=True)]
            torch.testing.assert_close(results[0][key], truth, rtol=1e-10, atol=1e-10, msg=f'{name}: {key}')
    torch.distributed.destroy_process_group()


def launch(folder, sizes):
    """By torchrun: where one process fails, the other would wait for it."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(WORLD)]
    command += [__file__, str(folder), *map(str, sizes)]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1'), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module', params=[(3, 2), (4, 0)], ids=['uneven', 'one without images'])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('norm')
    launch(folder, request.param)
    return request.param, folder


def one_process(sizes, options, dtype=torch.float64, mode='train'):
    """torch's batch norm of all batches at once."""
    both = batches(sizes, dtype)
    parts, gradients = (
        [torch.cat(tensors).to(torch.float64) for tensors in zip(*its, strict=True)] for its in zip(*both, strict=True)
    )
    norm = getattr(layer(nn.BatchNorm2d, options), mode)()
    return run_layer(lambda parts, norm: norm(torch.cat(parts, 1)).split(CHANNELS, 1), norm, parts, gradients)


def compare(ranks, expected, tolerance):
    for key in ('outputs', 'inputs'):
        for part, truth in enumerate(expected[key]):
            whole = torch.cat([rank[key][part] for rank in ranks])
            torch.testing.assert_close(whole.double(), truth, rtol=tolerance, atol=tolerance)
    for i, truth in enumerate(expected['parameters']):
        summed = sum(rank['parameters'][i].double() for rank in ranks)
        torch.testing.assert_close(summed, truth, rtol=tolerance, atol=tolerance)
    for rank in ranks:
        assert len(rank['buffers']) == len(expected['buffers'])
        for value, truth in zip(rank['buffers'], expected['buffers'], strict=True):
            torch.testing.assert_close(value.double(), truth.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_two_processes_are_one_of_both_batches(name, found):
    sizes, folder = found
    ranks = [torch.load(folder / f'{name}_{rank}.pt') for rank in range(WORLD)]
    compare(ranks, one_process(sizes, CASES[name][0]), 1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason='one GPU a process')
@pytest.mark.parametrize('sizes', [(3, 2), (4, 0)], ids=['uneven', 'one without images'])
def test_two_gpus_give_what_torchs_gives(sizes):
    launch('nccl', sizes)


@pytest.mark.slow
def test_half_precision_has_statistics_in_float32(found):
    sizes, folder = found
    ranks = [torch.load(folder / f'half_{rank}.pt') for rank in range(WORLD)]
    assert {out.dtype for rank in ranks for out in rank['outputs'] + rank['inputs']} == {torch.bfloat16}
    truth = one_process(sizes, {}, torch.bfloat16)
    for value, expected in zip(ranks[0]['buffers'], truth['buffers'], strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)
    compare([{**rank, 'buffers': truth['buffers']} for rank in ranks], truth, 0.03)  # bfloat16's own 2^-8


@pytest.mark.slow
def test_one_value_has_no_variance_and_none_changes_nothing(found):
    _, folder = found
    for rank in range(WORLD):
        one, none = torch.load(folder / f'few_{rank}.pt')
        assert one == pytest.approx([0.1, 0.9])  # a tenth of mean 1 and of variance 0
        assert none == [0, 1]


@pytest.mark.slow
def test_a_layer_sends_one_message_each_way(found):
    _, folder = found
    for rank in range(WORLD):
        assert (folder / f'messages_{rank}.txt').read_text() == 'all_gather_into_tensor all_reduce'


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('kind', [nn.BatchNorm2d, SyncBatchNorm])
@pytest.mark.parametrize(
    'options', [{}, dict(momentum=None), dict(track_running_stats=False), dict(affine=False), dict(eps=0.1)], ids=str
)
def test_parts_in_one_process_are_torchs_batch_norm(options, kind, mode):
    parts, gradients = batches([3])[0]
    expected = one_process([3], options, mode=mode)
    found = run_layer(batch_norm_parts, getattr(layer(kind, options), mode)(), parts, gradients)
    compare([found], expected, 1e-12)


def test_one_process_is_bit_for_bit_torchs():
    x = torch.randn(2, 12, 4, 4)
    ours, torchs = SyncBatchNorm(12), nn.BatchNorm2d(12)
    for _ in range(2):
        assert torch.equal(ours(x), torchs(x))
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(torch.equal(value, torchs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert torch.equal(ours.eval()(x), torchs.eval()(x))
    assert torch.equal(SyncBatchNorm(12)(x[:, :, 0, 0]), nn.BatchNorm1d(12)(x[:, :, 0, 0]))


def test_parts_of_other_channels_are_refused():
    with pytest.raises(
        ValueError, match=r'batch norm of 12 channels; got \(B, C, ...\) of \(2, 4, 1, 1\), \(2, 7, 1, 1\)'
    ):
        batch_norm_parts([torch.zeros(2, 4, 1, 1), torch.zeros(2, 7, 1, 1)], nn.BatchNorm2d(12))


def test_a_config_builds_it():
    name, norm = build_norm_layer(dict(type='mmseg_resnest.SyncBN', eps=1e-3, requires_grad=False), 8)
    assert (name, type(norm), norm.eps, norm.num_features) == ('bn', SyncBatchNorm, 1e-3, 8)
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_sync_bn_of_a_runner_converts_and_keeps_the_tensors():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, momentum=None)).eval())
    weight, state = model[1][0].weight, {key: value.clone() for key, value in model.state_dict().items()}
    converted = mmengine_runner.convert_sync_batchnorm(model, 'mmseg_resnest.SyncBN')
    norm = converted[1][0]
    assert (type(norm), norm.eps, norm.momentum, norm.training) == (SyncBatchNorm, 1e-3, None, False)
    assert norm.weight is weight
    assert list(converted.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    assert type(mmengine_runner.convert_sync_batchnorm(nn.BatchNorm2d(8), 'torch')) is nn.SyncBatchNorm
    assert type(mmengine_runner.convert_sync_batchnorm(nn.BatchNorm2d(8), 'mmseg_resnest.SyncBN')) is SyncBatchNorm
    with pytest.raises(ValueError, match='sync_bn should be'):
        mmengine_runner.convert_sync_batchnorm(nn.BatchNorm2d(8), 'other')


def test_a_converted_layer_keeps_its_group():
    group = object()
    assert SyncBatchNorm.convert(nn.SyncBatchNorm(8, process_group=group)).process_group is group


if __name__ == '__main__':
    folder, *sizes = sys.argv[1:]
    sizes = [int(size) for size in sizes]
    two_gpus(sizes) if folder == 'nccl' else two_processes(sizes, Path(folder))
