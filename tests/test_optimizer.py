import pytest
import torch
from rounding import assert_equal_to_rounding
from tiny_models import optimizer_flags, tiny

from common import UserError
from model import LMConfig, MiniMindLM
from training import make_optimizer

both_optimizers = pytest.mark.parametrize("kind", ["adamw", "muon"])


@both_optimizers
def test_decay_falls_on_matrices_only(kind):
    """With zero gradients the whole update is the decay: weight · (1 − lr · decay)."""
    config = LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, use_moe=True)
    model = MiniMindLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, optimizer_flags(0.1, 0.5, optimizer=kind))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = "norm" in name or "tok_embeddings" in name
        factor = 1.0 if kept else 1 - 0.1 * 0.5
        assert_equal_to_rounding(parameter, before[name] * factor, sums=2, name=name)


@both_optimizers
def test_the_tied_embedding_is_optimised_once(kind):
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64))
    optimizer = make_optimizer(model, optimizer_flags(0.1, 0.1, optimizer=kind))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})


@both_optimizers
def test_frozen_parameters_are_left_out(kind):
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64))
    frozen = (model.tok_embeddings.weight, model.layers[0].attention.wq.weight)
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer = make_optimizer(model, optimizer_flags(0.1, 0.1, optimizer=kind))
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not listed & set(map(id, frozen))


@both_optimizers
def test_rates_and_decays_by_name(kind):
    """With zero gradients the update is the decay alone: weight · (1 − lr · decay)."""
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patterns = {"lr_scale": [("tok_emb", 0.5), ("w[qk]", 2.0), ("wq", 7.0)]}
    patterns["weight_decay_for"] = [("tok_emb", 0.3), ("wo", 0.0)]
    optimizer = make_optimizer(model, optimizer_flags(0.1, 0.5, optimizer=kind, **patterns))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        lr = 0.1 * (0.5 if "tok_emb" in name else 2.0 if "wq" in name or "wk" in name else 1.0)
        decay = 0.3 if "tok_emb" in name else 0.0 if "norm" in name or "wo" in name else 0.5
        assert_equal_to_rounding(parameter, before[name] * (1 - lr * decay), sums=2, name=name)


@pytest.mark.parametrize("flag", ["lr_scale", "weight_decay_for"])
def test_a_pattern_without_a_parameter_is_refused(flag):
    with pytest.raises(UserError, match=f"--{flag} atention"):
        make_optimizer(tiny(), optimizer_flags(0.1, 0.1, **{flag: [("atention", 1.0)]}))


@pytest.mark.parametrize(
    ("kind", "patterns", "rate"),
    [("muon", [], 3e-2), ("adamw", [], 1e-2), ("muon", [("tok_embeddings", 0.5)], 5e-3)],
)
def test_the_embedding_s_rate_beside_muon(kind, patterns, rate):
    model = tiny()
    flags = optimizer_flags(1e-2, 0.1, optimizer=kind, lr_scale=patterns)
    for group in make_optimizer(model, flags, embedding_scale=3.0).param_groups:
        is_embedding = any(p is model.tok_embeddings.weight for p in group["params"])
        assert group["initial_lr"] == pytest.approx(rate if is_embedding else 1e-2)
