"""LMConfig: defaults, derived width, what it refuses, its round trip, the published sizes."""

import json
from dataclasses import asdict

import pytest
import torch

from model import LMConfig, MiniMindLM

DEFAULTS = {
    "dim": 512,
    "n_layers": 8,
    "n_heads": 8,
    "n_kv_heads": 2,
    "vocab_size": 6400,
    "hidden_dim": 1408,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "max_seq_len": 8192,
    "rope_theta": 1e6,
    "dropout": 0.0,
    "flash_attn": True,
    "use_moe": False,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.1,
    "seq_aux": True,
    "norm_topk_prob": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_defaults():
    config = LMConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.model_type == "minimind"
    assert config.head_dim == 64


@pytest.mark.parametrize(
    ("dim", "multiple_of", "hidden_dim"),
    [
        (512, 64, 1408),  # 8/3 · 512 = 1365.3 → 22 · 64
        (640, 64, 1728),  # 1706.7 → 27 · 64
        (768, 64, 2048),  # 2048 exactly: nothing to round
        (96, 64, 256),  # 256 exactly
        (512, 1, 1365),
        (512, 256, 1536),
        (16, 64, 64),
    ],
)
def test_hidden_dim_is_two_thirds_of_four_dim_rounded_up(dim, multiple_of, hidden_dim):
    assert LMConfig(dim=dim, multiple_of=multiple_of).hidden_dim == hidden_dim


def test_a_given_hidden_dim_is_taken_as_it_is():
    assert LMConfig(hidden_dim=1000).hidden_dim == 1000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dim": 500}, ["dim", "n_heads"]),
        ({"dim": 72}, ["dim", "n_heads"]),  # heads of 9: odd
        ({"n_kv_heads": 3}, ["n_heads", "n_kv_heads"]),
        ({"n_kv_heads": 16}, ["n_heads", "n_kv_heads"]),
        ({"dim": 0}, ["dim"]),
        ({"dim": -512}, ["dim"]),
        ({"n_layers": 0}, ["n_layers"]),
        ({"n_heads": 0}, ["n_heads"]),
        ({"n_heads": -8}, ["n_heads"]),
        ({"n_kv_heads": 0}, ["n_kv_heads"]),
        ({"n_kv_heads": -2}, ["n_kv_heads"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"hidden_dim": 0}, ["hidden_dim"]),
        ({"hidden_dim": -1}, ["hidden_dim"]),
        ({"multiple_of": 0}, ["multiple_of"]),
        ({"max_seq_len": 0}, ["max_seq_len"]),
        ({"norm_eps": 0.0}, ["norm_eps"]),
        ({"rope_theta": -1.0}, ["rope_theta"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"dropout": -0.1}, ["dropout"]),
        ({"use_moe": True, "num_experts_per_tok": 5}, ["num_experts_per_tok", "n_routed_experts"]),
        ({"use_moe": True, "num_experts_per_tok": 0}, ["num_experts_per_tok"]),
        ({"use_moe": True, "n_routed_experts": 0}, ["n_routed_experts"]),
        ({"use_moe": True, "n_shared_experts": -1}, ["n_shared_experts"]),
        ({"use_moe": True, "aux_loss_alpha": -0.1}, ["aux_loss_alpha"]),
        ({"use_moe": True, "scoring_func": "sigmoid"}, ["scoring_func"]),
    ],
    ids=str,
)
def test_an_impossible_shape_names_its_fields(fields, named):
    with pytest.raises(ValueError) as error:
        LMConfig(**fields)
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_kv_heads": 8},
        {"n_kv_heads": 1},
        {"use_moe": True, "num_experts_per_tok": 4},
        {"use_moe": True, "n_routed_experts": 1, "num_experts_per_tok": 1},
        {"use_moe": True, "n_shared_experts": 0},
        {"num_experts_per_tok": 5},  # without use_moe there are no experts to exceed
    ],
    ids=str,
)
def test_a_shape_at_the_edge_is_accepted(fields):
    config = LMConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("given", "kept"), [(True, 1), (1, 1), (2, 2), (0, 0), (False, 0), (None, 0)]
)
def test_n_shared_experts_is_a_number(given, kept):
    shared = LMConfig(n_shared_experts=given).n_shared_experts
    assert (shared, type(shared)) == (kept, int)


