"""Exports, loaded by the libraries that they are for."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_moe import as_granite
from tiny_models import as_llama, random_model, save_tuned
from torch import Tensor, nn

from dataset import ChatEncoder, parse_chat, render_chat
from export.model_card import training_facts
from inference import WeightSpec, load_trained
from model import MiniMindLM

KINDS = ("dense", "moe")
V5 = int(transformers.__version__.split(".")[0]) >= 5
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "加 add",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "多少 is 12 + 30?\n\n"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I need the tool.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
        ],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42.", "reasoning_content": "Read."},
    {"role": "user", "content": "谢谢 🙂"},
]
HOSTILE = [
    "",
    " ",
    "\n\n\n",
    "12345",
    "a\u0301\u200d🙂",
    "\x00\x1f\u2028",
    "Tab\there",
    "你好，世界",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run, sample_dir, quick) -> Path:
    """A folder of weights that were pretrained and tuned, with an adapter each."""
    out_dir = tmp_path_factory.mktemp("trained")
    lines = {}
    for name, number in (("pretrain", 800), ("sft", 200), ("lora", 40)):
        lines[name] = out_dir / f"{name}.jsonl"
        text = (sample_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:number]
        lines[name].write_text("\n".join(text), encoding="utf-8")
    common = ["--out_dir", out_dir, "--n_layers", 2, "--batch_size", 8, "--max_seq_len", 128]
    common += ["--learning_rate", 5e-3, "--device", "cpu"]
    common += ["--optimizer", "adamw", "--epochs", 1]
    for dim, moe in ((64, False), (32, True)):
        flags = [*common, "--dim", dim, "--use_moe", moe, "--data_path"]
        run(*flags, lines["pretrain"])
        run(*flags, lines["sft"], script="train_full_sft.py")
        run(*flags, lines["lora"], "--lora_name", "named", script="train_lora.py")
    return out_dir


@pytest.fixture(scope="module")
def convert(run, trained):
    """Run the converter on the trained weights, and return what it says."""

    def convert(kind: str, *words, code=0, lora=False):
        flags = ["--weight", "full_sft", "--use_moe", kind == "moe", "--out_dir", trained]
        if lora:
            flags += ["--lora_name", trained / "lora" / f"named_{DIMS[kind]}.pth"]
        return run(*flags, *words, script="scripts/convert_model.py", code=code)

    return convert


DIMS = {"dense": "64", "moe": "32_moe"}


def ours(trained: Path, tokenizer_dir: Path, kind: str, lora: str | None = None) -> MiniMindLM:
    spec = WeightSpec(trained, tokenizer_dir, "full_sft", lora, use_moe=kind == "moe")
    return load_trained(spec).model


def some_ids() -> Tensor:
    return torch.randint(16, 6400, (2, 60), generator=torch.manual_seed(0))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module", params=KINDS)
def exported(request, convert, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    convert(request.param, "--to", "transformers", "--out", folder)
    return request.param, folder


def test_transformers_computes_the_same(exported, trained, tokenizer_dir):
    kind, folder = exported
    model = ours(trained, tokenizer_dir, kind)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert theirs.dtype == torch.float32 and not {*info["missing_keys"], *info["unexpected_keys"]}
    ids = some_ids()
    assert torch.allclose(logits(theirs, ids), logits(model, ids), rtol=0, atol=1e-4)
    out = theirs.generate(
        ids, do_sample=False, max_new_tokens=64, temperature=None, top_p=None, eos_token_id=15
    )
    expected = model.generate(ids, temperature=0.0, max_new_tokens=64, eos_token_id=15)
    assert out.tolist() == expected.tolist()
    assert theirs.generation_config.eos_token_id == 2


def test_transformers_reads_texts_the_same(exported, tokenizer, sample_dir):
    _, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lines = (sample_dir / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    for text in HOSTILE + lines:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert theirs(text)["input_ids"] == expected
    encoder = ChatEncoder(tokenizer)
    for end in (3, 4, 5, 6):
        for tools in ([], [TOOL]):
            chat = parse_chat(json.dumps({"messages": CHAT[:end], "tools": tools}).encode())
            pieces = render_chat(chat.messages, chat.tools, add_generation_prompt=True)
            expected = encoder.encode([encoder.check_control(pieces)]).ids.tolist()
            found = theirs.apply_chat_template(
                CHAT[:end], tools=tools or None, add_generation_prompt=True, return_dict=False
            )
            assert found == expected


def test_weights_are_bit_identical(exported, trained, tokenizer_dir):
    kind, folder = exported
    model = ours(trained, tokenizer_dir, kind)
    if kind == "dense":
        expected = as_llama(model.state_dict(), model.config)
    else:
        expected = {}
        for name, tensor in as_granite(model.state_dict(), model.config).items():
            for new, old in (
                ("experts.gate_up_proj", "input_linear.weight"),
                ("experts.down_proj", "output_linear.weight"),
                ("router.weight", "router.layer.weight"),
            ):
                name = name.replace(f"block_sparse_moe.{new}", f"block_sparse_moe.{old}")
            expected[name] = tensor
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_lies_in_the_folder(exported):
    kind, folder = exported
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "sft.jsonl" in card and "vllm serve" in card and ("routed" in card) == (kind == "moe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "<think>\na\n</think>\n<tool_call>\n{}\n</tool_call>"  # where engines look for the parts
    ids = tokenizer(f"<s>{text}</s>")["input_ids"]
    assert len([id_ for id_ in ids if id_ < 16]) == 6
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # no file for the owner alone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(convert, trained, tokenizer_dir, tmp_path, dtype):
    convert("moe", "--to", "transformers", "--out", tmp_path / "half", "--dtype", dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    weights = ours(trained, tokenizer_dir, "moe").state_dict()
    state = load_file(tmp_path / "half" / "model.safetensors")
    norm = weights["layers.1.ffn_norm.weight"].to(getattr(torch, dtype))
    assert torch.equal(state["model.layers.1.post_attention_layernorm.weight"], norm)


needs_v5 = pytest.mark.skipif(not V5, reason="PEFT adapts experts from transformers 5 on")


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=needs_v5)])
def test_adapter_in_peft(convert, trained, tokenizer_dir, tmp_path, kind):
    convert(kind, "--to", "transformers", "--out", tmp_path / "base")
    convert(kind, "--to", "peft", "--out", tmp_path / "adapter", lora=True)
    convert(kind, "--to", "pth", "--out", tmp_path / "merged.pth", lora=True)
    adapted = ours(trained, tokenizer_dir, kind, f"named_{DIMS[kind]}")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = some_ids()
    before = logits(base, ids)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = logits(adapted, ids)
    assert (expected - before).abs().max() > 1e-2  # the adapter does something
    assert torch.allclose(logits(theirs, ids), expected, rtol=0, atol=1e-5)
    merged = load_trained(WeightSpec(tmp_path, tokenizer_dir, f"{tmp_path / 'merged.pth'}"))
    assert merged.chats
    united = theirs.merge_and_unload()
    assert torch.allclose(logits(united, ids), logits(merged.model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=needs_v5)])
def test_adapter_from_peft(convert, run, trained, tokenizer_dir, tmp_path, kind):
    convert(kind, "--to", "transformers", "--out", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    if kind == "dense":  # on a part of the layers
        targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]}
    else:
        targets = {
            "target_modules": ["k_proj", "o_proj", "input_linear", "output_linear"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        }
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, **targets)
    theirs = get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "lora" / "theirs.pth"
    flags = ["--from", "peft", "--weight", tmp_path / "adapter", "--out_dir", trained]
    run(*flags, "--out", out, script="scripts/convert_model.py")
    adapted = ours(trained, tokenizer_dir, kind, str(out))
    plain = ours(trained, tokenizer_dir, kind)
    ids = some_ids()
    assert (logits(plain, ids) - logits(adapted, ids)).abs().max() > 1e-2
    assert torch.allclose(logits(theirs, ids), logits(adapted, ids), rtol=0, atol=1e-5)


def test_refusals(convert, run, trained, tokenizer, tmp_path):
    def refused(*words, kind="dense", lora=False) -> str:
        error = convert(kind, *words, code=2, lora=lora).stderr
        assert error.startswith("convert_model.py: error: ") and error.count("\n") == 1
        return error

    out = tmp_path / "out"
    assert "--lora_name" in refused("--to", "pth", "--out", tmp_path / "x.pth")
    assert "one of the two" in refused("--out", out)
    assert "float32" in refused("--to", "peft", "--dtype", "float16", "--out", out, lora=True)
    out.mkdir()
    (out / "letter.txt").write_bytes(b"dear")
    assert "--overwrite" in refused("--to", "transformers", "--out", out)
    assert "other files" in refused("--to", "transformers", "--out", out, "--overwrite")
    assert ".gguf" in refused("--to", "gguf", "--out", out, "--overwrite")
    weights = trained / f"full_sft_{DIMS['dense']}.pth"
    words = ["--to", "pth", "--out", weights]
    assert "--overwrite" in refused(*words, lora=True)
    assert "made from" in refused(*words, "--overwrite", lora=True)
    (tmp_path / "x.json").write_bytes(b"precious")
    assert "beside it" in refused("--to", "pth", "--out", tmp_path / "x.pth", lora=True)
    assert (out / "letter.txt").read_bytes() == b"dear"
    raw = random_model(use_moe=True, num_experts_per_tok=1)
    path = save_tuned(raw, tmp_path, tokenizer, "raw_32_moe")
    error = run(
        *("--weight", path, "--to", "transformers", "--out", tmp_path / "raw"),
        script="scripts/convert_model.py",
        code=2,
    ).stderr
    assert "num_experts_per_tok 1" in error
    assert not list(tmp_path.glob("*raw")) and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_what_was_there(convert, tmp_path, monkeypatch):
    out = tmp_path / "hf"
    convert("dense", "--to", "transformers", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.transformers_format.save_file", fail)
    error = convert("moe", "--to", "transformers", "--out", out, "--overwrite", code=2).stderr
    assert error == f"convert_model.py: error: --out {out}: No space left on device\n"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.undo()
    convert("moe", "--to", "transformers", "--out", out, "--overwrite")
    assert "granite" in (out / "config.json").read_text(encoding="utf-8")


def test_a_failed_rename_leaves_what_was_there(convert, tmp_path, monkeypatch):
    out = tmp_path / "hf"
    convert("dense", "--to", "transformers", "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    convert("moe", "--to", "transformers", "--out", out, "--overwrite", code=130)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_adapters_of_other_bases_are_refused(convert, run, trained, tokenizer, tmp_path):
    """As after tuning again under the same name: the adapter knows the hash of its base."""
    convert("dense", "--to", "peft", "--out", tmp_path / "adapter", lora=True)
    save_tuned(random_model(dim=64, n_layers=2), tmp_path, tokenizer, "full_sft_64")
    flags = ["--from", "peft", "--weight", tmp_path / "adapter", "--out", tmp_path / "new.pth"]
    error = run(*flags, "--out_dir", tmp_path, script="scripts/convert_model.py", code=2).stderr
    assert "are not in" in error and not (tmp_path / "new.pth").exists()
    run(*flags, "--out_dir", trained, script="scripts/convert_model.py")
    own = torch.load(trained / "lora" / "named_64.pth", weights_only=True)
    back = torch.load(tmp_path / "new.pth", weights_only=True)
    assert back["base"] == own["base"] and back["lora"] == own["lora"]
    assert all(torch.equal(back["weights"][name], own["weights"][name]) for name in own["weights"])


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [1]},
        {"use_dora": True},
        {"r": 0},
        {"lora_alpha": "a"},
        {"rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_adapters_that_compute_something_else_are_refused(convert, run, trained, tmp_path, change):
    convert("dense", "--to", "peft", "--out", tmp_path / "adapter", lora=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(settings), encoding="utf-8")
    flags = ["--from", "peft", "--weight", tmp_path / "adapter", "--out", tmp_path / "new.pth"]
    error = run(*flags, "--out_dir", trained, script="scripts/convert_model.py", code=2).stderr
    assert str(path) in error and error.count("\n") == 1


def test_the_card_has_the_figures_of_its_weights(tmp_path):
    """The last evaluation's; those of the best one beside the best weights."""
    folder = tmp_path / "logs" / "pretrain_64"
    folder.mkdir(parents=True)
    arguments = {"data_path": "texts.jsonl", "epochs": 2, "from_weight": "none"}
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    lines = [{"step": 1, "tokens": 5, "val_loss": 1.0}, {"step": 2, "tokens": 9, "val_loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    last = {"Data": "texts.jsonl", "Epochs": "2", "Tokens": "9", "Validation loss": "2.500"}
    assert training_facts(tmp_path / "pretrain_64.pth") == last
    best = {"Data": "texts.jsonl", "Validation loss": "1.000"}
    assert training_facts(tmp_path / "pretrain_64_best.pth") == best
    assert training_facts(tmp_path / "another.pth") == {}
