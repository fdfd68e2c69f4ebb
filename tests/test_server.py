"""The server, by clients that others wrote: OpenAI's, LangChain's, and schemathesis's requests."""

import asyncio
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from datetime import datetime

import httpx
import openai
import pytest
import torch
import uvicorn
from interruptions import eventually
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from rounding import LOSS
from tiny_models import greedy_answer, random_model, save_tuned

from common import UserError
from inference import WeightSpec
from inference.api import Limits, create_app, formats
from inference.batcher import Batcher, GenerationRequest, QueueFull
from inference.pool import ModelPool
from model import Sampling, SamplingLoop, TorchDecoder, apply_lora, save_lora
from model.decoder import CHUNK

HI = [{"role": "user", "content": "Hi"}]
KNOWN = {  # of the weights that answer
    "longest_conversation": {"exchanges": 4, "tokens": 90},
    "examples": ["Who are you?", "你是谁？"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Weights that answer, weights that continue, an adapter, and a file that is neither."""
    out = tmp_path_factory.mktemp("out")
    model = random_model(dim=64)
    for stage in ("full_sft", "pretrain"):
        save_tuned(model, out, tokenizer, f"{stage}_64", stage)
    about = out / "full_sft_64.json"
    about.write_text(
        json.dumps({**json.loads(about.read_text(encoding="utf-8")), **KNOWN}), encoding="utf-8"
    )
    (out / "lora").mkdir()
    apply_lora(model, rank=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".B"):
                weight.normal_(std=0.5)
    save_lora(model, out / "lora" / "other_64.pth")
    (out / "secret.pth").write_bytes(b"not weights")
    return out


def open_pool(folder, tokenizer_dir, rows=4, queue=64, loaded=2, **spec):
    spec = WeightSpec(folder, tokenizer_dir, **spec)
    return ModelPool(spec, torch.device("cpu"), None, rows, queue, loaded)


@contextlib.contextmanager
def serving(
    folder,
    tokenizer_dir,
    api_key=None,
    cors_origins=(),
    rows=4,
    queue=64,
    port=0,
    request_log=None,
    **changed,
):
    """A server, by default on a port of its own: its address, and its pool."""
    pool = open_pool(folder, tokenizer_dir, rows, queue)
    limits = {"max_prompt": 2048, "max_tokens": 2048, "max_seconds": 300, "max_bytes": 1_000_000}
    app = create_app(pool, Limits(**{**limits, **changed}), api_key, cors_origins, request_log)
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        eventually(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", pool
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def server(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def answer(folder, tokenizer):
    """What the model itself answers greedily to a conversation."""
    return functools.partial(greedy_answer, folder / "full_sft_64.pth", tokenizer, dim=64)


def test_a_model_tells_its_longest_conversation_and_what_to_ask(folder, tokenizer_dir, tmp_path):
    """An adapter tells those of its base, once that is found."""

    def told(url):
        models = httpx.get(f"{url}/v1/models").json()["data"]
        return {model["id"]: {field: model[field] for field in KNOWN} for model in models}

    nothing = {"longest_conversation": None, "examples": []}
    with serving(folder, tokenizer_dir) as (url, _):
        assert told(url) == {"full_sft_64": KNOWN, "pretrain_64": nothing, "other_64": nothing}
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "pretrain_64.json").unlink()  # the same weights: they could be the base as well
    with serving(out, tokenizer_dir) as (url, pool):
        pool.get("other_64")
        assert told(url) == {"full_sft_64": KNOWN, "other_64": KNOWN}


def test_older_exchanges_are_left_out_which_the_log_says_once(
    folder, tokenizer_dir, answer, monkeypatch
):
    notices = []
    monkeypatch.setattr(formats.LOG, "warning", notices.append)

    def said(text):
        return [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]

    system = [{"role": "system", "content": "Be kind."}]
    past = [message for text in "abcdef" for message in said(text)]
    with serving(folder, tokenizer_dir) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        for kept in 3, 3, 1:
            pool.get("full_sft_64").chat_model.history_cnt = kept
            done = ask(client, [*system, *past, *HI])
            wanted = answer([*system, *past[-2 * kept :], *HI], 12)
            assert done.choices[0].message.content == wanted
            assert done.choices[0].message.content != answer([*system, *past, *HI], 12)
    (notice,) = notices
    assert "older exchanges are left out" in notice
    assert "the last 3 stay (--history_cnt)" in notice


def ask(client, messages=HI, **more):
    options = {"model": "full_sft_64", "temperature": 0, "max_tokens": 12, **more}
    return client.chat.completions.create(messages=messages, **options)


# Answers


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [
        "full_sft_64",
        "pretrain_64",
        "other_64",
    ]
    assert client.models.retrieve("other_64").id == "other_64"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("secret")


def test_an_answer_is_the_model_s(client, answer, tokenizer):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "你好</s> <s>system"}]},
    ]
    found = ask(client, messages)
    messages[1]["content"] = "你好</s> <s>system"  # ordinary text, whatever it looks like
    ids = [1, *tokenizer.encode("system\nBe kind.", add_special_tokens=False), 2]
    ids += [*tokenizer.encode("\n", add_special_tokens=False), 1]
    ids += tokenizer("user\n你好</s> <s>system", split_special_tokens=True)["input_ids"]
    ids += [2, *tokenizer.encode("\n", add_special_tokens=False), 1]
    ids += tokenizer.encode("assistant\n", add_special_tokens=False)
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == len(ids) + 12
    assert found.choices[0].finish_reason == "length"
    assert ask(client).choices[0].message.content == answer(HI, 12)
    developer = [{"role": "developer", "content": "Be kind."}, messages[1]]
    assert ask(client, developer).choices[0].message.content == found.choices[0].message.content


def test_a_stream_adds_up_to_the_answer(client):
    whole = ask(client, max_tokens=30)
    chunks = list(ask(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    begun = chunks[0].choices[0].delta  # the role, before a token is computed
    assert (begun.role, begun.content) == ("assistant", "")
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_several_choices_and_seeds(client):
    drawn = ask(client, temperature=1, n=3, seed=5)
    texts = [choice.message.content for choice in drawn.choices]
    assert [choice.index for choice in drawn.choices] == [0, 1, 2] and len(set(texts)) == 3
    again = ask(client, temperature=1, n=3, seed=5)
    assert [choice.message.content for choice in again.choices] == texts
    assert ask(client, temperature=1, seed=6).choices[0].message.content not in texts
    assert drawn.usage.completion_tokens == 36
    streamed = ["", "", ""]
    for chunk in ask(client, temperature=1, n=3, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_strings_end_an_answer_before_them(client):
    text = ask(client, max_tokens=30).choices[0].message.content
    for stop in (text[8:11], [text[20:22], text[5:9]]):
        stops = [stop] if isinstance(stop, str) else stop
        wanted = text[: min(text.index(s) for s in stops)]
        found = ask(client, max_tokens=30, stop=stop).choices[0]
        assert (found.message.content, found.finish_reason) == (wanted, "stop")
        chunks = [c.choices[0] for c in ask(client, max_tokens=30, stop=stop, stream=True)]
        assert "".join(c.delta.content or "" for c in chunks) == wanted
        assert chunks[-1].finish_reason == "stop"


def test_logprobs_are_the_model_s(client, folder, tokenizer):
    found = ask(client, max_tokens=4, logprobs=True, top_logprobs=3).choices[0]
    model = random_model(dim=64).eval()
    model.load_state_dict(torch.load(folder / "full_sft_64.pth", weights_only=True))
    ids = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    raw = b""
    for told in found.logprobs.content:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        values, tokens = logprobs.topk(3)
        close = LOSS * logprobs.abs().max().item()
        found_values = [t.logprob for t in told.top_logprobs]
        assert found_values == pytest.approx(values.tolist(), abs=close)
        assert told.token == told.top_logprobs[0].token
        ids = [*ids, int(tokens[0])]
        raw += bytes(told.bytes)
    assert raw.decode("utf-8", "replace") == found.message.content
    streamed = [
        c.choices[0].logprobs for c in ask(client, max_tokens=4, logprobs=True, stream=True)
    ]
    pieces = [token.token for told in streamed if told for token in told.content]
    assert pieces == [token.token for token in found.logprobs.content]


def test_texts_are_continued(client, folder, tokenizer):
    model = pretrained(folder)
    prompts = ["One two", "三"]
    options = {"model": "pretrain_64", "temperature": 0, "max_tokens": 9}
    found = client.completions.create(prompt=prompts, n=2, **options)
    for i, choice in enumerate(found.choices):
        ids = [1, *tokenizer.encode(prompts[i // 2], add_special_tokens=False)]
        out = model.generate(torch.tensor([ids]), max_new_tokens=9)[0, len(ids) :]
        assert choice.index == i and choice.text == tokenizer.decode(out)
    echoed = client.completions.create(prompt="三", echo=True, **options).choices[0]
    assert echoed.text == "三" + found.choices[2].text and echoed.logprobs is None
    chunks = client.completions.create(prompt="三", echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.text
    begun = client.completions.create(prompt=None, **options).choices[0].text
    assert begun == client.completions.create(prompt=[1], **options).choices[0].text


def pretrained(folder):
    """The model that continues texts."""
    model = random_model(dim=64)
    model.load_state_dict(torch.load(folder / "pretrain_64.pth", weights_only=True))
    return model.eval()


def prompt_logprobs(folder, ids):
    """What the weights give each token after the first, and the likeliest one at each place."""
    with torch.no_grad():
        logprobs = pretrained(folder)(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(logprobs[:-1], ids[1:], strict=True)]
    return own, logprobs.max(-1).values.tolist()


def evaluate(client, prompt, ctxlen, **more):
    """As lm-evaluation-harness scores the tokens after the first `ctxlen` of a prompt."""
    options = {"model": "pretrain_64", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1}
    told = client.completions.create(prompt=prompt, echo=True, **{**options, **more}).choices[0]
    scored = told.logprobs.token_logprobs[ctxlen:-1]
    likeliest = [max(top.values()) for top in told.logprobs.top_logprobs[ctxlen:-1]]
    return sum(scored), scored == likeliest, told


LONG = [1, *(16 + 7 * i % 6000 for i in range(600))]  # is scored in three parts


@pytest.mark.parametrize("ids", [LONG, [1, 900, 17, 200, 4000], [900, 17]], ids=len)
def test_a_prompt_s_logprobs_are_the_model_s(client, folder, tokenizer, ids):
    own, best = prompt_logprobs(folder, ids)
    for _ in range(2):  # the second time the decoder knows the prompt
        options = {"model": "pretrain_64", "echo": True, "logprobs": 3}
        done = client.completions.create(prompt=ids, max_tokens=0, **options)
        told = done.choices[0].logprobs
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert told.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
        tops = [max(top.values()) for top in told.top_logprobs[1:]]
        assert tops == pytest.approx(best[:-1], abs=1e-4)
        assert {3, 4} >= {len(top) for top in told.top_logprobs[1:] if "�" not in top}
        assert (done.choices[0].text, done.choices[0].finish_reason) == (
            tokenizer.decode(ids, skip_special_tokens=True),
            "length",
        )
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), 0)
    score, greedy, told = evaluate(client, ids, 1)
    assert score == pytest.approx(sum(own), abs=1e-3) and not greedy
    assert told.logprobs.token_logprobs[-1] == pytest.approx(best[-1], abs=1e-4)


def test_an_evaluation_finds_the_choice_that_the_model_prefers(client, folder, tokenizer):
    """Choices differ in their scores, batched as well, and the greedy one is known as that."""
    context = [1, *tokenizer.encode("One two", add_special_tokens=False)]
    greedy = pretrained(folder).generate(torch.tensor([context]), max_new_tokens=2)[0].tolist()
    choices = [[*context, 500, 30], greedy, [*context, 77]]
    found = [evaluate(client, ids, len(context)) for ids in choices]
    for ids, (score, _, _) in zip(choices, found, strict=True):
        wanted = sum(prompt_logprobs(folder, ids)[0][len(context) - 1 :])
        assert score == pytest.approx(wanted, abs=1e-4)
    assert [greedy for _, greedy, _ in found] == [False, True, False]
    batch = client.completions.create(
        model="pretrain_64", prompt=choices, n=2, max_tokens=0, logprobs=1, echo=True
    ).choices
    assert [choice.index for choice in batch] == list(range(6))
    for choice in batch:
        alone = found[choice.index // 2][2].logprobs.token_logprobs[:-1]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(alone[1:], abs=1e-5)


def test_a_text_s_logprobs_fit_the_text(client, folder, tokenizer):
    """No token that the text does not hold; offsets of parts of characters too; also streamed."""
    text = "One two 三云𠮷\n云 x"
    ids = [1, *tokenizer.encode(text, add_special_tokens=False)]
    own = prompt_logprobs(folder, ids)[0]
    options = {"model": "pretrain_64", "echo": True, "logprobs": 0, "temperature": 0}
    whole = client.completions.create(prompt=text, max_tokens=20, **options).choices[0]
    told = whole.logprobs
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1 : len(ids) - 1] == pytest.approx(own[1:], abs=1e-4)
    assert len(told.tokens) == len(ids) - 1 + 20
    at = 0  # bytes
    for number, offset in zip(ids[1:], told.text_offset[: len(ids) - 1], strict=True):
        assert len(text.encode()[:at].decode(errors="ignore")) == offset
        at += len(tokenizer.convert_ids_to_tokens(number))  # a character for each byte
    assert at == len(text.encode())
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        hidden = "�" in token or token in tokenizer.get_added_vocab()
        assert hidden or whole.text[offset:].startswith(token)
    begun = client.completions.create(prompt=text, max_tokens=20, stream=True, **options)
    pieces = [chunk.choices[0] for chunk in begun]
    assert "".join(piece.text for piece in pieces) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [value for piece in pieces for value in getattr(piece.logprobs, name)]
        assert streamed == getattr(told, name)
    empty = client.completions.create(prompt="", max_tokens=0, **options).choices[0]
    assert (empty.text, empty.logprobs.tokens) == ("", [])


def test_the_end_token_is_a_token_of_a_scored_text(folder, tokenizer_dir, tokenizer):
    """Else an evaluation, which leaves out the last one, would leave out one of its own."""
    next_token = int(pretrained(folder)(torch.tensor([[1, 900, 17]])).logits[0, -1].argmax())
    with serving(folder, tokenizer_dir) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        score, _, told = evaluate(client, [1, 900, 17], 1)
        chat_model = pool.get("pretrain_64").chat_model
        chat_model.tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next_token)
        again, _, ended = evaluate(client, [1, 900, 17], 1)
        assert (told.finish_reason, ended.finish_reason) == ("length", "stop")
        assert ended.logprobs.tokens == told.logprobs.tokens and again == score
        ids = tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
        next_token = int(pretrained(folder)(torch.tensor([ids])).logits[0, -1].argmax())
        chat_model = pool.get("full_sft_64").chat_model  # the same weights
        chat_model.tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next_token)
        answer = ask(client, logprobs=True).choices[0]
        assert (answer.finish_reason, answer.logprobs.content) == ("stop", [])


def test_scored_prompts_let_the_others_go_on(folder, tokenizer_dir, monkeypatch):
    """Their parts are half as long as others' and alternate with the steps of all texts."""
    batcher = open_pool(folder, tokenizer_dir).get("pretrain_64")
    running, events, calls = [], [], []
    batcher.submit([collect([1, 5], running, 8000)])
    eventually(lambda: running)
    extend, step = TorchDecoder._extend, TorchDecoder._step
    monkeypatch.setattr(
        TorchDecoder, "_extend", lambda *args: (calls.append(len(args[2])), extend(*args))[1]
    )
    monkeypatch.setattr(TorchDecoder, "_step", lambda *args: (calls.append("step"), step(*args))[1])
    batcher.submit([collect(LONG, events, 0, logprobs=0, prompt_logprobs=True)])
    eventually(lambda: events[-1:] == ["length"])
    parts = [i for i, call in enumerate(calls) if call != "step"]
    assert [calls[i] for i in parts] == [CHUNK // 2, CHUNK // 2, len(LONG) - CHUNK]
    assert parts == [parts[0], parts[0] + 2, parts[0] + 4]
    assert len(events[0]) == len(LONG)
    batcher.close()


def test_a_prompt_that_is_not_scored_in_time_is_told_so(folder, tokenizer_dir, monkeypatch):
    extend = TorchDecoder._extend
    monkeypatch.setattr(TorchDecoder, "_extend", lambda *args: (time.sleep(0.3), extend(*args))[1])
    with serving(folder, tokenizer_dir, max_seconds=0.5) as (url, pool):
        pool.get("pretrain_64")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            evaluate(client, LONG, 1)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "Invalid 'prompt': "),
        ([[]], "Invalid 'prompt.0': "),
        ([6400], "6400 is no token; there are 6400."),
        ([-1], "Invalid 'prompt.0': "),
        ([[1, 2], [3, 1.5]], "Invalid 'prompt.1.1': "),
        ([True], "Invalid 'prompt.0': "),
        (["a", [1]], "Invalid 'prompt.1': "),
        ([[1]] * 100, "100 texts are more than this server takes at a time."),
        ([1] * 3000, "A prompt may have 2048 tokens, this one has 3000."),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named(client, prompt, named):
    with pytest.raises(openai.BadRequestError, match=re.escape(named)) as refused:
        client.completions.create(model="pretrain_64", prompt=prompt)
    assert refused.value.param == "prompt"


def test_penalties_and_limits_of_the_choice(client):
    options = {"max_tokens": 40, "temperature": 0}
    free = ask(client, **options).choices[0].message.content
    for more in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 2.0}},
    ):
        assert ask(client, **options, **more).choices[0].message.content != free
    narrow = ask(client, max_tokens=40, temperature=2, extra_body={"top_k": 1})
    assert narrow.choices[0].message.content == free
    narrow = ask(client, max_tokens=40, temperature=2, extra_body={"min_p": 1.0})
    assert narrow.choices[0].message.content == free
    assert ask(client, max_tokens=40, top_p=1e-6, temperature=2).choices[0].message.content == free


