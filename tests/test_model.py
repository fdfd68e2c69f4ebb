"""MiniMindLM: mathematics, masks, cache, packing, what forward returns, initialisation, files.

What it is compared with is independent of it: golden vectors, transformers' Llama with the same
weights, and `reference_logits` below, which follows the contract query by query.
"""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    both_attentions,
    both_kinds,
    gradients,
    llama_with_weights_of,
    random_ids,
    tiny,
)
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from model import KVCache, LMConfig, MiniMindLM
from model.model import (
    Attention,
    RMSNorm,
    additive_mask,
    apply_rotary_emb,
    repeat_kv,
    rotary_cos_sin,
)

# Golden vectors


@pytest.fixture(params=["dense", "moe", "moe_global_aux"])
def golden(request, shared_dir):
    with np.load(shared_dir / "golden" / f"{request.param}.npz") as file:
        return {name: file[name] for name in file.files}


def golden_model(golden, **overrides) -> MiniMindLM:
    model = MiniMindLM(LMConfig(**{**json.loads(str(golden["config"])), **overrides}))
    weights = {n[2:]: torch.from_numpy(a) for n, a in golden.items() if n.startswith("w:")}
    weights.setdefault("tok_embeddings.weight", weights["output.weight"])
    model.load_state_dict(weights)
    return model.eval()


@both_attentions
@torch.no_grad()
def test_golden_logits(golden, flash_attn):
    model = golden_model(golden, flash_attn=flash_attn)
    logits = model(torch.from_numpy(golden["input_ids"])).logits
    wanted = torch.from_numpy(golden["logits"])
    assert_equal_to_rounding(logits, wanted, forward_sums(model.config, logits.shape[1]))


@both_attentions
@torch.no_grad()
def test_golden_greedy_continuation_with_and_without_cache(golden, flash_attn):
    model = golden_model(golden, flash_attn=flash_attn)
    prompt = torch.from_numpy(golden["input_ids"][:1])
    wanted = torch.from_numpy(golden["greedy_row0"])
    ids = prompt
    for _ in range(16):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ids, wanted)
    assert torch.equal(model.generate(prompt, max_new_tokens=16, eos_token_id=-1), wanted)


def test_golden_auxiliary_loss(golden):
    model = golden_model(golden).train()
    ids = torch.from_numpy(golden["input_ids"])
    aux_loss = model(ids).aux_loss
    wanted = golden.get("train_aux_loss", np.float32(0))
    close = rounding(forward_sums(model.config, ids.shape[1]) + ids.numel())
    assert aux_loss.item() == pytest.approx(float(wanted), rel=close)


@both_attentions
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_llama_with_the_same_weights_agrees_in_logits_loss_and_gradients(flash_attn, n_kv_heads):
    model = tiny(flash_attn=flash_attn, n_kv_heads=n_kv_heads, rope_theta=1e6)
    llama = llama_with_weights_of(model)
    ids = random_ids(3, 40)
    labels = ids.clone()
    labels[0, :15] = -100
    labels[2, 30:] = -100
    ours, theirs = model(ids, labels=labels), llama(ids, labels=labels)
    assert_equal_to_rounding(ours.logits, theirs.logits, forward_sums(model.config, 40))
    assert_equal_to_rounding(ours.loss, theirs.loss, loss_sums(model.config, 40, rows=3))
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(
        as_llama(gradients(model), model.config),
        gradients(llama),
        gradient_sums(model.config, 40, rows=3),
    )


@both_attentions
@torch.no_grad()
def test_llama_agrees_on_left_padded_rows(flash_attn):
    model = tiny(flash_attn=flash_attn)
    llama = llama_with_weights_of(model)
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = llama(ids, attention_mask=mask, position_ids=positions).logits
    ours = model(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert_equal_to_rounding(ours[kept], theirs[kept], forward_sums(model.config, 12))


# The parts


def test_rms_norm_by_hand():
    norm = RMSNorm(3, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    x = torch.tensor([[3.0, 4.0, 5.0], [0.0, 0.0, 0.0]])
    rms = math.sqrt((9 + 16 + 25) / 3 + 0.5)
    wanted = torch.tensor([[3 / rms, 8 / rms, -5 / rms], [0.0, 0.0, 0.0]])
    assert_equal_to_rounding(norm(x), wanted, sums=3 + 2)


def test_rms_norm_computes_in_fp32_and_returns_the_input_dtype():
    norm = RMSNorm(4, eps=1e-5).half()
    large = torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=torch.float16)  # 300² overflows fp16
    assert torch.equal(norm(large), torch.tensor([1, -1, 1, 1], dtype=torch.float16))
    small = torch.full((4,), 1e-4, dtype=torch.float16)  # and 1e-8 underflows
    value = small[0].double().item()
    wanted = value / math.sqrt(value**2 + 1e-5)
    assert norm(small)[0].item() == pytest.approx(wanted, rel=1e-3)


def complex_pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())


