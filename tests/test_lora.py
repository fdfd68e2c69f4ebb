"""Adapters: equal to PEFT's on the same weights; files, merging, several of them by name."""

import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rounding import (
    assert_equal_to_rounding,
    forward_sums,
    gradient_sums,
    loss_sums,
    rounding,
)
from tiny_models import (
    TINY,
    as_llama,
    assert_same_gradients,
    halves,
    llama_with_weights_of,
    random_ids,
    tiny,
)

from common import UserError
from model import (
    LMConfig,
    MiniMindLM,
    apply_lora,
    load_lora,
    merge_lora,
    save_lora,
    unmerge_lora,
    use_lora,
    weights_hash,
)
from model.model_lora import TARGETS, LoRA, active_lora, adapters, base_state, lora_state

PEFT_NAMES = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip


def adapted(model=None, seed=3, **settings):
    """A model with an adapter whose every number is far from its start."""
    model = model or tiny()
    apply_lora(model, **settings)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora_state(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(random_ids(2, 20) if ids is None else ids).logits


# PEFT


def peft_twin(model, rank, alpha, targets):
    """PEFT's model on transformers' Llama with the same base and the same adapter."""
    base = MiniMindLM(model.config)
    base.load_state_dict(base_state(model))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
        target_modules=[PEFT_NAMES[target] for target in targets],
    )  # fmt: skip
    twin = get_peft_model(llama_with_weights_of(base), config).eval()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in peft_layout(lora_state(model), model.config).items():
            parameters[name].copy_(tensor)
    return twin, parameters


def peft_layout(matrices, config):
    """Our matrices (or their gradients) under PEFT's names; B's rows as Llama orders heads."""
    renamed = {}
    for name, tensor in matrices.items():
        _, layer, block, projection, matrix = name.split(".")
        if matrix == "B" and projection in ("wq", "wk"):
            tensor = halves(tensor, config.n_heads if projection == "wq" else config.n_kv_heads)
        block = {"attention": "self_attn", "feed_forward": "mlp"}[block]
        path = f"base_model.model.model.layers.{layer}.{block}.{PEFT_NAMES[projection]}"
        renamed[f"{path}.lora_{matrix}.default.weight"] = tensor
    return renamed


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [(8, 16.0, TARGETS), (3, 5.0, TARGETS), (4, 4.0, ("wq", "wv")), (2, 8.0, ("w2",))],
)
def test_forward_and_gradients_equal_peft(rank, alpha, targets):
    model = adapted(rank=rank, alpha=alpha, target_modules=targets)
    twin, parameters = peft_twin(model, rank, alpha, targets)
    ids = random_ids(2, 20)
    ours, theirs = model(ids, labels=ids), twin(input_ids=ids, labels=ids)
    assert (logits(model) - logits(tiny())).abs().max() > 0.1
    assert_equal_to_rounding(ours.logits, theirs.logits, forward_sums(model.config, 20))
    close = rounding(loss_sums(model.config, 20, rows=2))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=close)
    ours.loss.backward()
    theirs.loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(".lora.default." in name for name in trained)
    trained = {name.replace(".lora.default.", "."): g for name, g in trained.items()}
    assert trained.keys() == lora_state(model).keys()
    expected = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    ours = peft_layout(trained, model.config)
    assert_same_gradients(ours, expected, gradient_sums(model.config, 20, rows=2))


def test_merged_weights_equal_peft():
    model = adapted()
    twin, _ = peft_twin(model, 8, 16.0, TARGETS)
    merge_lora(model)
    expected = twin.merge_and_unload().state_dict()
    for name, tensor in as_llama(base_state(model), model.config).items():
        # B · A of rank 8, scaled, and added to the weight.
        assert_equal_to_rounding(tensor, expected[name], sums=8 + 2, name=name)


# What a new adapter is


