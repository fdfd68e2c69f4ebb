"""generate: greedy, padded, sampled and streamed, against plain loops and transformers."""

import copy

import pytest
import torch
from rounding import assert_equal_to_rounding, forward_sums
from tiny_models import (
    both_attentions,
    both_kinds,
    llama_with_weights_of,
    random_ids,
    tiny,
)
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import MiniMindLM, TorchDecoder
from model.decoder import CHUNK, PREFIXES
from model.sampling import History, Sampling, penalise, probabilities, sample

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


@pytest.fixture
def fed(monkeypatch) -> list[int]:
    """How many tokens went through the layers together, each time."""
    counts = []
    layers = TorchDecoder._layers

    def counted(decoder, ids, *others):
        counts.append(len(ids))
        return layers(decoder, ids, *others)

    monkeypatch.setattr(TorchDecoder, "_layers", counted)
    return counts


def test_each_step_computes_one_token_of_each_row(fed):
    tiny().generate(random_ids(2, 6), max_new_tokens=5, eos_token_id=NEVER)
    assert fed == [6, 6, 2, 2, 2, 2]


def test_a_row_that_has_ended_is_computed_no_further(fed):
    model = tiny()
    prompt = random_ids(3, 6)
    free = greedy_loop(model, prompt, 12)[:, 6:].tolist()
    end = free[0][4]
    model.generate(prompt, max_new_tokens=12, eos_token_id=end)
    lengths = [row.index(end) + 1 if end in row else 12 for row in free]
    assert fed[3:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert min(fed) < 3


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
    out = model.generate(ids, mask, max_new_tokens=100, eos_token_id=NEVER)
    assert torch.equal(out[0, :16], greedy_loop(model, prompt[:1], 6)[0])
    assert out[0, 16:].tolist() == [0] * 6  # it is full: padding
    assert torch.equal(out[1, 6:], greedy_loop(model, prompt[1:, :4], 12)[0])


def test_no_new_tokens_gives_the_prompt_back():
    prompt = random_ids(2, 5)
    assert torch.equal(tiny().generate(prompt, max_new_tokens=0), prompt)


def test_it_records_no_gradients_and_changes_nothing_on_the_model():
    model = tiny().train()
    before, weights = dict(vars(model)), copy.deepcopy(model.state_dict())
    out = model.generate(random_ids(2, 5), max_new_tokens=5, eos_token_id=NEVER)
    assert out.dtype == torch.int64
    assert torch.is_grad_enabled()
    assert dict(vars(model)) == before
    assert model.training
    assert all(torch.equal(w, weights[n]) for n, w in model.state_dict().items())
    decoder = TorchDecoder(model)
    assert not decoder.prefill(0, [5, 6]).requires_grad
    assert not decoder.step([7]).requires_grad


def test_dropout_is_off_in_train_mode_too():
    prompt = random_ids(2, 5)
    wanted = greedy_loop(tiny(dropout=0.5), prompt, 9)
    assert torch.equal(
        tiny(dropout=0.5).train().generate(prompt, max_new_tokens=9, eos_token_id=NEVER), wanted
    )


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
        ({"do_sample": True, "min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop": [[5], []]}, "stop"),
        ({"seed": 1, "generator": torch.Generator()}, "seed"),
        ({"decoder": TorchDecoder(tiny(), rows=1)}, "rows"),
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
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 3.0, "top_p": 0.999},  # more candidates than are looked at first
    {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
]


