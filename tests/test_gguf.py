"""GGUF files, proven in llama.cpp itself (the xllamacpp package is its server as a library)."""

import json
import random
import stat
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tiny_models import random_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from benchmarks.llama_cpp import LlamaCpp
from common import UserError
from dataset import read_records, record_text
from export.gguf_format import FILE_TYPES, THINKING_IS_FREE, tensor_sources, write_gguf
from export.pre_tokenizer import check_tokenizer, crossing_merges
from model import LMConfig, MiniMindLM, load_tokenizer

SIZES = {"dim": 64, "n_layers": 2, "max_seq_len": 1024}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now>, 天气 & more",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "杭州", "days": 2}'},
}
CONVERSATIONS = [  # learnt by the small models below
    [
        {"role": "user", "content": "你好,你是谁?"},
        {"role": "assistant", "content": "我是 MiniMind。\n很高兴认识你 😀!"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "reasoning_content": "12 + 30 = 42.", "content": "It is 42."},
    ],
    [
        {"role": "user", "content": "How is the weather in 杭州?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ],
]
TOOLS = [None, None, [TOOL]]


def learnt(tokenizer, **shape) -> MiniMindLM:
    """A small model that has learnt CONVERSATIONS by heart."""
    model = random_model(**{**SIZES, **shape}).train()
    rows = [
        torch.tensor([tokenizer.apply_chat_template(c, tools=tools, return_dict=False)])
        for c, tools in zip(CONVERSATIONS, TOOLS, strict=True)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        for row in rows:
            cross_entropy(model(row[:, :-1]).logits[0], row[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def models(tokenizer, quick) -> dict[str, MiniMindLM]:
    return {"dense": learnt(tokenizer), "moe": learnt(tokenizer, use_moe=True)}


@pytest.fixture(scope="module")
def engines(models, tokenizer, tmp_path_factory) -> dict[str, LlamaCpp]:
    folder = tmp_path_factory.mktemp("gguf")
    for kind, model in models.items():
        write_gguf(folder / f"{kind}.gguf", model, tokenizer, "f32")
    return {kind: LlamaCpp(folder / f"{kind}.gguf") for kind in models}


both = pytest.mark.parametrize("kind", ["dense", "moe"])


def prompts(tokenizer) -> list[list[int]]:
    """Ids to continue: one, a few, a hundred, and each conversation up to its answer."""
    some = torch.randint(16, 6400, (100,), generator=torch.manual_seed(1)).tolist()
    chats = [
        tokenizer.apply_chat_template(
            c[:-1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        for c, tools in zip(CONVERSATIONS, TOOLS, strict=True)
    ]
    return [[1], some[:5], some, *chats]


def our_logprobs(model: MiniMindLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


# The network


@both
def test_log_probabilities_of_all_entries(kind, models, engines, tokenizer):
    for ids in prompts(tokenizer):
        ours, theirs = our_logprobs(models[kind], ids), engines[kind].logprobs(ids, 6400)
        assert ours.std() > 0.5  # not all the same
        assert (ours - theirs).abs().max() < 1e-3


@both
def test_greedy_tokens(kind, models, engines, tokenizer):
    for ids in prompts(tokenizer)[:3]:
        ours = models[kind].generate(torch.tensor([ids]), max_new_tokens=64)[0, len(ids) :].tolist()
        assert engines[kind].generate(ids, 64)[: len(ours)] == ours


# Measured: 0.003, 0.02, 0.07. These weights are ten times as large as trained ones.
@both
@pytest.mark.parametrize(("file_type", "bound"), [("f16", 0.01), ("bf16", 0.06), ("q8_0", 0.2)])
def test_smaller_types(kind, file_type, bound, models, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, models[kind], tokenizer, file_type)
    engine = LlamaCpp(path)
    differences = [
        (our_logprobs(models[kind], ids) - engine.logprobs(ids, 6400)).abs().mean()
        for ids in prompts(tokenizer)
    ]
    mean = torch.stack(differences).mean().item()
    print(f"{kind} {file_type}: mean |Δ log-probability| {mean:.1e}")
    assert 0 < mean < bound


@pytest.mark.parametrize(
    "shape",
    [
        {"n_shared_experts": 0},
        {"n_shared_experts": 2},
        {"n_routed_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": False},
        {"n_routed_experts": 1, "num_experts_per_tok": 1},
        {"num_experts_per_tok": 1},
        {"norm_topk_prob": False, "n_shared_experts": 2},
        {"n_heads": 4, "n_kv_heads": 4, "rope_theta": 1e4, "norm_eps": 1e-3},
    ],
)
def test_other_mixtures(shape, tokenizer, tmp_path):
    model = random_model(dim=64, use_moe=True, **shape).eval()
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "f32")
    engine = LlamaCpp(tmp_path / "model.gguf")
    ids = prompts(tokenizer)[2]
    assert (our_logprobs(model, ids) - engine.logprobs(ids, 6400)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
        ({"norm_topk_prob": False}, "norm_topk"),
    ],
)
def test_a_mixture_that_llama_cpp_does_not_compute_is_refused(shape, named, tokenizer, tmp_path):
    model = random_model(use_moe=True, n_shared_experts=0, **shape)
    with pytest.raises(UserError, match=named):
        write_gguf(tmp_path / "model.gguf", model, tokenizer)
    assert not list(tmp_path.iterdir())


# The file


def read_weights(path: Path, config: LMConfig) -> dict[str, Tensor]:
    """The weights in a file, by our names."""
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    weights = {}
    for theirs, ours in tensor_sources(config):
        tensor = tensors.pop(theirs)
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        values = values if theirs.endswith("_exps.weight") else values[None]
        weights |= dict(zip(ours, values, strict=True))
    assert not tensors
    return {**weights, "output.weight": weights["tok_embeddings.weight"]}


@both
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_weights_read_back(kind, file_type, models, tokenizer, tmp_path):
    write_gguf(tmp_path / "model.gguf", models[kind], tokenizer, file_type)
    back, state = (
        read_weights(tmp_path / "model.gguf", models[kind].config),
        models[kind].state_dict(),
    )
    assert back.keys() == state.keys()
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(file_type, torch.float32)
    for name, weight in state.items():
        if "norm" in name or "gate.weight" in name:
            assert torch.equal(back[name], weight), name
        elif file_type == "q8_0":  # 127 steps for the largest of 32 numbers
            step = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (back[name] - weight).unflatten(-1, (-1, 32)).abs()
            assert (error < 0.57 * step).all(), name  # half, and the step's rounding to float16
        else:
            assert torch.equal(back[name], weight.to(dtype).float()), name


def test_rows_that_q8_0_cannot_hold(tokenizer, tmp_path):
    model = random_model(dim=72, n_heads=4, hidden_dim=40)
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "F16"
    assert types["output_norm.weight"] == "F32"
    model = random_model(dim=640, hidden_dim=64)
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"


def test_what_the_file_says(models, tokenizer, tmp_path):
    write_gguf(tmp_path / "model.gguf", models["moe"], tokenizer, "q8_0", "小明")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = models["moe"].config
    expected = {
        "general.name": "小明",
        "general.architecture": "granitemoe",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "granitemoe.context_length": 1024,
        "granitemoe.rope.freq_base": 1e6,
        "granitemoe.expert_used_count": config.num_experts_per_tok,
        "tokenizer.chat_template": THINKING_IS_FREE + tokenizer.chat_template,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert {name: fields[name] for name in expected} == expected
    kinds = gguf.TokenType
    control, tags = [kinds.CONTROL], [kinds.USER_DEFINED]
    assert fields["tokenizer.ggml.token_type"] == [
        *(control * 3 + tags * 6 + control * 7),
        *([kinds.NORMAL] * 6384),
    ]


def test_another_vocabulary_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="6400 entries, while the model has 300"):
        write_gguf(tmp_path / "model.gguf", random_model(vocab_size=300), tokenizer)


def test_q4_k_m_without_llama_quantize(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs llama-quantize"):
        write_gguf(tmp_path / "model.gguf", random_model(), tokenizer, "q4_k_m")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize("fails", [False, True])
def test_q4_k_m_by_llama_quantize(fails, tokenizer, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-quantize"  # stands in for llama.cpp's
    program.parent.mkdir()
    script = "echo no space >&2; exit 1" if fails else '/bin/cp "$1" "$2"; echo "$3" >"$2.type"'
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    path = tmp_path / "out" / "model.gguf"
    path.parent.mkdir()
    if fails:
        with pytest.raises(UserError, match="no space"):
            write_gguf(path, random_model(), tokenizer, "q4_k_m")
        assert not list(path.parent.iterdir())
    else:
        write_gguf(path, random_model(), tokenizer, "q4_k_m")
        assert path.with_name("model.gguf.type").read_text(encoding="utf-8") == "Q4_K_M\n"
        assert len(list(path.parent.iterdir())) == 2
        assert len(gguf.GGUFReader(path).tensors) == 11


# Token ids


def assert_same_ids(engine: LlamaCpp, tokenizer, texts: list[str]) -> None:
    control = tokenizer.all_special_tokens + list(tokenizer.added_tokens_encoder)
    texts = [text for text in texts if text and not any(token in text for token in control)]
    for start in range(0, len(texts), 500):
        batch = texts[start : start + 500]
        for text, ours, theirs in zip(
            batch, tokenizer(batch)["input_ids"], engine.tokenize(batch), strict=True
        ):
            assert ours == theirs, ascii(text)


@pytest.mark.parametrize("name", ["pretrain_real_val", "sft_real_val", "dpo_real_val"])
def test_ids_of_real_text(name, engines, tokenizer, shared_dir):
    records = read_records(shared_dir / "data" / f"{name}.jsonl")
    assert_same_ids(engines["dense"], tokenizer, [record_text(record) for _, record in records])


PIECES = [
    *("\n", "\n\n\n", " ", "  ", " " * 50, "\t", "\r\n", "\u3000", "\xa0", "\u2028", "\ufeff"),
    *("\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\ufffd", "\U0010ffff", "\ue000"),
    *("the", " don't", "Hello, world", "，因为", "可再生能源", "。", "“", "…"),
    *("──────", "§ ", "勧 ", "<", "</", "s>", "</s >", "<pad", "<|reserved_"),
    *("1", "1234567", "３４５", "①②", "½", "Ⅷ", "٣٤", "१२", "𝟙𝟚", "x2y3", "3.14", "1,000,000"),
    *("😀", "👩\u200d👩\u200d👧", "🇨🇳🇩🇪", "1️⃣", "❤️", "e\u0301", "\u0301", "\u0301\u0302", "\u20dd"),
    *("\u200d", "\u200b", "\u202e", "\u00ad", "𠮷", "龘"),
    *("नमस्ते", "한국어", "ㅎㅏㄴ", "العربية", "שלום"),
    *("def f(x):\n    return x", "://", "/* */"),
    *("ǅ", "ß", "İi", "ﬁ", "Å", "ก็", "ᠮᠣᠩ", "ꙮ", "𓀀", "᚛ᚁ᚜", "௧", "〇", "々", "ー", "㈠"),
]


def test_ids_of_hostile_text(engines, tokenizer):
    pairs = [a + b for a in PIECES for b in PIECES]
    surrounded = [f"a{piece * 3},{piece}中 {piece}9{piece}\n" for piece in PIECES]
    assert_same_ids(engines["dense"], tokenizer, [*PIECES, *pairs, *surrounded])


def test_ids_of_random_text(engines, tokenizer):
    source = random.Random(17)
    ranges = [
        *((0x20, 0x7F), (0, 0x100), (0x370, 0x700), (0x900, 0xE80), (0x2000, 0x2C00)),
        *((0x3000, 0x3130), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0x10000)),
        *((0x10000, 0x20000), (0x1F300, 0x1FB00), (0x20000, 0x110000)),
    ]

    def character() -> str:
        if source.random() < 0.3:
            return source.choice(" \n,.的了a1-")
        return chr(source.randrange(*source.choice(ranges)))

    texts = ["".join(character() for _ in range(source.randint(1, 40))) for _ in range(10_000)]
    assert_same_ids(engines["dense"], tokenizer, texts)


# Which tokenizers are taken


@pytest.fixture(scope="module")
def train():
    import train_tokenizer

    return train_tokenizer


def saved(script, backend, folder: Path) -> PreTrainedTokenizerFast:
    script.save(backend, folder)
    return load_tokenizer(folder)


def test_tokenizers_of_the_training_script_are_taken(train, tmp_path):
    # From characters too rare for entries of their own, it would learn merges that reach over cuts.
    text = "§ § § ¶ ¶ ╧═══ ╧═══ Hello hello 你好,世界。你好 12 34\n" * 50
    tokenizer = saved(train, train.train(iter([text]), 290), tmp_path)
    check_tokenizer(tokenizer)
    assert len(tokenizer) == 290


def crossing_tokenizer(train, folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that merges 0xA7, the last byte of § and of 勧, with a space."""
    parts = json.loads(train.train(iter(["ab"]), train.SMALLEST + 1).to_str())
    parts["model"]["merges"].append(["§", "Ġ"])
    parts["model"]["vocab"]["§Ġ"] = len(parts["model"]["vocab"])
    return saved(train, train.Tokenizer.from_str(json.dumps(parts)), folder)


def test_a_merge_that_reaches_over_cuts_is_refused(train, tmp_path, monkeypatch):
    tokenizer = crossing_tokenizer(train, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer: .*b'\\xa7' and b' '"):
        check_tokenizer(tokenizer)
    # llama.cpp would indeed give other ids.
    monkeypatch.setattr("export.gguf_format.check_tokenizer", lambda _: None)
    write_gguf(tmp_path / "m.gguf", random_model(vocab_size=len(tokenizer)), tokenizer, "f32")
    engine = LlamaCpp(tmp_path / "m.gguf")
    assert_same_ids(engine, tokenizer, ["§ ", "§勧", "x ", "1 "])
    assert engine.tokenize(["勧 "]) != tokenizer(["勧 "])["input_ids"]


@pytest.mark.parametrize(
    ("left", "right", "crosses"),
    [
        ("a", "b", False),
        ("a", ",", True),  # after a letter
        (",", "a", False),
        ("1", "2", True),
        ("1", ",", False),  # llama.cpp cuts there too
        (",", "\n", True),
        ("\n", "\n", True),
        ("1", "\n", False),
        ("的"[-1:], "是", False),
        ("é", " ", True),
    ],
)
def test_which_merges_cross(left, right, crosses, tokenizer):
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    pair = tuple("".join(p for p, _ in pre_tokenizer.pre_tokenize_str(s)) for s in (left, right))
    assert bool(list(crossing_merges([pair]))) == crosses


@pytest.mark.parametrize(
    ("left", "right", "crosses"),
    [
        (b"\xa7", b" ", True),  # 勧 and a space
        (b"\xa7", b"a", False),  # whatever character ends so, no cut of ours alone is there
        (b" ", b"\xe5", False),  # all of these are letters
        (b"\x87", b"\xe5", False),
        (b"\x87", b"\xe3\x80", True),  # 、
        (b"\xe5\x8b", b"\xa7", False),  # inside of a character
        (b"\xe5\x8b", b" ", False),  # no text has these
        (b" ", b"\xe2", False),
        (b"a", b"\xe2", True),
        (b"a", b"\xf0\x9f", True),
        (b"a", b"\xf0\xa0", False),
    ],
)
def test_which_merges_of_parts_cross(left, right, crosses):
    from export.pre_tokenizer import byte_letters

    letters = {byte: letter for letter, byte in byte_letters().items()}
    pair = tuple("".join(letters[byte] for byte in side) for side in (left, right))
    assert bool(list(crossing_merges([pair]))) == crosses


def other_pattern(parts):
    parts["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"


def no_pre_tokenizer(parts):
    parts["pre_tokenizer"] = None


def normalizer(parts):
    parts["normalizer"] = {"type": "NFC"}


def ignore_merges(parts):
    parts["model"]["ignore_merges"] = True


def stripping_token(parts):
    parts["added_tokens"][-1]["lstrip"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_pattern, "cuts texts"),
        (no_pre_tokenizer, "cuts texts"),
        (normalizer, "normalizes"),
        (ignore_merges, "plain byte pair encoding"),
        (stripping_token, "no plain control token"),
    ],
)
def test_another_tokenizer_is_refused(change, reason, tokenizer, train):
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    other = PreTrainedTokenizerFast(
        tokenizer_object=train.Tokenizer.from_str(json.dumps(parts)), name_or_path="/a/folder"
    )
    with pytest.raises(UserError, match=f"/a/folder: .*{reason}"):
        check_tokenizer(other)


# Chat


@both
def test_chat(kind, models, engines, tokenizer):
    for messages, tools in zip(CONVERSATIONS, TOOLS, strict=True):
        question, answer = messages[:-1], messages[-1]
        ids = tokenizer.apply_chat_template(
            question, tools=tools, add_generation_prompt=True, return_dict=False
        )
        out = models[kind].generate(torch.tensor([ids]), max_new_tokens=64)[0, len(ids) :]
        rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        assert rendered.endswith(tokenizer.decode(out) + "\n")  # learnt by heart
        body = {"messages": question, "temperature": 0, "max_tokens": 64}
        reply = engines[kind].post(
            "/v1/chat/completions", **body, **({"tools": tools} if tools else {})
        )
        assert reply["usage"]["prompt_tokens"] == len(ids)
        message = reply["choices"][0]["message"]
        assert (message.get("content") or "") == answer["content"]
        thought = message.get("reasoning_content") or ""
        assert thought.rstrip("\n") == answer.get("reasoning_content", "")
        calls = [call["function"] for call in message.get("tool_calls", [])]
        expected = [call["function"] for call in answer.get("tool_calls", [])]
        assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
            (c["name"], json.loads(c["arguments"])) for c in expected
        ]


def test_tags_of_thoughts_are_text(engines, tokenizer):
    """Programs that call /completion find thoughts by them."""
    ids = tokenizer.apply_chat_template(
        CONVERSATIONS[1][:-1], add_generation_prompt=True, return_dict=False
    )
    body = {"prompt": ids, "n_predict": 64, "temperature": 0}
    content = engines["dense"].post("/completion", **body)["content"]
    assert content == "<think>\n12 + 30 = 42.\n</think>\nIt is 42."


def test_llama_cpp_renders_our_template(engines, tokenizer):
    result = {"role": "tool", "content": '{"sky": "晴"}'}
    for messages, tools in zip(CONVERSATIONS, TOOLS, strict=True):
        longer = [*messages, result] if tools else messages
        longer = [*longer, {"role": "user", "content": " And\n\nthen? "}]
        ours = tokenizer.apply_chat_template(
            longer, tools=tools, tokenize=False, add_generation_prompt=True
        )
        body = {"messages": longer, **({"tools": tools} if tools else {})}
        assert engines["dense"].post("/apply-template", **body)["prompt"] == ours
        body["chat_template_kwargs"] = {"enable_thinking": False}
        closed = f"{ours}<think>\n\n</think>\n"
        assert engines["dense"].post("/apply-template", **body)["prompt"] == closed