def test_a_new_adapter_changes_nothing_and_begins_as_it_should():
    model = tiny(dim=256, n_heads=4)
    before = logits(model)
    torch.manual_seed(0)
    apply_lora(model, rank=32)
    assert torch.equal(logits(model), before)
    a = torch.cat([t.flatten() for n, t in lora_state(model).items() if n.endswith("A")])
    assert a.mean().abs() < 1e-3 and a.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(t.any() for n, t in lora_state(model).items() if n.endswith("B"))


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_it_sits_on_every_projection_and_nothing_else_is_trained(use_moe):
    model = tiny(use_moe=use_moe)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in TARGETS
    }
    c = model.config
    feed_forwards = c.n_routed_experts + c.n_shared_experts if use_moe else 1
    assert len(linear) == c.n_layers * (4 + 3 * feed_forwards)
    apply_lora(model, rank=2)
    assert {name.rpartition(".")[0] for name in lora_state(model)} == linear
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(t.numel() for t in lora_state(model).values())


def test_dropout_is_on_the_adapters_input_alone():
    torch.manual_seed(0)
    lora = LoRA(50, 7, rank=3, alpha=6, dropout=0.5)
    torch.nn.init.normal_(lora.B)
    x = torch.randn(20_000, 50)
    plain = x @ lora.A.T @ lora.B.T * 2
    lora.eval()
    assert_equal_to_rounding(lora(x), plain, sums=50 + 3 + 1)
    lora.train()
    dropped = lora(x[:1].expand(20_000, 50))
    assert dropped.std(0).min() > 0.01
    torch.testing.assert_close(dropped.mean(0), plain[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_is_in_the_mode_of_its_model(training):
    model = tiny().train(training)
    apply_lora(model, dropout=0.5)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\)"),
        ({"target_modules": []}, "needs a target"),
        ({"target_modules": ["output"]}, "'output' gets no adapter"),
    ],
)
def test_settings_out_of_range(settings, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        apply_lora(model, **settings)


# Files


def test_a_saved_adapter_comes_back_on_its_base(tmp_path):
    model = adapted(rank=4, alpha=6.0, dropout=0.25, target_modules=("wv", "w1"))
    save_lora(model, tmp_path / "a.pth")
    again = tiny()
    load_lora(again, tmp_path / "a.pth", "again")
    assert torch.equal(logits(again), logits(model))
    assert adapters(again) == ["again"]
    contents = torch.load(tmp_path / "a.pth", weights_only=True)
    settings = {"rank": 4, "alpha": 6.0, "dropout": 0.25, "target_modules": ["wv", "w1"]}
    assert contents["lora"] == settings
    assert contents["weights"].keys() == lora_state(model).keys()


def test_half_precision_halves_the_file(tmp_path):
    model = adapted(tiny(dim=256, n_heads=4), rank=32)
    for dtype in (torch.float32, torch.float16):
        save_lora(model, tmp_path / f"{dtype}.pth", dtype)
    sizes = [(tmp_path / f"{dtype}.pth").stat().st_size for dtype in (torch.float32, torch.float16)]
    assert sizes[1] < 0.55 * sizes[0]
    again = tiny(dim=256, n_heads=4)
    load_lora(again, tmp_path / "torch.float16.pth")
    wanted = logits(model)
    assert (logits(again) - wanted).abs().max() <= 0.01 * wanted.abs().max()


def one_bit_off(model):
    with torch.no_grad():
        weight = model.layers[1].feed_forward.w2.weight
        weight.view(torch.int32)[0, 0] ^= 1
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: one_bit_off(tiny()),
        lambda: tiny(dim=64),
        lambda: tiny(n_layers=1),
        lambda: tiny(use_moe=True),
        lambda: tiny(n_heads=2),
        lambda: tiny().half(),
        lambda: tiny(norm_eps=1e-6),
        lambda: tiny(rope_theta=1e6),
    ],
    ids=["one bit", "dim", "layers", "moe", "heads", "precision", "norm", "rope"],
)
def test_another_base_is_refused(tmp_path, other):
    save_lora(adapted(), tmp_path / "a.pth")
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="another base"):
        load_lora(model, tmp_path / "a.pth")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert adapters(model) == []


