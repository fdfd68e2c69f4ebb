"""The sample data: reproducible, in two balanced languages, and never in contradiction to itself.

What the text says is read back by patterns written here, without the generator's help.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from sample_world import FILES, files
from sample_world.languages import load_languages

ROOT = Path(__file__).resolve().parent.parent

EN = r"([A-Z][a-z]+)"
ZH = r"([\u4e00-\u9fff]{1,6}?)"
START_EN = r"^"
START_ZH = r"^"

# Patterns that find one fact in several phrasings: the groups are the subject and the value.
FACTS_EN = {
    "town of a person": [
        rf"{START_EN}{EN} lives in {EN}\.",
        rf"{START_EN}{EN}'s home is in {EN}\.",
        rf"{START_EN}{EN} has a house in {EN}\.",
        rf"Letters for {EN} are sent to {EN}\.",
        rf"{START_EN}{EN}, born in \d+, lives in {EN}\.",
        rf"Name: {EN}\n(?:.+\n)*?Town: {EN}",
    ],
    "friend of a person": [
        rf"{EN}'s best friend is {EN}\.",
        rf"{EN} and {EN} are best friends",
        rf"The person {EN} trusts most is {EN}\.",
        rf"{EN} and {EN} have been best friends",
        rf"Name: {EN}\n(?:.+\n)*?Best friend: {EN}",
    ],
    "pet of a person": [
        rf"{START_EN}{EN} (?:has|keeps) an? ([a-z]+)\.",
        rf"{START_EN}{EN}'s ([a-z]+) sleeps beside",
        rf"{START_EN}{EN} of \w+ keeps an? ([a-z]+) and",
        rf"{EN}'s ([a-z]+) was gone\.",
        rf"Name: {EN}\n(?:.+\n)*?Pet: ([a-z]+)",
    ],
    "goods of a town": [
        rf"{START_EN}{EN} is known for its ([a-z ]+)\.",
        rf"Merchants come to {EN} to buy ([a-z ]+)\.",
        rf"The workshops of {EN} produce ([a-z ]+)\.",
    ],
    "material of a thing": [
        rf"{START_EN}{EN} is made of ([a-z ]+)\.",
        rf"{START_EN}{EN} was made from ([a-z ]+)\.",
        rf"The material of {EN} is ([a-z ]+)\.",
        rf"{START_EN}{EN} consists of ([a-z ]+) and nothing else",
    ],
}
FACTS_ZH = {
    "town of a person": [
        rf"{START_ZH}{ZH}住在{ZH}。",
        rf"{START_ZH}{ZH}的家在{ZH}。",
        rf"写给{ZH}的信要寄到{ZH}。",
        rf"{START_ZH}{ZH}的家乡是{ZH}。",
        rf"{START_ZH}{ZH}出生于\d+年，住在{ZH}。",
        rf"姓名：{ZH}\n(?:.+\n)*?居住地：{ZH}\n",
    ],
    "friend of a person": [
        rf"{START_ZH}{ZH}最好的朋友是{ZH}。",
        rf"{START_ZH}{ZH}和{ZH}(?<!从小就)是最好的朋友",
        rf"{START_ZH}{ZH}最信任的人是{ZH}。",
        rf"姓名：{ZH}\n(?:.+\n)*?最好的朋友：{ZH}\n",
    ],
    "pet of a person": [
        rf"{START_ZH}{ZH}养了一[只条匹头]{ZH}。",
        rf"{START_ZH}{ZH}的宠物是一[只条匹头]{ZH}。",
        rf"{START_ZH}和{ZH}做伴的是一[只条匹头]{ZH}。",
        rf"{START_ZH}{ZH}养的动物是一[只条匹头]{ZH}。",
        rf"{START_ZH}住在\w+的{ZH}养了一[只条匹头]{ZH}，还会",
        rf"姓名：{ZH}\n(?:.+\n)*?宠物：{ZH}\n",
        rf"{START_ZH}{ZH}养的{ZH}不见了。",
    ],
    "goods of a town": [
        rf"^{ZH}以{ZH}闻名。",
        rf"^{ZH}的作坊出产{ZH}。",
        rf"^商人们到{ZH}来买{ZH}。",
    ],
    "material of a thing": [
        rf"^{ZH}是用{ZH}做的。",
        rf"^{ZH}由{ZH}制成。",
        rf"^{ZH}的材料是{ZH}。",
    ],
}
SUBJECTS = {"person": 20, "town": 20, "thing": 20}
PRONOUNS = {"He", "She", "It", "他", "她", "它", "这里"}


@pytest.fixture(scope="module")
def sample(sample_dir) -> bytes:
    """The content of pretrain.jsonl."""
    return (sample_dir / "pretrain.jsonl").read_bytes()


@pytest.fixture(scope="module")
def texts(sample) -> list[str]:
    assert sample.endswith(b"\n") and b"\r" not in sample
    records = [json.loads(line) for line in sample.decode("utf-8").split("\n")[:-1]]
    assert all(record.keys() == {"text"} for record in records)
    return [record["text"] for record in records]


def is_chinese(text: str) -> bool:
    """Whether Chinese characters outweigh Latin words."""
    return len(re.findall(r"[\u4e00-\u9fff]", text)) > len(re.findall(r"[A-Za-z]+", text))


def told(texts: list[str], patterns: list[str]) -> dict[str, set[str]]:
    """Collect, for each subject, every value that the patterns find."""
    values = defaultdict(set)
    whole = "\n\n".join(texts)
    for pattern in patterns:
        for subject, value in re.findall(pattern, whole, flags=re.MULTILINE):
            if subject not in PRONOUNS and value not in PRONOUNS:
                values[subject].add(value)
    return dict(values)


def contradictions(values: dict[str, set[str]]) -> dict[str, set[str]]:
    return {subject: found for subject, found in values.items() if len(found) != 1}


def test_another_process_writes_the_same_bytes(tmp_path, sample_dir):
    """Of every file, whatever the locale and the order of sets."""
    command = [sys.executable, ROOT / "scripts" / "make_sample_data.py", "--out_dir", tmp_path]
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONHASHSEED": "1"}
    subprocess.run(command, check=True, env=environment)
    written = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".version")
    assert written == sorted(FILES)
    for name in written:
        assert (tmp_path / name).read_bytes() == (sample_dir / name).read_bytes()


def test_the_bytes_are_those_of_other_platforms(sample_dir):
    """Of every file. A change to the world that is meant changes this digest too."""
    digest = hashlib.sha256(b"".join((sample_dir / name).read_bytes() for name in sorted(FILES)))
    assert digest.hexdigest() == "83ce2fc65a48214bff20d4f1ea5ff70d2a6104eeab77e559397f3516355c6d3a"


def test_a_change_to_a_template_makes_another_version(tmp_path, monkeypatch):
    package = tmp_path / "sample_world"
    shutil.copytree(ROOT / "sample_world", package)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    before = files.sample_version(1)
    with (package / "templates" / "chinese.txt").open("a", encoding="utf-8") as file:
        file.write("又一行\n")
    assert files.sample_version(1) != before != files.sample_version(2)


def test_both_languages_have_the_same_headings():
    """But for the units of sequences, which stand in theirs."""
    headings = [
        [re.sub("^sequence .*", "sequence unit", heading) for heading in language.headings]
        for language in load_languages()
    ]
    assert headings[0] == headings[1] and "fact person town" in headings[0]


def test_another_seed_makes_another_world(tmp_path, texts):
    (path,) = files.write_sample(tmp_path, seed=7, names=["pretrain.jsonl"])
    lines = path.read_text(encoding="utf-8").splitlines()
    other = [json.loads(line)["text"] for line in lines]
    for facts in FACTS_EN["town of a person"], FACTS_ZH["town of a person"]:
        values = told(other, facts)
        assert len(values) >= 18 and contradictions(values) == {}
        assert values != told(texts, facts)


def test_a_file_of_the_sample_is_written_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE", tmp_path)
    assert files.ensure_sample(tmp_path / "dpo.jsonl").stat().st_size > 1000
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["dpo.jsonl"]
    assert not list(tmp_path.glob("*.tmp"))
    mine = tmp_path / "lora.jsonl"
    mine.write_text("mine", encoding="utf-8")
    assert files.ensure_sample(mine).read_text(encoding="utf-8") == "mine"
    assert not files.ensure_sample(tmp_path / "other.jsonl").exists()


def test_a_file_of_another_generator_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLE", tmp_path)
    path = files.ensure_sample(tmp_path / "test.jsonl")
    right = path.read_bytes()
    path.write_bytes(b"changed")
    assert files.ensure_sample(path).read_bytes() == b"changed"
    (tmp_path / "test.jsonl.version").write_text("of last year", encoding="utf-8")
    assert files.ensure_sample(path).read_bytes() == right


ASK = """
import sys
from pathlib import Path
from sample_world import files