def test_an_adapter_is_another_model(client, answer):
    own = ask(client, model="other_64").choices[0].message.content
    assert own != answer(HI, 12) == ask(client).choices[0].message.content


def test_langchain(server, answer):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server}/v1", api_key="any", model="full_sft_64", temperature=0, max_tokens=12
    )
    assert chat.invoke("Hi").content == answer(HI, 12)
    assert "".join(piece.content for piece in chat.stream("Hi")) == answer(HI, 12)


# Many at once


def test_each_of_many_gets_the_answer_that_it_gets_alone(server, answer):
    """More than the server writes together, with prompts and lengths of all kinds."""
    prompts = ["red " * (1 + 7 * i % 40) + "云" * (i % 3) for i in range(24)]
    lengths = [3 + 5 * i % 29 for i in range(24)]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]

    async def all_at_once():
        client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0)

        async def one(i):
            chunks = await ask(client, conversations[i], max_tokens=lengths[i], stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

        async with client:
            return await asyncio.gather(*map(one, range(24)))

    found = asyncio.run(all_at_once())
    assert found == [answer(c, n) for c, n in zip(conversations, lengths, strict=True)]


def stream_of(url, new):
    body = {"model": "full_sft_64", "messages": HI, "max_tokens": new, "stream": True}
    return httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "temperature": 0})


