"""The mixture of experts: routing, the auxiliary loss, gradients, autocast, against Granite."""

import copy
import math

import pytest
import torch
import transformers
from rounding import (
    assert_equal_to_rounding,
    forward_sums,
    gradient_sums,
    loss_sums,
    rounding,
)
from tiny_models import (
    TINY,
    assert_same_gradients,
    gradients,
    halves,
    random_ids,
    randomised,
)
from tiny_models import tiny as tiny_model
from torch import Tensor, nn

from model import LMConfig, MiniMindLM
from model.model import MOEFeedForward, MoEGate

MOE = {"use_moe": True, "hidden_dim": 48}
LAYER_SUMS = 32 + 32 + 2 * 48 + 4  # gate, w1, w2 of two shared experts, the experts of a token


def tiny(**overrides) -> MiniMindLM:
    return tiny_model(**{**MOE, **overrides})


def layer(**overrides) -> MOEFeedForward:
    torch.manual_seed(0)
    return randomised(MOEFeedForward(LMConfig(**{**TINY, **MOE, **overrides})))


# transformers' GraniteMoeShared: its halves-wise rotary embedding, fused projections, no aux loss


def as_granite(weights: dict[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Weights (or gradients) under Granite's names, in its layout."""
    renamed = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"

        def swiglu(name: str, layer: str = ours) -> tuple[Tensor, Tensor]:
            w1, w2, w3 = (weights[f"{layer}.feed_forward.{name}.w{n}.weight"] for n in (1, 2, 3))
            return torch.cat((w1, w3)), w2

        attention = {w: weights[f"{ours}.attention.{w}.weight"] for w in ("wq", "wk", "wv", "wo")}
        experts = [swiglu(f"experts.{e}") for e in range(config.n_routed_experts)]
        renamed |= {
            f"{theirs}.self_attn.q_proj.weight": halves(attention["wq"], config.n_heads),
            f"{theirs}.self_attn.k_proj.weight": halves(attention["wk"], config.n_kv_heads),
            f"{theirs}.self_attn.v_proj.weight": attention["wv"],
            f"{theirs}.self_attn.o_proj.weight": attention["wo"],
            f"{theirs}.input_layernorm.weight": weights[f"{ours}.attention_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": weights[f"{ours}.ffn_norm.weight"],
            f"{theirs}.block_sparse_moe.router.weight": weights[f"{ours}.feed_forward.gate.weight"],
            f"{theirs}.block_sparse_moe.experts.gate_up_proj": torch.stack([e[0] for e in experts]),
            f"{theirs}.block_sparse_moe.experts.down_proj": torch.stack([e[1] for e in experts]),
        }
        if config.n_shared_experts:
            fused, down = swiglu("shared_experts")
            renamed[f"{theirs}.shared_mlp.input_linear.weight"] = fused
            renamed[f"{theirs}.shared_mlp.output_linear.weight"] = down
    return renamed


def granite_with_weights_of(model: MiniMindLM) -> nn.Module:
    config = model.config
    granite = transformers.GraniteMoeSharedForCausalLM(
        transformers.GraniteMoeSharedConfig(
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            shared_intermediate_size=config.hidden_dim * config.n_shared_experts,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            num_local_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            attention_multiplier=config.head_dim**-0.5,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
            tie_word_embeddings=True,
        )
    )
    weights = as_granite(model.state_dict(), config)
    granite.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return granite.eval()


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="names of transformers 5's weights"
)
@pytest.mark.parametrize("flash_attn", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2},
        {"n_shared_experts": 0},
        {"num_experts_per_tok": 4},
    ],
    ids=str,
)
def test_granite_with_the_same_weights_agrees_in_logits_and_gradients(flash_attn, routing):
    model = tiny(flash_attn=flash_attn, **routing)
    granite = granite_with_weights_of(model)
    ids = random_ids(3, 30)
    labels = ids.clone()
    labels[0, :15] = -100
    ours, theirs = model(ids, labels=labels), granite(ids, labels=labels)
    assert_equal_to_rounding(ours.logits, theirs.logits, forward_sums(model.config, 30))
    assert_equal_to_rounding(ours.loss, theirs.loss, loss_sums(model.config, 30, rows=3))
    ours.loss.backward()  # eval mode: the language loss alone
    theirs.loss.backward()
    assert_same_gradients(
        as_granite(gradients(model), model.config),
        gradients(granite),
        gradient_sums(model.config, 30, rows=3),
    )


