"""What exported weights compute in transformers and llama.cpp, beside this project.

    python benchmarks/exports.py --weight full_sft            (as eval_model.py takes it)

For each format: the size of the file, the largest and the mean difference of the log-probabilities
of all entries after several prefixes of a text, and how many of 64 greedy tokens after 3 of them
are the same before the first that differs. Needs gguf and xllamacpp (tests/requirements.txt).
"""

import tempfile
from collections.abc import Callable, Sequence
from itertools import takewhile, zip_longest
from pathlib import Path

import torch
from llama_cpp import LlamaCpp
from torch import Tensor
from transformers import AutoModelForCausalLM

from common import (
    ROOT,
    make_parser,
    report_user_errors,
)
from export.gguf_format import FILE_TYPES, write_gguf
from export.transformers_format import write_transformers
from inference import add_weight_arguments, load_trained, named_weights

LENGTHS = (1, 5, 20, 60, 150, 300, 600)
NEW = 64

NextTokens = Callable[[list[int]], Tensor]  # ids → log-probabilities of the next token, (entries,)
Continue = Callable[[list[int]], list[int]]


def compare(
    prompts: Sequence[list[int]],
    ours: tuple[NextTokens, Continue],
    theirs: tuple[NextTokens, Continue],
) -> str:
    """Columns of the table: differences of log-probabilities, and equal greedy tokens."""
    differences = [(ours[0](ids) - theirs[0](ids)).abs() for ids in prompts]
    largest = max(d.max().item() for d in differences)
    mean = sum(d.mean().item() for d in differences) / len(differences)
    equal = []
    for ids in prompts[:3]:
        first, second = ours[1](ids), theirs[1](ids)
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip_longest(first, second))
        )
        equal.append(f"{same}/{len(first)}")
    return f"{largest:10.1e} {mean:10.1e}   {' '.join(equal)}"


def main() -> None:
    """Export, compare, print a table."""
    parser = make_parser(__doc__.splitlines()[0])
    add_weight_arguments(parser)
    args = parser.parse_args()
    trained = load_trained(named_weights(args))
    model, tokenizer = trained.model, trained.tokenizer
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    prompts = [ids[:length] for length in LENGTHS]

    def as_functions(model: torch.nn.Module, **options: object) -> tuple[NextTokens, Continue]:
        def next_tokens(ids: list[int]) -> Tensor:
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)

        def continue_(ids: list[int]) -> list[int]:
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, **options
            )
            return out[0, len(ids) :].tolist()

        return next_tokens, continue_

    ours = as_functions(model)
    print(trained.name)
    print(f"{'engine':32} {'MB':>7} {'largest':>10} {'mean':>10}   equal greedy tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_transformers(path, model.config, dict(model.state_dict()), tokenizer, "")
        peer = AutoModelForCausalLM.from_pretrained(path)
        size = (path / "model.safetensors").stat().st_size / 1e6
        theirs = as_functions(peer, temperature=None, top_p=None)
        print(f"{'transformers, float32':32} {size:7.1f} {compare(prompts, ours, theirs)}")
        for file_type in FILE_TYPES:
            file = path / "model.gguf"
            write_gguf(file, model, tokenizer, file_type)
            for exact in (True, False) if file_type == "f32" else (True,):
                engine = LlamaCpp(file, exact=exact)
                theirs = (
                    lambda ids, engine=engine: engine.logprobs(ids, model.config.vocab_size),
                    lambda ids, engine=engine: engine.generate(ids, NEW),
                )
                name = f"llama.cpp, {file_type}{'' if exact else ', its defaults'}"
                columns = compare(prompts, ours, theirs)
                print(f"{name:32} {file.stat().st_size / 1e6:7.1f} {columns}")


if __name__ == "__main__":
    with report_user_errors():
        main()