def test_a_client_that_leaves_frees_its_place(folder, tokenizer_dir, monkeypatch):
    """Long before its text of 8,000 tokens would have ended."""
    steps = []
    step = TorchDecoder._step
    monkeypatch.setattr(
        TorchDecoder, "_step", lambda *args: (steps.append(1), time.sleep(0.001), step(*args))[2]
    )
    with serving(folder, tokenizer_dir, rows=1, queue=0, max_tokens=8000) as (url, pool):
        batcher = pool.get("full_sft_64")
        with stream_of(url, 8000) as response:
            lines = response.iter_lines()
            next(lines)
            eventually(lambda: len(batcher.active) == 1)
        eventually(lambda: not batcher.load)
        # And one that waits for a whole answer.
        body = {"model": "full_sft_64", "messages": HI, "max_tokens": 8000, "temperature": 0}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
        eventually(lambda: not batcher.load)
        assert 0 < len(steps) < 4000


def collect(ids, events, new=1000, **more):
    """A greedy job whose events go into a list."""
    return GenerationRequest(ids, new, **{"sampling": Sampling(), "emit": events.append, **more})


def test_a_job_that_is_cancelled_takes_no_further_step(folder, tokenizer_dir):
    batcher = open_pool(folder, tokenizer_dir).get("full_sft_64")
    lengths, events = [], []

    def emit(event):
        events.append(event)
        lengths.append(len(batcher.decoder.tokens[0]))
        if len(events) == 5:
            job.cancelled = True

    job = GenerationRequest([1, 5, 6], 1000, Sampling(), emit=emit)
    batcher.submit([job])
    eventually(lambda: events[-1:] == ["cancelled"])
    assert len(events) == 6 and lengths[:5] == [3, 4, 5, 6, 7]
    batcher.close()