def test_matrices_of_another_shape_are_refused(tmp_path):
    model = adapted(rank=2)
    saved = {"lora": {"rank": 3, "alpha": 1.0, "dropout": 0.0, "target_modules": list(TARGETS)}}
    saved |= {"base": weights_hash(tiny()), "weights": lora_state(model)}
    path = tmp_path / "a.pth"
    torch.save(saved, path)
    with pytest.raises(UserError, match=r"layers.0.attention.wq.A is \(2, 32\) there, \(3, 32\)"):
        load_lora(tiny(), path)
    torch.save({"weights": {}}, path)
    with pytest.raises(UserError, match="not an adapter"):
        load_lora(tiny(), path)
    with pytest.raises(ValueError, match="no adapter is active"):
        save_lora(tiny(), path)


# Merging


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_merging_equals_the_adapters_path_and_merges_out_again(use_moe):
    model = adapted(tiny(use_moe=use_moe))
    base = {name: tensor.clone() for name, tensor in base_state(model).items()}
    beside = logits(model)
    merge_lora(model)
    assert_equal_to_rounding(logits(model), beside, forward_sums(model.config, 20))
    plain = MiniMindLM(model.config).eval()
    merged = {name: tensor.clone() for name, tensor in base_state(model).items()}
    plain.load_state_dict(merged)
    assert torch.equal(logits(plain), logits(model))
    unmerge_lora(model)
    for name, tensor in base_state(model).items():
        # Two roundings, of the sum and of the difference, each of half a unit in the last place.
        limit = 2**-24 * (merged[name].abs() + base[name].abs()) * (1 + 2**-20)
        assert ((tensor - base[name]).abs() <= limit).all(), name
    assert_equal_to_rounding(logits(model), beside, forward_sums(model.config, 20))


def test_what_cannot_be_done_while_merged(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_lora(model)
    merge_lora(model)
    for change in (
        merge_lora,
        functools.partial(apply_lora, name="b"),
        functools.partial(use_lora, name=None),
        functools.partial(save_lora, path=tmp_path / "a.pth"),
        weights_hash,
    ):
        with pytest.raises(ValueError, match="merged"):
            change(model)
    unmerge_lora(model)
    use_lora(model, None)
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)


# Several


def test_adapters_are_switched_by_name():
    alone = {name: logits(adapted(seed=seed)) for name, seed in (("a", 1), ("b", 2))}
    model = tiny()
    base = logits(model)
    for name, seed in (("a", 1), ("b", 2)):
        adapted(model, seed, name=name)
    assert adapters(model) == ["a", "b"] and active_lora(model) == "b"
    for name in ("a", "b", None, "b", "a"):
        use_lora(model, name)
        expected = base if name is None else alone[name]
        assert torch.equal(logits(model), expected)
        assert active_lora(model) == name
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".lora.{name}." in n for n in trained)
        assert bool(trained) == (name is not None)
    with pytest.raises(ValueError, match="no adapter 'c'; there is a, b"):
        use_lora(model, "c")
    with pytest.raises(ValueError, match="has an adapter 'a' already"):
        apply_lora(model, name="a")


def test_generation_uses_the_adapter():
    model = adapted()
    merged = adapted()
    merge_lora(merged)
    ids = random_ids(2, 8)

    def generated(some):
        return some.generate(ids, max_new_tokens=12, do_sample=False)

    assert torch.equal(generated(model), generated(merged))
    assert not torch.equal(generated(model), generated(tiny()))
    use_lora(model, None)
    assert torch.equal(generated(model), generated(tiny()))


def test_the_hash_tells_bases_apart_and_not_their_adapters():
    model = tiny()
    plain = weights_hash(model)
    adapted(model)
    use_lora(model, None)
    assert weights_hash(model) == plain != weights_hash(one_bit_off(tiny()))
    assert weights_hash(MiniMindLM(LMConfig(**TINY))) != plain
