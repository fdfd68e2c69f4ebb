"""generate: greedy, padded, sampled and streamed, against plain loops and transformers."""

import copy

import pytest
import torch
from tiny_models import (
    both_attentions,
    both_kinds,
    llama_with_weights_of,
    random_ids,
    tiny,
)
from torch import Tensor
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import MiniMindLM
from model.generation import choose_token

NEVER = -1  # an end token that no row ever writes


@torch.no_grad()
def greedy_loop(model: MiniMindLM, ids: Tensor, steps: int) -> Tensor:
    """Greedy continuation that computes the whole row anew for each token."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def left_padded(rows: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


# Greedy


@both_kinds
@both_attentions
def test_greedy_equals_a_loop_without_cache(use_moe, flash_attn):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    prompt = random_ids(3, 7)
    wanted = greedy_loop(model, prompt, 20)
    assert len(set(wanted[0, 7:].tolist())) > 5  # no mere repetition of one token
    assert torch.equal(model.generate(prompt, max_new_tokens=20, eos_token_id=NEVER), wanted)
    single = model.generate(prompt[:1, :1], max_new_tokens=20, eos_token_id=NEVER)
    assert torch.equal(single, greedy_loop(model, prompt[:1, :1], 20))


def test_llama_with_the_same_weights_writes_the_same():
    model = tiny()
    llama = llama_with_weights_of(model)
    ids, mask = left_padded(list(random_ids(1, 12)[0].split([6, 4, 2])))
    free = model.generate(ids, mask, max_new_tokens=16, eos_token_id=NEVER)
    end = int(free[0, 6 + 5])  # an end token that row 0 meets soon and other rows may not
    for eos in (NEVER, end, [end, int(free[1, 6 + 9])]):
        options = {"max_new_tokens": 16, "eos_token_id": eos, "pad_token_id": 1}
        ours = model.generate(ids, attention_mask=mask, **options)
        theirs = llama.generate(ids, attention_mask=mask, do_sample=False, **options)
        assert torch.equal(ours, theirs), eos


@both_kinds
@both_attentions
def test_left_padded_rows_write_what_they_write_alone(use_moe, flash_attn):
    model = tiny(use_moe=use_moe, flash_attn=flash_attn)
    rows = list(random_ids(1, 15)[0].split([9, 5, 1]))
    ids, mask = left_padded(rows)
    for dtype in (torch.long, torch.bool):
        together = model.generate(ids, mask.to(dtype), max_new_tokens=12, eos_token_id=NEVER)
        for row, prompt in zip(together, rows, strict=True):
            assert torch.equal(row[9:], greedy_loop(model, prompt[None], 12)[0, len(prompt) :])


@torch.no_grad()
def test_each_step_feeds_one_token_and_asks_for_one_position():
    model = tiny()
    fed, asked = [], []
    model.tok_embeddings.register_forward_hook(lambda m, args, out: fed.append(args[0].shape[1]))
    model.output.register_forward_hook(lambda m, args, out: asked.append(out.shape[1]))
    model.generate(random_ids(2, 6), max_new_tokens=5, eos_token_id=NEVER)
    assert fed == [6, 1, 1, 1, 1]
    assert asked == [1] * 5


# Where it ends


def test_a_row_ends_at_its_end_token_and_is_filled_with_padding():
    model = tiny()
    prompt = random_ids(3, 6)
    free = greedy_loop(model, prompt, 20)[:, 6:]
    ends = [int(free[0, 3]), int(free[1, 8])]
    first = [min(i for i, t in enumerate(row.tolist()) if t in ends) for row in free[:2]]
    wanted = free.clone()
    for row, end in enumerate(first):
        wanted[row, end + 1 :] = 299
    assert not set(free[2].tolist()) & set(ends)  # the third row goes on undisturbed
    out = model.generate(prompt, max_new_tokens=20, eos_token_id=ends, pad_token_id=299)
    assert torch.equal(out[:, :6], prompt)
    assert torch.equal(out[:, 6:], wanted)
    # without the third row it stops as soon as both have ended
    both = model.generate(prompt[:2], max_new_tokens=20, eos_token_id=ends, pad_token_id=299)
    assert torch.equal(both[:, 6:], wanted[:2, : max(first) + 1])


def test_end_and_padding_come_from_the_config():
    prompt = random_ids(2, 6)
    free = greedy_loop(tiny(), prompt, 20)[:, 6:]
    end = int(free[0, 4])
    stop = free[0].tolist().index(end)
    for eos in (end, [NEVER, end]):
        model = tiny(eos_token_id=eos, pad_token_id=298)
        out = model.generate(prompt, max_new_tokens=20)[:, 6:]
        assert torch.equal(out[0, : stop + 1], free[0, : stop + 1])
        assert (out[0, stop + 1 :] == 298).all()
        assert out.shape[1] > stop + 1
        # an argument outweighs the config
        out = model.generate(prompt, max_new_tokens=20, eos_token_id=NEVER)[:, 6:]
        assert torch.equal(out, free)


def test_a_config_without_end_token_never_ends():
    prompt = random_ids(1, 6)
    model = tiny(eos_token_id=None, pad_token_id=None)
    assert torch.equal(model.generate(prompt, max_new_tokens=9), greedy_loop(model, prompt, 9))


def test_an_end_token_in_the_prompt_ends_nothing():
    model = tiny()
    prompt = random_ids(1, 6)
    wanted = greedy_loop(model, prompt, 8)
    end = int(prompt[0, 3])
    assert end not in wanted[0, 6:].tolist()
    assert torch.equal(model.generate(prompt, max_new_tokens=8, eos_token_id=end), wanted)


def test_it_ends_when_the_context_is_full():
    model = tiny(max_seq_len=16)
    prompt = random_ids(2, 10)
    out = model.generate(prompt, max_new_tokens=100, eos_token_id=NEVER)
    assert torch.equal(out, greedy_loop(model, prompt, 6))
    ids, mask = left_padded([prompt[0], prompt[1, :4]])
    assert model.generate(ids, mask, max_new_tokens=100, eos_token_id=NEVER).shape == (2, 16)


def test_no_new_tokens_gives_the_prompt_back():
    prompt = random_ids(2, 5)
    assert torch.equal(tiny().generate(prompt, max_new_tokens=0), prompt)


def test_it_records_no_gradients_and_changes_nothing_on_the_model():
    model = tiny().train()
    recorded = []
    model.norm.register_forward_hook(lambda m, args, out: recorded.append(out.requires_grad))
    before, weights = dict(vars(model)), copy.deepcopy(model.state_dict())
    out = model.generate(random_ids(2, 5), max_new_tokens=5, eos_token_id=NEVER)
    assert recorded == [False] * 5
    assert out.dtype == torch.int64
    assert torch.is_grad_enabled()
    assert dict(vars(model)) == before
    assert model.training
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": random_ids(1, 64)}, "max_seq_len 64"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}, "left"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_come_at_once(arguments, words, stream):
    with pytest.raises(ValueError, match=words):
        tiny().generate(**{"input_ids": random_ids(2, 4), **arguments}, stream=stream)


# Sampling


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_k": 0},
    {"top_p": 0.9},
    {"top_p": 0.35},
    {"top_p": 1e-9},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.5},
]


def warped(logits: Tensor, setting: dict) -> Tensor:
    """Probabilities as transformers' warpers leave them."""
    logits = TemperatureLogitsWarper(setting.get("temperature", 1.0))(None, logits)
    if setting.get("top_k"):
        logits = TopKLogitsWarper(setting["top_k"])(None, logits)
    if setting.get("top_p", 1.0) < 1.0:
        logits = TopPLogitsWarper(setting["top_p"])(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers_warpers(monkeypatch, setting):
    logits = torch.randn(40, 300, generator=torch.manual_seed(3)) * 3
    drawn_from = []

    def multinomial(probs: Tensor, n: int, generator=None) -> Tensor:
        drawn_from.append(probs)
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    before = logits.clone()
    choose_token(logits, do_sample=True, **setting)
    assert torch.equal(logits, before)
    probs = drawn_from[0] / drawn_from[0].sum(-1, keepdim=True)  # multinomial takes weights too
    wanted = warped(logits, setting)
    assert torch.equal(probs > 0, wanted > 0)
    torch.testing.assert_close(probs, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}], ids=str)
