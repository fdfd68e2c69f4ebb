"""Muon against its definition by singular values, and as one optimizer with AdamW."""

import copy
import io
import re

import pytest
import torch
from interruptions import assert_same
from tiny_models import optimizer_flags, tiny
from torch import Tensor

from common import UserError
from model import MiniMindLM, apply_lora
from training import make_optimizer, muon

LR, DECAY = 0.02, 0.1
PATTERNS = {"lr_scale": [("w[qk]", 2.0), ("tok_emb", 0.5)], "weight_decay_for": [("wo|w2", 0.3)]}


def network() -> MiniMindLM:
    """Experts, a shared one twice as wide, and fewer key-value heads: six shapes of matrices."""
    return tiny(use_moe=True, n_shared_experts=2, n_layers=2)


def is_hidden(name: str) -> bool:
    return re.search(r"\.w[qkvo123]\.weight$", name) is not None


def make(model: MiniMindLM, optimizer: str = "muon", dtype=torch.float32, **patterns):
    made = make_optimizer(model, optimizer_flags(LR, DECAY, optimizer=optimizer, **patterns), dtype)
    for group in made.param_groups:
        group["lr"] = group["initial_lr"]
    return made


def random_gradients(model: MiniMindLM, steps: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p.shape) for name, p in model.named_parameters()]
    return [{n: torch.randn(s, generator=generator) for n, s in named} for _ in range(steps)]


def take_steps(model: MiniMindLM, optimizer, gradients: list[dict[str, Tensor]]) -> dict:
    for step in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Muon's steps in float64: the polynomial of Newton–Schulz, on singular values from an SVD."""
    weight, average = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient.double()
        u, s, vh = torch.linalg.svd(0.05 * gradient.double() + 0.95 * average, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        update = 0.2 * max(weight.shape) ** 0.5 * (u * s) @ vh
        weight = weight - lr * (decay * weight + update)
    return weight


def difference(actual: Tensor, expected: Tensor, before: Tensor) -> float:
    """The error of a weight, relative to how far it has moved."""
    return ((actual.double() - expected).norm() / (expected - before.double()).norm()).item()


def test_steps_are_those_by_hand():
    """Of each matrix by itself, each expert's too, at the rates and decays of its name."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model, 5)
    after = take_steps(model, make(model, **PATTERNS), gradients)
    hidden = [name for name in after if is_hidden(name)]
    assert len(hidden) == 2 * (4 + 3 * (4 + 1))
    for name in hidden:
        lr = LR * (2.0 if re.search("w[qk]", name) else 1.0)
        decay = 0.3 if re.search("wo|w2", name) else DECAY
        expected = by_hand(before[name], [step[name] for step in gradients], lr, decay)
        assert difference(after[name], expected, before[name]) < 1e-5, name


def test_all_else_is_adamw():
    """Embedding, norms and gates, bit for bit."""
    model, other = network(), network()
    gradients = random_gradients(model, 3)
    after = take_steps(model, make(model, **PATTERNS), gradients)
    expected = take_steps(other, make(other, "adamw", **PATTERNS), gradients)
    rest = [name for name in after if not is_hidden(name)]
    assert len(rest) == 1 + 1 + 2 * (2 + 1)
    assert_same({n: after[n] for n in rest}, {n: expected[n] for n in rest})


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_pytorchs_muon_within_its_rounding(dtype):
    """Which is to bf16, 2⁻⁸, in each of the products; also with Newton–Schulz in another dtype."""
    model, other = network(), network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model, 3)
    after = take_steps(model, make(model, dtype=dtype), gradients)
    matrices = [p for name, p in other.named_parameters() if is_hidden(name)]
    theirs = torch.optim.Muon(matrices, LR, DECAY, adjust_lr_fn="match_rms_adamw")
    expected = take_steps(other, theirs, gradients)
    for name in filter(is_hidden, after):
        assert difference(after[name], expected[name].double(), before[name]) < 0.03, name


def test_batches_give_what_single_matrices_give(monkeypatch):
    model, other = network(), network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model, 3)
    batches = []
    orthogonalize = muon.orthogonalize

    def recorded(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        batches.append(len(matrices))
        return orthogonalize(matrices, dtype)

    monkeypatch.setattr(muon, "orthogonalize", recorded)
    after = take_steps(model, make(model), gradients)
    assert len(batches) == 3 * 6 and max(batches) == 16  # as many shapes; w1 and w3 of 4 experts
    batches.clear()
    monkeypatch.setattr(muon, "BATCH", 1)
    expected = take_steps(other, make(other), gradients)
    assert set(batches) == {1}
    for name in after:
        assert difference(after[name], expected[name].double(), before[name]) < 1e-5, name


def test_its_state_goes_through_a_file():
    """The same bits go on, from one moment of a matrix and two of all else."""
    model = network()
    optimizer = make(model, **PATTERNS)
    gradients = random_gradients(model, 4)
    take_steps(model, optimizer, gradients[:2])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = make(other, **PATTERNS)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for name, parameter in other.named_parameters():
        own = {"momentum"} if is_hidden(name) else {"step", "exp_avg", "exp_avg_sq"}
        assert resumed.state[parameter].keys() == own
    unbroken = take_steps(model, optimizer, gradients[2:])
    assert_same(take_steps(other, resumed, gradients[2:]), unbroken)
    assert_same(resumed.state_dict(), optimizer.state_dict())


def test_scaled_gradients():
    """A power of two changes no bit; gradients that overflow change nothing."""
    model, other = network(), network()
    (gradients,) = random_gradients(model, 1)
    after = take_steps(model, make(model), [gradients])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = make(other)
    for overflow in (False, True):
        for name, parameter in other.named_parameters():
            parameter.grad = scaler.scale(gradients[name])
            if overflow and name.endswith("wq.weight"):
                parameter.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same({name: p.detach() for name, p in other.named_parameters()}, after)


def test_what_has_no_gradient_stays():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.layers[0].attention.wq.weight.grad = torch.ones(32, 32)
    make(model).step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["layers.0.attention.wq.weight"]


def test_adapters_are_left_to_adamw():
    model = tiny()
    apply_lora(model)
    with pytest.raises(UserError, match=r"--optimizer muon: .* use adamw"):
        make(model)
