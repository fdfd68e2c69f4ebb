import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from common import UserError
from dataset import PretrainDataset

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def encode(tokenizer_dir):
    """Text to ids by the tokenizers library alone."""
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def check_items(dataset, texts, lines, encode):
    """Each item by the definition: every token after `<s>` a target once, in order."""
    index = 0
    lengths = dataset.lengths().tolist()
    for text, line in zip(texts, lines, strict=True):
        document = [BOS, *encode(text), EOS]
        targets = []
        while len(targets) < len(document) - 1:
            x, y, mask = dataset[index]
            assert (x.dtype, y.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)
            assert len(x) == len(y) == len(mask) == lengths[index]
            assert 1 <= len(x) <= dataset.max_length - 1
            start = len(targets)
            assert x.tolist() == document[start : start + len(x)]
            targets += y.tolist()
            complete = len(targets) == len(document) - 1
            assert complete or len(x) == dataset.max_length - 1
            assert mask.tolist() == [1.0] * len(x)
            assert dataset.line_number(index) == line
            index += 1
        assert targets == document[1:]
    assert index == len(dataset) == len(lengths)
    assert dataset.n_tokens == sum(len(encode(text)) + 1 for text in texts)
    assert dataset.n_documents == len(texts)
    assert dataset.text_bytes == sum(len(text.encode("utf-8")) for text in texts)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
            str.strip
        ),
        min_size=1,
        max_size=6,
    ),
    max_length=st.integers(2, 12),
)
def test_every_token_is_a_target_once(tmp_path_factory, tokenizer, encode, texts, max_length):
    path = write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts)
    dataset = PretrainDataset(path, tokenizer, max_length)
    check_items(dataset, texts, range(1, len(texts) + 1), encode)


def test_lengths_at_the_border_of_an_item(tmp_path, tokenizer, encode):
    texts = ["4" * n for n in range(1, 20)]  # n tokens each: digits stand alone
    assert [len(encode(text)) for text in texts] == list(range(1, 20))
    path = write_lines(tmp_path / "data.jsonl", texts)
    dataset = PretrainDataset(path, tokenizer, 7)  # six targets; n tokens and </s> to predict
    assert dataset.lengths().tolist() == [
        length
        for n in range(1, 20)
        for length in [6] * ((n + 1) // 6) + [(n + 1) % 6] * ((n + 1) % 6 > 0)
    ]
    check_items(dataset, texts, range(1, 20), encode)


def test_lengths_of_a_range_are_those_of_its_items(tmp_path, tokenizer):
    path = write_lines(tmp_path / "data.jsonl", ["1" * n for n in (1, 30, 2, 11, 5)])
    dataset = PretrainDataset(path, tokenizer, 6)
    expected = [len(dataset[i][0]) for i in range(len(dataset))]
    for start in range(len(dataset) + 2):
        for stop in range(len(dataset) + 2):
            assert dataset.lengths(start, stop).tolist() == expected[start:stop]


def test_it_is_indexed_like_a_list(tmp_path, tokenizer):
    path = write_lines(tmp_path / "data.jsonl", ["one", "two", "three"])
    dataset = PretrainDataset(path, tokenizer, 64)
    for i in range(3):
        assert torch.equal(dataset[i][1], dataset[i - 3][1])
        assert dataset.line_number(i - 3) == i + 1
    for i in (3, -4):
        with pytest.raises(IndexError):
            dataset[i]


def test_line_numbers_count_bad_lines(tmp_path, tokenizer, encode):
    path = tmp_path / "data.jsonl"
    path.write_text('bad\n{"text": "two"}\n\n{"text": "four"}\n', encoding="utf-8")  # one is blank
    with pytest.raises(UserError, match=r"data\.jsonl:1: "):
        PretrainDataset(path, tokenizer, 64)
    dataset = PretrainDataset(path, tokenizer, 64, skip_bad_lines=True)
    check_items(dataset, ["two", "four"], [2, 4], encode)
    assert dataset.n_bad_lines == 1


def test_an_array_is_read_as_the_lines_that_it_holds(shared_dir, tmp_path, tokenizer, encode):
    for name, lines in (
        ("array_lines.json", range(2, 7)),
        ("array_indented.json", range(2, 19, 4)),
    ):
        path = shared_dir / "data" / "formats" / name
        dataset = PretrainDataset(path, tokenizer, 64, cache_dir=tmp_path)
        texts = [f"document {n}: 春天来了 the quick brown fox" for n in range(5)]
        check_items(dataset, texts, lines, encode)


def test_text_cannot_produce_control_tokens(tmp_path, tokenizer):
    texts = [f"a{token}b" for token in tokenizer.all_special_tokens]
    path = write_lines(tmp_path / "data.jsonl", texts)
    dataset = PretrainDataset(path, tokenizer, 64)
    for i, text in enumerate(texts):
        inner = dataset[i][1][:-1].tolist()
        assert not set(inner) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(inner, clean_up_tokenization_spaces=False) == text


def test_it_pickles_small_and_reopens(tmp_path, tokenizer):
    path = write_lines(tmp_path / "data.jsonl", ["some text"] * 1000)
    dataset = PretrainDataset(path, tokenizer, 64)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[999][1], dataset[999][1])


def test_two_lengths_share_one_store(tmp_path, tokenizer):
    path = write_lines(tmp_path / "data.jsonl", ["1234567890"])
    short, long = PretrainDataset(path, tokenizer, 4), PretrainDataset(path, tokenizer, 64)
    assert (len(short), len(long)) == (4, 1)
    assert len(list(tmp_path.glob("*.tokens"))) == 1


def test_unusable_tokenizers(tmp_path, tokenizer_dir):
    path = write_lines(tmp_path / "data.jsonl", ["text"])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="bos_token"):
        PretrainDataset(path, tokenizer, 64)


def test_real_text_whole(shared_dir, tmp_path, tokenizer, encode):
    path = shared_dir / "data" / "pretrain_real_val.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    dataset = PretrainDataset(path, tokenizer, 513, cache_dir=tmp_path)
    check_items(dataset, texts, range(1, len(texts) + 1), encode)