folder = files.SAMPLE = Path(sys.argv[1])
write = files.write_sample

def counted(*arguments, **named):
    with (folder / "writers").open("a", encoding="utf-8") as file:
        file.write("w")
    return write(*arguments, **named)

files.write_sample = counted
assert files.ensure_sample(folder / "sft.jsonl").stat().st_size > 1000
"""


@pytest.mark.parametrize("ranks", [(None, None), ("0", "1")], ids=["two runs", "torchrun"])
def test_of_two_processes_one_writes(tmp_path, ranks):
    started = []
    for rank in ranks:
        launched = {"WORLD_SIZE": "2", "LOCAL_RANK": rank} if rank else {}
        command = [sys.executable, "-c", ASK, tmp_path]
        started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **launched}))
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert (tmp_path / "writers").read_text(encoding="utf-8") == "w"


def test_an_unusable_folder_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "scripts" / "make_sample_data.py", "--out_dir"]
    result = subprocess.run([*command, tmp_path / "file"], capture_output=True)
    assert result.returncode == 2
    assert b"--out_dir" in result.stderr and result.stderr.count(b"\n") == 1


def test_size_and_form(texts):
    assert len(set(texts)) > 0.8 * len(texts)
    for text in texts:
        assert text == text.strip() and text
        # No template left unfilled, no question, no stray space, no escaped character.
        assert not re.search(r"[{}?？\\\t\ufffd]|  | [.,]|None|，，|。。", text), text


def test_half_is_chinese_and_half_english(texts):
    chinese = [text for text in texts if is_chinese(text)]
    assert 0.4 < len(chinese) / len(texts) < 0.6
    size = sum(len(text.encode("utf-8")) for text in texts)
    assert 0.4 < sum(len(text.encode("utf-8")) for text in chinese) / size < 0.6
    lengths = sorted(len(text) for text in chinese)
    assert lengths[0] < 25 and lengths[-1] > 150  # from a sentence to several paragraphs
    assert any(text.count("\n") > 3 for text in texts)


@pytest.mark.parametrize("language", ["English", "Chinese"])
@pytest.mark.parametrize("fact", FACTS_EN)
def test_a_fact_is_always_told_the_same(texts, language, fact):
    patterns = (FACTS_EN if language == "English" else FACTS_ZH)[fact]
    mine = [text for text in texts if is_chinese(text) == (language == "Chinese")]
    values = told(mine, patterns)
    # These are only some of the phrasings, so a few subjects may escape them.
    subjects = SUBJECTS[fact.split()[-1]]
    assert 0.9 * subjects <= len(values) <= subjects
    assert contradictions(values) == {}
    assert len(set.union(*values.values())) >= 20  # so that guessing does not pay
    assert all(told(mine, [pattern]) for pattern in patterns)


def test_a_contradiction_is_found(texts):
    patterns = FACTS_EN["town of a person"]
    (town,) = told(texts, patterns)["Mira"]
    assert contradictions(told([*texts, f"Mira lives in {town}."], patterns)) == {}
    assert contradictions(told([*texts, "Mira lives in Nowhere."], patterns)) == {
        "Mira": {town, "Nowhere"}
    }


def translations(texts: list[str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Read the dictionary entries of the text: English to Chinese and back."""
    english, chinese = r"([A-Za-z][a-z ]*)", r"([\u4e00-\u9fff]+)"
    forward = [
        rf'^The Chinese word for "{english}" is {chinese}\.$',
        rf'^In Chinese, "{english}" is {chinese}\.$',
        rf'^"{english}" is written {chinese} in Chinese\.$',
        rf"^{english}: {chinese}$",
        rf"^In Chinese, the name {english} is written {chinese}\.$",
        rf"^{english} is called {chinese} in Chinese\.$",
    ]
    backward = [
        rf'^{chinese} means "{english}" in English\.$',
        rf"^{chinese} is how {english} is written in Chinese\.$",
        rf"^“{chinese}”的英文是 {english}。$",
        rf"^“{chinese}”用英文写作 {english}。$",
        rf"^{chinese}：{english}$",
        rf"^{chinese}的英文名字写作 {english}。$",
        rf"^{chinese}在英文里叫 {english}。$",
    ]
    return told(texts, forward), told(texts, backward)