def test_tokens_are_drawn_as_often_as_the_distribution_says(setting):
    draws = 20_000
    logits = torch.tensor([[2.0, 0.5, 1.5, -1.0, 1.0, -3.0]])
    tokens = choose_token(
        logits.expand(draws, -1),
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
        **setting,
    )
    assert tokens.shape == (draws,)
    found = tokens.bincount(minlength=6) / draws
    wanted = warped(logits, setting)[0]
    assert (found[wanted == 0] == 0).all()
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert ((found - wanted).abs() <= 4.5 * deviation).all()


def test_without_do_sample_the_likeliest_token_is_taken():
    logits = torch.randn(5, 300)
    tokens = choose_token(logits, do_sample=False, temperature=5.0, top_k=9, top_p=0.9)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(setting):
    model = tiny()
    prompt = random_ids(2, 6)
    out = model.generate(prompt, max_new_tokens=12, do_sample=True, eos_token_id=NEVER, **setting)
    assert torch.equal(out, greedy_loop(model, prompt, 12))


def test_a_seeded_generator_repeats_itself_and_leaves_the_global_one_alone():
    model = tiny()
    prompt = random_ids(3, 6)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, max_new_tokens=15, do_sample=True, generator=generator)

    state = torch.get_rng_state()
    first = sample(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(sample(7), first)
    assert not torch.equal(sample(8), first)
    assert not torch.equal(first[0, 6:], first[1, 6:])
    rows = model.generate(prompt[:1].repeat(4, 1), max_new_tokens=15, do_sample=True)
    assert len({tuple(row.tolist()) for row in rows}) == 4  # equal prompts, draws of their own


def test_without_generator_the_global_seed_decides():
    model = tiny()
    prompt = random_ids(2, 6)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(prompt, max_new_tokens=15, do_sample=True))
    assert torch.equal(outs[0], outs[1])
    assert outs[2].shape != outs[0].shape or not torch.equal(outs[2], outs[0])