def test_every_field_survives_a_save():
    fields = {
        "dim": 96,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 3,
        "vocab_size": 321,
        "hidden_dim": 100,
        "multiple_of": 32,
        "norm_eps": 1e-6,
        "max_seq_len": 77,
        "rope_theta": 12345.0,
        "dropout": 0.25,
        "flash_attn": False,
        "use_moe": True,
        "num_experts_per_tok": 3,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "aux_loss_alpha": 0.01,
        "seq_aux": False,
        "norm_topk_prob": False,
        "bos_token_id": 7,
        "eos_token_id": [8, 9],
        "pad_token_id": 10,
    }
    config = LMConfig(**fields)
    text = json.dumps(asdict(config))
    assert json.loads(text) == {**fields, "scoring_func": "softmax"}
    assert LMConfig.from_dict(json.loads(text)) == config


def test_a_derived_width_survives_a_save():
    assert LMConfig.from_dict(asdict(LMConfig(dim=640))).hidden_dim == 1728


def test_a_dict_that_transformers_wrote_loads():
    """What LMConfig().to_dict() gave while it was a PretrainedConfig of transformers 5.23."""
    older = {
        **DEFAULTS,
        "transformers_version": "5.23.0",
        "architectures": ["MiniMindLM"],
        "output_hidden_states": False,
        "return_dict": True,
        "dtype": "float32",
        "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "problem_type": None,
        "_name_or_path": "",
        "tie_word_embeddings": True,
        "model_type": "minimind",
        "output_attentions": False,
    }
    assert LMConfig.from_dict({**older, "dim": 640, "hidden_dim": 1728}) == LMConfig(dim=640)


@pytest.mark.parametrize("make", [lambda x: LMConfig(**x), LMConfig.from_dict])
def test_a_name_that_is_no_field_is_refused(make):
    with pytest.raises(TypeError, match="dmi"):
        make({"dmi": 640})


def by_hand(dim, hidden, layers, experts=0, shared=0, vocab=6400, heads=8, kv_heads=2):
    """Parameters from the shapes in the papers: attention, SwiGLU (or experts and gate), norms."""
    attention = 2 * dim * dim + 2 * dim * (dim // heads * kv_heads)
    swiglu = 3 * dim * hidden
    ffn = swiglu * (experts + shared) + dim * experts if experts else swiglu
    return vocab * dim + layers * (attention + ffn + 2 * dim) + dim


@pytest.mark.parametrize(
    ("size", "count", "formula"),
    [
        ("2m", 2_409_792, by_hand(192, 512, 3, heads=6)),
        ("5m", 4_458_752, by_hand(256, 704, 4)),
        ("26m", 25_829_888, by_hand(512, 1408, 8)),
        ("104m", 104_030_976, by_hand(768, 2048, 16)),
        ("moe", 145_029_760, by_hand(640, 1728, 8, experts=4, shared=1)),
    ],
)
def test_published_sizes(size, count, formula):
    with torch.device("meta"):
        model = MiniMindLM(LMConfig.from_size(size))
    assert sum(p.numel() for p in model.parameters()) == count == formula


def test_from_size_takes_overrides_and_refuses_unknown_names():
    config = LMConfig.from_size("104m", max_seq_len=100, n_layers=2)
    assert (config.dim, config.n_layers, config.max_seq_len) == (768, 2, 100)
    with pytest.raises(ValueError, match=r"huge.*2m.*5m.*26m.*104m.*moe"):
        LMConfig.from_size("huge")
