"""The plan of a run, against reality and calculations by hand."""

import argparse
import math
import re
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_models import optimizer_flags
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import UserError
from diagnosis.compute import PEAKS, count_parameters, flops_per_token, peak_flops
from diagnosis.curves import draw_lr_curve
from diagnosis.memory import _cgroup_limits, device_memory, estimate_memory
from diagnosis.plan import Plan, memory_warnings
from model import LMConfig, MiniMindLM
from training import make_optimizer, muon
from training.guards import explain_out_of_memory
from training.record import cost_line

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SMALL = {"dim": 64, "n_layers": 3, "vocab_size": 320}


def network(**fields) -> MiniMindLM:
    torch.manual_seed(0)
    return MiniMindLM(LMConfig(**{**SMALL, **fields})).train()


# Parameters and FLOPs


@pytest.mark.parametrize(
    ("size", "total", "active"),
    [("26m", 25.83, 25.83), ("104m", 104.03, 104.03), ("moe", 145.03, 91.95)],
)
def test_published_sizes_have_the_parameters_that_the_readme_says(size, total, active):
    with torch.device("meta"):
        counts = count_parameters(MiniMindLM(LMConfig.from_size(size)))
    assert [round(n / 1e6, 2) for n in counts] == [total, active, total, active]


def test_only_experts_that_a_token_does_not_visit_are_inactive():
    fields = {"n_routed_experts": 5, "num_experts_per_tok": 1, "n_shared_experts": 2}
    model = network(use_moe=True, hidden_dim=96, **fields)
    idle = 3 * 4 * (3 * 64 * 96)  # layers · idle experts · three matrices
    total, active, trained, active_trained = count_parameters(model)
    assert total == trained == sum(p.numel() for p in model.parameters())
    assert total - active == trained - active_trained == idle
    for parameter in (model.norm.weight, model.layers[0].feed_forward.experts[0].w1.weight):
        parameter.requires_grad_(False)
    frozen = count_parameters(model)
    assert frozen[:2] == (total, active) and frozen.trained == total - 64 - 64 * 96


def test_flops_are_those_of_the_matrix_products():
    """PyTorch's own counter, over a forward and a backward pass with attention in the open."""
    model = network(flash_attn=False)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    expected = flops_per_token(model, row_length=32) - 6 * norms
    assert counter.get_total_flops() == ids.numel() * expected


# Per GPU: multiprocessors; fused multiply-adds of each per clock, in tensor cores (fp16, sums in
# fp32) and in fp32; GHz when boosted, for the one and the other.
HARDWARE = {
    "A10": (72, 512, 128, 1.695, 1.695),
    "A30": (56, 1024, 64, 1.44, 1.44),
    "A40": (84, 512, 128, 1.74, 1.74),
    "A100": (108, 1024, 64, 1.41, 1.41),
    "A100 PCIE": (108, 1024, 64, 1.41, 1.41),
    "A100 SXM4": (108, 1024, 64, 1.41, 1.41),
    "H100": (132, 2048, 128, 1.83, 1.98),
    "H100 PCIE": (114, 2048, 128, 1.62, 1.755),
    "H200": (132, 2048, 128, 1.83, 1.98),
    "L4": (58, 512, 128, 2.04, 2.04),
    "L40": (142, 256, 128, 2.49, 2.49),
    "L40S": (142, 512, 128, 2.49, 2.52),
    "RTX 3070": (46, 256, 128, 1.725, 1.725),
    "RTX 3090": (82, 256, 128, 1.695, 1.695),
    "RTX 3090 TI": (84, 256, 128, 1.86, 1.86),
    "RTX 4080": (76, 256, 128, 2.505, 2.505),
    "RTX 4090": (128, 256, 128, 2.52, 2.52),
    "RTX 5090": (170, 256, 128, 2.407, 2.407),
    "RTX A6000": (84, 512, 128, 1.8, 1.8),
    "T4": (40, 512, 64, 1.59, 1.59),
    "V100 PCIE": (80, 512, 64, 1.38, 1.38),
    "V100 SXM2": (80, 512, 64, 1.53, 1.53),
}


