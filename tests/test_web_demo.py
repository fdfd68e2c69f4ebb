"""The page: as Streamlit runs it, and in a real browser where one is installed."""

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from interruptions import eventually
from PIL import Image, ImageDraw
from test_server import serving
from tiny_models import greedy_answer, random_model, save_tuned

from dataset import parse_chat
from inference import WeightSpec
from inference.backends import Endpoint, LocalModels, ModelInfo, Piece, Settings, for_api
from inference.conversations import Conversation, ConversationStore
from inference.parts import Delta
from inference.pool import ModelPool
from inference.tools import BUILT_IN

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The share of a picture's pixels, those of edges, that may differ from one run to the next.
EDGES = 2e-4
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("full_sft_64", "dpo_64")):
        save_tuned(random_model(seed, dim=64), folder, tokenizer, name, name[:-3])
        os.utime(folder / f"{name}.pth", (1e9 - seed, 1e9 - seed))
    return folder


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(root, *words):
    """The page on a free port, in a process of its own: its address."""
    port = free_port()
    command = [sys.executable, root / "scripts" / "web_demo.py", *words, "--port", port]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url)
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def site(root, out_dir):
    with started(root, "--out_dir", out_dir, "--device", "cpu") as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
    page.set_default_timeout(30_000)
    yield page
    page.close()


def say(page, text, placeholder="Type a message"):
    page.get_by_placeholder(placeholder).fill(text)
    page.keyboard.press("Enter")


def set_slider(page, name, key, value):
    """Move a slider to one of its ends, and wait until the page has taken it."""
    slider = page.get_by_role("slider", name=re.compile(name))
    slider.press(key)
    eventually(lambda: slider.input_value() == value)
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")


def greedy(page, longest="Home"):
    """Choose the likeliest tokens, and few or many of them."""
    page.get_by_text("Settings").click()
    set_slider(page, "Temperature", "Home", "0")
    set_slider(page, "New tokens", longest, "16" if longest == "Home" else "2048")


def answer(out_dir, tokenizer, name, messages):
    """What the model itself answers."""
    return greedy_answer(out_dir / f"{name}.pth", tokenizer, messages, 16, dim=64)


def newest(out_dir):
    """The conversation that changed last, as it lies on the disk."""
    return ConversationStore(out_dir / "chats").list()[0]


@in_a_browser
def test_a_conversation_a_model_switch_and_a_reload(site, page, out_dir, tokenizer):
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for()
    greedy(page)
    say(page, "Hi")
    messages = [{"role": "user", "content": "Hi"}]
    page.get_by_text("Answer again").last.wait_for()
    saved = newest(out_dir)
    first = answer(out_dir, tokenizer, "full_sft_64", messages)
    assert saved.prompt() == [*messages, {"role": "assistant", "content": first}]
    # Another model answers, and knows what was said before.
    page.get_by_role("combobox").press("ArrowDown")
    page.get_by_role("option", name="dpo_64").click()
    eventually(lambda: page.get_by_role("combobox").input_value() == "dpo_64")
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    say(page, "Again")
    eventually(lambda: len(newest(out_dir).messages) == 4)
    messages = [*saved.messages, {"role": "user", "content": "Again"}]
    second = answer(out_dir, tokenizer, "dpo_64", messages)
    assert newest(out_dir).messages[3]["content"] == second
    assert newest(out_dir).model == "dpo_64"
    # All of it is there again after a reload, and in another session.
    page.reload()
    page.get_by_text("Answer again").last.wait_for()
    eventually(lambda: page.get_by_test_id("stChatMessage").count() == 4)
    with page.expect_download() as download:
        page.get_by_text("Export as training data").click()
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert exported == {"conversations": newest(out_dir).prompt()}