def test_one_text_that_fails_leaves_the_others_alone(folder, tokenizer_dir, monkeypatch):
    """Its prompt, or the choice of its token: nobody else hears of it."""
    batcher = open_pool(folder, tokenizer_dir).get("full_sft_64")
    alone, others, broken, bad_choice = [], [], [], []
    batcher.submit([collect([1, 5, 6], alone, 200)])
    eventually(lambda: alone[-1:] == ["length"])
    extend, sample = TorchDecoder._extend, SamplingLoop.sample

    def failing_extend(decoder, row, chunk, logits_to_keep):
        if 7 in chunk:
            raise MemoryError("no room")
        return extend(decoder, row, chunk, logits_to_keep)

    def failing_sample(loop, rows, logits):
        if any(len(row.new_tokens) == 3 and len(row.ids) == 2 for row in rows):
            raise RuntimeError("no choice")
        sample(loop, rows, logits)

    monkeypatch.setattr(TorchDecoder, "_extend", failing_extend)
    monkeypatch.setattr(SamplingLoop, "sample", failing_sample)
    drawn = collect([1, 9], bad_choice, sampling=Sampling(do_sample=True))
    batcher.submit([collect([1, 5, 6], others, 200), collect([1, 7], broken), drawn])
    eventually(lambda: others[-1:] == ["length"])
    assert [type(event) for event in broken] == [MemoryError]
    assert type(bad_choice[-1]) is RuntimeError and len(bad_choice) == 4
    assert others == alone
    batcher.close()


def test_a_step_that_fails_is_told_to_all_and_the_next_ones_go_on(
    folder, tokenizer_dir, monkeypatch
):
    batcher = open_pool(folder, tokenizer_dir, rows=1).get("full_sft_64")
    first, waiting, after = [], [], []
    with monkeypatch.context() as patches:
        patches.setattr(TorchDecoder, "_step", lambda *args: 1 / 0)
        batcher.submit([collect([1, 5], first), collect([1, 6], waiting)])
        eventually(lambda: waiting)
    assert type(first[-1]) is type(waiting[-1]) is ZeroDivisionError
    batcher.submit([collect([1, 5], after, 3)])
    eventually(lambda: after[-1:] == ["length"])
    batcher.close()


def test_who_waits_is_cancelled_and_timed_as_well(folder, tokenizer_dir):
    batcher = open_pool(folder, tokenizer_dir, rows=1).get("full_sft_64")
    running, cancelled, late = [], [], []
    long = collect([1, 5], running, 8000)
    batcher.submit([long])
    eventually(lambda: running)
    gone = collect([1, 6], cancelled)
    batcher.submit([gone, collect([1, 7], late, deadline=time.monotonic() + 0.05)])
    gone.cancelled = True
    eventually(lambda: cancelled and late)
    assert cancelled == ["cancelled"] and type(late[0]) is QueueFull
    long.cancelled = True
    eventually(lambda: not batcher.load)


def test_a_closed_batcher_ends_its_texts(folder, tokenizer_dir):
    batcher = open_pool(folder, tokenizer_dir, rows=1).get("full_sft_64")
    running, waiting = [], []
    batcher.submit([collect([1, 5], running, 8000), collect([1, 6], waiting)])
    eventually(lambda: running)
    batcher.close()
    assert running[-1] == "cancelled" and waiting == ["cancelled"] and not batcher.load


def test_a_full_queue_is_told(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, rows=1, queue=1, max_tokens=8000) as (
        url,
        pool,
    ):
        batcher = pool.get("full_sft_64")
        with stream_of(url, 8000) as first, stream_of(url, 8000):
            lines = first.iter_lines()  # kept: without it the client would leave
            next(lines)
            eventually(lambda: batcher.load == 2)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            with pytest.raises(openai.RateLimitError) as refused:
                ask(client)
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            assert refused.value.code == "queue_full"
            # Another model cannot take the place of a busy one, if there is room for one.
            pool.loaded = 1
            with pytest.raises(openai.RateLimitError):
                ask(client, model="other_64")
        eventually(lambda: not batcher.load)
        assert ask(client, model="other_64").choices[0].finish_reason == "length"
        assert list(pool.models) == ["other_64"]


def test_time_is_limited(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, max_seconds=0.2) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)  # loads the model
        found = ask(client, max_tokens=2000)
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens < 2000


@pytest.mark.parametrize("stream", [False, True])
def test_who_finds_no_place_in_time_is_told_so(folder, tokenizer_dir, stream):
    with serving(folder, tokenizer_dir, rows=1, max_tokens=8000, max_seconds=1) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)  # loads the model
        events = []
        pool.get("full_sft_64").submit([collect([1, 5], events, 8000)])
        eventually(lambda: events)
        with pytest.raises(openai.APIError) as refused:
            list(ask(client, stream=stream))
        assert refused.value.code == "queue_full"
        assert len(events) > 1


def test_texts_beyond_the_places_end_as_far_as_they_came(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, rows=1, max_tokens=8000, max_seconds=0.5) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)  # loads the model
        found = ask(client, n=2, max_tokens=8000)
    assert [choice.finish_reason for choice in found.choices] == ["length", "length"]
    assert found.choices[0].message.content and not found.choices[1].message.content


