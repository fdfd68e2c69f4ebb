"""The server, by clients that others wrote: OpenAI's, LangChain's, and schemathesis's requests."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn
from tiny_models import random_model, save_tuned
from transformers import AutoTokenizer

from dataset import tokenizer_hash
from inference import Choice
from inference.pool import ModelPool
from model import apply_lora, save_lora
from training import save_weights

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def module(root):
    sys.path.insert(0, str(root / "scripts"))
    import serve_openai_api

    yield serve_openai_api
    sys.path.remove(str(root / "scripts"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Weights that answer, weights that continue, an adapter, and a file that is neither."""
    out = tmp_path_factory.mktemp("out")
    model = random_model(dim=64)
    save_tuned(model, out, tokenizer, "full_sft_64")
    save_weights(
        out / "pretrain_64.pth", model, model.config, "pretrain", tokenizer_hash(tokenizer)
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


@contextlib.contextmanager
def serving(module, folder, tokenizer_dir, **changed):
    """A server on a port of its own: its address, and its pool."""
    argv = ["serve_openai_api.py", "--out_dir", str(folder), "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys, "argv", argv)
        patches.delenv("MINIMIND_API_KEY", raising=False)
        args = module.parse_args()
    vars(args).update(changed)
    choice = Choice(None, None, folder, None, None, None, tokenizer_dir)
    device = torch.device("cpu")
    pool = ModelPool(choice, device, None, args.max_batch, args.max_queue, args.max_models)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(module.create_app(args, pool), port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", pool
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def server(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, max_batch=4, max_queue=64) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def answer(folder, tokenizer_dir):
    """What the model itself answers greedily to a conversation, and how it ends."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = random_model(dim=64)
    model.load_state_dict(torch.load(folder / "full_sft_64.pth", weights_only=True))

    def greedy(messages, new):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        out = model.generate(torch.tensor([ids]), max_new_tokens=new)[0, len(ids) :]
        return tokenizer.decode(out, skip_special_tokens=True)

    return greedy


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
    assert chunks[0].choices[0].delta.role == "assistant"
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
        assert [t.logprob for t in told.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
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
    model = random_model(dim=64)
    model.load_state_dict(torch.load(folder / "pretrain_64.pth", weights_only=True))
    prompts = ["One two", "三"]
    options = {"model": "pretrain_64", "temperature": 0, "max_tokens": 9}
    found = client.completions.create(prompt=prompts, n=2, **options)
    for i, choice in enumerate(found.choices):
        ids = [1, *tokenizer.encode(prompts[i // 2], add_special_tokens=False)]
        out = model.generate(torch.tensor([ids]), max_new_tokens=9)[0, len(ids) :]
        assert choice.index == i and choice.text == tokenizer.decode(out)
    echoed = client.completions.create(prompt="三", echo=True, logprobs=2, **options).choices[0]
    assert echoed.text == "三" + found.choices[2].text
    assert echoed.logprobs.text_offset[0] == 1 and len(echoed.logprobs.tokens) == 9
    chunks = client.completions.create(prompt="三", echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.text


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


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stream_of(url, new):
    body = {"model": "full_sft_64", "messages": HI, "max_tokens": new, "stream": True}
    return httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "temperature": 0})


def test_a_client_that_leaves_frees_its_place(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, max_batch=1, max_queue=0, max_tokens=8000) as (
        url,
        pool,
    ):
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


def test_a_job_that_is_cancelled_takes_no_further_step(folder, tokenizer_dir):
    choice = Choice(None, None, folder, None, None, None, tokenizer_dir)
    pool = ModelPool(choice, torch.device("cpu"), None, 2, 2, 1)
    batcher = pool.get("full_sft_64")
    from inference.batcher import Job
    from model import Sampling

    events = []

    def emit(event):
        events.append(event)
        if len(events) == 5:
            job.cancelled = True

    job = Job([1, 5, 6], 1000, Sampling(), None, frozenset(), emit)
    batcher.submit([job])
    eventually(lambda: events[-1:] == ["cancelled"])
    assert len(events) == 6 and batcher.steps == 4  # the first token needs none
    pool.close()


def test_a_full_queue_is_told(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, max_batch=1, max_queue=1, max_tokens=8000) as (
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
        assert list(pool.batchers) == ["other_64"]


def test_time_is_limited(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, max_seconds=0.2) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        ask(client)  # loads the model
        found = ask(client, max_tokens=2000, temperature=1)
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens < 2000


# Errors


@pytest.mark.parametrize(
    ("changed", "kind", "param", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "../secret"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "secret"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "pretrain_64"}, openai.BadRequestError, "model", None),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "foo", "unknown_parameter"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias", "unknown_parameter"),
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


def test_a_broken_request(server):
    url = f"{server}/v1/chat/completions"
    surrogate = json.dumps({"model": "full_sft_64", "messages": HI}).replace("Hi", "\\ud800")
    for content in (b"{", b"\xff", b"[]", b"", surrogate.encode(), b'{"model": "\\ud800"}'):
        done = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
        assert done.status_code == 400 and done.json()["error"]["message"], content
    body = {"model": "\ud800", "messages": HI}
    done = httpx.post(url, content=json.dumps(body).encode())
    assert done.status_code in (400, 404)
    assert httpx.get(url).status_code == 405
    assert "error" in httpx.get(f"{server}/nowhere").json()


def test_a_large_request_is_refused(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, max_bytes=2000) as (url, _):
        body = b'{"model": "' + b"x" * 3000 + b'"}'

        def in_parts():  # without a length
            for i in range(0, len(body), 100):
                yield body[i : i + 100]

        for content in (body, in_parts()):
            done = httpx.post(f"{url}/v1/chat/completions", content=content)
            assert done.status_code == 413 and done.json()["error"]["code"] == "request_too_large"


def test_a_key_is_asked_for(module, folder, tokenizer_dir):
    with serving(module, folder, tokenizer_dir, api_key="sésame") as (url, _):
        for key in ("x", "sésam", "sésamee"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/metrics"):
                done = httpx.get(url + path, headers=headers)
                assert done.status_code == 401
                assert done.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_other_pages_may_call_only_if_told(module, folder, tokenizer_dir, server):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for path in ("/health", "/v1/chat/completions"):
        assert (
            "access-control-allow-origin"
            not in httpx.options(server + path, headers=headers).headers
        )
    origin = "http://good.example"
    with serving(module, folder, tokenizer_dir, cors_origin=[origin], api_key="k") as (url, _):
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
    ask(client, max_tokens=7)
    after = counted()
    name = 'minimind_tokens_total{kind="completion"}'
    assert after[name] - before[name] == 7
    name = 'minimind_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[name] - before.get(name, 0) == 1
    name = "minimind_first_token_seconds_count"
    assert after[name] - before[name] == 1
    assert after["minimind_active"] == after["minimind_waiting"] == 0


def test_requests_that_nobody_thought_of(server):
    """schemathesis makes them from the server's own description: no answer is a bug's."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

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
                body.pop("max_tokens", None)
                body["max_tokens"] = 2
            done = case.call()
            statuses.add(done.status_code)
            assert done.status_code < 500, done.text

        fuzz()
    assert {200, 400} <= statuses