@in_a_browser
def test_an_answer_is_stopped_and_the_page_goes_on(site, page, out_dir):
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for()
    greedy(page, longest="End")
    say(page, "Go on")
    page.get_by_test_id("stChatMessage").nth(1).get_by_text(re.compile(r"\S")).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Answer again").last.wait_for()
    stopped = newest(out_dir).messages[1]["content"]
    assert stopped
    set_slider(page, "New tokens", "Home", "16")
    assert newest(out_dir).messages[1]["content"] == stopped
    say(page, "And now")
    eventually(lambda: len(newest(out_dir).messages) == 4)
    page.get_by_role("button", name="New conversation").click()
    page.get_by_text("And now").wait_for(state="detached")
    eventually(lambda: page.get_by_test_id("stChatMessage").count() == 0)
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("And now").wait_for()


@in_a_browser
def test_it_speaks_chinese_and_fits_a_phone(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, locale="zh-CN")
    page.goto(site)
    page.get_by_placeholder("说点什么").wait_for(timeout=60_000)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390
    page.close()


@in_a_browser
def test_what_is_set_outlives_a_change_of_language(site, page):
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for()
    page.get_by_text("Settings").click()
    set_slider(page, "Temperature", "End", "2")
    page.get_by_role("radio", name="中文").or_(page.get_by_text("中文")).first.click()
    page.get_by_placeholder("说点什么").wait_for()
    page.get_by_text("设置").click()
    eventually(lambda: page.get_by_role("slider", name=re.compile("温度")).input_value() == "2")


@in_a_browser
def test_a_question_without_an_answer_is_taken_back(site, page, out_dir):
    """One that is too long for the model's context: it is shown, and the page goes on."""
    before = len(ConversationStore(out_dir / "chats").list())
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for()
    say(page, "龘" * 9000)
    page.get_by_text("No answer").wait_for()
    assert len(ConversationStore(out_dir / "chats").list()) == before
    greedy(page)
    say(page, "Short")
    page.get_by_text("Answer again").last.wait_for()
    assert [m["role"] for m in newest(out_dir).messages] == ["user", "assistant"]


@in_a_browser
def test_a_server_is_talked_to_as_soon_as_it_is_there(
    root, page, out_dir, tokenizer, tokenizer_dir, tmp_path
):
    port = free_port()
    endpoint = ["--endpoint", f"http://127.0.0.1:{port}/v1", "--api_key", "k"]
    with started(root, *endpoint, "--chats_dir", tmp_path / "chats") as url:
        page.goto(url)
        page.get_by_text("No answer").wait_for()
        assert page.get_by_text("There are no models yet").count() == 0
        with serving(out_dir, tokenizer_dir, api_key="k", port=port):
            page.get_by_role("button", name="Retry").click()
            page.get_by_placeholder("Type a message").wait_for()
            greedy(page)
            say(page, "Hello")
            page.get_by_text("Answer again").last.wait_for()
    messages = [{"role": "user", "content": "Hello"}]
    wanted = answer(out_dir, tokenizer, "full_sft_64", messages)
    assert newest(tmp_path).messages[1]["content"] == wanted


@in_a_browser
def test_an_answer_is_copied_and_nothing_jumps_when_it_ends(site, browser, out_dir):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site)
    page = context.new_page()
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for(timeout=60_000)
    greedy(page)
    say(page, "3*4*5\n__init__")
    stop = page.get_by_role("button", name="Stop")
    with contextlib.suppress(Exception):  # the answer may end first
        stop.wait_for(timeout=2_000)
        place, box = stop.bounding_box(), page.get_by_test_id("stChatInput").bounding_box()
        assert place["x"] + place["width"] <= box["x"] + box["width"]
        assert box["y"] <= place["y"] and place["y"] + place["height"] <= box["y"] + box["height"]
    page.get_by_text("Answer again").wait_for()
    page.get_by_text("3*4*5").first.wait_for()
    page.get_by_role("button", name="Copy").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == newest(out_dir).messages[1]["content"]
    context.close()