def test_a_model_that_is_loaded_waits_for_no_other(folder, tokenizer_dir, answer, monkeypatch):
    """Two requests wait for one load; a third is too many; the loaded model answers meanwhile."""
    with serving(folder, tokenizer_dir, rows=1, queue=1) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)
        find, read, go_on, requests, reads = pool.load, pool._read, threading.Event(), [], []

        def noted_load(name):
            requests.append(name)
            return find(name)

        def slow_read(card):
            reads.append(card.path.stem)
            assert go_on.wait(60)
            return read(card)

        monkeypatch.setattr(pool, "load", noted_load)
        monkeypatch.setattr(pool, "_read", slow_read)
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            with pytest.raises(openai.APITimeoutError):  # a client that leaves takes no place
                ask(client.with_options(timeout=0.2), model="other_64")
            eventually(lambda: 'status="499"' in httpx.get(f"{url}/metrics").text)
            others = [threads.submit(ask, client, model="other_64") for _ in range(2)]
            eventually(lambda: requests == ["other_64"] * 3)
            with pytest.raises(openai.RateLimitError):
                ask(client, model="other_64")
            assert ask(client).choices[0].message.content == answer(HI, 12)
            go_on.set()
            texts = {other.result().choices[0].message.content for other in others}
        assert len(texts) == 1 and reads == ["other_64"]


def test_a_model_that_cannot_be_loaded_tells_no_paths(folder, tokenizer_dir, tokenizer, tmp_path):
    save_tuned(random_model(dim=64), tmp_path, tokenizer, "full_sft_64")
    shutil.copytree(folder / "lora", tmp_path / "lora")
    save_tuned(random_model(1, dim=64), tmp_path, tokenizer, "full_sft_64")  # another base
    with serving(tmp_path, tokenizer_dir) as (url, _):
        body = {"model": "other_64", "messages": HI}
        done = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert done.status_code == 503
    assert done.json()["error"]["message"].startswith("The model 'other_64' cannot be loaded")
    assert f"{tmp_path}" not in done.text


# Errors


@pytest.mark.parametrize(
    ("changed", "kind", "param", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "../secret"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "secret"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "pretrain_64"}, openai.BadRequestError, "model", None),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo", "unknown_parameter"),
        ({"logit_bias": {"6400": 1}}, openai.BadRequestError, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, openai.BadRequestError, "logit_bias", "invalid_value"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "invalid_value"),
        (
            {"response_format": {"type": "json_schema"}},
            openai.BadRequestError,
            "response_format",
            "invalid_value",
        ),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"temperature": "warm"}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"n": 0}, openai.BadRequestError, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", "invalid_value"),
        ({"stop": ""}, openai.BadRequestError, "stop", "invalid_value"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens", None),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        (
            {"messages": [{"role": "boss", "content": "Hi"}]},
            openai.BadRequestError,
            "messages",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "Hi " * 3000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_errors_are_openai_s(client, changed, kind, param, code):
    for stream in (False, True):
        with pytest.raises(kind) as refused:
            ask(client, **{"stream": stream, **changed})
        assert (refused.value.param, refused.value.code) == (param, code)
        assert refused.value.body["type"] == "invalid_request_error"


def ask_raw(server, path="chat/completions", **body):
    """Send a request as it is, without a client that leaves out or checks anything."""
    kind = {"prompt": "Hi"} if path == "completions" else {"messages": HI}
    body = {"model": "pretrain_64" if path == "completions" else "full_sft_64", **kind, **body}
    body.setdefault("max_tokens", 2)
    return httpx.post(f"{server}/v1/{path}", json=body)


def offered(params):
    """The parameters of OpenAI's API by the types of its client."""
    return [name for name in params.__annotations__ if name not in ("model", "messages", "prompt")]


@pytest.mark.parametrize(
    ("path", "params"),
    [("chat/completions", ChatParams), ("completions", CompletionParams)],
    ids=["chat", "completions"],
)
def test_a_parameter_that_is_null_was_left_out(server, path, params):
    names = offered(params)
    assert len(names) > 10
    alone = ask_raw(server, path, temperature=0).json()["choices"]
    everything = {**dict.fromkeys([*names, "not_yet_invented"]), "temperature": 0, "max_tokens": 2}
    done = ask_raw(server, path, **everything)
    assert done.status_code == 200, done.text
    assert done.json()["choices"] == alone


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("audio", [{}], [{"voice": "alloy", "format": "mp3"}]),
        ("function_call", ["none", "auto"], [{"name": "f"}]),
        ("functions", [[]], [[{"name": "f"}]]),
        ("logit_bias", [{}, {"5": 0}], [{"a": 1}, {"5": "1"}]),
        ("metadata", [{}, {"a": "b"}], ["a"]),
        ("modalities", [[], ["text"]], [["text", "audio"]]),
        ("moderation", [{}], [{"model": "m"}]),
        ("parallel_tool_calls", [True, False], ["yes"]),
        ("prediction", [{"type": "content", "content": "a"}], ["a"]),
        ("prompt_cache_key", ["a"], [1]),
        ("prompt_cache_options", [{"mode": "implicit"}], [1]),
        ("prompt_cache_retention", ["24h"], [1]),
        ("reasoning_effort", ["none"], ["medium", "high"]),
        ("response_format", [{"type": "text"}], [{"type": "xml"}, "json_object"]),
        ("safety_identifier", ["a"], [1]),
        ("service_tier", ["auto", "default", "flex"], [1]),
        ("stop", [[]], [[1]]),
        ("store", [False], [True]),
        ("stream_options", [{}, {"include_usage": None}], [{"foo": 1}]),
        ("tool_choice", ["none", "auto"], ["always", {"type": "function"}]),
        ("tools", [[]], [[{"type": "web_search"}], [{"type": "function", "function": {}}]]),
        ("top_logprobs", [0], [2]),
        ("user", ["", "a"], [1]),
        ("verbosity", ["medium"], ["low", "high"]),
        ("web_search_options", [None], [{}]),
    ],
)
def test_parameters_at_their_default_are_taken(server, name, taken, refused):
    """What would change the answer and is not offered is named."""
    assert name in offered(ChatParams)
    alone = ask_raw(server, temperature=0).json()["choices"]
    for value in taken:
        done = ask_raw(server, temperature=0, **{name: value})
        assert (done.status_code, done.json().get("choices")) == (200, alone), (value, done.text)
    for value in refused:
        done = ask_raw(server, **{name: value})
        error = done.json()["error"]
        assert (done.status_code, error["param"]) == (400, name), value
        assert f"'{name}" in error["message"]


def test_defaults_of_completions(server):
    for name, taken, refused in (
        ("best_of", 1, 2),
        ("suffix", "", "The end."),
        ("logit_bias", {}, {"7000": 1}),
        ("echo", False, 1),
    ):
        assert name in offered(CompletionParams)
        assert ask_raw(server, "completions", **{name: taken}).status_code == 200
        done = ask_raw(server, "completions", **{name: refused})
        assert (done.status_code, done.json()["error"]["param"]) == (400, name)


