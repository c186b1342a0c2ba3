"""The optimiser wrapper: what it computes in, and that its steps are the optimiser's."""

import copy
import math

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmseg_resnest.optim import AutocastOptimWrapper

LEARNING_RATE = 1.0


class Network(nn.Module):
    """Two layers that remember what number format they ran in."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 1)
        self.dtype = None

    def forward(self, x):
        hidden = self.first(x)
        self.dtype = hidden.dtype
        return self.second(hidden.relu()).float()


def make(optimizer='SGD', wrapper=AutocastOptimWrapper, groups=1, device='cpu', **options):
    torch.manual_seed(0)
    network = Network().to(device)
    parameters = network.parameters() if groups == 1 else [dict(params=[p]) for p in network.parameters()]
    settings = dict(lr=LEARNING_RATE, momentum=0.9) if optimizer == 'SGD' else dict(lr=0.01)
    return network, wrapper(optimizer=getattr(torch.optim, optimizer)(parameters, **settings), **options)


def batches(count, device='cpu'):
    torch.manual_seed(1)
    return [torch.randn(16, 4, device=device) for _ in range(count)]


def loss_of(network, x):
    """A hundredth of the mean squared error: small, so that its first scale does not overflow float16."""
    return (network(x) - x.sum(1, keepdim=True)).square().mean() / 100


def train(network, wrapper, data):
    losses = []
    for x in data:
        with wrapper.optim_context(network):
            loss = loss_of(network, x)
        wrapper.update_params(loss)
        losses.append(loss.item())
    return losses


def assert_same_parameters(network, other, **tolerance):
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_cpu_computes_in_float32_exactly_as_the_stock_wrapper(dtype):
    network, wrapper = make(dtype=dtype)
    stock_network, stock = make(wrapper=OptimWrapper)
    losses = train(network, wrapper, batches(3))
    assert network.dtype == torch.float32
    assert losses == train(stock_network, stock, batches(3))
    assert_same_parameters(network, stock_network, rtol=0, atol=0)


@pytest.mark.parametrize('counts', [0, 1.5, 'two'])
def test_accumulates_over_whole_batches(counts):
    with pytest.raises(ValueError, match=f'accumulative_counts={counts!r}; expected an integer of at least 1'):
        make(accumulative_counts=counts)


def test_autocast_cpu_is_true_or_false():
    with pytest.raises(ValueError, match="autocast_cpu='off'; expected True or False"):
        make(autocast_cpu='off')


def test_default_is_bfloat16():
    _, wrapper = make()
    assert wrapper.dtype == torch.bfloat16


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_autocast_on_a_cpu_when_asked(dtype, recwarn):
    network, wrapper = make(dtype=dtype, autocast_cpu=True)
    reference, stock = make(wrapper=OptimWrapper)
    losses = train(network, wrapper, batches(20))
    assert network.dtype == getattr(torch, dtype)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert losses[-1] < 0.2 * losses[0]
    exact = train(reference, stock, batches(20))
    assert losses == pytest.approx(exact, rel=0.1)
    assert (losses == exact) == (dtype == 'float32')
    assert not [w for w in recwarn if 'autocast' in str(w.message)]
    # Outside of the context nothing is cast.
    network(batches(1)[0])
    assert network.dtype == torch.float32


def test_only_float16_scales_the_loss():
    scales = {}
    for dtype in ('bfloat16', 'float16', 'float32'):
        network, wrapper = make(dtype=dtype, autocast_cpu=True)
        with wrapper.optim_context(network):
            loss = loss_of(network, batches(1)[0])
        wrapper.backward(loss)
        exact = copy.deepcopy(network)
        exact.zero_grad()
        loss_of(exact, batches(1)[0]).backward()
        scales[dtype] = (network.second.bias.grad / exact.second.bias.grad).item()
    assert scales == pytest.approx({'bfloat16': 1, 'float16': 2**16, 'float32': 1}, rel=0.05)


def test_float16_skips_a_step_that_overflows():
    network, wrapper = make(dtype='float16', autocast_cpu=True)
    before = copy.deepcopy(network)
    loss = loss_of(network, batches(1)[0] * 1e17)
    assert loss.isfinite()
    assert not (loss * 2**16 * 1e17).isfinite()  # about a gradient
    wrapper.update_params(loss)
    assert_same_parameters(network, before, rtol=0, atol=0)
    assert wrapper.loss_scaler.get_scale() == 2**15
    assert wrapper.last_check.finite
    train(network, wrapper, batches(1))
    assert not torch.equal(network.second.weight, before.second.weight)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_accumulation_equals_one_large_batch(dtype):
    network, wrapper = make(dtype=dtype, accumulative_counts=2)
    large_network, large = make(dtype=dtype)
    x, y = batches(2)
    train(network, wrapper, [x])
    assert_same_parameters(network, large_network, rtol=0, atol=0)
    train(network, wrapper, [y])
    train(large_network, large, [torch.cat([x, y])])
    assert_same_parameters(network, large_network, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_gradients_are_clipped_unscaled(dtype):
    network, wrapper = make(dtype=dtype, autocast_cpu=True, clip_grad=dict(max_norm=0.001))
    before = copy.deepcopy(network)
    train(network, wrapper, batches(1))
    pairs = zip(network.parameters(), before.parameters(), strict=True)
    change = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    assert change.item() == pytest.approx(LEARNING_RATE * 0.001, rel=1e-3)
    logged = wrapper.message_hub.get_scalar('train/grad_norm').current()
    assert logged > 0.001


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_state_goes_through_a_checkpoint(tmp_path, dtype, groups):
    network, wrapper = make('Adam', dtype=dtype, autocast_cpu=True, groups=groups)
    train(network, wrapper, batches(3))
    if dtype == 'float16':
        wrapper.loss_scaler.update(2.0**7)
    torch.save(dict(model=network.state_dict(), optimizer=wrapper.state_dict()), tmp_path / 'checkpoint.pth')
    checkpoint = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)
    assert ('loss_scaler' in checkpoint['optimizer']) == (dtype == 'float16')
    resumed_network, resumed = make('Adam', dtype=dtype, autocast_cpu=True, groups=groups)
    resumed_network.load_state_dict(checkpoint['model'])
    resumed.load_state_dict(checkpoint['optimizer'])
    assert resumed.loss_scaler.get_scale() == (2**7 if dtype == 'float16' else 1)
    assert train(resumed_network, resumed, batches(3)) == train(network, wrapper, batches(3))
    assert_same_parameters(resumed_network, network, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_state_of_the_stock_wrapper_and_back(dtype):
    network, stock = make('Adam', wrapper=OptimWrapper)
    train(network, stock, batches(3))
    ours = copy.deepcopy(network)
    wrapper = AutocastOptimWrapper(optimizer=torch.optim.Adam(ours.parameters(), lr=0.01), dtype=dtype)
    wrapper.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert train(ours, wrapper, batches(2)) == train(network, stock, batches(2))
    back = copy.deepcopy(ours)
    stock = OptimWrapper(optimizer=torch.optim.Adam(back.parameters(), lr=0.01))
    stock.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    assert train(back, stock, batches(2)) == train(ours, wrapper, batches(2))


@pytest.mark.parametrize(('saved', 'resumed'), [('float16', 'bfloat16'), ('bfloat16', 'float16')])
def test_state_of_another_number_format(saved, resumed):
    network, wrapper = make(dtype=saved, autocast_cpu=True)
    train(network, wrapper, batches(3))
    _, other = make(dtype=resumed, autocast_cpu=True)
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    (momenta, expected) = ([s['momentum_buffer'] for s in w.optimizer.state.values()] for w in (other, wrapper))
    assert len(momenta) == 4
    assert all(torch.equal(a, b) for a, b in zip(momenta, expected, strict=True))
    assert other.loss_scaler.get_scale() == (2**16 if resumed == 'float16' else 1)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_steps_after_ones_own_backward_are_those_of_the_stock_wrapper(dtype):
    networks = []
    for wrapper_type, options in ((AutocastOptimWrapper, dict(dtype=dtype)), (OptimWrapper, {})):
        network, wrapper = make(wrapper=wrapper_type, **options)
        for x in batches(3):
            loss_of(network, x).backward()
            wrapper.step()
            wrapper.zero_grad()
        networks.append(network)
    assert_same_parameters(*networks, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('optimizer', 'options'),
    [
        (torch.optim.SGD, dict(lr=0.1, momentum=0.9, fused=True)),
        (torch.optim.AdamW, dict(lr=0.01, betas=[0.9, 0.99])),  # as from a config
    ],
)
def test_groups_of_the_same_options_step_together(optimizer, options, monkeypatch):
    sides = []
    for wrapper in (OptimWrapper, AutocastOptimWrapper):
        torch.manual_seed(0)
        network = Network()
        groups = [dict(params=[p], weight_decay=0.1 * (p.ndim > 1)) for p in network.parameters()]
        sides.append((network, wrapper(optimizer=optimizer(groups, **options))))
    (theirs, stock), (network, wrapper) = sides
    train(theirs, stock, batches(3))
    seen = []
    initialise = optimizer._init_group
    monkeypatch.setattr(
        optimizer, '_init_group', lambda self, group, *args: (seen.append(group), initialise(self, group, *args))[1]
    )
    train(network, wrapper, batches(3))
    assert [len(group['params']) for group in seen] == [2, 2] * 3  # weights, biases
    assert_same_parameters(network, theirs, rtol=0, atol=0)
    assert [len(group['params']) for group in wrapper.optimizer.param_groups] == [1] * 4
    states = [side.state_dict() for side in (wrapper, stock)]
    assert states[0]['param_groups'] == states[1]['param_groups']
    assert all(str(states[0]['state'][i]) == str(states[1]['state'][i]) for i in range(4))


def test_groups_that_a_runner_makes_are_plain_dicts():
    optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    cfg = ConfigDict(
        type='mmseg_resnest.AutocastOptimWrapper',
        optimizer=optimizer,
        paramwise_cfg=dict(custom_keys=dict(second=dict(lr_mult=10.0))),
    )
    groups = build_optim_wrapper(Network(), cfg).optimizer.param_groups
    assert [type(group) for group in groups] == [dict] * 4
    assert [group['lr'] for group in groups] == [0.1, 0.1, 1.0, 1.0]


class KeepsInGroups(torch.optim.SGD):
    """An optimiser of another library that counts in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group['steps'] = group.get('steps', 0) + 1
        return super().step(closure)