@in_a_browser
def test_the_drawer_of_a_phone_closes_after_a_choice(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, locale="en-US")
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for(timeout=60_000)
    page.get_by_role("combobox").wait_for()  # the model's name
    page.get_by_test_id("stExpandSidebarButton").click()
    page.get_by_role("button", name="New conversation").click()
    closed = ':is([aria-expanded="false"], [data-collapsed="true"])'  # by Streamlit's version
    page.locator(f'[data-testid="stSidebar"]{closed}').wait_for(state="attached")
    page.close()


def look_alike(*shots):
    """Whether two pictures differ in their edges at most."""
    first, second = (np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")) for shot in shots)
    return first.shape == second.shape and (first != second).any(axis=2).mean() <= EDGES


def test_a_word_more_is_seen():
    shots = []
    for text in ("A small language model.", "A small language model, twice."):
        picture = Image.new("RGB", (390, 844), "white")
        ImageDraw.Draw(picture).text((20, 100), text, "black")
        shots.append(io.BytesIO())
        picture.save(shots[-1], "png")
    assert look_alike(shots[0].getvalue(), shots[0].getvalue())
    assert not look_alike(*(shot.getvalue() for shot in shots))


@in_a_browser
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_the_page_looks_as_it_did(site, browser, pytestconfig, size, scheme, locale):
    """Screenshots are kept in pytest's cache; one that changed is there beside the last one.

    The edges of letters and lines differ from run to run, in fewer than EDGES of the pixels.
    """
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, locale=locale
    )
    page.goto(f"{site}?model=full_sft_64")
    page.get_by_test_id("stChatInput").wait_for(timeout=60_000)
    page.get_by_test_id("stStatusWidget").wait_for(state="detached")
    private = [page.get_by_test_id("stSidebar"), page.get_by_test_id("stCaptionContainer")]

    def take():
        return page.screenshot(animations="disabled", caret="hide", mask=private)

    shots = [take()]

    def has_settled():
        shots.append(take())
        return look_alike(*shots[-2:])

    eventually(has_settled)
    shot = shots[-1]
    page.close()
    folder = pytestconfig.cache.mkdir("screenshots")
    path = folder / f"{size[0]}-{scheme}-{locale}.png"
    last = path.read_bytes() if path.exists() else shot
    path.write_bytes(shot)
    if not look_alike(last, shot):
        path.with_suffix(".last.png").write_bytes(last)
        pytest.fail(f"{path} differs from the one before, {path.with_suffix('.last.png')}")


class Parrot:
    """A source of answers: it gives the same pieces each time, and keeps what it was asked."""

    address = "http://parrot/v1"

    def __init__(self, *pieces, **models):
        self.pieces, self.prompts = list(pieces), []
        self.named = models or {"full_sft_64": ModelInfo(chats=True)}

    def models(self):
        return self.named

    def is_loaded(self, model):
        return True

    def stream(self, model, messages, settings, tools=()):
        self.prompts.append([message["content"] for message in messages])
        for n_tokens, piece in enumerate(self.pieces, 1):
            if isinstance(piece, Exception):
                raise piece
            if callable(piece):
                piece()
            else:
                yield Piece(Delta("content", piece), n_tokens)


def script(backend, folder):
    from pathlib import Path

    from web_page import draw

    draw(lambda: backend, Path(folder))


@pytest.fixture
def opened(root, tmp_path, monkeypatch):
    """Open the page on a source of answers, at an address with these parameters."""
    # AppTest leaves its script there, which later processes would run as they are spawned.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.syspath_prepend(root / "scripts")
    testing = pytest.importorskip("streamlit.testing.v1")

    def open_page(backend, **query):
        from web_page import list_models, open_backend

        open_backend.clear()
        list_models.clear()
        options = {"backend": backend, "folder": str(tmp_path / "chats")}
        page = testing.AppTest.from_function(script, kwargs=options, default_timeout=60)
        page.query_params.update(query)
        return page.run()

    return open_page


def asked(page, text):
    """Type a text, and wait for the answer."""
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def click(page, key):
    """Click a button, and wait for what it does."""
    page.button(key=key).click().run()
    assert not page.exception
    return page


