"""FactoredLinear computes what its dense twin computes, and is never initialised by chance."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershare.errors import TieError
from layershare.linear import FactoredLinear, kind_of


def made(*, base: bool, bias: bool = True, transposed: bool = False) -> FactoredLinear:
    torch.manual_seed(0)
    module = FactoredLinear(6, 4, 2, base=base, bias=bias, transposed=transposed)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
def test_the_dense_twin_does_the_same(base, bias, transposed):
    module, x = made(base=base, bias=bias, transposed=transposed), torch.randn(3, 5, 6)
    dense = module.dense()
    assert type(dense) is (Conv1D if transposed else nn.Linear)
    assert dense.weight.shape == module.weight.shape == ((6, 4) if transposed else (4, 6))
    torch.testing.assert_close(module(x), dense(x))
    by_hand = x @ (module.up @ module.down + (module.base if base else 0)).T + (module.bias if bias else 0)
    torch.testing.assert_close(module(x), by_hand)


def test_gradients_reach_every_factor():
    module = made(base=True)
    module(torch.randn(3, 6)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("plain", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)])
def test_it_stands_for_a_plain_map(plain):
    plain.eval()
    module = FactoredLinear.standing_for(plain, 2, base=False)
    assert (module.in_features, module.out_features, module.rank) == (6, 4, 2)
    assert module.bias is plain.bias
    assert not module.training
    assert kind_of(module) == kind_of(plain) != "other"


def test_frozen_maps_stay_frozen():
    module = FactoredLinear.standing_for(nn.Linear(6, 4).requires_grad_(False), 2, base=True)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.dense().weight.requires_grad


def test_the_twin_owns_its_weight():
    module = made(base=True)
    before = module.base.clone()
    with torch.no_grad():
        module.dense().weight.zero_()
    assert torch.equal(module.base, before)


def test_the_weight_is_no_parameter():
    module = made(base=True)
    assert set(dict(module.named_parameters())) == {"base", "up", "down", "bias"}
    for other in (nn.Parameter(torch.zeros(4, 6)), torch.zeros(4, 6), torch.zeros(6, 4)):
        with pytest.raises(TieError, match=r"computed from its factors.*unshare"):
            module.weight = other
    module.weight = module.weight  # as PEFT does when it takes an adapter off
    assert set(dict(module.named_parameters())) == {"base", "up", "down", "bias"}


def test_nothing_initialises_it():
    module = made(base=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.reset_parameters()
    assert module._is_hf_initialized
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_weight_still_on_the_meta_device_has_a_shape():
    module = FactoredLinear(6, 4, 2, base=True, bias=False, transposed=True, device="meta")
    assert (module.weight.shape, module.weight.is_meta) == ((6, 4), True)


def test_kinds():
    class Special(nn.Linear):
        pass

    modules = nn.Linear(1, 1), Conv1D(1, 1), Special(1, 1), nn.Embedding(1, 1)
    assert [kind_of(m) for m in modules] == ["linear", "conv1d", "other", "other"]


def test_it_prints_its_shape():
    assert repr(made(base=True)) == "FactoredLinear(6, 4, base + rank=2, bias=True)"


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_diagonal_is_part_of_the_map(inputs, outputs, transposed):
    torch.manual_seed(0)
    module = FactoredLinear(inputs, outputs, 2, base=True, bias=True, diagonal=True, transposed=transposed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, inputs)
    whole = module.base + module.up @ module.down
    for i, value in enumerate(module.diagonal):
        whole = whole + value * torch.eye(outputs, inputs)[i][None] * torch.eye(outputs)[i][:, None]
    torch.testing.assert_close(module(x), x @ whole.T + module.bias)
    torch.testing.assert_close(module.weight, whole.T if transposed else whole)
    torch.testing.assert_close(module.dense()(x), module(x))
