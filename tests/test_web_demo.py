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
import torch
from tiny_models import random_model, save_tuned
from transformers import AutoTokenizer

from inference.conversations import Talk, TalkStore

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("full_sft_64", "dpo_64")):
        save_tuned(random_model(seed, dim=64), folder, tokenizer, name)
        os.utime(folder / f"{name}.pth", (1e9 - seed, 1e9 - seed))
    return folder


@contextlib.contextmanager
def started(root, script, *words):
    """A script that serves on a free port, in a process of its own: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, root / "scripts" / script, *words, "--port", port]
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
    with started(root, "web_demo.py", "--out_dir", out_dir, "--device", "cpu") as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
    page.set_default_timeout(60_000)
    yield page
    page.close()


def say(page, text, placeholder="Say something"):
    page.get_by_placeholder(placeholder).fill(text)
    page.keyboard.press("Enter")


def greedy(page):
    """Choose the likeliest tokens, and few of them."""
    page.get_by_text("Sampling").click()
    for name, key, times in (("Temperature", "Home", 1), ("New tokens", "Home", 1)):
        slider = page.get_by_role("slider", name=re.compile(name))
        for _ in range(times):
            slider.press(key)
    page.wait_for_timeout(1000)


def answer(out_dir, tokenizer_dir, name, messages, new=16):
    """What the model itself answers."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = random_model(dim=64)
    model.load_state_dict(torch.load(out_dir / f"{name}.pth", weights_only=True))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    out = model.generate(torch.tensor([ids]), max_new_tokens=new)[0, len(ids) :]
    return tokenizer.decode(out, skip_special_tokens=True)


def kept(out_dir):
    """The conversation that changed last, as it lies on the disk."""
    return TalkStore(out_dir / "chats").list()[0]


def eventually(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@in_a_browser
def test_a_conversation_a_model_switch_and_a_reload(site, page, out_dir, tokenizer_dir):
    page.goto(site)
    page.get_by_placeholder("Say something").wait_for()
    greedy(page)
    say(page, "Hi")
    messages = [{"role": "user", "content": "Hi"}]
    page.get_by_text("Take back the last exchange").wait_for()
    talk = kept(out_dir)
    first = answer(out_dir, tokenizer_dir, "full_sft_64", messages)
    assert talk.messages == [*messages, {"role": "assistant", "content": first}]
    # Another model answers, and knows what was said before.
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="dpo_64").click()
    page.wait_for_timeout(1000)
    say(page, "Again")
    eventually(lambda: len(kept(out_dir).messages) == 4)
    messages = [*talk.messages, {"role": "user", "content": "Again"}]
    second = answer(out_dir, tokenizer_dir, "dpo_64", messages)
    assert kept(out_dir).messages[3]["content"] == second
    assert kept(out_dir).model == "dpo_64"
    # All of it is there again after a reload, and in another session.
    page.reload()
    page.get_by_text("Take back the last exchange").wait_for()
    assert page.get_by_test_id("stChatMessage").count() == 4
    page.get_by_text("Take back the last exchange").click()
    page.get_by_test_id("stChatMessage").nth(2).wait_for(state="detached")
    assert len(kept(out_dir).messages) == 2
    with page.expect_download() as download:
        page.get_by_text("Export as training data").click()
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert saved == {"conversations": talk.messages}


@in_a_browser
def test_an_answer_is_stopped_and_the_page_goes_on(site, page, out_dir):
    page.goto(site)
    page.get_by_placeholder("Say something").wait_for()
    page.get_by_text("Sampling").click()
    page.get_by_role("slider", name=re.compile("Temperature")).press("Home")
    page.get_by_role("slider", name=re.compile("New tokens")).press("End")
    page.wait_for_timeout(1000)
    say(page, "Go on")
    page.get_by_test_id("stChatMessage").nth(1).get_by_text(re.compile(r"\S")).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Take back the last exchange").wait_for()
    stopped = kept(out_dir).messages[1]["content"]
    assert stopped
    page.wait_for_timeout(500)
    assert kept(out_dir).messages[1]["content"] == stopped
    page.get_by_role("slider", name=re.compile("New tokens")).press("Home")
    page.wait_for_timeout(1000)
    say(page, "And now")
    eventually(lambda: len(kept(out_dir).messages) == 4)
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
def test_a_server_is_talked_to(root, page, out_dir, tokenizer_dir):
    words = ["--out_dir", out_dir, "--device", "cpu"]
    with started(root, "serve_openai_api.py", *words, "--api_key", "k") as server:
        words = ["--endpoint", f"{server}/v1", "--api_key", "k", "--chats_dir", out_dir / "chats"]
        with started(root, "web_demo.py", *words) as url:
            page.goto(url)
            page.get_by_placeholder("Say something").wait_for()
            greedy(page)
            say(page, "Hello")
            page.get_by_text("Take back the last exchange").wait_for()
    messages = [{"role": "user", "content": "Hello"}]
    wanted = answer(out_dir, tokenizer_dir, "full_sft_64", messages)
    assert kept(out_dir).messages[1]["content"] == wanted


@pytest.mark.parametrize(
    "words", [["--bogus"], ["--device", "cuda:99"], ["--tokenizer_path", "nowhere"]]
)
def test_mistakes_are_one_line(run, words):
    error = run(*words, script="scripts/web_demo.py", code=2).stderr
    assert words[0] in error.splitlines()[-1] and "Traceback" not in error


def test_conversations_are_kept_and_names_reach_no_other_file(tmp_path):
    store = TalkStore(tmp_path / "chats")
    store.keep(Talk())
    assert store.list() == [] and not store.folder.exists()
    talk = Talk(system="Be kind.", messages=[{"role": "user", "content": "你好\n" * 40}])
    store.keep(talk)
    (store.folder / "other.json").write_text("{", encoding="utf-8")
    assert store.list() == [talk] and store.get(talk.id) == talk
    assert len(talk.title) == 29
    (tmp_path / "secret.json").write_text(json.dumps(vars(talk)), encoding="utf-8")
    for name in ("../secret", "other", "", talk.id + "\n", "/" + talk.id):
        assert store.get(name) is None
    store.delete(talk)
    assert store.list() == []