def test_peaks_follow_from_the_hardware():
    assert PEAKS.keys() == HARDWARE.keys()
    for name, (units, tensor, single, tensor_ghz, single_ghz) in HARDWARE.items():
        by_hand = (2e-3 * units * tensor * tensor_ghz, 2e-3 * units * single * single_ghz)
        assert PEAKS[name] == pytest.approx(by_hand, rel=0.015), name


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("A100-PCIE-40GB", torch.float16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float32, 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, None),
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", torch.float16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float32, 40e12),
        ("NVIDIA RTX A6000", torch.bfloat16, 154.8e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7e12),
        ("AMD Instinct MI300X", torch.bfloat16, None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, dtype) == peak


def test_other_devices_have_no_known_peak():
    assert peak_flops(CPU, torch.float32) is None
    assert peak_flops(torch.device("mps"), torch.float16) is None


# Memory


def training_rows(n_rows: int, length: int, packed: bool) -> dict[str, Tensor]:
    """Rows as training makes them: of two documents each, or of one, the last with padding."""
    ids = torch.randint(3, 320, (n_rows, length))
    positions, mask = torch.arange(length).repeat(n_rows, 1), torch.ones_like(ids)
    if packed:
        positions[:, length // 3 :] -= length // 3
    else:
        mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def summed_loss(model: MiniMindLM, rows: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The loss as a training step makes it, which lets go of the logits."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(**rows)
        logits = output.logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, rows["input_ids"].flatten(), reduction="none")
        return losses.sum() + output.aux_loss


def saved_tensors(model: MiniMindLM, rows: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What autograd keeps for the backward pass beside the parameters, one of each storage."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # which keeps the address from being used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(model, rows, dtype)
    assert loss.requires_grad
    return list(kept.values())


def estimate(model: MiniMindLM, rows: dict[str, Tensor], dtype: torch.dtype, **kwargs):
    n_rows, length = rows["input_ids"].shape
    kwargs = {"gradient_checkpointing": False, "device": CPU, **kwargs}
    return estimate_memory(model, rows=n_rows, row_length=length, dtype=dtype, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_kv_heads": 8},
        {"flash_attn": False},
        {"use_moe": True},
        {"use_moe": True, "num_experts_per_tok": 1, "n_shared_experts": 0},
        {"use_moe": True, "num_experts_per_tok": 3, "n_shared_experts": 2},
        {"dropout": 0.1},
        {"dropout": 0.1, "flash_attn": False, "use_moe": True},
    ],
    ids=str,
)
def test_the_estimate_is_what_autograd_saves(fields, packed, dtype):
    model, rows = network(**fields), training_rows(4, 80, packed)
    estimated = estimate(model, rows, dtype)
    log_probabilities, others = 0, 0
    for tensor in saved_tensors(model, rows, dtype):
        if tensor.shape == (4 * 80, model.config.vocab_size):
            log_probabilities += tensor.untyped_storage().nbytes()
        else:
            others += tensor.untyped_storage().nbytes()
    # Autograd keeps one of the three matrices that are there at the peak.
    assert estimated["logits"] == 3 * log_probabilities == 3 * 4 * (4 * 80 * 320)
    casts = estimated["weights"] - 4 * count_parameters(model)[0]
    assert casts == (0 if dtype == torch.float32 else 2 * count_parameters(model)[0])
    tolerance = 0.1 if model.config.dropout else 0.03
    assert estimated["activations"] + casts == pytest.approx(others, rel=tolerance)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that exist, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.add(result)
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "fields",
    [{"n_layers": 5}, {"vocab_size": 3200}, {"use_moe": True}],
    ids=["deep", "vocabulary", "moe"],
)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_sum_is_the_peak_of_a_step(kind, fields, checkpointing, dtype, monkeypatch):
    monkeypatch.setattr(muon, "BATCH", 2**14)  # as small beside this model as it is beside others
    model, rows = network(**fields), training_rows(3, 64, packed=True)
    model.gradient_checkpointing = checkpointing
    optimizer = make_optimizer(model, optimizer_flags(1e-3, 0.1, optimizer=kind))

    def step(rows: dict[str, Tensor]) -> None:
        for _ in range(2):
            summed_loss(model, rows, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(training_rows(1, 4, packed=True))  # makes the moments
    with LiveBytes() as live:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in (*model.parameters(), *moments):
            live.add(tensor)
        total = count_parameters(model)[0]
        how = {"gradient_checkpointing": checkpointing, "optimizer": kind}
        estimated = estimate(model, rows, dtype, **how)
        assert live.now == pytest.approx(4 * total + estimated["optimizer"], rel=1e-3)
        step(rows)
    assert sum(estimated.values()) == pytest.approx(live.peak, rel=0.1)


def test_a_gpu_has_fused_norms_and_masks_of_bytes():
    """What a CPU keeps beyond a GPU, and a GPU with dropout beyond one without, by hand."""
    with torch.device("meta"):
        model = MiniMindLM(LMConfig.from_size("26m"))
        dropping = MiniMindLM(LMConfig.from_size("26m", dropout=0.1))
    rows = {"input_ids": torch.zeros(1, 512, dtype=torch.int64)}
    here = estimate(model, rows, torch.bfloat16)["activations"]
    there = estimate(model, rows, torch.bfloat16, device=CUDA)["activations"]
    assert here - there == 512 * (2 * 8 + 1) * 512 * 4  # tokens · norms · dim · fp32
    noisy = estimate(dropping, rows, torch.bfloat16, device=CUDA)["activations"]
    assert noisy - there == 512 * 2 * 8 * 512  # tokens · residual branches · dim, a byte each


# The plan


def flags(**changed) -> argparse.Namespace:
    """The flags of the README's long run, or some other values."""
    values = {
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "dropout": 0.0,
        "grad_clip": 1.0,
        "epochs": 1,
        "max_steps": None,
        "max_tokens": None,
        "max_minutes": None,
        "tokens_per_parameter": None,
        "batch_size": 8,
        "accumulation_steps": 1,
        "max_seq_len": 512,
        "gradient_checkpointing": False,
        "eval_interval": 100,
        "early_stopping_patience": None,
        "warmup_iters": None,
        "warmup_ratio": None,
        "dim": 512,
        "n_heads": 8,
    }
    return argparse.Namespace(**{**values, **changed})


def test_the_plan_of_a_dense_model():
    model = network()
    total = sum(p.numel() for p in model.parameters())
    args = flags(batch_size=4, max_seq_len=64)
    lines = Plan(args, model, CPU, torch.float32, 1, 10 * total, 1, 1234, 37, RATES).size()
    memory = estimate(model, training_rows(4, 64, packed=True), torch.float32)
    assert len(lines) <= 8
    assert lines[0] == f"parameters: {total / 1e3:.2f} k"
    assert lines[1].startswith(f"tokens: {total / 1e5:.2f} M, or 10 per parameter; ")
    assert lines[2].startswith("steps: 1,234, each of 4 rows of 64 (")
    assert lines[3].startswith(f"compute: {6 * total * 10 * total:.3g} FLOPs")
    assert lines[4].startswith(f"memory: about {sum(memory.values()) / 1e9:.2f} GB (weights ")
    assert "each process" not in lines[4]


def test_the_plan_of_a_mixture_of_experts_on_several_gpus(monkeypatch):
    card = types.SimpleNamespace(total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with torch.device("meta"):
        model = MiniMindLM(LMConfig.from_size("moe"))
    args = flags(epochs=2, batch_size=16, accumulation_steps=4)
    plan = Plan(args, model, CUDA, torch.bfloat16, 2, 919_500_000, 2, 14_033, 421, RATES)
    lines = plan.size()
    assert lines[0] == "parameters: 145.03 M, 91.95 M active for each token"
    assert lines[1].startswith("tokens: 2 × 919.50 M = 1.84 B, or 20 per active parameter")
    assert "each of 128 rows of 512 (batch 16 × accumulation 4 × processes 2)" in lines[2]
    assert "1.01e+18 FLOPs (6 × active parameters × tokens)" in lines[3]
    assert " GB of the GPU's 24.00 in each process (weights 0.87, gradients 0.58, " in lines[4]


# Warnings

RATES = ((1e7, 1e-4, 1e-3, 5e-3), (6e7, 1e-4, 5e-4, 2e-3), (math.inf, 5e-5, 3e-4, 1e-3))


def warnings(parameters: float = 26e6, total_steps: int = 479, warmup: int = 14, **changed):
    weights = types.SimpleNamespace(numel=lambda: parameters, requires_grad=True)
    model = types.SimpleNamespace(parameters=lambda: [weights], modules=lambda: [])
    args = flags(**changed)
    plan = Plan(args, model, CPU, torch.float32, 1, 10**7, args.epochs, total_steps, warmup, RATES)
    return list(plan.setting_warnings())


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"parameters": 2.4e6, "learning_rate": 2e-3, "batch_size": 4, "epochs": 4, "dim": 256,
         "total_steps": 3180, "warmup": 95},
        {"learning_rate": 5e-4, "batch_size": 32},
        {"parameters": 104e6, "learning_rate": 3e-4, "batch_size": 8, "accumulation_steps": 8},
        {"parameters": 145e6, "learning_rate": 1e-4, "early_stopping_patience": 3},
    ],
    ids=["long run", "quick start", "defaults", "104 M", "145 M"],
)  # fmt: skip
def test_what_the_readme_recommends_gives_no_warning(run):
    assert warnings(**run) == []


