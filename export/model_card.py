"""The README.md of an exported folder: what the model is, what it learnt from, how to run it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import format_number
from diagnosis.metrics import column, latest, read_metrics

if TYPE_CHECKING:
    from inference import TrainedModel

RUN = """## Run it

Python, with transformers alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
{prompt}
ids = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

As an OpenAI-compatible server:

```bash
vllm serve {folder}
python -m sglang.launch_server --model-path {folder}
```

A text begins with `<s>`: the chat template writes it, for plain texts it is yours to write. For
llama.cpp, Ollama and LM Studio, export with `--to gguf` or `--to ollama`.
"""
PROMPTS = {
    True: 'chat = [{"role": "user", "content": "Who are you?"}]\n'
    "inputs = tokenizer.apply_chat_template(\n"
    '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
    ")",
    False: 'inputs = tokenizer("<s>Once upon a time", return_tensors="pt")',
}


def write_model_card(folder: Path, trained: "TrainedModel", name: str) -> None:
    """Write README.md.

    Args:
        folder: existing folder.
        trained: the model.
        name: name of the folder in the commands.
    """
    config = trained.model.config
    parameters = sum(tensor.numel() for tensor in trained.model.parameters())
    rows = {
        "Parameters": format_number(parameters),
        "Layers × width": f"{config.n_layers} × {config.dim}",
        "Heads (queries, keys and values)": f"{config.n_heads}, {config.n_kv_heads}",
        "Vocabulary": f"{config.vocab_size:,}",
        "Context": f"{config.max_seq_len:,} tokens",
    }
    if config.use_moe:
        rows["Experts"] = (
            f"{config.n_routed_experts} routed, {config.num_experts_per_tok} of them for a token, "
            f"{config.n_shared_experts} shared"
        )
    rows |= training_facts(trained.path)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {trained.name}\n\nTrained from nothing with MiniMind.\n\n| | |\n|---|---|\n{table}\n\n"
    )
    run = RUN.format(folder=name, prompt=PROMPTS[trained.chats])
    (folder / "README.md").write_text(text + run, encoding="utf-8")


def training_facts(weights: Path) -> dict[str, Any]:
    """What the record of the run that made the weights knows; empty if there is none."""
    folder = weights.parent / "logs" / weights.stem
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        metrics = read_metrics(folder / "metrics.jsonl")
        arguments = record["arguments"]
        facts = {"Data": Path(arguments["data_path"]).name}
        if arguments["epochs"]:
            facts["Epochs"] = f"{arguments['epochs']:g}"
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    facts["Tokens"] = f"{latest(metrics, 'tokens'):,}"
    for key, title in (("val_loss", "Validation loss"), ("val_bits_per_byte", "Bits per byte")):
        if values := column(metrics, key):
            facts[title] = f"{min(values):.3f}"
    if arguments.get("from_weight"):
        facts["Started from"] = arguments["from_weight"]
    return facts