def values(elements):
    return [element.value for element in elements]


def contents(conversation):
    return [message["content"] for message in conversation.messages]


def test_questions_are_shown_as_typed_and_answers_by_the_kind_of_model(opened, tmp_path):
    models = {"full_sft_64": ModelInfo(True), "pretrain_64": ModelInfo(False)}
    page = opened(Parrot("**a**\n", "b", **models))
    asked(page, "3*4*5 __init__\n\n  x")
    assert values(page.text) == ["3*4*5 __init__\n\n  x"]
    assert "**a**  \nb" in values(page.markdown)
    page.selectbox[0].select("pretrain_64").run()
    asked(page, "on")
    assert values(page.text)[1:] == ["on", "**a**\nb"]
    assert "**a**  \nb" in values(page.markdown)  # what the other model answered
    made = newest(tmp_path).messages[3]["made"]
    assert made["model"] == "pretrain_64" and made["tokens"] == 2
    assert any("pretrain\\_64" in caption for caption in values(page.caption))
    assert set(newest(tmp_path).prompt()[3]) == {"role", "content"}
    titles = [button.label for button in page.sidebar.button]
    assert r"3\*4\*5 \_\_init\_\_ x" in titles


def test_the_last_exchange_is_changed_in_place_and_an_earlier_one_in_a_copy(opened, tmp_path):
    backend = Parrot("A")
    page = asked(asked(opened(backend), "one"), "two")
    click(page, "Answer again3")
    store = ConversationStore(tmp_path / "chats")
    assert [contents(c) for c in store.list()] == [["one", "A", "two", "A"]]
    assert backend.prompts[-1] == ["one", "A", "two"]
    click(page, "Edit3")
    page.text_area(key="edited2").set_value("second").run()
    click(page, "send")
    assert [contents(c) for c in store.list()] == [["one", "A", "second", "A"]]
    assert page.text_area.len == 1  # the system prompt
    click(page, "Answer again1")
    assert backend.prompts[-1] == ["one"]
    assert [contents(c) for c in store.list()] == [["one", "A"], ["one", "A", "second", "A"]]


def test_what_fails_or_is_stopped_loses_nothing_and_is_retried(opened, tmp_path):
    import streamlit

    backend = Parrot("A")
    page = asked(opened(backend), "one")
    backend.pieces = [RuntimeError("no_such_thing")]
    click(page, "Answer again1")
    assert values(page.error) == [r"No answer\: http\:\/\/parrot\/v1\: no\_such\_thing"]
    assert contents(newest(tmp_path)) == ["one", "A"] and values(page.text) == ["one"]
    asked(page, "two")
    assert contents(newest(tmp_path)) == ["one", "A"] and values(page.text) == ["one", "two"]
    backend.pieces = ["B", RuntimeError("gone")]
    click(page, "retry")
    assert contents(newest(tmp_path)) == ["one", "A", "two", "B"] and page.error.len == 1
    backend.pieces = ["C", streamlit.stop, "D"]
    click(page, "retry")
    assert contents(newest(tmp_path)) == ["one", "A", "two", "C"]
    backend.pieces = []
    asked(page.run(), "three")
    assert "ended its answer" in page.error[0].value
    backend.pieces = ["E"]
    click(page, "edit")
    page.text_area(key="edited4").set_value("3").run()
    click(page, "send")
    assert contents(newest(tmp_path))[4:] == ["3", "E"] and page.error.len == 0


def test_an_answer_that_a_later_run_interrupts_is_saved_once(opened, tmp_path):
    """Streamlit begins the later run before the earlier one has ended."""
    backend = Parrot("A")
    page = opened(backend)
    from web_state import settle

    backend.pieces = ["A", settle, "B"]
    asked(page, "one")
    assert contents(newest(tmp_path)) == contents(page.session_state.chat) == ["one", "A"]
    backend.pieces = [settle, "C"]
    asked(page, "two")
    assert "stopped before" in page.error[0].value
    assert contents(newest(tmp_path)) == ["one", "A"]
    backend.pieces = ["D"]
    click(page, "retry")
    assert contents(newest(tmp_path)) == ["one", "A", "two", "D"]