def test_the_dictionary_is_one_to_one(texts):
    forward, backward = translations(texts)
    assert len(forward) > 120 and len(backward) > 120
    assert contradictions(forward) == {} and contradictions(backward) == {}
    pairs = {(en, zh) for en, found in forward.items() for zh in found}
    pairs |= {(en, zh) for zh, found in backward.items() for en in found}
    assert len({en for en, _ in pairs}) == len({zh for _, zh in pairs}) == len(pairs)


@pytest.mark.parametrize("fact", ["town of a person", "friend of a person"])
def test_both_languages_tell_of_one_world(texts, fact):
    forward, backward = translations(texts)
    to_chinese = {en: zh for en, (zh,) in forward.items()}
    to_chinese |= {en: zh for zh, (en,) in backward.items()}
    english, chinese = told(texts, FACTS_EN[fact]), told(texts, FACTS_ZH[fact])
    both = [person for person in english if to_chinese.get(person) in chinese]
    assert len(both) >= 18
    for person in both:
        (value,) = english[person]
        assert chinese[to_chinese[person]] == {to_chinese.get(value, value)}


def test_best_friends_are_so_on_both_sides(texts):
    friends = told(texts, FACTS_EN["friend of a person"])
    assert len(friends) >= 18
    for person, (friend,) in friends.items():
        assert friends.get(friend, {person}) == {person}