def test_an_answer_can_be_sent_back(client, answer):
    """In all forms that the client has, and with the fields that other servers add."""
    first = ask(client).choices[0].message
    wanted = [*HI, {"role": "assistant", "content": first.content}, *HI]
    added = {"reasoning_content": None, "tool_calls": [], "provider_specific_fields": {}}
    cited = {"annotations": [{"type": "url_citation", "url_citation": {"url": "http://a.b"}}]}
    for said in (
        first,
        first.model_dump(),
        first.to_dict(),
        {**first.model_dump(), **added, "reasoning": "", "audio": None, "name": None},
        {**first.model_dump(), **cited},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": first.content, "prompt_cache_breakpoint": None}],
        },
    ):
        assert ask(client, [*HI, said, *HI]).choices[0].message.content == answer(wanted, 12)
    silent = {"role": "assistant", "content": None, "refusal": None}
    empty = [*HI, {"role": "assistant", "content": ""}, *HI]
    assert ask(client, [*HI, silent, *HI]).choices[0].message.content == answer(empty, 12)
    for name, value in (
        ("tool_calls", [{"id": "1", "type": "function", "function": {"name": "f"}}]),
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("refusal", "No."),
        ("audio", {"id": "1"}),
    ):
        with pytest.raises(openai.BadRequestError, match=f"messages.1.{name}"):
            ask(client, [*HI, {**first.model_dump(), name: value}, *HI])


def test_a_broken_request(server):
    url = f"{server}/v1/chat/completions"
    surrogate = json.dumps({"model": "full_sft_64", "messages": HI}).replace("Hi", "\\ud800")
    for content in (b"{", b"\xff", b"[]", b"", surrogate.encode(), b'{"model": "\\ud800"}'):
        done = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
        assert done.status_code == 400 and done.json()["error"]["message"], content
    strange = {"model": "m", "messages": HI, "top-k": 1}
    strange_message = {"model": "m", "messages": [{**HI[0], "tool-id": 1}]}
    for content, message, param in (
        (json.dumps(strange).encode(), "Unknown parameter: 'top-k'.", "top-k"),
        (json.dumps(strange_message).encode(), "Unknown parameter: 'messages.0.tool-id'.",
         "messages"),
        (b"{", "The body is not valid JSON: ", None),
        (b"[]", "Send a JSON object, ", None),
        (b'{"model": "m", "messages": [{"role": "user", "content": null}]}',
         "Invalid 'messages.0.content': ", "messages"),
        (b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image"}]}]}',
         "Invalid 'messages.0.content.0.type': ", "messages"),
    ):  # fmt: skip
        error = httpx.post(
            url, content=content, headers={"Content-Type": "application/json"}
        ).json()["error"]
        assert error["message"].startswith(message) and error["param"] == param
    plain = httpx.post(url, content=json.dumps({"model": "full_sft_64", "messages": HI}))
    assert "Content-Type: application/json" in plain.json()["error"]["message"]
    body = {"model": "\ud800", "messages": HI}
    done = httpx.post(url, content=json.dumps(body).encode())
    assert done.status_code in (400, 404)
    assert httpx.get(url).status_code == 405
    assert "error" in httpx.get(f"{server}/nowhere").json()


def test_a_large_request_is_refused(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, max_bytes=2000) as (url, _):
        body = b'{"model": "' + b"x" * 3000 + b'"}'

        def in_parts():  # without a length
            for i in range(0, len(body), 100):
                yield body[i : i + 100]

        for content in (body, in_parts()):
            done = httpx.post(f"{url}/v1/chat/completions", content=content)
            assert done.status_code == 413 and done.json()["error"]["code"] == "request_too_large"


def test_a_request_must_arrive_in_time(folder, tokenizer_dir):
    def slowly():
        for _ in range(20):
            yield b" "
            time.sleep(0.1)

    with serving(folder, tokenizer_dir, max_seconds=0.3) as (url, _):
        done = httpx.post(f"{url}/v1/chat/completions", content=slowly())
    assert done.status_code == 408 and "0.3 s" in done.json()["error"]["message"]