# By hand


def gate_scores(moe: MOEFeedForward, token: Tensor) -> list[float]:
    logits = [math.exp(float(row @ token)) for row in moe.gate.weight.detach().double()]
    return [z / sum(logits) for z in logits]


def likeliest(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "n_shared_experts": 0},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 3, "norm_topk_prob": False, "n_shared_experts": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_output_by_hand(routing):
    moe = layer(**routing)
    top_k = routing.get("num_experts_per_tok", 2)
    x = torch.randn(2, 5, 32)
    y, _, _ = moe(x, None)
    for b in range(2):
        for t in range(5):
            scores = gate_scores(moe, x[b, t].double())
            chosen = likeliest(scores, top_k)
            # top-1 keeps its raw probability; normalised it would be 1 whatever the gate says
            scale = 1.0
            if top_k > 1 and routing.get("norm_topk_prob", True):
                scale = sum(scores[e] for e in chosen)
            wanted = sum(scores[e] / scale * moe.experts[e](x[b, t]) for e in chosen)
            if routing.get("n_shared_experts", 1):
                wanted = wanted + moe.shared_experts(x[b, t])
            assert_equal_to_rounding(y[b, t], wanted, LAYER_SUMS)


@pytest.mark.parametrize(("shared", "width"), [(0, None), (1, 48), (True, 48), (2, 96)])
def test_shared_experts_are_one_layer_of_their_joint_width(shared, width):
    moe = layer(n_shared_experts=shared)
    if width is None:
        assert moe.shared_experts is None
        assert not any("shared" in name for name, _ in moe.named_parameters())
    else:
        assert moe.shared_experts.w1.weight.shape == (width, 32)


