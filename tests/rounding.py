"""How far two computations of one result may lie apart by rounding alone.

Processors, their instruction sets and numbers of threads add the same terms in different orders,
and each order rounds differently. A tolerance therefore follows from what is compared: its size,
its dtype, and how many terms its sums have.
"""

import math

import torch
from torch import Tensor

from model import LMConfig


def rounding(sums: int, dtype: torch.dtype = torch.float32) -> float:
    """Largest relative difference that rounding explains between two sums of `sums` terms.

    An addition rounds by up to u = eps / 2 of its partial sum, upwards as often as downwards, so
    that the errors of n additions grow as u · √n, not as u · n (Higham and Mary, "A new approach
    to probabilistic rounding error analysis", 2019). An error that is uniform in ±u has a standard
    deviation of u / √3, and the difference of two sums with n of them each has √(2n / 3) · u. The
    tolerance, 4u · √n, is almost five of these deviations, which is about as far as the largest of
    a million normal numbers lies.

    Args:
        sums: how many additions a number has behind it, one after the other: the lengths of the
            sums on its way, added up (`forward_sums` and `gradient_sums`: those of a model).
        dtype: the dtype of the sums.
    """
    return 4 * torch.finfo(dtype).eps / 2 * math.sqrt(sums)


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, sums: int, name: str = "") -> None:
    """Two floating-point tensors are equal, but for the rounding of sums of `sums` terms.

    The error of a sum follows the size of its terms, and a small number in a tensor is what is
    left of terms as large as its neighbours'. So the scale is the tensor's: the largest error is
    held against the largest number expected, and the root mean square of the errors against that
    of the numbers, where a common error shows though one number outweighs all others.

    Raises:
        AssertionError: with the error and what rounding explains. NaN and infinity are errors.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    coarser = max(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    expected = expected.detach().double()
    errors = (actual.detach().double() - expected).abs()
    for kind, size in (("largest", Tensor.max), ("root mean square", root_mean_square)):
        error = size(errors).item()
        explained = rounding(sums, coarser) * size(expected.abs()).item()
        assert error <= explained < math.inf, (
            f"{name}: {kind} error {error:.3g}; rounding explains {explained:.3g} ({sums} terms)"
        )


def root_mean_square(numbers: Tensor) -> Tensor:
    """The square root of the mean of the squares."""
    return numbers.square().mean().sqrt()


def forward_sums(config: LMConfig, length: int) -> int:
    """Lengths of the sums from the embeddings of `length` tokens to a logit, added up."""
    attention = 3 * config.dim + config.head_dim + 2 * length  # norm, wq, wo; q · k; softmax, · v
    feed_forward = 2 * config.dim + config.hidden_dim  # norm, w1; w2
    if config.use_moe:  # gate, softmax; w2 of the shared experts; the sum of a token's experts
        feed_forward += config.dim + config.n_routed_experts + config.num_experts_per_tok + 1
        feed_forward += config.hidden_dim * max(config.n_shared_experts - 1, 0)
    return config.n_layers * (attention + feed_forward) + 2 * config.dim  # norm, output


def loss_sums(config: LMConfig, length: int, rows: int = 1) -> int:
    """The same to the mean loss of `rows` such rows: softmax over the vocabulary, and mean."""
    return forward_sums(config, length) + config.vocab_size + rows * length


def gradient_sums(config: LMConfig, length: int, rows: int = 1) -> int:
    """The same to the gradients of that loss, whose way back is as long as the way there."""
    return 2 * loss_sums(config, length, rows)


# What the scripts write. The tests train models of about this size, of the shipped vocabulary.

SCRIPTS = LMConfig(dim=32, n_layers=2)
LOSS = rounding(loss_sums(SCRIPTS, 96, rows=8))
NORM = rounding(gradient_sums(SCRIPTS, 96, rows=8))


def assert_same_training(
    actual: dict[str, Tensor], expected: dict[str, Tensor], learning_rates: list[float]
) -> None:
    """Weights of the same names after the same steps of AdamW or Muon are equal, but for rounding.

    A step moves a weight by about the learning rate, however small its gradient is, and so by
    anything up to that where the gradient is as small as its own rounding. These weights are few:
    it is the mean error that is held against the way of all steps.

    Args:
        actual: weights by name.
        expected: the same.
        learning_rates: one a step.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor.double()).abs().mean().item()
        explained = NORM * sum(learning_rates)
        explained += rounding(len(learning_rates)) * tensor.double().abs().mean().item()
        assert error <= explained, f"{name}: mean error {error:.3g}, explained {explained:.3g}"