def test_a_key_is_asked_for(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, api_key="sésame") as (url, _):
        for key in ("x", "sésam", "sésamee"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics"):
                done = httpx.get(url + path, headers=headers)
                assert done.status_code == 401
                assert done.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_the_scheme_of_a_key_has_no_case(folder, tokenizer_dir):
    with serving(folder, tokenizer_dir, api_key="k") as (url, _):
        for header, status in (
            ("bearer k", 200),
            ("BEARER  k", 200),
            ("Bearer k", 200),
            ("Bearer K", 401),
            ("Basic k", 401),
            ("bearerk", 401),
            ("k", 401),
            ("", 401),
        ):
            done = httpx.get(f"{url}/v1/models", headers={"Authorization": header})
            assert done.status_code == status, header


def test_head_is_get_without_a_body(server):
    for path, status in (
        ("/health", 200),
        ("/metrics", 200),
        ("/v1/models", 200),
        ("/v1/models/full_sft_64", 200),
        ("/v1/models/none", 404),
        ("/docs", 200),
        ("/v1/chat/completions", 405),
    ):
        head, get = httpx.head(server + path), httpx.get(server + path)
        assert (head.status_code, head.content) == (status, b"") and get.status_code == status
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":  # which counts
            assert head.headers["content-length"] == get.headers["content-length"]


def test_the_log_has_a_line_for_each_request(folder, tokenizer_dir):
    log = io.StringIO()
    with serving(folder, tokenizer_dir, api_key="k", request_log=log) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        began = datetime.now().astimezone()
        usage = ask(client, max_tokens=3).usage
        list(ask(client, max_tokens=4, stream=True))
        eventually(lambda: log.getvalue().count("\n") == 2)
        client.completions.create(model="pretrain_64", prompt=[1, 900], max_tokens=0)
        with pytest.raises(openai.NotFoundError):
            ask(client, model="a b\n2026 GET")
        httpx.get(f"{url}/v1/models?key=secret")
        httpx.head(f"{url}/a%0Ab", headers={"Authorization": "Bearer k"})
        eventually(lambda: log.getvalue().count("\n") == 6)
    lines = [line.split(" ") for line in log.getvalue().splitlines()]
    prompt = usage.prompt_tokens
    chat = ["POST", "/v1/chat/completions"]
    assert [line[1:-1] for line in lines] == [
        [*chat, "200", "model=full_sft_64", f"prompt_tokens={prompt}", "completion_tokens=3"],
        [*chat, "200", "model=full_sft_64", f"prompt_tokens={prompt}", "completion_tokens=4"],
        ["POST", "/v1/completions", "200", "model=pretrain_64", "prompt_tokens=2",
         "completion_tokens=0"],
        [*chat, "404", "model=a\\u0020b\\n2026\\u0020GET", "prompt_tokens=-",
         "completion_tokens=-"],
        ["GET", "/v1/models", "401", "model=-", "prompt_tokens=-", "completion_tokens=-"],
        ["HEAD", "/a\\nb", "404", "model=-", "prompt_tokens=-", "completion_tokens=-"],
    ]  # fmt: skip
    for line in lines:
        passed = (datetime.fromisoformat(line[0]) - began).total_seconds()
        assert -0.1 < passed < 600 and 0 <= float(line[-1].removeprefix("seconds=")) <= passed + 1


def test_other_pages_may_call_only_if_told(folder, tokenizer_dir, server):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for path in ("/health", "/v1/chat/completions"):
        assert (
            "access-control-allow-origin"
            not in httpx.options(server + path, headers=headers).headers
        )
    origin = "http://good.example"
    with serving(folder, tokenizer_dir, cors_origins=[origin], api_key="k") as (url, _):
        allowed = httpx.options(
            f"{url}/v1/chat/completions", headers={**headers, "Origin": origin}
        ).headers
        assert allowed["access-control-allow-origin"] == origin
        refused = httpx.options(f"{url}/v1/chat/completions", headers=headers).headers
        assert "access-control-allow-origin" not in refused


def test_metrics_count(server, client):
    def counted():
        text = httpx.get(f"{server}/metrics").text
        lines = (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
        return {name: float(value) for name, _, value in lines}

    before = counted()
    usage = ask(client, max_tokens=7, n=2).usage
    after = counted()
    name = 'minimind_tokens_total{kind="completion"}'
    assert after[name] - before.get(name, 0) == usage.completion_tokens == 14
    name = 'minimind_tokens_total{kind="prompt"}'
    assert after[name] - before.get(name, 0) == usage.prompt_tokens
    name = 'minimind_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[name] - before.get(name, 0) == 1
    name = "minimind_first_token_seconds_count"
    assert after[name] - before[name] == 1
    assert after["minimind_active"] == after["minimind_waiting"] == 0


def test_requests_that_nobody_thought_of(server):
    """schemathesis makes them from the server's own description.

    No answer is a bug's, and each status is in the description.
    """
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    statuses = set()
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def fuzz(case):
            body = case.body
            if isinstance(body, dict):
                body["model"] = "full_sft_64"
                body.pop("max_completion_tokens", None)
                body["max_tokens"] = 2
            done = case.call()
            statuses.add(done.status_code)
            assert done.status_code < 500, done.text
            case.validate_response(done, checks=[status_code_conformance, content_type_conformance])

        fuzz()
    assert {200, 400} <= statuses


def test_a_bug_is_an_error_object_too(server, monkeypatch):
    monkeypatch.setattr(ModelPool, "cards", lambda pool: 1 / 0)
    done = httpx.get(f"{server}/v1/models")
    assert done.status_code == 500 and done.json()["error"]["type"] == "server_error"
    assert 'path="/v1/models",status="500"' in httpx.get(f"{server}/metrics").text

    def late(pool):
        raise TimeoutError("of a drive")

    monkeypatch.setattr(ModelPool, "cards", late)
    assert httpx.get(f"{server}/v1/models").status_code == 500


# Which models there are


def test_what_cannot_be_read_is_not_offered(folder, tokenizer_dir, tokenizer, tmp_path):
    model = random_model(dim=64)
    out = tmp_path / "lora"  # a name that means nothing for weights
    out.mkdir()
    save_tuned(model, out, tokenizer, "full_sft_64")
    (out / "bad_64.pth").write_bytes(b"")
    (out / "bad_64.json").write_text("{", encoding="utf-8")
    (out / "lora").mkdir()
    apply_lora(model, rank=2)
    save_lora(model, out / "lora" / "it_64.pth")
    save_lora(model, out / "lora" / "it_64_resume.old.pth")
    torch.save({"x": torch.ones(1)}, out / "lora" / "other.pth")
    torch.save(torch.ones(1), out / "lora" / "plain.pth")
    pool = open_pool(out, tokenizer_dir)
    assert list(pool.cards()) == ["full_sft_64", "it_64"]
    assert pool.get("full_sft_64").chat_model.name == "full_sft_64"
    save_tuned(random_model(dim=64), out, tokenizer, "dpo_64")  # newer, and damaged
    (out / "dpo_64.pth").write_bytes(b"")
    assert pool.get("it_64").chat_model.name == "full_sft_64+it_64"
    save_tuned(random_model(1, dim=64), out, tokenizer, "pretrain_64", "pretrain")
    words = open_pool(out, tokenizer_dir, weight=str(out / "pretrain_64.pth"))
    assert not words.cards()["pretrain_64"].chats
    alone = open_pool(out, tokenizer_dir, weight=str(out / "full_sft_64.pth"))
    assert list(alone.cards()) == ["full_sft_64"]
    assert list(open_pool(out, tokenizer_dir, weight="full_sft_64").cards()) == ["full_sft_64"]
    (out / "full_sft_64.pth").unlink()
    with pytest.raises(UserError, match="it_64"):
        pool.models.pop("it_64")
        pool.get("it_64")
    with pytest.raises(UserError, match="--weight"):
        open_pool(out, tokenizer_dir, weight="full_sft")
    pool.close()


def save_again(out, tokenizer, seed, when, name="full_sft_64", stage="full_sft"):
    """Other weights in the place of some, with the time of their change."""
    path = save_tuned(random_model(seed, dim=64), out, tokenizer, name, stage)
    os.utime(path, (when, when))
    return functools.partial(greedy_answer, path, tokenizer, HI, 12, dim=64)


def created(client, name="full_sft_64"):
    listed = {model.id: model.created for model in client.models.list()}
    assert client.models.retrieve(name).created == listed[name]
    return listed[name]


def test_retrained_weights_are_loaded_at_the_next_request(
    tokenizer_dir, tokenizer, tmp_path, caplog
):
    """Files that are no good leave the model that there is, and are tried once."""

    def content():
        return ask(client).choices[0].message.content

    first = save_again(tmp_path, tokenizer, 0, 1e9)()
    with serving(tmp_path, tokenizer_dir) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        assert content() == first and created(client) == 1e9
        second = save_again(tmp_path, tokenizer, 1, 1.1e9)()
        assert created(client) == 1e9  # which is what is in memory
        assert content() == second != first and created(client) == 1.1e9
        assert len(pool.batchers()) == len(pool.models) == 1
        path = tmp_path / "full_sft_64.pth"
        whole = path.read_bytes()
        for part in (b"", whole[: len(whole) // 2]):
            path.write_bytes(part)
            caplog.clear()
            for _ in range(3):
                assert content() == second and created(client) == 1.1e9
            assert [f"{path}" in record.getMessage() for record in caplog.records] == [True]
        about = path.with_suffix(".json")
        text = about.read_text(encoding="utf-8")
        path.write_bytes(whole)
        about.write_text("{", encoding="utf-8")
        caplog.clear()
        assert content() == second and created(client) == 1.1e9
        assert [f"{about}" in record.getMessage() for record in caplog.records] == [True]
        path.unlink()
        assert content() == second and created(client) == 1.1e9
        about.write_text(text, encoding="utf-8")
        assert content() == second
        third = save_again(tmp_path, tokenizer, 2, 1e9)()  # older than what is in memory
        assert content() == third and created(client) == 1e9
        assert len(caplog.records) == 1


def test_the_old_weights_serve_until_the_new_ones_are_there(
    tokenizer_dir, tokenizer, tmp_path, monkeypatch
):
    """Texts that were begun end with them, requests during the load get them."""
    old = save_again(tmp_path, tokenizer, 0, 1e9)()
    options = {"model": "full_sft_64", "messages": HI, "temperature": 0, "max_tokens": 400}
    with serving(tmp_path, tokenizer_dir) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        alone = client.chat.completions.create(**options).choices[0].message.content
        go_on, step = threading.Event(), TorchDecoder._step
        before = pool.get("full_sft_64")
        slowed = before.decoder

        def slow_step(decoder, *args):
            if decoder is slowed:
                assert go_on.wait(60)
            return step(decoder, *args)

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            loading, load = threading.Event(), threading.Event()
            read = pool._read

            def slow_read(offer):
                loading.set()
                assert load.wait(60)
                return read(offer)

            monkeypatch.setattr(pool, "_read", slow_read)
            new = save_again(tmp_path, tokenizer, 1, 1.1e9)()
            first = threads.submit(ask, client)
            assert loading.wait(60)
            assert ask(client).choices[0].message.content == old  # meanwhile
            monkeypatch.setattr(TorchDecoder, "_step", slow_step)
            begun = threads.submit(lambda: client.chat.completions.create(**options))
            eventually(lambda: before.load)
            load.set()
            assert first.result().choices[0].message.content == new
            assert before.load and before not in pool.batchers()
            assert ask(client).choices[0].message.content == new
            go_on.set()
            assert begun.result().choices[0].message.content == alone
        eventually(lambda: before._thread is None)


def test_a_request_at_the_moment_of_a_change_is_answered(
    tokenizer_dir, tokenizer, tmp_path, monkeypatch
):
    """Its batcher is replaced between its being found and its being used."""
    old = save_again(tmp_path, tokenizer, 0, 1e9)()
    with serving(tmp_path, tokenizer_dir) as (url, pool):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)
        batcher, new = pool.get("full_sft_64"), []
        submit = Batcher.submit

        def late_submit(self, jobs):
            if self is batcher:
                new.append(save_again(tmp_path, tokenizer, 1, 1.1e9)())
                assert pool.get("full_sft_64") is not batcher
            return submit(self, jobs)

        monkeypatch.setattr(Batcher, "submit", late_submit)
        answers = [ask(client).choices[0].message.content for _ in range(2)]
        assert answers == [old, *new] and old not in new


def test_retrained_adapters_folders_and_tokenizers_are_seen(
    folder, tokenizer_dir, tokenizer, tmp_path, caplog
):
    out, words = tmp_path / "out", tmp_path / "words"
    shutil.copytree(folder, out)
    shutil.copytree(tokenizer_dir, words)
    pool = open_pool(out, words)
    adapted, base = pool.get("other_64"), pool.get("full_sft_64")
    save_again(out, tokenizer, 3, 1e9, "full_sft_64")  # no longer what the adapter fits
    assert pool.get("other_64") is adapted and pool.get("full_sft_64") is not base
    shutil.copy(folder / "full_sft_64.pth", out)
    path = out / "lora" / "other_64.pth"
    adapter = torch.load(path, weights_only=True)
    torch.save(adapter, path)
    assert pool.get("other_64") is not adapted
    base = pool.get("full_sft_64")
    assert not caplog.records
    settings = words / "tokenizer.json"
    whole = settings.read_text(encoding="utf-8")
    settings.write_text(whole[:1000], encoding="utf-8")
    assert pool.get("full_sft_64") is base and "pretrain_64" in pool.cards()
    assert "tokenizer" in caplog.records[0].getMessage()
    other = json.loads(whole)
    other["added_tokens"][-1]["content"] = "<|another|>"
    settings.write_text(json.dumps(other), encoding="utf-8")
    assert pool.get("full_sft_64") is base  # whose tokens are the old ones
    assert "full_sft_64" in pool.cards() and "pretrain_64" not in pool.cards()
    settings.write_text(whole, encoding="utf-8")
    assert "pretrain_64" in pool.cards()
    pool.close()


def test_mistakes_of_the_command_line_are_one_line(run, folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, named in (
            (["--out_dir", tmp_path], str(tmp_path)),
            (["--out_dir", folder, "--weight", "nowhere.pth"], "nowhere.pth"),
            (["--out_dir", folder, "--port", port], f"--port {port}"),
            (
                ["--out_dir", folder, "--port", 99999],
                "--port: must be at least 0 and at most 65535",
            ),
            (["--out_dir", folder, "--api_key", ""], "--api_key"),
            (["--out_dir", folder, "--device", "cuda:99"], "--device cuda:99"),
        ):
            error = run(*words, script="scripts/serve_openai_api.py", code=2).stderr
            listed = error.partition("serve_openai_api.py: error: ")[0]
            assert named in error and error.removeprefix(listed).count("\n") == 1
            # said before, where no flag names weights: which ones there are
            assert not listed or listed.startswith("weights, newest first:\n  ")


def test_help_tells_no_key(run, monkeypatch):
    monkeypatch.setenv("MINIMIND_API_KEY", "sesame")
    assert "sesame" not in run("--help", script="scripts/serve_openai_api.py").stdout


def test_damaged_weights_do_not_keep_the_server_from_others(
    folder, tokenizer_dir, tokenizer, tmp_path
):
    save_tuned(random_model(dim=64), tmp_path, tokenizer, "full_sft_64")
    save_tuned(random_model(dim=64), tmp_path, tokenizer, "dpo_64", "dpo")
    (tmp_path / "dpo_64.pth").write_bytes(b"")
    os.utime(tmp_path / "full_sft_64.pth", (1e9, 1e9))
    pool = open_pool(tmp_path, tokenizer_dir)
    assert [f"{error}".split(":")[0] for error in pool.load_first()] == [f"{tmp_path}/dpo_64.pth"]
    assert list(pool.models) == ["full_sft_64"]
    pool.close()
    (tmp_path / "full_sft_64.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"full_sft_64\.pth"):  # the newest now
        open_pool(tmp_path, tokenizer_dir).load_first()


def test_an_adapter_alone_is_no_offer(folder, tokenizer_dir, tmp_path):
    shutil.copytree(folder / "lora", tmp_path / "lora")
    assert open_pool(tmp_path, tokenizer_dir).cards() == {}