def test_optimisers_of_other_libraries_see_their_own_groups():
    network = Network()
    wrapper = AutocastOptimWrapper(optimizer=KeepsInGroups([dict(params=[p]) for p in network.parameters()], lr=0.1))
    train(network, wrapper, batches(2))
    assert [group['steps'] for group in wrapper.optimizer.param_groups] == [2] * 4


def test_groups_are_put_back_after_an_error(monkeypatch):
    network, wrapper = make(groups=4)
    groups = wrapper.optimizer.param_groups
    monkeypatch.setattr(torch.optim.SGD, '_init_group', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(network, wrapper, batches(1))
    assert wrapper.optimizer.param_groups is groups
    assert len(groups) == 4


def test_unknown_dtype():
    with pytest.raises(ValueError) as error:
        make(dtype='fp16')
    assert str(error.value) == "AutocastOptimWrapper: dtype='fp16'; expected one of bfloat16, float16, float32"


# ---------------------------------------------------------------------------------------------- what is not finite


def infinite_gradient(network, x):
    """A finite loss whose gradient is not: the slope of a square root at zero."""
    return loss_of(network, x) + (network.second.bias * 0).sqrt().sum()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0), dict(type='value', clip_value=1.0)])
@pytest.mark.parametrize('loss_of_step', [lambda n, x: loss_of(n, x) * float('inf'), infinite_gradient])
def test_no_step_is_made_from_what_is_not_finite(dtype, clip_grad, loss_of_step):
    network, wrapper = make(dtype=dtype, autocast_cpu=True, clip_grad=clip_grad and dict(clip_grad))
    wrapper.raises = False
    train(network, wrapper, batches(2))  # momentum
    assert wrapper.last_check.finite
    before = copy.deepcopy(network)
    loss = loss_of_step(network, batches(1)[0])
    wrapper.update_params(loss)
    assert_same_parameters(network, before, rtol=0, atol=0)
    assert all(p.grad is None for p in network.parameters())
    check = wrapper.last_check
    assert not check.finite
    assert (
        check.losses_finite == check.own_losses_finite == loss.isfinite().item() == (loss_of_step is infinite_gradient)
    )
    assert math.isnan(check.grad_norm) or math.isinf(check.grad_norm)
    train(network, wrapper, batches(1))
    assert wrapper.last_check.finite
    assert not torch.equal(network.second.weight, before.second.weight)


