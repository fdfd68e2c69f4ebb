"""Tolerances let rounding through, and nothing else: a relative error of 1e-4 is found."""

import copy
import math

import pytest
import torch
from rounding import (
    LOSS,
    NORM,
    assert_equal_to_rounding,
    assert_same_training,
    forward_sums,
    gradient_sums,
    loss_sums,
    rounding,
)
from tiny_models import assert_same_gradients, both_kinds, gradients, random_ids, tiny

from model import MiniMindLM

PLANTED = 1 + 1e-4


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("terms", [10, 100, 1_000])
@pytest.mark.parametrize("signs", ["both", "positive"])
def test_sums_of_any_length_differ_as_the_rule_has_it(terms, signs):
    """One term after the other in fp32, against fp64: within the rule, and not far within."""
    numbers = noise(2_000, terms) if signs == "both" else noise(2_000, terms).abs()
    found, exact = sum(numbers.unbind(1)), numbers.double().sum(1)
    assert_equal_to_rounding(found, exact, terms)
    largest = ((found - exact).abs().max() / exact.abs().max()).item()
    assert 0.05 < largest / rounding(terms) < 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * PLANTED,
        lambda x: torch.where(x == x.max(), x * PLANTED, x),
        lambda x: torch.where(x == x.max(), math.nan, x),
        lambda x: torch.where(x == x.min(), -math.inf, x),
        lambda x: torch.where(x < 1_000, x * PLANTED, x),
        lambda x: x[:, :9],
        lambda x: x.roll(1),
    ],
    ids=["all", "the largest", "nan", "inf", "all but the largest", "shape", "order"],
)
def test_what_is_no_rounding_is_an_error(wrong):
    numbers = noise(1_000, 10)
    numbers[7, 3] = 1_000  # of the others about 1
    assert_equal_to_rounding(numbers.clone(), numbers, sums=800)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(wrong(numbers), numbers, sums=800)


def test_zeros_have_no_rounding():
    assert_equal_to_rounding(torch.zeros(3), torch.zeros(3), sums=800)
    with pytest.raises(AssertionError, match="w2: largest error 1e-30"):
        assert_equal_to_rounding(torch.tensor([0, 0, 1e-30]), torch.zeros(3), 800, "w2")


def test_the_coarser_dtype_counts():
    numbers = noise(1_000)
    for dtype in (torch.float16, torch.bfloat16):
        assert_equal_to_rounding(numbers.to(dtype), numbers, sums=1)
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(numbers.bfloat16().float(), numbers, sums=1)


# Real comparisons, each with an error of 1e-4 in one weight matrix


IDS = random_ids(3, 40)


def results(model: MiniMindLM):
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


@both_kinds
def test_a_network_equals_itself_in_float64(use_moe):
    model = tiny(use_moe=use_moe)
    (logits, loss, grads), exact = results(model), results(copy.deepcopy(model).double())
    assert_equal_to_rounding(logits, exact[0], forward_sums(model.config, 40))
    assert_equal_to_rounding(loss, exact[1], loss_sums(model.config, 40, rows=3))
    assert_same_gradients(grads, exact[2], gradient_sums(model.config, 40, rows=3))


@both_kinds
def test_an_error_in_any_weight_shows_in_logits_and_in_gradients(use_moe):
    model = tiny(use_moe=use_moe)
    exact = results(copy.deepcopy(model))
    for name, weight in model.named_parameters():
        right = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(PLANTED)
        logits, _, grads = results(model)
        with pytest.raises(AssertionError, match="rounding explains"):
            assert_equal_to_rounding(logits, exact[0], forward_sums(model.config, 40), name)
        with pytest.raises(AssertionError, match="rounding explains"):
            assert_same_gradients(grads, exact[2], gradient_sums(model.config, 40, rows=3))
        with torch.no_grad():
            weight.copy_(right)


def trained(model: MiniMindLM, rates: list[float]) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        results(model)
        optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@both_kinds
def test_errors_in_training_show_in_the_trained_weights(use_moe):
    """Equal in float64; not with other learning rates or from other weights, by 1e-4."""
    rates = [1e-3, 3e-3, 2e-3, 1e-3]
    exact = trained(tiny(use_moe=use_moe).double(), rates)
    assert_same_training(trained(tiny(use_moe=use_moe), rates), exact, rates)
    faster = trained(tiny(use_moe=use_moe), [rate * PLANTED for rate in rates])
    with pytest.raises(AssertionError, match="explained"):
        assert_same_training(faster, exact, rates)
    for name, weight in trained(tiny(use_moe=use_moe), rates).items():
        with pytest.raises(AssertionError, match="explained"):
            assert_same_training({**exact, name: weight * PLANTED}, exact, rates)


def test_errors_in_what_scripts_write_show():
    assert pytest.approx(8.7, rel=LOSS) != 8.7 * PLANTED
    assert pytest.approx(2.3, rel=NORM) != 2.3 * PLANTED
    assert rounding(1) < LOSS < NORM