def warped(logits: Tensor, setting: dict) -> Tensor:
    """Probabilities as transformers' warpers leave them."""
    logits = TemperatureLogitsWarper(setting.get("temperature", 1.0))(None, logits)
    if setting.get("top_k"):
        logits = TopKLogitsWarper(setting["top_k"])(None, logits)
    if setting.get("top_p", 1.0) < 1.0:
        logits = TopPLogitsWarper(setting["top_p"])(None, logits)
    if setting.get("min_p"):
        logits = MinPLogitsWarper(setting["min_p"])(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers_warpers(setting):
    logits = torch.randn(40, 600, generator=torch.manual_seed(3)) * 3
    before = logits.clone()
    probs = probabilities(logits, Sampling(do_sample=True, **setting))
    assert torch.equal(logits, before)
    probs = probs / probs.sum(-1, keepdim=True)  # a draw takes weights too
    wanted = warped(logits, setting)
    assert torch.equal(probs > 0, wanted > 0)
    assert_equal_to_rounding(probs, wanted, sums=600)


def test_penalties_of_what_occurred():
    logits = torch.randn(2, 300, generator=torch.manual_seed(3)) * 3
    prompts = random_ids(2, 40)
    histories = [History(prompt.tolist(), 300, logits.device) for prompt in prompts]
    written = [[5, 9], [5, 7], [5, 9]]
    for tokens in written:
        for history, token in zip(histories, tokens, strict=True):
            history.add(token)
    sampling = Sampling(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4)
    found = penalise(logits, sampling, histories)
    context = torch.cat((prompts, torch.tensor(written).T), dim=1)
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(context, logits)
    for row, token, times in ((0, 5, 3), (1, 9, 2), (1, 7, 1)):
        wanted[row, token] -= 0.7 * times + 0.4
    assert_equal_to_rounding(found, wanted, sums=4)


@pytest.mark.parametrize(
    "wild",
    [
        *({"repetition_penalty": factor} for factor in (5e-324, 1e-30, 1e30)),
        {"top_p": 5e-324},
        {"min_p": 1 - 1e-16},
        {"temperature": 1e-300},
        {"temperature": 1e300},
    ],
    ids=str,
)
def test_the_wildest_settings_leave_a_distribution(wild):
    out = tiny().generate(random_ids(2, 6), max_new_tokens=5, do_sample=True, seed=1, **wild)
    assert out.shape[0] == 2


def test_a_penalty_counts_each_row_for_itself():
    """Rows that end and rows that go on: each as transformers' Llama writes it alone."""
    model = tiny()
    rows = list(random_ids(1, 17)[0].split([6, 4, 5, 2]))
    ids, mask = left_padded(rows)
    llama = llama_with_weights_of(model)
    options = {"max_new_tokens": 16, "repetition_penalty": 1.8}
    free = model.generate(ids, mask, eos_token_id=NEVER, **options)
    assert not torch.equal(free, model.generate(ids, mask, max_new_tokens=16, eos_token_id=NEVER))
    for eos in (NEVER, int(free[1, 6 + 3])):
        ours = model.generate(ids, mask, eos_token_id=eos, **options)[:, 6:]
        for row, prompt in zip(ours, rows, strict=True):
            theirs = llama.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                do_sample=False,
                eos_token_id=eos,
                **options,
            )[0, len(prompt) :]
            assert torch.equal(row[: len(theirs)], theirs)
            assert not row[len(theirs) :].any()


def test_autocast_around_it_changes_nothing():
    model, prompt = tiny(), random_ids(2, 6)
    wanted = model.generate(prompt, max_new_tokens=9, eos_token_id=NEVER)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(prompt, max_new_tokens=9, eos_token_id=NEVER), wanted)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.6, "top_k": 4, "top_p": 0.9}], ids=str)
def test_tokens_are_drawn_as_often_as_the_distribution_says(setting):
    draws = 20_000
    logits = torch.tensor([[2.0, 0.5, 1.5, -1.0, 1.0, -3.0]])
    tokens = sample(
        logits.expand(draws, -1),
        Sampling(do_sample=True, **setting),
        torch.Generator().manual_seed(0),
    )
    assert tokens.shape == (draws,)
    found = tokens.bincount(minlength=6) / draws
    wanted = warped(logits, setting)[0]
    assert (found[wanted == 0] == 0).all()
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert ((found - wanted).abs() <= 4.5 * deviation).all()


def test_without_do_sample_the_likeliest_token_is_taken():
    logits = torch.randn(5, 300)
    tokens = sample(logits, Sampling(temperature=5.0, top_k=9, top_p=0.9))
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


def test_streaming_computes_a_token_when_it_is_asked_for(fed):
    tokens = tiny().generate(random_ids(1, 5), max_new_tokens=9, eos_token_id=NEVER, stream=True)
    assert fed == []
    next(tokens)
    assert fed == [5]
    assert torch.is_grad_enabled()
    next(tokens)
    assert fed == [5, 1]
    tokens.close()
    assert fed == [5, 1]


# Several continuations, stop sequences, seeds


def test_several_continuations_of_each_row():
    model = tiny()
    prompts = random_ids(2, 6)
    options = {"max_new_tokens": 8, "eos_token_id": NEVER}
    greedy = model.generate(prompts, num_return_sequences=3, **options)
    assert torch.equal(greedy, model.generate(prompts, **options).repeat_interleave(3, dim=0))
    drawn = model.generate(prompts, num_return_sequences=3, do_sample=True, seed=1, **options)
    assert torch.equal(drawn[:, :6], prompts.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in drawn.tolist()}) == 6