def test_an_empty_page_says_what_it_is_and_offers_six_questions(opened, tmp_path):
    examples = tuple(f"Q{i}?" for i in range(8))
    page = opened(Parrot("A", one_64=ModelInfo(True, examples=examples)))
    assert page.title[0].value == "MiniMind" and "one\\_64" in page.caption[0].value
    offered = [b for b in page.main.button if b.label.startswith("Q")]
    assert [b.label for b in offered] == [rf"Q{i}\?" for i in range(6)]
    offered[5].click().run()
    assert contents(newest(tmp_path)) == ["Q5?", "A"]
    assert not [b for b in page.main.button if b.label.startswith("Q")] and not page.title


def test_the_model_sees_as_many_exchanges_as_it_was_trained_on(opened):
    backend = Parrot("A", one_64=ModelInfo(True, history=1))
    line = "The model no longer sees what is above this line."
    page = asked(asked(opened(backend), "one"), "two")
    assert backend.prompts[-1] == ["one", "A", "two"]
    assert values(page.caption).count(line) == 1
    asked(page, "three")
    assert backend.prompts[-1] == ["two", "A", "three"]
    page.number_input(key="history").set_value(0).run()
    asked(page, "four")
    assert backend.prompts[-1] == ["four"]
    page.number_input(key="history").set_value(9).run()
    asked(page, "five")
    assert len(backend.prompts[-1]) == 9 and line not in values(page.caption)


def test_language_settings_and_conversation_live_through_a_reload(opened, tmp_path):
    query = {"language": "中文", "temperature": "0.3", "seed": "5", "history": "2"}
    page = opened(Parrot("A", a_64=ModelInfo(True), b_64=ModelInfo(True)), **query, model="b_64")
    assert page.chat_input[0].placeholder == "说点什么"
    assert page.slider(key="temperature").value == 0.3
    assert [page.number_input(key=key).value for key in ("seed", "history")] == [5, 2]
    assert page.selectbox[0].value == "b_64"
    page.text_area[0].set_value("Be kind.").run()
    assert page.query_params["system"] in ("Be kind.", ["Be kind."])
    asked(page, "one")
    assert "system" not in page.query_params
    again = opened(Parrot("A"), chat=newest(tmp_path).id)
    assert values(again.text) == ["one"] and again.text_area[0].value == "Be kind."


def test_a_conversation_is_deleted_when_that_is_confirmed(opened, tmp_path):
    page = asked(opened(Parrot("A")), "one")
    click(page, "delete")
    assert len(ConversationStore(tmp_path / "chats").list()) == 1
    click(page, "really")
    assert ConversationStore(tmp_path / "chats").list() == [] and page.title


def test_a_server_that_comes_later_answers_a_retry(opened, out_dir, tokenizer, tokenizer_dir):
    port = free_port()
    backend = Endpoint(f"http://127.0.0.1:{port}/v1", "k")
    page = opened(backend, temperature="0.0", max_tokens="16")
    assert rf"127\.0\.0\.1\:{port}" in page.error[0].value
    with serving(out_dir, tokenizer_dir, api_key="k", port=port):
        click(page, "models")
        asked(page, "Hello")
    wanted = answer(out_dir, tokenizer, "full_sft_64", [{"role": "user", "content": "Hello"}])
    chat = page.session_state.chat
    assert contents(chat) == ["Hello", wanted]
    assert chat.messages[1]["made"]["tokens"] == 16
    asked(page, "more")
    assert rf"127\.0\.0\.1\:{port}" in page.error[0].value