def test_rotary_cos_sin_is_the_complex_exponential_of_position_times_frequency():
    positions = torch.tensor([[0, 1, 7], [100, 2000, 8191]])
    table = rotary_cos_sin(8, positions, theta=1e6)
    frequencies = torch.tensor([1.0, 1e6 ** (-2 / 8), 1e6 ** (-4 / 8), 1e6 ** (-6 / 8)]).double()
    wanted = torch.exp(1j * positions[..., None] * frequencies)
    assert table.shape == (2, 3, 4, 2)
    assert table.dtype == torch.float32
    # fp32 angles are only as exact as their size allows.
    close = torch.finfo(torch.float32).eps * positions.clamp(min=1)[..., None]
    assert ((complex_pairs(table).squeeze(-1) - wanted).abs() <= close).all()
    assert torch.equal(rotary_cos_sin(8, 5), rotary_cos_sin(8, torch.arange(5)))


def test_rotary_embedding_multiplies_adjacent_pairs_as_complex_numbers():
    torch.manual_seed(0)
    xq, xk = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    positions = torch.randint(0, 50, (2, 5))
    table = rotary_cos_sin(8, positions, theta=100.0)
    turns = complex_pairs(table).squeeze(-1)[:, :, None]  # (B, T, 1, head_dim / 2)
    for x, turned in zip((xq, xk), apply_rotary_emb(xq, xk, table), strict=True):
        assert turned.shape == x.shape
        wanted = torch.view_as_real(complex_pairs(x) * turns).flatten(-2)
        assert_equal_to_rounding(turned, wanted, sums=2)
    for x, turned in zip((xq, xk), apply_rotary_emb(xq.half(), xk.half(), table), strict=True):
        assert turned.dtype == torch.float16
        wanted = torch.view_as_real(complex_pairs(x.half()) * turns).flatten(-2)
        assert_equal_to_rounding(turned, wanted, sums=1)  # in fp32, and rounded once


def test_rotary_embedding_makes_products_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(query_position: int, key_position: int) -> float:
        turned_q, _ = apply_rotary_emb(q, k, rotary_cos_sin(16, torch.tensor([query_position])))
        _, turned_k = apply_rotary_emb(q, k, rotary_cos_sin(16, torch.tensor([key_position])))
        return (turned_q * turned_k).sum().item()

    close = rounding(3 * 16) * (q.norm() * k.norm()).item()  # two rotations, one product
    assert product(9, 4) == pytest.approx(product(105, 100), abs=close)
    assert product(7, 7) == pytest.approx((q * k).sum().item(), abs=close)
    assert product(9, 4) != pytest.approx(product(4, 9), abs=1e-2)