def test_a_row_ends_after_a_stop_sequence():
    model = tiny()
    prompt = random_ids(2, 6)
    free = greedy_loop(model, prompt, 14)[:, 6:].tolist()
    stop = [free[0][3:6], [free[1][9]], [free[0][3], NEVER]]

    def cut(row):
        for end in range(1, 15):
            if any(row[:end][-len(tokens) :] == tokens for tokens in stop):
                return row[:end]
        return row

    wanted = [cut(row) for row in free]
    assert len(wanted[0]) == 6 or free[0].index(stop[1][0]) < 6
    width = max(map(len, wanted))
    out = model.generate(prompt, max_new_tokens=14, stop=stop, eos_token_id=NEVER, pad_token_id=299)
    assert out[:, 6:].tolist() == [row + [299] * (width - len(row)) for row in wanted]


def test_tokens_of_the_prompt_begin_no_stop_sequence():
    model = tiny()
    prompt = random_ids(1, 6)
    first = greedy_loop(model, prompt, 1)[0, -1].item()
    options = {"max_new_tokens": 5, "eos_token_id": NEVER}
    out = model.generate(prompt, stop=[[int(prompt[0, -1]), first]], **options)
    assert torch.equal(out, model.generate(prompt, **options))


def test_a_seed_is_a_generator():
    model = tiny()
    prompt = random_ids(2, 6)
    options = {"max_new_tokens": 9, "do_sample": True, "eos_token_id": NEVER}
    drawn = model.generate(prompt, seed=5, **options)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(drawn, model.generate(prompt, generator=generator, **options))


# A decoder that is kept


@both_kinds
def test_what_a_decoder_holds_is_not_computed_again(fed, use_moe):
    model = tiny(use_moe=use_moe)
    decoder = TorchDecoder(model)
    options = {"max_new_tokens": 4, "eos_token_id": NEVER}
    first = model.generate(random_ids(1, 9), decoder=decoder, **options)
    more = torch.cat((first, random_ids(1, 5, seed=3)), dim=1)
    changed = torch.cat((more[:, :6], random_ids(1, 4, seed=4)), dim=1)
    for prompt, new in ((more, 6), (more, 1), (changed, 4), (more, 12)):  # the last new token too
        fed.clear()
        out = model.generate(prompt, decoder=decoder, **options)
        assert torch.equal(out, greedy_loop(model, prompt, 4))
        assert fed == [new, 1, 1, 1]


def test_a_prefix_is_taken_from_another_row(fed):
    model = tiny()
    decoder = TorchDecoder(model, rows=3)
    system = random_ids(1, 10)
    prompts = [torch.cat((system, random_ids(1, 3, seed=s)), dim=1) for s in range(3)]
    options = {"max_new_tokens": 6, "eos_token_id": NEVER, "decoder": decoder}
    out = model.generate(torch.cat(prompts), **options)
    assert torch.equal(out, greedy_loop(model, torch.cat(prompts), 6))
    assert fed[:3] == [13, 3, 3]


def test_a_row_that_was_left_is_gone_on_from(fed):
    """Kept apart from the rows, as it was when it was left, for as long as there is room."""
    model = tiny()
    decoder = TorchDecoder(model, rows=2)
    prompt = random_ids(1, 12)
    decoder.prefill(0, prompt[0].tolist())
    decoder.cache_prefix(0)
    for seed in range(2):  # both rows hold something else now
        decoder.prefill(seed, random_ids(1, 9, seed=20 + seed)[0].tolist())
    fed.clear()
    more = torch.cat((prompt, random_ids(1, 3, seed=9)), dim=1)
    out = model.generate(more, max_new_tokens=4, eos_token_id=NEVER, decoder=decoder)
    assert fed == [3, 1, 1, 1]
    assert torch.equal(out, greedy_loop(model, more, 4))
    for seed in range(PREFIXES):
        decoder.prefill(1, random_ids(1, 9, seed=40 + seed)[0].tolist())
        decoder.cache_prefix(1)
    decoder.prefill(0, [5, 6])
    fed.clear()
    decoder.prefill(0, prompt[0].tolist())
    assert fed == [12]
    decoder.release()
    assert decoder.capacity == 0 and len(decoder.prefix_cache) == PREFIXES
    assert torch.equal(
        model.generate(more, max_new_tokens=4, eos_token_id=NEVER, decoder=decoder), out
    )