def test_what_is_not_finite_raises_unless_a_hook_looks_after_it():
    network, wrapper = make(dtype='float32')
    before = copy.deepcopy(network)
    with pytest.raises(ValueError, match='no step was made: the loss is not finite, the gradient norm nan') as error:
        wrapper.update_params(loss_of(network, batches(1)[0]) * float('nan'))
    assert 'mmseg_resnest.NonFiniteHook' in str(error.value)
    assert_same_parameters(network, before, rtol=0, atol=0)


def test_after_ones_own_backward_only_the_gradients_are_judged():
    network, wrapper = make(dtype='float32')
    before = copy.deepcopy(network)
    (loss_of(network, batches(1)[0]) * float('inf')).backward()
    with pytest.raises(ValueError, match=r'no step was made: the loss is finite, the gradient norm (nan|inf)'):
        wrapper.step()
    assert_same_parameters(network, before, rtol=0, atol=0)


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1e-3), dict(type='value', clip_value=1e-3)])
def test_gradient_norm_is_that_before_clipping(clip_grad):
    network, wrapper = make(dtype='float16', autocast_cpu=True, clip_grad=clip_grad)
    exact = copy.deepcopy(network)
    train(network, wrapper, batches(1))
    loss_of(exact, batches(1)[0]).backward()
    norm = torch.cat([p.grad.flatten() for p in exact.parameters()]).norm().item()
    assert wrapper.last_check.grad_norm == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize('bad', [0, 1])
