"""What only a GPU can show; skipped where there is none."""

import copy
import functools
import json

import pytest
import torch
from interruptions import assert_same, killed, learning, read_metrics
from test_train_full_sft import chats, write_chats
from tiny_models import both_kinds, optimizer_flags, random_ids, random_model, save_tuned, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import MiniMindLM
from training import make_optimizer

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = ["--dim", 32, "--n_layers", 1, "--max_seq_len", 96, "--device", "cuda"]
SHAPE += ["--learning_rate", "1e-2", "--batch_size", 2, "--epochs", 5]
SHAPE += ["--log_interval", 1, "--eval_interval", 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return save_tuned(random_model(0), tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tokenizer, base):
    """The flags of every stage, by script, and the name of what it writes."""
    folder = tmp_path_factory.mktemp("data")
    conversations = write_chats(folder / "chats.jsonl", chats(24))
    texts, pairs = [], []
    for messages in chats(24):
        texts.append({"text": " ".join(message["content"] for message in messages)})
        question, answer = messages[-2:]
        worse = {"role": "assistant", "content": "no no"}
        pairs.append({"prompt": [question], "chosen": [answer], "rejected": [worse]})
    for name, records in (("texts", texts), ("pairs", pairs)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    def flags(data, *more):
        return [*SHAPE, "--data_path", data, "--val_data_path", data, *more]

    tuned = ["--from_weight", base]
    teacher = random_model(9, dim=48, n_layers=2, n_heads=4)
    teacher = save_tuned(teacher, folder, tokenizer, "full_sft_48")
    return {
        "train_pretrain.py": (flags(folder / "texts.jsonl", "--optimizer", "muon"), "pretrain_32"),
        "train_full_sft.py": (flags(conversations, *tuned), "full_sft_32"),
        "train_dpo.py": (flags(folder / "pairs.jsonl", *tuned), "dpo_32"),
        "train_lora.py": (flags(conversations, *tuned, "--lora_name", "it"), "it_32"),
        "train_distillation.py": (
            flags(conversations, *tuned, "--teacher_weight", teacher),
            "distill_32",
        ),
    }


SCRIPTS = ["train_pretrain.py", "train_full_sft.py", "train_dpo.py", "train_lora.py"]
SCRIPTS += ["train_distillation.py"]


def weights_of(out, name):
    folder = out / "lora" if name == "it_32" else out
    return torch.load(folder / f"{name}.pth", weights_only=True)


def metrics_of(out, name):
    return read_metrics(out / "lora" if name == "it_32" else out, name)


def losses_of(out, name):
    return [line["loss"] for line in metrics_of(out, name) if "loss" in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_resumes_where_it_was(run, stages, script, tmp_path):
    """In bf16, as users run it; the loss falls, and the resumed run is the undisturbed one."""
    flags, name = stages[script]
    train = functools.partial(run, *flags, "--dtype", "bfloat16", script=script)
    train("--out_dir", tmp_path / "whole")
    whole = metrics_of(tmp_path / "whole", name)
    scores = [line["val_loss"] for line in whole if "val_loss" in line]
    assert scores[-1] < scores[0]
    broken = ["--out_dir", tmp_path / "broken", "--save_interval", 3]
    with killed(8, MiniMindLM, "forward", when=learning):
        train(*broken)
    train(*broken, "--resume")
    assert_same(weights_of(tmp_path / "broken", name), weights_of(tmp_path / "whole", name))


@pytest.mark.parametrize("script", SCRIPTS)
def test_float32_learns_what_the_processor_learns(run, stages, script, tmp_path):
    flags, name = stages[script]
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run(*flags, "--device", device, "--dtype", "float32", "--out_dir", out, script=script)
        found[device] = losses_of(out, name)[:10]  # later rounding grows, at such a rate
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_scales_its_gradients(run, stages, tmp_path, optimizer):
    flags, name = stages["train_full_sft.py"]
    words = [*flags, "--dtype", "float16", "--optimizer", optimizer, "--out_dir", tmp_path]
    run(*words, script="train_full_sft.py")
    losses = losses_of(tmp_path, name)
    assert losses[-1] < losses[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes_over_nccl_give_the_same_run(run, stages, tmp_path):
    flags, name = stages["train_pretrain.py"]
    flags = [*flags, "--dtype", "float32"]
    run(*flags, "--batch_size", 4, "--out_dir", tmp_path / "alone")
    run(*flags, "--batch_size", 2, "--out_dir", tmp_path / "nccl", processes=2)
    assert losses_of(tmp_path / "nccl", name) == pytest.approx(
        losses_of(tmp_path / "alone", name), rel=1e-4
    )


@both_kinds
def test_attention_never_falls_back_to_the_slow_kernel(use_moe):
    """Causal rows, packed rows and padding, forward and backward."""
    model = tiny(use_moe=use_moe, dim=128, n_heads=4).cuda()
    ids = random_ids(2, 48).cuda()
    positions = torch.arange(48).remainder(20).expand(2, -1).cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fast), torch.autocast("cuda", torch.bfloat16):
        for how in ({}, {"position_ids": positions}, {"attention_mask": mask}):
            model(ids, **how, labels=ids).loss.backward()


def test_the_optimizer_is_fused():
    optimizer = make_optimizer(tiny().cuda(), optimizer_flags(1e-3, 0.1))
    assert all(group["fused"] for group in optimizer.param_groups)


@both_kinds
def test_it_writes_what_the_processor_writes(use_moe):
    model = tiny(use_moe=use_moe)
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    wanted = model.generate(ids, mask, max_new_tokens=20, eos_token_id=-1)
    on_card = copy.deepcopy(model).cuda()
    written = on_card.generate(ids.cuda(), mask.cuda(), max_new_tokens=20, eos_token_id=-1)
    assert torch.equal(written.cpu(), wanted)
