import math

import torch
from torch import nn

from emotion.training.schedule import Ema, steps_of, warmup_cosine


def test_steps_are_rounded_up() -> None:
    assert steps_of(10, 1802, 48) == 376
    assert steps_of(1, 5, 5) == 1
    assert steps_of(0.1, 10, 4) == 1
    assert steps_of(1e-9, 130, 8) == 1
    assert steps_of(0, 130, 8) == 0


def test_the_learning_rate_rises_then_falls_to_almost_nothing() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[0] == 1 / 11
    assert factors[10] == 1.0
    assert factors[55] == 0.5
    assert 0 < factors[-1] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_without_warmup_it_starts_at_the_top() -> None:
    assert warmup_cosine(0, 50, 0.0) == 1.0


def test_the_average_follows_its_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 0.0)
    ema = Ema(network, 0.9)
    expected = 0.0
    for step in range(40):
        nn.init.constant_(network.weight, float(step))
        ema.begin(step)
        ema.update(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert math.isclose(ema.network.weight.item(), expected, rel_tol=1e-5)


def test_trained_weights_are_averaged_as_if_their_head_start_had_been_made_here() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    ema = Ema(network, 0.95, head_start=80)
    nn.init.constant_(network.weight, 3.0)
    ema.begin(0)
    ema.update(network)
    # 81 / 90 of the old weights, where a training from the start would keep a tenth.
    assert math.isclose(ema.network.weight.item(), 2.1, rel_tol=1e-6)
    ema.begin(500)
    ema.update(network)
    assert math.isclose(ema.network.weight.item(), 3 - 0.95 * 0.9, rel_tol=1e-6)


def test_averaging_leaves_the_network_alone() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    ema = Ema(network, 0.5)
    ema.begin(0)
    ema.update(network)
    assert torch.equal(network.weight, before)
    assert network.weight.requires_grad