# Streaming


@pytest.mark.parametrize("do_sample", [False, True])
def test_streaming_yields_the_same_tokens(do_sample):
    model = tiny()
    ids, mask = left_padded(list(random_ids(1, 9)[0].split([6, 3])))
    free = model.generate(ids, mask, max_new_tokens=14, eos_token_id=NEVER)
    options = {"max_new_tokens": 14, "eos_token_id": int(free[0, 6 + 4]), "do_sample": do_sample}

    def generate(stream: bool):
        generator = torch.Generator().manual_seed(4)
        return model.generate(ids, mask, stream=stream, generator=generator, **options)

    tokens = list(generate(stream=True))
    assert all(token.shape == (2,) for token in tokens)
    assert torch.equal(torch.stack(tokens, dim=1), generate(stream=False)[:, ids.shape[1] :])


def test_streaming_computes_a_token_when_it_is_asked_for():
    model = tiny()
    passes = []
    model.norm.register_forward_hook(lambda *_: passes.append(1))
    tokens = model.generate(random_ids(1, 5), max_new_tokens=9, eos_token_id=NEVER, stream=True)
    assert len(passes) == 0
    next(tokens)
    assert len(passes) == 1
    assert torch.is_grad_enabled()
    next(tokens)
    assert len(passes) == 2
    tokens.close()
    assert len(passes) == 2


# Prompts of different lengths


def test_batches_of_prompts_give_what_each_gives_alone():
    """In the order of the prompts, cut before the end token."""
    model = tiny()
    prompts = [random_ids(1, length)[0] for length in (5, 1, 9, 3, 9)]
    free = [greedy_loop(model, prompt[None], 12)[0, len(prompt) :] for prompt in prompts]
    end = free[0][4].item()
    answers = model.batch_generate(prompts, batch_size=2, max_new_tokens=12, eos_token_id=end)
    assert len(answers[0]) <= 4
    for answer, whole in zip(answers, free, strict=True):
        ends = (whole == end).nonzero().flatten().tolist()
        assert torch.equal(answer, whole[: ends[0] if ends else 12])
