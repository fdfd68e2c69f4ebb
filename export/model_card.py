"""The README.md of an exported folder: what the model is, what it learnt from, how to run it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import format_number
from diagnosis.metrics import column, latest, read_metrics
from model import MiniMindLM

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

In llama.cpp, LM Studio and Ollama, after a conversion in the folder of MiniMind:

```bash
python scripts/convert_model.py --weight WEIGHT --to gguf --out model.gguf
llama-server -m model.gguf --jinja                     # or open model.gguf in LM Studio
python scripts/convert_model.py --weight WEIGHT --to ollama --out model-ollama
cd model-ollama && ollama create model -f Modelfile && ollama run model
```

A text begins with `<s>`: the chat template writes it, for plain texts it is yours to write.
"""
PROMPTS = {
    True: 'chat = [{"role": "user", "content": "Who are you?"}]\n'
    "inputs = tokenizer.apply_chat_template(\n"
    '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
    ")",
    False: 'inputs = tokenizer("<s>Once upon a time", return_tensors="pt")',
}


def write_model_card(folder: Path, trained: "TrainedModel", model: MiniMindLM, name: str) -> None:
    """Write README.md.

    Args:
        folder: existing folder.
        trained: where the model comes from.
        model: the model as it is written, its adapter merged.
        name: name of the folder in the commands.
    """
    config = model.config
    parameters = sum(tensor.numel() for tensor in model.parameters())
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
    if trained.adapter is not None:
        adapted = training_facts(trained.adapter)
        rows |= {f"Adapter: {key[0].lower()}{key[1:]}": value for key, value in adapted.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {trained.name}\n\nTrained from nothing with MiniMind.\n\n| | |\n|---|---|\n{table}\n\n"
    )
    run = RUN.format(folder=name, prompt=PROMPTS[trained.chats])
    (folder / "README.md").write_text(text + run, encoding="utf-8")


def training_facts(weights: Path) -> dict[str, Any]:
    """What the record of the run that made the weights knows; empty if there is none.

    Of `_best` weights that is the best evaluation, else the last one.
    """
    is_best = weights.stem.endswith("_best")
    folder = weights.parent / "logs" / weights.stem.removesuffix("_best")
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        metrics = read_metrics(folder / "metrics.jsonl")
        arguments = record["arguments"]
        sources = arguments["data_path"]  # a path, or of several each with its weight
        sources = [sources] if isinstance(sources, str) else [path for path, _ in sources]
        facts = {"Data": ", ".join(Path(path).name for path in sources)}
        if arguments["epochs"] and not is_best:
            facts["Epochs"] = f"{arguments['epochs']:g}"
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    tokens = latest(metrics, "tokens")
    if tokens and not is_best:
        facts["Tokens"] = f"{tokens:,}"
    for key, title in (("val_loss", "Validation loss"), ("val_bits_per_byte", "Bits per byte")):
        if values := column(metrics, key):
            facts[title] = f"{min(values) if is_best else values[-1]:.3f}"
    if arguments.get("from_weight", "none") != "none":
        facts["Started from"] = arguments["from_weight"]
    return facts
