import torch
from rounding import assert_equal_to_rounding

from model import LMConfig, MiniMindLM
from training import make_optimizer


def test_decay_falls_on_matrices_only():
    """With zero gradients AdamW's whole update is the decay: weight · (1 − lr · decay)."""
    config = LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, use_moe=True)
    model = MiniMindLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = "norm" in name or "tok_embeddings" in name
        factor = 1.0 if kept else 1 - 0.1 * 0.5
        assert_equal_to_rounding(parameter, before[name] * factor, sums=2, name=name)


def test_the_tied_embedding_is_optimised_once():
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64))
    optimizer = make_optimizer(model, 0.1, 0.1, (0.9, 0.95))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})


def test_frozen_parameters_are_left_out():
    model = MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64))
    model.tok_embeddings.weight.requires_grad_(False)
    optimizer = make_optimizer(model, 0.1, 0.1, (0.9, 0.95))
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(model.tok_embeddings.weight) not in listed