@pytest.mark.parametrize(
    ("fine", "hurts", "words"),
    [
        ({"learning_rate": 2e-3}, {"learning_rate": 2.1e-3}, "--learning_rate 0.0021 is high"),
        ({"learning_rate": 1e-4}, {"learning_rate": 9e-5}, "try 0.0001 to 0.002"),
        ({"parameters": 1e7, "learning_rate": 5e-3},
         {"parameters": 1.1e7, "learning_rate": 5e-3}, "11.00 M parameters"),
        ({"parameters": 1e9}, {"parameters": 1e9, "learning_rate": 4e-5}, "1.00 B parameters"),
        ({"warmup": 239}, {"warmup": 240}, "more than half of the run's 479"),
        ({"warmup": 0}, {"warmup": 1000}, "1,000 steps takes all of the run's 479"),
        ({"warmup": 0, "warmup_ratio": 0.001}, {"warmup": 0, "warmup_ratio": 0.0},
         "--warmup_ratio 0:"),
        ({"warmup": 1, "warmup_iters": 1}, {"warmup": 0, "warmup_iters": 0}, "--warmup_iters 0:"),
        ({"total_steps": 200, "warmup": 6}, {"total_steps": 199, "warmup": 6}, "200 steps (199)"),
        ({"dim": 256, "n_heads": 8}, {"dim": 248, "n_heads": 8}, "heads of 31 dimensions"),
        ({"batch_size": 1, "accumulation_steps": 2}, {"batch_size": 1}, "--accumulation_steps"),
        ({"batch_size": 1953}, {"batch_size": 1954}, "--accumulation_steps"),
        ({"weight_decay": 0.0}, {"weight_decay": 0.11}, "--weight_decay 0.11"),
        ({"dropout": 0.3}, {"dropout": 0.31}, "--dropout 0.31"),
        ({"beta2": 0.999}, {"beta2": 0.9999}, "--beta2 0.9999 averages over 10,000 steps"),
        ({"grad_clip": 10}, {"grad_clip": 11}, "--grad_clip 11"),
        ({"epochs": 10}, {"epochs": 11}, "11 epochs"),
        ({"epochs": 11, "early_stopping_patience": 3}, {"epochs": 11}, "--early_stopping_patience"),
        ({"early_stopping_patience": 2}, {"early_stopping_patience": 1}, "try 3"),
        # At 100, 200 and 300 of 301 steps: one to compare with and two that may be no better.
        ({"early_stopping_patience": 2, "total_steps": 301},
         {"early_stopping_patience": 2, "total_steps": 300}, "--eval_interval 100"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_that_hurts_is_named_once(fine, hurts, words):
    assert warnings(**fine) == []
    found = warnings(**hurts)
    assert len(found) == 1
    assert words in found[0] and "--" in found[0] and "\n" not in found[0]


STEP = {"weights": 2e9, "gradients": 1e9, "optimizer": 3e9, "activations": 5e9, "logits": 1e9}


def test_too_little_memory_is_a_warning_with_the_remedies_in_their_order():
    assert memory_warnings(STEP, 12e9) == []
    (line,) = memory_warnings(STEP, 11.9e9)
    assert "12.00 GB are needed and 11.90 GB are there" in line
    remedies = ["--batch_size", "--accumulation_steps", "--gradient_checkpointing", "--max_seq_len"]
    assert re.findall(r"--\w+", line) == remedies
    # The remedies of the error that training ends with are the same, in the same order.
    with pytest.raises(UserError) as error, explain_out_of_memory():
        raise MemoryError
    assert re.findall(r"--\w+", str(error.value)) == remedies


def test_a_model_that_does_not_fit_with_any_batch_has_another_remedy():
    (line,) = memory_warnings(STEP, 5.9e9)
    assert re.findall(r"--\w+", line) == ["--dim", "--n_layers"]


@pytest.mark.parametrize(("there", "processes", "warned"), [(3e9, 1, False), (3e9, 4, True)])
def test_the_plan_compares_with_the_memory_of_the_device(
    there, processes, warned, tmp_path, monkeypatch
):
    """3 GB of RAM are enough for one process, and not for four that share it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("diagnosis.plan.device_memory", lambda device: there)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with torch.device("meta"):
        model = MiniMindLM(LMConfig.from_size("26m"))
    plan = Plan(flags(), model, CPU, torch.float32, processes, 10**7, 1, 479, 14, RATES)
    lines = plan.describe(lambda step: 1e-3, tmp_path / "lr.png")
    assert "learning rate: pip install -r scripts/plot_requirements.txt to draw it" in lines
    (needed,) = re.findall(r"memory: about ([\d.]+) GB", "\n".join(lines))
    assert 0.75 < float(needed) < 3
    found = [line for line in lines if line.startswith("warning: ")]
    assert len(found) == warned
    assert all(f"{needed} GB are needed and 0.75 GB are there" in line for line in found)


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/box/job\n", {"box/job/memory.max": "max", "box/memory.max": "8000000"}, [8000000]),
        ("0::/\n", {"memory.max": "5000000"}, [5000000]),  # as a container sees itself
        # The path is that of the host; the container has its own group at the top.
        ("1:name=systemd:/a\n0::/a/b\n", {"memory.max": "6000000"}, [6000000]),
        ("0::/\n", {}, []),
    ],
)
def test_limits_of_control_groups(groups, files, limits, tmp_path):
    for name, contents in {f"sys/fs/cgroup/{k}": v for k, v in files.items()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(contents + "\n", encoding="utf-8")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups, encoding="utf-8")
    assert _cgroup_limits(tmp_path) == limits


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_this_machine():
    psutil = pytest.importorskip("psutil")
    there = device_memory(CPU)
    limits = _cgroup_limits()
    assert there == min([there, *limits])
    if there not in limits:
        assert there == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_several_warnings():
    assert len(warnings(weight_decay=1.0, dropout=0.9, warmup=500)) == 3


# Cost and curve


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((3.2, 1500, 2.0, 1), "about 1:20:00 to go; at 2.00 per GPU-hour: 2.67"),
        ((3.2, 1500, 2.0, 4), "about 1:20:00 to go; at 2.00 per GPU-hour × 4: 10.67"),
        ((0.5, 80, None, 1), "about 0:00:40 to go"),
        ((0.5, 1200, None, 8), "about 0:10:00 to go"),
        ((3.6, 80_000, 0.9, 100), "about 80:00:00 to go; at 0.90 per GPU-hour × 100: 7,200.00"),
    ],
)
def test_cost_line(arguments, line):
    assert cost_line(*arguments) == line


def test_the_curve_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "logs" / "lr.png"
    draw_lr_curve(path, lambda step: 1e-3 * step / 7, 8)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in path.parent.iterdir()] == ["lr.png"]


class FakeFigure:
    """Stands in for matplotlib's, and keeps what is plotted."""

    drawn = None

    def __init__(self, **_):
        pass

    def subplots(self):
        return self

    def plot(self, steps, rates):
        FakeFigure.drawn = list(steps), list(rates)

    def savefig(self, file, **_):
        file.write(b"picture")

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.mark.parametrize(("n", "points"), [(1, 1), (2000, 2000), (2001, 1001), (10**6, 2000)])
def test_a_long_run_is_drawn_with_few_points(n, points, tmp_path, monkeypatch):
    module = types.SimpleNamespace(Figure=FakeFigure)
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(figure=module))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    draw_lr_curve(tmp_path / "lr.png", lambda step: step + 5, n)
    steps, rates = FakeFigure.drawn
    assert len(steps) == points and steps[0] == 0 and n - steps[-1] <= math.ceil(n / points)
    assert rates == [step + 5 for step in steps]
    assert (tmp_path / "lr.png").read_bytes() == b"picture"


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        draw_lr_curve(tmp_path / "lr.png", lambda step: 0.1, 2)
    assert list(tmp_path.iterdir()) == []