def test_repeat_kv_repeats_each_head_in_place():
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    repeated = repeat_kv(x, 2)
    assert repeated.shape == (2, 6, 5, 4)
    for head in range(6):
        assert torch.equal(repeated[:, head], x[:, head // 2])
    assert torch.equal(repeat_kv(x, 1), x)
    repeated.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_both_attention_paths_are_equal_with_gradients(n_kv_heads, masked):
    config = LMConfig(**{**TINY, "n_kv_heads": n_kv_heads})
    torch.manual_seed(0)
    sdpa = Attention(config, 0)
    plain = copy.deepcopy(sdpa)
    plain.flash_attn = False
    x = torch.randn(2, 9, 32)
    masks = [None, None]
    if masked:
        seen = (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
        configs = [config, replace(config, flash_attn=False)]
        masks = [additive_mask(seen, x, each) for each in configs]
    table = rotary_cos_sin(8, 9)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [
        layer(x, table, mask, None)
        for layer, x, mask in zip((sdpa, plain), inputs, masks, strict=True)
    ]
    sums = 3 * 32 + 8 + 2 * 9  # wq, wv, wo; q · k; softmax, · v
    assert_equal_to_rounding(*outs, sums)
    for out in outs:
        (out * x).sum().backward()
    assert_equal_to_rounding(inputs[0].grad, inputs[1].grad, 2 * sums)
    assert_same_gradients(gradients(sdpa), gradients(plain), 2 * sums + 2 * 9)


def test_attention_takes_the_memory_layout_of_every_fused_kernel(monkeypatch):
    model = tiny()
    ids = random_ids(2, 9)
    calls = {
        "mask": {"attention_mask": torch.ones_like(ids)},
        "packed": {"position_ids": starts_at_zero([5, 4])},
        "causal": {},
    }
    wanted = {name: model(ids, **arguments).logits for name, arguments in calls.items()}
    sdpa = nn.functional.scaled_dot_product_attention

    def as_on_cuda(*args, **kwargs) -> Tensor:
        """Memory in the order (B, T, heads, head_dim), as CUDA's memory-efficient kernel has it."""
        out = sdpa(*args, **kwargs)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", as_on_cuda)
    for name, arguments in calls.items():
        logits = model(ids, **arguments).logits
        assert_equal_to_rounding(logits, wanted[name], forward_sums(model.config, 9), name)


@both_attentions
def test_dropout_works_in_train_mode_only(flash_attn):
    model = tiny(dropout=0.3, flash_attn=flash_attn)
    ids = random_ids(1, 8)
    still = tiny(flash_attn=flash_attn)(ids).logits
    assert torch.equal(model(ids).logits, still)
    model.train()
    assert not torch.allclose(model(ids).logits, still, atol=1e-2)
    x = torch.ones(4, 50, 32)
    attention = model.layers[0].attention
    mask = additive_mask(torch.ones(4, 1, 50, 50, dtype=torch.bool).tril(), x, model.config)
    for seen in (None, mask):
        dropped = attention(x, rotary_cos_sin(8, 50), seen, None)
        # Equal inputs have equal values, and a mean of them changes only where weights are dropped.
        assert (dropped - attention.wo(repeat_rows(attention, x))).abs().max() > 1e-2


def repeat_rows(attention: Attention, x: Tensor) -> Tensor:
    values = attention.wv(x).unflatten(-1, (attention.n_kv_heads, -1))
    return values.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=2).flatten(2)


# The contract of masks, positions and cache, query by query


def reference_logits(
    model: MiniMindLM, ids: Tensor, keep: Tensor, positions: Tensor | None
) -> Tensor:
    """Logits by loops over rows, layers, queries and heads, in float64.

    A query in slot s with position p attends to the slots s − p … s that `keep` has; without
    positions, to every kept slot up to s, and its position is the number of kept slots before it.
    Queries that see nothing get NaN.
    """
    config = model.config
    weights = {name: w.double() for name, w in model.state_dict().items()}
    size, group = config.head_dim, config.n_heads // config.n_kv_heads
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2).double() / size)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * weights[f"{name}.weight"]

    def turned(x: Tensor, position: int) -> Tensor:
        return torch.view_as_real(complex_pairs(x) * torch.exp(1j * position * frequencies))

    logits = torch.full((*ids.shape, config.vocab_size), float("nan"), dtype=torch.float64)
    for b, row in enumerate(ids):
        seen, place = [], []
        for s in range(len(row)):
            if positions is None:
                first, p = 0, max(int(keep[b, : s + 1].sum()) - 1, 0)
            else:
                p = int(positions[b, s])
                first = max(s - p, 0)
            seen.append([j for j in range(first, s + 1) if keep[b, j]])
            place.append(p)
        x = [weights["tok_embeddings.weight"][token] for token in row]
        for i in range(config.n_layers):
            layer = f"layers.{i}"
            normed = [norm(h, f"{layer}.attention_norm") for h in x]
            q, k, v = (
                [(weights[f"{layer}.attention.{w}.weight"] @ h).view(-1, size) for h in normed]
                for w in ("wq", "wk", "wv")
            )
            for s in range(len(row)):
                heads = []
                for h in range(config.n_heads if seen[s] else 0):
                    query = turned(q[s][h], place[s])
                    scores = [
                        (query * turned(k[j][h // group], place[j])).sum() / math.sqrt(size)
                        for j in seen[s]
                    ]
                    shares = torch.stack(scores).softmax(0)
                    heads.append(
                        sum(w * v[j][h // group] for w, j in zip(shares, seen[s], strict=True))
                    )
                if heads:
                    x[s] = x[s] + weights[f"{layer}.attention.wo.weight"] @ torch.cat(heads)
                h = norm(x[s], f"{layer}.ffn_norm")
                w1, w2, w3 = (weights[f"{layer}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
                x[s] = x[s] + w2 @ (nn.functional.silu(w1 @ h) * (w3 @ h))
        for s, h in enumerate(x):
            if seen[s]:
                logits[b, s] = weights["output.weight"] @ norm(h, "norm")
    return logits


@st.composite
def masked_rows(draw):
    """(shape, mask or None, positions or None, chunk lengths) of a batch."""
    rows, slots = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    bits = st.lists(st.integers(0, 1), min_size=slots, max_size=slots)
    mask = draw(st.none() | st.lists(bits, min_size=rows, max_size=rows))
    numbers = st.tuples(*(st.integers(0, s + 2) for s in range(slots)))
    positions = draw(st.none() | st.lists(numbers, min_size=rows, max_size=rows))
    cuts = draw(st.sets(st.integers(1, slots - 1), max_size=3)) if slots > 1 else set()
    edges = [0, *sorted(cuts), slots]
    return (
        (rows, slots),
        None if mask is None else torch.tensor(mask),
        None if positions is None else torch.tensor(positions),
        [b - a for a, b in itertools.pairwise(edges)],
    )


@both_attentions
@settings(deadline=None, max_examples=60)
@given(case=masked_rows())
@torch.no_grad()
def test_every_query_sees_what_the_contract_says(flash_attn, case):
    shape, mask, positions, chunks = case
    model = tiny(flash_attn=flash_attn, dim=16, vocab_size=40)
    ids = random_ids(*shape) % 40
    keep = torch.ones(shape, dtype=torch.long) if mask is None else mask
    wanted = reference_logits(model, ids, keep, positions)
    logits, cache, end = [], None, 0
    for length in chunks:
        start, end = end, end + length
        out = model(
            ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
        cache = out.past_key_values
    logits = torch.cat(logits, dim=1)
    assert logits.isfinite().all()
    sees = ~wanted.isnan()
    if sees.any():
        sums = forward_sums(model.config, shape[1])
        assert_equal_to_rounding(logits[sees], wanted[sees], sums)


# Cache


def in_chunks(model: MiniMindLM, ids: Tensor, lengths: list[int]) -> Tensor:
    """Logits of a row fed piece by piece through one cache."""
    cache, logits = KVCache(model.config.n_layers), []
    for chunk in ids.split(lengths, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        logits.append(out.logits)
    assert cache.length == ids.shape[1]
    return torch.cat(logits, dim=1)


@both_kinds
@both_attentions
@pytest.mark.parametrize(
    "lengths", [[12], [1] * 12, [5, 7], [1, 11], [11, 1], [3, 1, 1, 4, 1, 2]], ids=str
)
@torch.no_grad()
def test_any_split_into_chunks_equals_one_pass(use_moe, flash_attn, lengths):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    ids = random_ids(2, 12)
    whole = model(ids).logits
    chunked = in_chunks(model, ids, lengths)
    assert_equal_to_rounding(chunked, whole, forward_sums(model.config, 12))


@both_kinds
@both_attentions
def test_gradients_through_a_cache_equal_those_of_one_pass(use_moe, flash_attn):
    ids = random_ids(2, 9)
    found = []
    for lengths in ([9], [4, 1, 1, 3]):
        model = tiny(use_moe=use_moe, flash_attn=flash_attn)
        logits = in_chunks(model, ids, lengths)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        found.append(gradients(model))
    assert_same_gradients(*found, gradient_sums(model.config, 9, rows=2))


@both_attentions
def test_gradients_reach_queries_when_keys_are_frozen(flash_attn):
    ids = random_ids(2, 8)
    found = []
    for lengths in ([8], [2, 2, 2, 2]):
        model = tiny(flash_attn=flash_attn).requires_grad_(False)
        for layer in model.layers:
            layer.attention.wq.weight.requires_grad_(True)
        in_chunks(model, ids, lengths).square().mean().backward()
        found.append({n: g for n, g in gradients(model).items() if g is not None})
    assert found[0]
    assert_same_gradients(*found, gradient_sums(model.config, 8, rows=2))


def test_a_pass_without_gradients_leaves_an_earlier_graph_intact():
    ids = random_ids(2, 8)
    model = tiny()
    cache = KVCache(2)
    logits = model(ids[:, :5], past_key_values=cache, use_cache=True).logits
    with torch.no_grad():
        model(ids[:, 5:], past_key_values=cache, use_cache=True)
    logits.sum().backward()
    cached = gradients(model)
    fresh = tiny()
    fresh(ids[:, :5]).logits.sum().backward()
    assert_same_gradients(cached, gradients(fresh), gradient_sums(model.config, 5, rows=2))


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_without_use_cache_a_past_is_read_and_left_alone(recording):
    model = tiny()
    ids = random_ids(2, 12)
    sums = forward_sums(model.config, 12)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :6], use_cache=True).past_key_values
    kept = [[t[:, :, :6].clone() for t in store] for store in (cache.keys, cache.values)]
    with torch.set_grad_enabled(recording):
        for _ in range(2):  # several continuations of one prefix
            out = model(ids[:, 6:], past_key_values=cache)
            assert out.past_key_values is None
            assert_equal_to_rounding(out.logits, whole[:, 6:], sums)
            model(ids[:, :3], past_key_values=cache)
    assert cache.length == 6
    for store, before in zip((cache.keys, cache.values), kept, strict=True):
        assert all(torch.equal(t[:, :, :6], b) for t, b in zip(store, before, strict=True))
    with torch.no_grad():
        out = model(ids[:, 6:], past_key_values=cache, use_cache=True)
    assert_equal_to_rounding(out.logits, whole[:, 6:], sums)
    assert cache.length == 12


@torch.no_grad()
def test_the_cache_doubles():
    model = tiny()
    cache, places = KVCache(2), []
    for token in random_ids(1, 40).split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
        places.append(cache.keys[1].data_ptr())
    allocations = 1 + sum(a != b for a, b in itertools.pairwise(places))
    assert allocations == 7  # 1, 2, 4, 8, 16, 32, 64 slots
    assert cache.keys[1].shape == (1, 2, 64, 8)


# Padding


def alone(model: MiniMindLM, row: Tensor) -> Tensor:
    return model(row[None]).logits[0]


@both_kinds
@both_attentions
@torch.no_grad()
def test_left_padded_rows_equal_the_rows_alone_through_prefill_and_decoding(use_moe, flash_attn):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    lengths, prompt, steps = [9, 4, 1], 9, [1, 1, 3, 1]
    ids = random_ids(3, prompt + sum(steps))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : prompt - length] = 0
    cache, logits, end = None, [], 0
    for step in [prompt, *steps]:
        start, end = end, end + step
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, length in enumerate(lengths):
        wanted = alone(model, ids[row, prompt - length :])
        sums = forward_sums(model.config, ids.shape[1])
        assert_equal_to_rounding(logits[row, prompt - length :], wanted, sums)


@both_attentions
@torch.no_grad()
def test_right_padding_and_holes_count_for_nothing(flash_attn):
    model = tiny(flash_attn=flash_attn)
    ids = random_ids(3, 10)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1, [0, 3, 4, 9]] = 0
    for dtype in (torch.long, torch.bool, torch.float32):
        logits = model(ids, attention_mask=mask.to(dtype)).logits
        for row, kept in enumerate(mask.bool()):
            wanted = alone(model, ids[row][kept])
            assert_equal_to_rounding(logits[row][kept], wanted, forward_sums(model.config, 10))


@both_kinds
@both_attentions
def test_a_row_of_padding_gives_no_nan_and_disturbs_no_other(use_moe, flash_attn):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    ids = random_ids(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    out = model(ids, attention_mask=mask, labels=ids)
    assert out.logits.isfinite().all()
    assert_equal_to_rounding(out.logits[0], alone(model, ids[0]), forward_sums(model.config, 6))
    out.loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


# Packed rows


def starts_at_zero(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@both_kinds
@both_attentions
@pytest.mark.parametrize("lengths", [[5, 1, 7, 3], [40, 1, 64, 20]], ids=["short", "over context"])
@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(use_moe, flash_attn, lengths):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    ids = random_ids(1, sum(lengths))
    logits = model(ids, position_ids=starts_at_zero(lengths)).logits[0]
    for packed, document in zip(logits.split(lengths), ids[0].split(lengths), strict=True):
        sums = forward_sums(model.config, max(lengths))
        assert_equal_to_rounding(packed, alone(model, document), sums)


@both_attentions
@pytest.mark.parametrize("lengths", [[5, 1, 7, 3], [40, 1, 64, 20]], ids=["short", "over context"])
def test_a_change_in_one_document_changes_no_other_at_all(flash_attn, lengths):
    model = tiny(flash_attn=flash_attn)
    ids = random_ids(1, sum(lengths))
    positions = starts_at_zero(lengths)
    before = model(ids, position_ids=positions).logits
    for changed, (first, last) in enumerate([(0, lengths[0]), (lengths[0], sum(lengths[:2]))]):
        other = ids.clone()
        other[:, first:last] = random_ids(1, last - first, seed=2)
        after = model(other, position_ids=positions).logits
        assert not torch.equal(after[:, first:last], before[:, first:last]), changed
        assert torch.equal(after[:, :first], before[:, :first])
        assert torch.equal(after[:, last:], before[:, last:])


def test_a_loss_on_one_packed_document_has_no_gradient_in_another():
    model = tiny()
    lengths = [5, 4, 6]
    ids = torch.arange(10, 25)[None]  # every id once, so that embedding rows tell documents apart
    labels = torch.full_like(ids, -100)
    labels[0, 6:9] = ids[0, 6:9]
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())
    model(ids, position_ids=starts_at_zero(lengths), labels=labels).loss.backward()
    touched = model.tok_embeddings.weight.grad.abs().sum(-1).nonzero().flatten()
    assert touched.tolist() == [15, 16, 17]  # the last token of the document predicts no target


@torch.no_grad()
def test_the_last_packed_document_continues_through_a_cache():
    model = tiny()
    lengths = [5, 3, 6]
    ids = random_ids(1, 14)
    positions = starts_at_zero(lengths)
    cache, logits = None, []
    for chunk in (slice(0, 10), slice(10, 11), slice(11, 14)):
        out = model(
            ids[:, chunk],
            position_ids=positions[:, chunk],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits[0])
    logits = torch.cat(logits)
    for packed, document in zip(logits.split(lengths), ids[0].split(lengths), strict=True):
        sums = forward_sums(model.config, max(lengths))
        assert_equal_to_rounding(packed, alone(model, document), sums)


@both_attentions
@pytest.mark.parametrize("tail", ["zeros", "counting"])
@torch.no_grad()
def test_packed_rows_with_a_padded_tail(flash_attn, tail):
    model = tiny(flash_attn=flash_attn)
    lengths = [4, 5]
    ids = random_ids(2, 12)
    positions = starts_at_zero([4, 5, 3]).repeat(2, 1)
    if tail == "zeros":
        positions[:, 9:] = 0
    mask = (torch.arange(12) < 9).long().repeat(2, 1)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    assert logits.isfinite().all()
    for row in range(2):
        packed = logits[row, :9].split(lengths)
        for found, document in zip(packed, ids[row, :9].split(lengths), strict=True):
            sums = forward_sums(model.config, 12)
            assert_equal_to_rounding(found, alone(model, document), sums)


# What forward returns


def attributes(model: nn.Module) -> dict[str, dict]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@both_kinds
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_call_keeps_nothing_and_two_calls_are_equal(use_moe, training):
    model = tiny(use_moe=use_moe).train(training)
    ids = random_ids(2, 9)
    before, weights = attributes(model), copy.deepcopy(model.state_dict())
    first = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, labels=ids)
    logits, loss = first.logits.detach().clone(), first.loss.detach().clone()
    first.loss.backward()
    with torch.no_grad():
        first.logits.zero_()
    second = model(ids, attention_mask=torch.ones_like(ids), use_cache=True, labels=ids)
    assert torch.equal(second.logits, logits)
    assert torch.equal(second.loss, loss)
    assert second is not first
    assert second.past_key_values is not first.past_key_values
    assert attributes(model) == before
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_output_of_a_dense_model():
    model = tiny()
    ids = random_ids(2, 9)
    out = model(ids)
    assert out.logits.shape == (2, 9, 300)
    assert out.last_hidden_state.shape == (2, 9, 32)
    logits = out.last_hidden_state @ model.tok_embeddings.weight.T
    assert_equal_to_rounding(out.logits, logits, sums=32)
    assert out.aux_loss.shape == ()
    assert out.aux_loss.item() == 0
    assert out.loss is None
    assert out.past_key_values is None
    assert out.expert_load is None


@torch.no_grad()
def test_logits_to_keep_computes_the_last_positions_only():
    model = tiny()
    ids = random_ids(2, 9)
    whole = model(ids).logits
    for kept in (1, 4, 9):
        logits = model(ids, logits_to_keep=kept).logits
        assert logits.shape == (2, kept, 300)
        assert_equal_to_rounding(logits, whole[:, -kept:], forward_sums(model.config, 9))


def test_loss_by_hand():
    model = tiny()
    ids = random_ids(2, 6)
    labels = torch.tensor([[9, 8, -100, 7, 6, -100], [-100, -100, 5, 4, -100, 3]])
    out = model(ids, labels=labels)
    terms = []
    for row in range(2):
        for t in range(5):
            target = int(labels[row, t + 1])
            if target != -100:
                scores = [math.exp(z) for z in out.logits[row, t].tolist()]
                terms.append(-math.log(scores[target] / sum(scores)))
    assert len(terms) == 6
    assert out.loss.item() == pytest.approx(sum(terms) / 6, rel=rounding(300 + 6))


def test_no_label_at_all_gives_a_loss_of_zero():
    model = tiny()
    ids = random_ids(2, 6)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(model).values())


def test_the_context_can_be_filled_but_not_exceeded():
    model = tiny(max_seq_len=16)
    ids = random_ids(1, 17)
    assert model(ids[:, :16]).logits.shape[1] == 16
    with pytest.raises(ValueError, match="max_seq_len"):
        model(ids)
    cache = model(ids[:, :16], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="max_seq_len"):
        model(ids[:, 16:], past_key_values=cache, use_cache=True)


def test_an_attention_mask_covers_past_and_present():
    model = tiny()
    ids = random_ids(2, 9)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 8))
    cache = model(ids[:, :6], use_cache=True).past_key_values
    for width in (1, 3, 6, 10):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids[:, 6:], attention_mask=torch.ones(2, width), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):  # a step's own mask, of width 1
        model(ids[:, 6:7], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_contradictory_arguments_are_refused():
    model = tiny()
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, labels=ids, logits_to_keep=1)
    model.gradient_checkpointing = True
    model.train()
    with pytest.raises(ValueError, match="checkpointing"):
        model(ids, use_cache=True)
    model.eval()
    assert model(ids, use_cache=True).past_key_values.length == 6


@both_kinds
def test_half_precision_weights_give_close_logits(use_moe):
    model = tiny(use_moe=use_moe, num_experts_per_tok=4)  # all experts: rounding cannot reroute
    ids = random_ids(2, 20)
    exact = model(ids).logits
    for dtype in (torch.bfloat16, torch.float16):
        out = copy.deepcopy(model).to(dtype)(ids)
        assert out.logits.dtype == dtype
        # Sums are fp32's; each of the 11 operations of a layer, and norm and output, round once.
        assert_equal_to_rounding(out.logits, exact, sums=2 * 11 + 2)


# Initialisation, names, tying, files


def test_names_of_the_weights():
    dense = [f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk", "wv", "wo")]
    dense += [f"layers.{i}.{n}.weight" for i in range(2) for n in ("attention_norm", "ffn_norm")]
    dense += ["tok_embeddings.weight", "norm.weight", "output.weight"]
    swiglu = [f"{w}.weight" for w in ("w1", "w2", "w3")]
    layers = [f"layers.{i}.feed_forward" for i in range(2)]
    plain = [f"{layer}.{w}" for layer in layers for w in swiglu]
    assert set(tiny().state_dict()) == {*dense, *plain}
    moe = [f"{layer}.experts.{e}.{w}" for layer in layers for e in range(4) for w in swiglu]
    moe += [f"{layer}.gate.weight" for layer in layers]
    shared = [f"{layer}.shared_experts.{w}" for layer in layers for w in swiglu]
    assert set(tiny(use_moe=True).state_dict()) == {*dense, *moe, *shared}
    assert set(tiny(use_moe=True, n_shared_experts=0).state_dict()) == {*dense, *moe}


def test_initial_weights():
    torch.manual_seed(0)
    shape = {"dim": 128, "n_layers": 8, "vocab_size": 600, "hidden_dim": 256}
    model = MiniMindLM(LMConfig(use_moe=True, **shape))
    pooled: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        kind = "norm" if "norm" in parts[-2] else parts[-2]
        pooled.setdefault(kind, []).append(weight.detach().flatten())
    assert set(pooled) == {
        *("tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "gate", "norm")
    }
    for kind, weights in pooled.items():
        values = torch.cat(weights)
        if kind == "norm":
            assert (values == 1).all()
            continue
        std = 0.02 / math.sqrt(2 * 8) if kind in ("wo", "w2") else 0.02
        assert values.std().item() == pytest.approx(std, rel=0.05), kind
        assert abs(values.mean().item()) < 0.05 * std, kind
        kurtosis = ((values - values.mean()) / values.std()).pow(4).mean()
        assert kurtosis == pytest.approx(3, abs=0.5), kind  # normal; a uniform one has 1.8


def is_tied(model: MiniMindLM) -> bool:
    return model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr() and (
        model.output.weight is model.tok_embeddings.weight
    )


def test_output_and_embedding_stay_one_tensor():
    model = tiny()
    assert is_tied(model)
    assert "output.weight" not in dict(model.named_parameters())
    other = MiniMindLM(LMConfig(**TINY))
    other.load_state_dict(model.state_dict())
    assert is_tied(other)
    assert is_tied(copy.deepcopy(model))
    assert is_tied(copy.deepcopy(model).to(torch.bfloat16))
    model(random_ids(1, 5)).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert is_tied(model)


# Inside other people's machinery


@both_kinds
def test_gradient_checkpointing_runs_blocks_again_and_changes_no_gradient(use_moe):
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found, calls = [], []
    for checkpointing in (False, True):
        model = tiny(use_moe=use_moe, dropout=0.1).train()
        model.gradient_checkpointing = checkpointing
        count = 0

        def entered(*_):
            nonlocal count
            count += 1

        for layer in model.layers:
            layer.register_forward_pre_hook(entered)
        torch.manual_seed(5)
        out = model(ids, attention_mask=mask, labels=ids)
        assert count == 2
        out.loss.backward()
        calls.append(count)
        found.append({**gradients(model), "loss": out.loss.detach(), "aux": out.aux_loss.detach()})
    assert calls == [2, 4]
    assert_same_gradients(*found, gradient_sums(model.config, 12, rows=2))
    model.gradient_checkpointing = False
    model(ids, labels=ids).loss.backward()
    assert count == 6


class Counting(torch.utils.data.Dataset):
    """Rows that count upwards: easy to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(16) + index) % 50 + 3
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("fields", "checkpointing", "arguments"),
    [
        ({}, False, {}),
        ({"use_moe": True}, True, {"gradient_accumulation_steps": 2}),
        ({"use_moe": True}, False, {"bf16": True}),
    ],
    ids=["dense", "moe checkpointed", "moe bf16"],
)
def test_trainer_lowers_the_loss_and_evaluates(tmp_path, recwarn, fields, checkpointing, arguments):
    """The model is no PreTrainedModel, so the trainer computes and whoever uses it saves."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(**{**TINY, "vocab_size": 60, **fields}))
    model.gradient_checkpointing = checkpointing
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=12,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=6,
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Counting(),
        eval_dataset=Counting(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    metrics = trainer.evaluate()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = MiniMindLM(model.config).eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    batch = torch.stack([Counting()[i]["input_ids"] for i in range(64)])
    expected = loaded(batch, labels=batch).loss.item()
    assert metrics["eval_loss"] == pytest.approx(
        expected, rel=0.02 if "bf16" in arguments else rounding(loss_sums(model.config, 16, 64))
    )
    assert not [w for w in recwarn if "MiniMind" in str(w.message)]


MASK = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
COMPILED_CALLS = {
    "causal": {"labels": random_ids(2, 12)},
    "masked": {"attention_mask": MASK},
    "packed": {"position_ids": starts_at_zero([5, 7])},
    "packed and masked": {"position_ids": starts_at_zero([5, 7]), "attention_mask": MASK},
}


@pytest.mark.parametrize(
    ("flash_attn", "call"),
    [(True, "causal"), (True, "masked"), (True, "packed"), (False, "packed and masked")],
)
def test_dense_forward_compiles_without_graph_breaks(flash_attn, call):
    torch._dynamo.reset()
    model = tiny(flash_attn=flash_attn, n_layers=1).train()
    ids, arguments = random_ids(2, 12), COMPILED_CALLS[call]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        out = run(ids, **arguments)
        (out.logits.square().mean() if out.loss is None else out.loss).backward()
        found.append({**gradients(model), "logits": out.logits.detach()})
        model.zero_grad()
    assert_same_gradients(*found, gradient_sums(model.config, 12, rows=2))