def aux_loss_by_hand(moe: MOEFeedForward, x: Tensor, valid: Tensor, alpha, top_k, by_sequence):
    """alpha · Σ_e f_e · P_e of each sequence, averaged; or of all tokens together."""
    experts = len(moe.experts)
    sequences = [[x[b, t] for t in range(x.shape[1]) if valid[b, t]] for b in range(x.shape[0])]
    if not by_sequence:
        sequences = [[token for sequence in sequences for token in sequence]]
    losses = []
    for sequence in sequences:
        pairs, mean = [0] * experts, [0.0] * experts
        for token in sequence:
            scores = gate_scores(moe, token.double())
            for e in likeliest(scores, top_k):
                pairs[e] += 1
            for e in range(experts):
                mean[e] += scores[e] / len(sequence)
        shares = [experts * n / (len(sequence) * top_k) for n in pairs]
        losses.append(alpha * sum(f * p for f, p in zip(shares, mean, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seq_aux", [True, False], ids=["sequence", "global"])
def test_auxiliary_loss_by_hand(seq_aux, top_k, masked):
    moe = layer(num_experts_per_tok=top_k, seq_aux=seq_aux, aux_loss_alpha=0.3)
    x = torch.randn(3, 7, 32)
    valid = torch.ones(3, 7, dtype=torch.bool)
    if masked:
        valid[0, :4] = False
        valid[1, [0, 3, 6]] = False
    _, aux_loss, load = moe(x, valid if masked else None)
    wanted = aux_loss_by_hand(moe, x, valid, 0.3, top_k, seq_aux)
    close = rounding(32 + 4 + 21)  # gate, softmax, tokens
    assert aux_loss.item() == pytest.approx(wanted, rel=close)
    counts = [0] * 4
    for token in x[valid]:
        for e in likeliest(gate_scores(moe, token.double()), top_k):
            counts[e] += 1
    assert load.tolist() == counts


def test_even_use_has_the_least_auxiliary_loss_alpha():
    gate = MoEGate(LMConfig(**{**TINY, **MOE, "num_experts_per_tok": 1, "aux_loss_alpha": 0.1}))
    with torch.no_grad():
        gate.weight.copy_(torch.eye(4, 32) * 50)
    even, close = torch.eye(4, 32)[None], rounding(32 + 4 + 4)  # gate, softmax, tokens
    assert gate(even, None)[2].item() == pytest.approx(0.1, rel=close)
    uneven = torch.eye(4, 32)[[0, 0, 0, 0]][None]
    assert gate(uneven, None)[2].item() == pytest.approx(0.4, rel=close)  # alpha · n_experts


def test_model_sums_the_auxiliary_losses_of_its_layers():
    model = tiny(n_layers=3)
    ids = random_ids(2, 9)
    seen = []
    for block in model.layers:
        block.feed_forward.register_forward_hook(lambda module, args, out: seen.append(out[1]))
    out = model(ids)
    assert len(seen) == 3
    assert out.aux_loss.shape == ()
    wanted = sum(loss.item() for loss in seen)
    assert out.aux_loss.item() == pytest.approx(wanted, rel=rounding(3))
    double = tiny(n_layers=3, aux_loss_alpha=0.2)(ids).aux_loss
    assert_equal_to_rounding(double, 2 * out.aux_loss, sums=3)
    assert tiny(n_layers=3, aux_loss_alpha=0.0)(ids).aux_loss.item() == 0


def test_loss_holds_the_auxiliary_loss_in_train_mode_only():
    model = tiny()
    ids = random_ids(2, 9)
    plain = model(ids, labels=ids)
    training = model.train()(ids, labels=ids)
    assert_equal_to_rounding(training.loss, plain.loss + plain.aux_loss, sums=2)


# Padding


@pytest.mark.parametrize("seq_aux", [True, False], ids=["sequence", "global"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_auxiliary_loss_nor_load_nor_gradients(seq_aux, side):
    ids = random_ids(2, 8)
    filler = torch.full((2, 5), 7)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(filler)
    pairs = [(filler, ids), (zeros, ones)] if side == "left" else [(ids, filler), (ones, zeros)]
    padded, mask = (torch.cat(pair, dim=1) for pair in pairs)
    found = []
    for arguments in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        model = tiny(seq_aux=seq_aux)
        out = model(**arguments)
        out.aux_loss.backward()
        touched = {n: g for n, g in gradients(model).items() if g is not None}
        found.append((out.aux_loss.detach(), out.expert_load, touched))
    assert_equal_to_rounding(found[0][0], found[1][0], forward_sums(model.config, 13))
    assert torch.equal(found[0][1], found[1][1])
    assert_same_gradients(found[0][2], found[1][2], gradient_sums(model.config, 13, rows=2))


@pytest.mark.parametrize("seq_aux", [True, False], ids=["sequence", "global"])
def test_a_row_of_padding_does_not_change_the_auxiliary_loss(seq_aux):
    model = tiny(seq_aux=seq_aux)
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[2] = 0
    padded = model(ids, attention_mask=mask)
    alone = model(ids[:2])
    assert torch.equal(padded.expert_load, alone.expert_load)
    assert_equal_to_rounding(padded.aux_loss, alone.aux_loss, forward_sums(model.config, 8))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_expert_load_counts_every_choice_of_every_token(top_k):
    model = tiny(num_experts_per_tok=top_k, n_layers=3)
    ids = random_ids(2, 10)
    load = model(ids).expert_load
    assert load.shape == (3, 4)
    assert load.dtype == torch.int64
    assert load.sum(1).tolist() == [20 * top_k] * 3
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    assert model(ids, attention_mask=mask).expert_load.sum(1).tolist() == [13 * top_k] * 3
    cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    step = model(ids[:, 8:], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert step.expert_load.sum(1).tolist() == [4 * top_k] * 3  # of this step's tokens only


# One implementation for training and inference


def test_training_and_evaluation_route_alike():
    model = tiny()
    ids = random_ids(2, 20)
    evaluated = model.eval()(ids)
    trained = model.train()(ids)
    assert torch.equal(evaluated.expert_load, trained.expert_load)
    assert torch.equal(evaluated.logits, trained.logits)
    assert torch.equal(evaluated.aux_loss, trained.aux_loss)


@pytest.mark.parametrize("top_k", [1, 2])
@torch.no_grad()
def test_a_token_alone_gets_what_it_gets_in_a_batch(top_k):
    moe = layer(num_experts_per_tok=top_k)
    x = torch.randn(3, 6, 32)
    together, _, _ = moe(x, None)
    for b in range(3):
        for t in range(6):
            single, _, _ = moe(x[b : b + 1, t : t + 1], None)
            assert_equal_to_rounding(single[0, 0], together[b, t], LAYER_SUMS)


# Gradients


def test_experts_without_tokens_get_gradients_of_zero():
    model = tiny(num_experts_per_tok=1)
    with torch.no_grad():
        for block in model.layers:
            block.feed_forward.gate.weight.zero_()  # equal scores: the first expert wins everywhere
    ids = random_ids(2, 9)
    out = model.train()(ids, labels=ids)
    used = out.expert_load > 0
    assert used.sum(1).tolist() == [1, 1]
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for i, block in enumerate(model.layers):
        for e, expert in enumerate(block.feed_forward.experts):
            for weight in expert.parameters():
                assert bool(weight.grad.any()) == bool(used[i, e])


def test_single_expert_choice_still_teaches_the_gate():
    model = tiny(num_experts_per_tok=1, aux_loss_alpha=0.0)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for block in model.layers:
        assert block.feed_forward.gate.weight.grad.abs().max() > 1e-4


def test_gradients_agree_with_finite_differences():
    moe = layer(hidden_dim=8, num_experts_per_tok=2)
    x = torch.randn(1, 4, 32)
    probe = torch.randn(1, 4, 32)

    def objective() -> Tensor:
        y, aux_loss, _ = moe(x, None)
        return (y.double() * probe).sum() + aux_loss.double()

    objective().backward()
    for name, weight in moe.named_parameters():
        direction = torch.randn_like(weight)
        step = 1e-2 / direction.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight += sign * step * direction
                values.append(objective().item())
                weight -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step.item())
        assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=0.02, abs=2e-3), (
            name
        )


# Autocast


def test_autocast_runs_is_finite_and_close_to_fp32():
    model = tiny(num_experts_per_tok=4, aux_loss_alpha=0.1).train()  # all experts: no rerouting
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    exact_model = copy.deepcopy(model)
    exact = exact_model(ids, attention_mask=mask, labels=ids)
    exact.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    assert out.loss.dtype == out.aux_loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert out.aux_loss.item() == pytest.approx(exact.aux_loss.item(), rel=0.02)
    for name, gradient in gradients(model).items():
        wanted = gradients(exact_model)[name]
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name
        assert (gradient - wanted).norm() < 0.1 * wanted.norm() + 1e-4, name


def test_autocast_with_sparse_routing_and_an_idle_expert():
    model = tiny(num_experts_per_tok=1).train()
    with torch.no_grad():
        for block in model.layers:
            block.feed_forward.gate.weight.zero_()
    ids = random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
        cached = model(ids, use_cache=True)
        step = model(ids[:, :1], past_key_values=cached.past_key_values, use_cache=True)
    out.loss.backward()
    assert step.logits.isfinite().all()
    assert all(g is not None and g.isfinite().all() for g in gradients(model).values())


def test_the_gate_scores_in_fp32_under_autocast():
    gate = randomised(MoEGate(LMConfig(**TINY, **MOE)))
    x = torch.randn(2, 50, 32)
    exact = gate(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gate(x, None)
    for a, b in zip(exact, mixed, strict=True):
        assert torch.equal(a, b)