def test_local_models_say_what_they_were_trained_on_and_count_tokens(
    out_dir, tokenizer, tokenizer_dir, tmp_path
):
    path = save_tuned(random_model(0, dim=64), tmp_path, tokenizer, "full_sft_64", "full_sft")
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    pool = ModelPool(WeightSpec(tmp_path, tokenizer_dir), "cpu", "torch", 1, 1, 1)
    backend = LocalModels(pool)
    assert backend.models() == {"full_sft_64": ModelInfo(True)}
    about["longest_conversation"] = {"exchanges": 10, "tokens": 300}
    path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    assert backend.models() == {"full_sft_64": ModelInfo(True, history=9)}
    assert not backend.is_loaded("full_sft_64") and backend.address == str(tmp_path)
    question = [{"role": "user", "content": "Hi"}]
    settings = Settings(max_tokens=16, temperature=0)
    pieces = list(backend.stream("full_sft_64", question, settings))
    assert backend.is_loaded("full_sft_64") and pieces[-1].tokens == 16
    text = "".join(piece.delta.text for piece in pieces)
    assert text == answer(tmp_path, tokenizer, "full_sft_64", question)
    pool.close()


def test_what_a_server_tells_of_its_models_is_taken():
    models = [
        {"id": "a", "longest_conversation": {"exchanges": 3, "tokens": 90}, "examples": ["Q?"]},
        {"id": "pretrain_8"},
    ]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"object": "list", "data": models}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", None).models()
        server.shutdown()
    assert found == {"a": ModelInfo(True, 2, ("Q?",)), "pretrain_8": ModelInfo(False)}


def test_answers_become_streamlits_markdown(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "scripts")
    from web_texts import answer_markdown, plain

    for text, wanted in {
        r"so \(x^2\) is": "so $x^2$ is",
        "\\[\nx\n\\]": "$$\nx\n$$",
        "a\nb\n\nc": "a  \nb\n\nc",
        "from $5 to $10": r"from \$5 to \$10",
        "$x$ and $$y$$": "$x$ and $$y$$",
        "```\n$5\na\n```\nb": "```\n$5\na\n```\nb",
        r"`\(x\)` $1": r"`\(x\)` \$1",
        "```\nopen $5": "```\nopen $5",
    }.items():
        assert answer_markdown(text) == wanted
    assert plain("3*4 _a_ 你好") == r"3\*4 \_a\_ 你好"


def test_every_text_is_there_in_chinese_with_chinese_punctuation(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "scripts")
    import web_texts

    used = set()
    for name in ("web_page", "web_state"):
        source = (root / "scripts" / f"{name}.py").read_text(encoding="utf-8")
        used.update(re.findall(r'tr\("([^"]+)"\)', source))
        used.update(getattr(web_texts, name) for name in re.findall(r"tr\(([A-Z_]+)\)", source))
    assert len(used) > 20 and used <= web_texts.CHINESE.keys()
    for text in web_texts.CHINESE.values():
        assert not re.search(r"[一-鿿] ?[,:;?!()]|[,:;?!()] ?[一-鿿]|词元", text), text


@pytest.mark.parametrize(
    "words",
    [
        ["--bogus"],
        ["--port", "70000"],
        ["--host", "192.0.2.1"],
        ["--endpoint", "foo"],
        ["--device", "cuda:99"],
        ["--tokenizer_path", "nowhere"],
    ],
)
def test_mistakes_are_one_line(run, words):
    error = run(*words, script="scripts/web_demo.py", code=2).stderr
    assert words[0] in error and error.count("\n") == 1