def test_one_loss_that_is_not_finite_spoils_all_that_accumulate(bad):
    network, wrapper = make(dtype='float32', accumulative_counts=2)
    wrapper.raises = False
    before = copy.deepcopy(network)
    for i, x in enumerate(batches(2)):
        assert wrapper.last_check is None
        wrapper.update_params(loss_of(network, x) * (float('inf') if i == bad else 1))
    assert not wrapper.last_check.finite
    assert_same_parameters(network, before, rtol=0, atol=0)
    train(network, wrapper, batches(2))
    assert wrapper.last_check.finite


def test_float16_gradients_that_overflow_unscaled_are_not_the_scalers_business():
    network, wrapper = make(dtype='float16', autocast_cpu=True)
    wrapper.raises = False
    before = copy.deepcopy(network)
    checks = []
    for _ in range(18):
        wrapper.update_params(infinite_gradient(network, batches(1)[0]))
        checks.append(wrapper.last_check.finite)
    assert checks == [True] * 16 + [False] * 2  # the scales 2^16, ..., 2; then 1 and 1/2
    assert_same_parameters(network, before, rtol=0, atol=0)


def test_float16_loss_that_is_not_finite_is_not_the_scalers_business():
    network, wrapper = make(dtype='float16', autocast_cpu=True)
    wrapper.raises = False
    wrapper.update_params(loss_of(network, batches(1)[0]) * float('nan'))
    assert not wrapper.last_check.finite
    assert wrapper.last_check.loss_scaler['scale'] == 2**16  # what the losses were scaled by


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_autocast_on_a_gpu_unasked(dtype):
    network, wrapper = make(dtype=dtype, device='cuda', clip_grad=dict(max_norm=10))
    losses = train(network, wrapper, batches(20, 'cuda'))
    assert network.dtype == getattr(torch, dtype)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert losses[-1] < 0.2 * losses[0]
    state = copy.deepcopy(wrapper.state_dict())
    assert ('loss_scaler' in state) == (dtype == 'float16')
    wrapper.load_state_dict(state)
