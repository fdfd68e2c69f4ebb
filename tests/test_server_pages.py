"""What the server tells about itself, and the requests that well-known clients send it."""

import html.parser
import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
from fastapi.testclient import TestClient
from flag_tables import parser_of
from test_server import HI, open_pool
from tiny_models import greedy_answer, random_model, save_tuned

from inference.api import Limits, create_app

DEFAULT = parser_of("scripts/serve_openai_api.py").get_default
# Of each route: the errors that a test of test_server.py gets from it, and 500.
ALWAYS = {408, 413, 500}
ERRORS = {
    ("post", "/v1/chat/completions"): {400, 404, 429, 503} | ALWAYS,
    ("post", "/v1/completions"): {400, 404, 429, 503} | ALWAYS,
    ("get", "/v1/models"): ALWAYS,
    ("get", "/v1/models/{name}"): {404} | ALWAYS,
    ("get", "/health"): ALWAYS,
    ("get", "/metrics"): ALWAYS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    out = tmp_path_factory.mktemp("out")
    model = random_model(dim=64)
    known = {"longest_conversation": {"exchanges": 2, "tokens": 40}, "examples": ["Who?"]}
    save_tuned(model, out, tokenizer, "full_sft_64", conversations=known)
    save_tuned(model, out, tokenizer, "pretrain_64", "pretrain", known)
    save_tuned(model, out, tokenizer, "full_sft_64_a&b", conversations=known)
    return out


@pytest.fixture(scope="module")
def serve(folder, tokenizer_dir):
    """Clients of servers with a key or without; limits as the script's defaults."""
    started = []

    def start(api_key=None):
        limits = Limits(*map(DEFAULT, ("max_prompt", "max_tokens", "max_seconds", "max_bytes")))
        client = TestClient(create_app(open_pool(folder, tokenizer_dir), limits, api_key))
        started.append(client)
        return client.__enter__()

    yield start
    for client in started:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(serve):
    return serve()


@pytest.fixture(scope="module")
def description(client):
    return client.get("/openapi.json").json()


class Links(html.parser.HTMLParser):
    """Collects the addresses in a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


# /docs


def operations(description):
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_each_route_has_its_errors_and_no_others(client, serve, description):
    def documented(description):
        return {
            (method, path): {int(status) for status in operation["responses"]} - {200}
            for method, path, operation in operations(description)
        }

    assert documented(description) == ERRORS
    with_key = documented(serve("k").get("/openapi.json").json())
    for route, statuses in ERRORS.items():
        key = set() if route[1] == "/health" else {401}
        assert with_key[route] == statuses | key
    text = json.dumps(description)
    assert "422" not in text and "ValidationError" not in text


def test_an_error_is_as_described(client, description):
    schema = {"$ref": "#/components/schemas/ErrorBody", "components": description["components"]}
    for body, status in (({}, 400), ({"model": "none", "messages": HI}, 404)):
        done = client.post("/v1/chat/completions", json=body)
        assert done.status_code == status
        jsonschema.validate(done.json(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"detail": "Not Found"}, schema)


def keys(value):
    """The names in a JSON value, whatever the values."""
    if isinstance(value, dict):
        return {name: keys(part) for name, part in value.items()}
    return [keys(part) for part in value[:1]] if isinstance(value, list) else None


def test_each_example_can_be_sent_and_is_answered_as_shown(client, description):
    """Also where the models have other names than in the examples of the source."""
    sent = 0
    for method, path, operation in operations(description):
        shown = operation["responses"]["200"]["content"]
        if method == "get":
            done = client.get(path.format(name="full_sft_64"))
            media_type = done.headers["content-type"].partition(";")[0]
            assert done.status_code == 200 and shown[media_type]["example"]
            if media_type == "application/json":
                assert keys(done.json()) == keys(shown[media_type]["example"])
            continue
        examples = operation["requestBody"]["content"]["application/json"]["examples"]
        for example in examples.values():
            body = example["value"]
            done = client.post(path, json={**body, "max_tokens": min(4, body.get("max_tokens", 4))})
            assert done.status_code == 200, done.text
            sent += 1
            if body.get("stream"):
                assert "text/event-stream" in shown and "data: [DONE]" in done.text
            elif not body.get("logprobs"):
                assert keys(done.json()) == keys(shown["application/json"]["example"])
    assert sent >= 5


def test_docs_need_no_network(serve, monkeypatch, tmp_path):
    """Their files come from the package; here one that stands for it."""
    static = tmp_path / "fastapi_offline" / "static"
    static.mkdir(parents=True)
    (static.parent / "__init__.py").touch()
    files = {"swagger-ui-bundle.js": "// code", "swagger-ui.css": "/* style */"}
    for name, text in files.items():
        (static / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fastapi_offline", raising=False)
    client = serve("k")  # a browser cannot send the key for them
    page = client.get("/docs")
    assert page.status_code == 200
    loaded = [link for link in Links(page.text).found if not link.startswith("data:")]
    assert [client.get(f"/{link}").text for link in loaded] == [*files.values()][::-1]
    assert re.findall(r"https?://", page.text) == []
    assert client.get("/openapi.json").status_code == 200


def test_the_package_has_these_files():
    package = pytest.importorskip("fastapi_offline")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert (Path(package.__file__).parent / "static" / name).stat().st_size > 100_000


# /


def test_the_start_page_shows_models_and_links(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<code>full_sft_64</code></td><td>answers conversations" in page.text
    assert "<code>pretrain_64</code></td><td>continues texts" in page.text
    assert "a&amp;b" in page.text and "a&b" not in page.text
    assert f"{client.base_url}/v1" in page.text
    links = [link for link in Links(page.text).found if not link.startswith("data:")]
    assert {"docs", "v1/models", "health", "metrics"} == set(links)
    assert {client.get(f"/{link}").status_code for link in links} == {200}


def test_a_key_hides_the_models_and_nothing_else(serve):
    client = serve("k")
    text = client.get("/").text + client.get("/openapi.json").text
    assert "full_sft_64" not in text and "v1/models" in text
    assert client.get("/v1/models").status_code == 401
    security = {
        path: operation["security"]
        for _, path, operation in operations(client.get("/openapi.json").json())
    }
    assert security["/health"] == [] and security["/v1/models"] == [{"key": []}]


# Clients: what each sends by its documentation and source, beside the three settings


def chunks(done):
    """The events of a stream, without its end."""
    *events, end = [line.removeprefix("data: ") for line in done.text.split("\n\n") if line]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


CLIENTS = {
    "Open WebUI": {
        "model": "full_sft_64", "messages": HI, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "Cherry Studio": {
        "model": "full_sft_64", "messages": [{"role": "system", "content": "Be kind."}, *HI],
        "temperature": 0.7, "top_p": 1, "max_tokens": 4096, "stream": True,
        "stream_options": {"include_usage": True},
    },
    "LibreChat": {
        "model": "full_sft_64", "temperature": 1, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "user": "665f0c0ffee", "stream": True, "messages": HI, "n": 1,
        "stream_options": {"include_usage": True},
    },
    "Continue": {
        "messages": [{"role": "system", "content": "You help with code."}, *HI],
        "model": "full_sft_64", "max_tokens": 4096, "stream": True,
        "stream_options": {"include_usage": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_finds_the_models_and_gets_a_stream(serve, folder, tokenizer, name):
    """Its own request, cut short and greedy here, so that the answer is known."""
    client = serve("k")
    headers = {"Authorization": "Bearer k", "Accept": "application/json", "x-api-key": "k"}
    models = client.get("/v1/models", headers=headers).json()["data"]
    assert {"full_sft_64", "pretrain_64"} <= {model["id"] for model in models}
    body = CLIENTS[name]
    asked = {**body, "temperature": 0, "max_tokens": 5}
    events = chunks(client.post("/v1/chat/completions", headers=headers, json=asked))
    *pieces, last = events
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in pieces)
    path = folder / "full_sft_64.pth"
    assert text == greedy_answer(path, tokenizer, body["messages"], 5, dim=64)
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert body.get("max_tokens", 1) <= DEFAULT("max_tokens")  # else it would be an error


def test_open_webui_asks_for_titles(client):
    body = {
        "model": "full_sft_64", "messages": [{"role": "user", "content": "### Task:\nA title."}],
        "stream": False, "max_completion_tokens": 10,
    }  # fmt: skip
    done = client.post("/v1/chat/completions", json=body)
    assert done.status_code == 200 and done.json()["choices"][0]["message"]["role"] == "assistant"


def test_continue_asks_for_completions(client):
    """With `useLegacyCompletionsEndpoint`, which pretrained weights need."""
    body = {
        "prompt": "def add(", "model": "pretrain_64", "max_tokens": 8, "temperature": 0.01,
        "stream": True, "stop": ["\n\n"],
    }  # fmt: skip
    done = client.post("/v1/completions", json=body)
    assert all("text" in event["choices"][0] for event in chunks(done))


@pytest.mark.parametrize("flag", ["--access_log", "--log_requests"])
def test_the_log_has_two_names(flag):
    parser = parser_of("scripts/serve_openai_api.py")
    assert parser.parse_args([flag]).access_log and not parser.parse_args([]).access_log