def test_conversations_are_kept_and_names_reach_no_other_file(tmp_path):
    store = ConversationStore(tmp_path / "chats")
    store.save(Conversation())
    assert store.list() == [] and not store.folder.exists()
    talk = Conversation(system="Be kind.", messages=[{"role": "user", "content": "你好\n" * 40}])
    store.save(talk)
    for i, text in enumerate(("{", "[]", '{"messages": [1]}', '{"changed": "x"}', '{"system": 1}')):
        (store.folder / f"{i:032}.json").write_text(text, encoding="utf-8")
    assert store.list() == [talk] and store.get(talk.id) == talk
    forged = {**vars(talk), "id": "../elsewhere"}
    (store.folder / f"{9:032}.json").write_text(json.dumps(forged), encoding="utf-8")
    assert store.get(f"{9:032}").id == f"{9:032}"
    (store.folder / f"{9:032}.json").write_text(json.dumps({"changed": "5"}), encoding="utf-8")
    assert [talk.changed for talk in store.list()][1] == 5.0
    (store.folder / f"{9:032}.json").unlink()
    assert len(talk.title) == 29
    (tmp_path / "secret.json").write_text(json.dumps(vars(talk)), encoding="utf-8")
    for name in ("../secret", "other", "", talk.id + "\n", "/" + talk.id):
        assert store.get(name) is None
    # Two windows go on with the same conversation: both are kept.
    here, there = store.get(talk.id), store.get(talk.id)
    for window, text in ((here, "here"), (there, "there")):
        window.messages.append({"role": "assistant", "content": text})
        store.save(window)
    assert here.id == talk.id != there.id
    assert store.list() == [there, here]
    here.messages.clear()
    store.save(store.get(there.id))  # a third window
    there.messages.clear()
    store.save(there)  # does not take away what the third one has
    assert len(store.list()) == 2
    store.save(here)
    store.delete(store.list()[0])
    assert store.list() == []


QUESTION = {"role": "user", "content": "2 + 3?"}
CALLED = {"name": "calculator", "arguments": '{"expression": "2 + 3"}'}
CALL = Delta("call", CALLED["arguments"], "calculator")


class Thinker(Parrot):
    """A source of answers in rounds: each is a list of pieces."""

    def __init__(self, *rounds):
        super().__init__()
        self.rounds, self.given = iter(rounds), []

    def stream(self, model, messages, settings, tools=()):
        self.given.append((messages, settings.enable_thinking, list(tools)))
        yield from map(Piece, next(self.rounds))


def test_thoughts_calls_and_results_are_shown_and_exported(opened, tmp_path):
    """The export is what training takes, and the next question's prompt begins with it."""
    first = [Delta("reasoning", "a"), Delta("reasoning", "dd"), CALL]
    second = [Delta("content", "It is 5.")]
    backend = Thinker(first, second, [Delta("content", "Yes.")])
    page = opened(backend)
    page.button_group(key="thinking").set_value("on").run()
    tools = next(g for g in page.button_group if g.key.startswith("tools"))
    tools.set_value(["calculator"]).run()
    asked(page, "2 + 3?")
    assert [e.label for e in page.expander if e.label == "Thought"] == ["Thought"]
    assert "add" in values(page.text)
    shown = values(page.caption)
    assert any("calculator" in text and "→" in text for text in shown) and r"← 5" in shown
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALLED]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5.", "reasoning_content": ""},
    ]
    chat = newest(tmp_path)
    line = json.loads(chat.training_line())
    schema = BUILT_IN["calculator"].schema
    assert line == {"conversations": messages, "tools": [schema]}
    assert parse_chat(json.dumps(line).encode()).messages == messages
    asked(page, "Sure?")
    more = [*messages, {"role": "user", "content": "Sure?"}]
    assert backend.given == [
        ([QUESTION], True, [schema]),
        (messages[:3], True, [schema]),
        (more, True, [schema]),
    ]


def test_a_server_gets_calls_with_ids():
    messages = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALLED, {**CALLED, "arguments": {}}]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "6"},
    ]
    given = for_api(messages)
    calls = given[1]["tool_calls"]
    assert [call["function"] for call in calls] == [CALLED, {**CALLED, "arguments": "{}"}]
    assert [call["id"] for call in calls] == [m["tool_call_id"] for m in given[2:]]
    assert len({call["id"] for call in calls}) == 2
    assert messages[1]["tool_calls"][0] == CALLED