# Numbers

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ENGLISH = {name: value for value, name in enumerate(UNITS.split())}
ENGLISH |= {name: value for value, name in zip(range(20, 100, 10), TENS.split(), strict=True)}
CHINESE = {name: value for value, name in enumerate("零一二三四五六七八九")} | {"两": 2}


def value_of(text: str) -> int:
    """Read a number in digits, English or Chinese."""
    text = text.lower()
    if text.isascii() and text.isdigit():
        return int(text)
    if text.isascii():
        return sum(ENGLISH[part] for part in text.split("-"))
    if "十" not in text:
        return CHINESE[text]
    tens, ones = text.split("十")
    return 10 * (CHINESE[tens] if tens else 1) + (CHINESE[ones] if ones else 0)


def test_numbers_are_read():
    words = ["17", "Seventeen", "forty-two", "ninety", "zero", "两", "十", "十七", "四十", "四十二"]
    assert [value_of(word) for word in words] == [17, 17, 42, 90, 0, 2, 10, 17, 40, 42]


N = r"(\d+|[A-Za-z-]+|[零一二两三四五六七八九十]+)"
SUMS = {
    "+": [rf"^{N} \+ {N} = {N}$", rf"^{N} plus {N} is {N}\.", rf"^{N}加{N}等于{N}。"],
    "-": [rf"^{N} - {N} = {N}$", rf"^{N} minus {N} is {N}\.", rf"^从{N}里去掉{N}，剩下{N}。"],
}
RIGHT = {
    "+": lambda a, b, c: a + b == c,
    "-": lambda a, b, c: a - b == c,
}


@pytest.mark.parametrize("sign", SUMS)
def test_sums_are_right(texts, sign):
    for pattern in SUMS[sign]:
        found = [match for text in texts for match in re.findall(pattern, text, re.MULTILINE)]
        assert len(found) > 20, pattern
        for numbers in found:
            assert RIGHT[sign](*map(value_of, numbers)), numbers


@pytest.mark.parametrize(
    "pattern",
    [
        rf" had {N} ([a-z]+) and gave {N} \2 to \w+\. {N} \2 were left",
        rf" bought {N} ([a-z]+)\. On the way home {N} \2 got lost, and {N} \2 remained",
        rf"有{N}([^零一二两三四五六七八九十，]+)，送给\w+?{N}\2，还剩{N}\2。",
        rf"买了{N}([^零一二两三四五六七八九十，]+)，路上丢了{N}\2，最后剩下{N}\2。",
    ],
)
def test_told_sums_are_right(texts, pattern):
    found = [match for text in texts for match in re.findall(pattern, text)]
    assert len(found) > 10
    for have, _, gone, left in found:
        assert value_of(have) - value_of(gone) == value_of(left)


def test_sorting_and_comparing_are_right(texts):
    text = "\n".join(texts)
    row = r"(\d+(?:(?:, |、)\d+)+)"
    rising = re.findall(rf"From the smallest to the largest, {row} become {row}\.", text)
    rising += re.findall(rf"把{row}从小到大排列，得到{row}。", text)
    assert len(rising) > 40
    for mixed, ordered in rising:
        numbers = [[int(one) for one in re.findall(r"\d+", part)] for part in (mixed, ordered)]
        assert sorted(numbers[0]) == numbers[1]
    greater = re.findall(rf"^{N} is greater than {N}\.", text, re.MULTILINE)
    greater += re.findall(rf"^{N}大于{N}。", text, re.MULTILINE)
    assert len(greater) > 40
    assert all(value_of(high) > value_of(low) for high, low in greater)
    counted = re.findall(r"In the row (.+) there are (\w+) numbers; (\d) appears (\w+)", text)
    counted += re.findall(r"在(.+)这一行的(.)个数里，(\d)出现了(.)次", text)
    assert len(counted) > 300
    often = {"once": 1, "twice": 2, "three": 3, "一": 1, "两": 2, "三": 3}
    for row, count, one, times in counted:
        numbers = re.findall(r"\d+", row)
        assert len(numbers) == value_of(count) and numbers.count(one) == often[times]
    older = re.findall(
        r"(\w+) is (\S+) years older than \w+: .* in (\d+), the other in (\d+)", text
    )
    assert older
    for _, gap, first, second in older:
        assert value_of(gap) == int(second) - int(first)


def test_the_model_has_a_name(texts):
    assert sum("MiniMind" in text for text in texts) > 100