def test_long_prompts_go_in_parts():
    model = tiny(max_seq_len=3 * CHUNK)
    prompt = random_ids(1, 2 * CHUNK + 7)
    decoder = TorchDecoder(model)
    parts = decoder.prefill_in_chunks(0, prompt[0].tolist())
    for length in (CHUNK, 2 * CHUNK, 2 * CHUNK + 7):
        logits = next(parts)
        assert len(decoder.tokens[0]) == length
    assert next(parts, None) is None
    with torch.no_grad():
        wanted = model(prompt).logits[0, -1]
    assert_equal_to_rounding(logits, wanted, forward_sums(model.config, prompt.shape[1]))


@torch.no_grad()
@both_kinds
def test_all_logits_of_a_prompt(use_moe):
    """Also of a prompt that a row holds already; its keys and values serve the next steps."""
    model = tiny(max_seq_len=2 * CHUNK, use_moe=use_moe)
    prompt = random_ids(1, CHUNK + 7)
    ids, wanted = prompt[0].tolist(), model(prompt).logits[0]
    decoder = TorchDecoder(model, rows=2)
    decoder.prefill(1, ids)
    parts = list(decoder.prefill_in_chunks(0, ids, all_logits=True))
    assert [len(part) for part in parts] == [CHUNK // 2, CHUNK // 2, 7]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-4, atol=1e-5)
    after = model(torch.tensor([[*ids, 5]])).logits[0, -1]
    torch.testing.assert_close(decoder.step([5])[0], after, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@both_kinds
def test_rows_come_and_go(use_moe):
    """Steps over rows of any lengths, some of which end, give the logits of each row alone."""
    model = tiny(use_moe=use_moe)
    decoder = TorchDecoder(model, rows=4)
    rows = [ids.tolist() for ids in random_ids(1, 20)[0].split([3, 9, 1, 7])]
    for i in range(3):
        decoder.prefill(i, rows[i])
    active = [0, 1, 2]
    for step in range(12):
        tokens = random_ids(len(active), seed=step)
        for row, token in zip(active, tokens.tolist(), strict=True):
            rows[row].append(token)
        logits = decoder.step(tokens.tolist())
        for row, found in zip(active, logits, strict=True):
            wanted = model(torch.tensor([rows[row]])).logits[0, -1]
            assert_equal_to_rounding(found, wanted, forward_sums(model.config, len(rows[row])))
        if step == 4:  # row 0 ends
            decoder.move(2, 0)
            active = [2, 1]
        if step == 8:  # another begins
            decoder.prefill(2, rows[3])
            active = [2, 1, 3]


def test_a_full_row_is_an_error():
    decoder = TorchDecoder(tiny(max_seq_len=8))
    with pytest.raises(ValueError, match="max_seq_len 8"):
        decoder.prefill(0, list(range(9)))
    with pytest.raises(ValueError, match="empty"):
        decoder.prefill(0, [])
    decoder.prefill(0, list(range(8)))
    with pytest.raises(ValueError, match="max_seq_len 8"):
        decoder.step([3])


def test_half_precision_writes_what_the_model_computes():
    """In bfloat16 the logits are the model's, within its precision."""
    model = tiny().to(torch.bfloat16)
    prompt = random_ids(1, 12)
    decoder = TorchDecoder(model)
    decoder.prefill(0, prompt[0, :11].tolist())
    with torch.no_grad():
        wanted = model(prompt).logits[0, -1]
    found = decoder.step(prompt[0, 11:].tolist())[0]
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()


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


def test_a_long_prompt_leaves_its_neighbours_their_room():
    """A row ends when it fills the context by itself; the others go on."""
    model = tiny(max_seq_len=32)
    prompts = [random_ids(1, length)[0] for length in (3, 30, 9)]
    answers = model.batch_generate(prompts, max_new_tokens=20, eos_token_id=[])
    assert [len(answer) for answer in answers] == [20, 2, 20]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert torch.equal(answer, greedy_loop(model, prompt[None], len(answer))[0, len(prompt) :])


def test_batches_of_prompts_end_at_stop_sequences():
    """Each answer with its own stop sequence, and nothing of the padding behind it."""
    model = tiny()
    prompts = [random_ids(1, length)[0] for length in (4, 7)]
    free = [greedy_loop(model, prompt[None], 12)[0, len(prompt) :].tolist() for prompt in prompts]
    stop = [free[0][2:4], [model.config.vocab_size]]
    answers = model.batch_generate(prompts, max_new_tokens=12, eos_token_id=[], stop=stop)
    cut = next(i for i in range(12) if free[0][i : i + 2] == stop[0]) + 2
    assert answers[0].tolist() == free[0][:cut]
    assert len(answers[1]) == 12 and answers[1].tolist() == free[1]
