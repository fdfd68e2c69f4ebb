"""The page, in a real browser where one is installed."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import httpx
import pytest
from interruptions import eventually
from test_server import serving
from tiny_models import greedy_answer, random_model, save_tuned

from inference.conversations import Conversation, ConversationStore

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
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
    page.get_by_text("Sampling").click()
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
    page.get_by_text("Undo the last exchange").wait_for()
    saved = newest(out_dir)
    first = answer(out_dir, tokenizer, "full_sft_64", messages)
    assert saved.messages == [*messages, {"role": "assistant", "content": first}]
    # Another model answers, and knows what was said before.
    page.get_by_label("Model").first.click()
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
    page.get_by_text("Undo the last exchange").wait_for()
    assert page.get_by_test_id("stChatMessage").count() == 4
    page.get_by_text("Undo the last exchange").click()
    page.get_by_test_id("stChatMessage").nth(2).wait_for(state="detached")
    assert len(newest(out_dir).messages) == 2
    with page.expect_download() as download:
        page.get_by_text("Export as training data").click()
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert exported == {"conversations": saved.messages}


@in_a_browser
def test_an_answer_is_stopped_and_the_page_goes_on(site, page, out_dir):
    page.goto(site)
    page.get_by_placeholder("Type a message").wait_for()
    greedy(page, longest="End")
    say(page, "Go on")
    page.get_by_test_id("stChatMessage").nth(1).get_by_text(re.compile(r"\S")).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Undo the last exchange").wait_for()
    stopped = newest(out_dir).messages[1]["content"]
    assert stopped
    set_slider(page, "New tokens", "Home", "16")
    assert newest(out_dir).messages[1]["content"] == stopped
    say(page, "And now")
    eventually(lambda: len(newest(out_dir).messages) == 4)
    page.get_by_role("button", name="New conversation").click()
    page.get_by_text("And now").wait_for(state="detached")
    assert page.get_by_test_id("stChatMessage").count() == 0
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
    page.get_by_text("Sampling").click()
    set_slider(page, "Temperature", "End", "2")
    page.get_by_role("radio", name="中文").or_(page.get_by_text("中文")).first.click()
    page.get_by_placeholder("说点什么").wait_for()
    page.get_by_text("采样").click()
    assert page.get_by_role("slider", name=re.compile("温度")).input_value() == "2"


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
    page.get_by_text("Undo the last exchange").wait_for()
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
            page.get_by_text("Look for models again").click()
            page.get_by_placeholder("Type a message").wait_for()
            greedy(page)
            say(page, "Hello")
            page.get_by_text("Undo the last exchange").wait_for()
    messages = [{"role": "user", "content": "Hello"}]
    wanted = answer(out_dir, tokenizer, "full_sft_64", messages)
    assert newest(tmp_path).messages[1]["content"] == wanted


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
