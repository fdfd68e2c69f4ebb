"""The questions of the sample: what the test asks must be nowhere in training.

The files are read back by patterns written here, without the generator's help; only the names of
the entities and the words of the dictionary are taken from it.
"""

import json
import re
import runpy
from collections import Counter
from itertools import pairwise

import pytest
from tiny_models import random_model

from sample_world import FILES, Score, is_right, score_answers, score_calls
from sample_world.languages import load_languages
from sample_world.world import VOCABULARY, build_world

TRAINING = ("pretrain.jsonl", "sft.jsonl", "sft_tools.jsonl", "dpo.jsonl", "lora.jsonl")
APART = ("test_tools.jsonl", "test_thinking.jsonl")
TESTS = ("test.jsonl", *APART, "dpo_test.jsonl", "lora_test.jsonl")


@pytest.fixture(scope="module")
def records(sample_dir):
    """The records of every file, by its name."""
    return {
        name: [
            json.loads(line)
            for line in (sample_dir / name).read_text(encoding="utf-8").splitlines()
        ]
        for name in FILES
    }


def turns(record):
    """The (question, answer) pairs of a conversation or a preference pair."""
    if "prompt" in record:
        (question,) = record["prompt"]
        for side in "chosen", "rejected":
            yield question["content"], record[side][0]["content"]
        return
    messages = record["conversations"]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start, end in pairwise([*starts, len(messages)]):
        yield messages[start]["content"], messages[end - 1]["content"]


@pytest.fixture(scope="module")
def training_turns(records):
    return {pair for name in TRAINING[1:] for record in records[name] for pair in turns(record)}


WORLD = build_world(2024)
NAMES = [word for e in WORLD.entities for word in (e.name.en, e.name.zh)]
HELD_OUT = [word for e in WORLD.entities if e.held_out for word in (e.name.en, e.name.zh)]
# Names of people and towns, which may be misspelled.
PROPER = {c: [getattr(e.name, c) for e in WORLD.people + WORLD.towns] for c in ("en", "zh")}


def whole(word):
    """A pattern that finds a word, not a part of another one."""
    letters = "A-Za-z" if word.isascii() else "\u4e00-\u9fff"
    return re.compile(rf"(?<![{letters}]){word}(?![{letters}])")


def skeleton(question, words=()):
    """A question without what it is about: names, numbers, rows of numbers, some words."""
    text = re.sub(r"\d+([,、] ?\d+)*", "0", question)
    for name in sorted(NAMES, key=len, reverse=True):
        text = text.replace(name, "X")
    for word in words:
        text = whole(word).sub("W", text) if word.isascii() else text.replace(word, "W")
    return text


def plain_form(question):
    """A question without case, spaces and marks."""
    return re.sub(r"[\W_]", "", question.casefold())


def test_every_test_question_is_new(records, training_turns):
    seen = {question for question, _ in training_turns}
    seen_plain = {plain_form(question) for question in seen}
    plain = "\n".join(record["text"] for record in records["pretrain.jsonl"])
    for name in TESTS:
        for record in records[name]:
            for question, answer in turns(record):
                assert (question, answer) not in training_turns
                assert question not in seen
                if record["skill"] == "small_talk":  # "Bye" is in many a text
                    assert plain_form(question) not in seen_plain, question
                    continue
                assert question not in plain
                # nor inside another one, which only has something around it
                assert not any(question in asked for asked in seen), question


def test_every_wording_of_the_test_is_new(records, training_turns):
    words = [word for entry in VOCABULARY for word in (entry.en, entry.zh)]
    for about in ((), words):
        trained = {skeleton(question, about) for question, _ in training_turns}
        trained_plain = set(map(plain_form, trained))
        tested = [r for name in ("test.jsonl", *APART) for r in records[name]]
        tested = [r for r in tested if (r["skill"] == "dictionary") == bool(about)]
        assert len(tested) >= 48
        for record in tested:
            asked = skeleton(record["conversations"][0]["content"], about)
            if record["skill"] in ("small_talk", "typing"):  # with and without marks
                assert plain_form(asked) not in trained_plain, asked
                continue
            nameless = record["skill"] in ("identity", "tools", "thinking")
            assert nameless or re.search("[X0W]", asked), asked
            assert not any(asked in wording for wording in trained), asked


def operands(record):
    return frozenset(re.findall(r"\d+", record["conversations"][0]["content"]))


def test_sums_of_the_test_are_in_no_training_file(records, training_turns):
    """No sentence holds exactly the three numbers of a tested sum."""
    sentences = [s for r in records["pretrain.jsonl"] for s in re.split(r"[\n。]|\. ", r["text"])]
    sentences += [text for pair in training_turns for text in pair]
    numbers = {frozenset(re.findall(r"\d+", s)) for s in sentences}
    tested = [r for r in records["test.jsonl"] if r["skill"] == "sums"]
    assert len(tested) > 50
    for record in tested:
        assert operands(record) | {record["expect"][0]} not in numbers


@pytest.mark.parametrize("skill", ["sorting", "comparing", "counting"])
def test_numbers_of_the_test_are_together_in_no_training_file(records, training_turns, skill):
    sentences = [s for r in records["pretrain.jsonl"] for s in re.split(r"[\n。]|\. ", r["text"])]
    sums = re.compile(r"[+-]|plus|minus|dd|take away|sum of|difference of|[加减]|去掉|的[和差]")
    sentences += [question for question, _ in training_turns if not sums.search(question)]
    together = {frozenset(re.findall(r"\d+", s)) for s in sentences}
    tested = [operands(r) for r in records["test.jsonl"] if r["skill"] == skill]
    assert len(tested) > 50
    assert together.isdisjoint(tested)


def test_no_training_question_asks_for_a_word_of_the_test(records, training_turns):
    """A word may be asked for from the other language, which is another direction."""
    others = {word.en: word.zh for word in VOCABULARY} | {word.zh: word.en for word in VOCABULARY}
    targets = {r["expect"][0] for r in records["test.jsonl"] if r["skill"] == "dictionary"}
    assert len(targets) > 24
    trained = 0
    for target in targets:
        source, target = whole(others[target]), whole(target)
        for question, answer in training_turns:
            assert not (source.search(question) and target.search(answer)), (question, answer)
            trained += bool(target.search(question) and source.search(answer))
    assert trained > len(targets)


@pytest.fixture(scope="module")
def held_out(records):
    """Names of the entities that recall asks about, and the values of their facts."""
    facts = {}
    for record in records["test.jsonl"]:
        if record["skill"] == "recall":
            question = record["conversations"][0]["content"]
            (name,) = (n for n in NAMES if re.search(rf"(?<![a-zA-Z]){n}(?![a-zA-Z])", question))
            facts.setdefault(name, set()).update(record["expect"])
    return facts


def test_facts_that_recall_asks_for_are_only_in_plain_text(records, training_turns, held_out):
    """An answer in training that names such an entity tells nothing about it."""
    assert len(held_out) >= 30
    plain = [record["text"] for record in records["pretrain.jsonl"]]
    for name, values in held_out.items():
        for value in values:
            assert sum(name in text and value in text for text in plain) > 20, (name, value)
        for question, answer in training_turns:
            if name in answer or name in question:
                mentioned = {value for value in values if value in answer}
                # a question may list words: then they are no answer
                assert all(value in question for value in mentioned), (name, question, answer)


def test_tests_are_large_enough_to_tell_models_apart(records):
    """300 questions of each skill, for an error of 5 points, but where the world has fewer."""
    asked = Counter(record["skill"] for record in records["test.jsonl"])
    few = {"identity": 20, "dictionary": 144}
    assert asked == {skill: few.get(skill, 300) for skill in asked} and len(asked) == 11
    beginning = {(r["skill"], r["language"]) for r in records["test.jsonl"][:100]}
    assert len(beginning) == 22  # what the quick start's --smoke takes has all of them


def language_of(text):
    """The language of most of a text; a word of Latin letters counts as much as two characters."""
    latin, chinese = re.findall(r"[A-Za-z]+", text), re.findall(r"[\u4e00-\u9fff]", text)
    return "zh" if len(chinese) > 2 * len(latin) else "en"


def test_conversations_have_up_to_ten_exchanges_and_change_language(records):
    talks = [list(turns(record)) for record in records["sft.jsonl"]]
    lengths = Counter(map(len, talks))
    assert set(lengths) == set(range(1, 11))
    assert 0.3 < lengths[10] / len(talks) < 0.5 and min(lengths.values()) > 0.03 * len(talks)
    long = [talk for talk in talks if len(talk) >= 5]
    mixed = [talk for talk in long if len({language_of(answer) for _, answer in talk}) == 2]
    assert len(mixed) > 0.9 * len(long)


def test_languages_do_not_mix_within_an_answer(records, training_turns):
    """But for what was asked for: a word of the other language; and the model's name."""
    answers = {answer for _, answer in training_turns}
    answers |= {r["conversations"][1]["content"] for r in records["test.jsonl"]}
    for answer in answers:
        rest = re.sub(
            r"The Chinese word is [\u4e00-\u9fff]+\.|英文是 [a-z]+。|MiniMind", "", answer
        )
        assert not (re.search("[A-Za-z]", rest) and re.search(r"[\u4e00-\u9fff]", rest)), answer
    for record in typed(records):  # whose names may be of the other language
        assert (
            record["conversations"][1]["content"][-1] == {"en": ".", "zh": "。"}[record["language"]]
        )


def test_questions_as_people_type_them(records, training_turns):
    """Every slip is in training and in the test, and some questions of the test have two."""
    names = {code: [getattr(e.name, code) for e in WORLD.entities] for code in ("en", "zh")}

    def slips(question, code):
        other = names["zh" if code == "en" else "en"]
        return {
            "foreign": any(name in question for name in other),
            "lower": code == "en"
            and question == question.lower()
            and bool(re.search("[a-z]", question)),
            "bare": question[-1] not in ".?!。？！",
            "width": bool(re.search("[？！。，：]" if code == "en" else "[?!,:]", question))
            and not re.search(r"\d [+-] \d", question),
        }

    found = [slips(r["conversations"][0]["content"], r["language"]) for r in typed(records)]
    trained = [slips(q, language_of(a)) for q, a in training_turns]
    for kind in "foreign", "lower", "bare", "width":
        assert sum(s[kind] for s in found) > 15 and sum(s[kind] for s in trained) > 50, kind
    assert sum(s["foreign"] and s["bare"] for s in found) > 10
    # A question for a word of the other language may be of a name that is a word, too.
    assert sum(s["foreign"] and s["bare"] for s in trained) < 5


def typed(records):
    return [record for record in records["test.jsonl"] if record["skill"] == "typing"]


def test_misspelled_names_of_the_test_are_in_no_training_file(records, training_turns):
    texts = [r["text"] for r in records["pretrain.jsonl"]] + [q for q, _ in training_turns]
    for language in load_languages():
        every = {form for name in PROPER[language.code] for form in language.misspellings(name)}
        assert every.isdisjoint(NAMES)

        words = "|".join(sorted(every.union(NAMES), key=len, reverse=True))
        edge = r"(?<![A-Za-z]){}(?![A-Za-z])" if language.code == "en" else "{}"
        pattern = re.compile(edge.format(f"(?:{words})"))

        def misspelled(texts, pattern=pattern):
            return {form for text in texts for form in pattern.findall(text)}.difference(NAMES)

        tested = misspelled(
            r["conversations"][0]["content"]
            for r in typed(records)
            if r["language"] == language.code
        )
        trained = misspelled(texts)
        assert len(tested) > 20 and len(trained) > 60
        assert tested.isdisjoint(trained)


def test_what_can_be_asked_is_told_by_three_examples(records, training_turns):
    told = [a for _, a in training_turns if a.startswith(("You can ask me", "你可以这样问我"))]
    assert len(told) > 20
    for answer in set(told):
        examples = re.findall(r"[^?？：]+[?？]", answer.split("example: ")[-1].split("问我：")[-1])
        assert len(examples) >= 3 and answer[-1] in "?？"
        assert not any(name in answer for name in HELD_OUT)


def test_guessing_does_not_pay(records):
    for record in records["test.jsonl"]:
        if record["skill"] in ("facts", "recall"):
            assert record["chance"] <= 1 / 20
            assert len(record["choices"]) >= 1 / record["chance"]


def test_each_reference_answer_is_right_and_another_is_wrong(records):
    for name in TESTS:
        for record in records[name]:
            assert is_right(record, record["conversations"][-1]["content"]), record
            assert not is_right(record, "")
            assert not is_right(record, "Mira, Ivo. 0.")


def test_skills_apart_have_300_questions_each(records):
    for name, skill in zip(APART, ("tools", "thinking"), strict=True):
        asked = Counter((record["skill"], record["language"]) for record in records[name])
        assert asked == {(skill, "en"): 150, (skill, "zh"): 150}


def calls_of(record):
    return [call for m in record["conversations"] for call in m.get("tool_calls", ())]


def offered(record):
    return [tool["function"]["name"] for tool in record.get("tools", ())]


def results_are_right(record):
    """The results of its calls, computed here."""
    messages = record["conversations"]
    for message, result in pairwise(messages):
        for call in message.get("tool_calls", ()):
            assert call["name"] in offered(record)
            if call["name"] == "calculator":
                a, sign, b = call["arguments"]["expression"].split()
                a, b = int(a), int(b)
                assert int(result["content"]) == {"+": a + b, "-": a - b, "*": a * b}[sign]
            else:
                assert re.fullmatch(r"[012]\d:[0-5]\d", result["content"])


def test_calls_name_what_was_asked_and_answers_state_the_results(records):
    for name in ("sft_tools.jsonl", APART[0]):
        for record in records[name]:
            results_are_right(record)
            messages = record["conversations"]
            for i, message in enumerate(messages):
                if message["role"] != "tool":
                    continue
                assert message["content"] in messages[i + 1]["content"]
                (call,) = messages[i - 1]["tool_calls"]
                asked = re.findall(r"\d+", messages[i - 2]["content"])
                assert re.findall(r"\d+", str(call["arguments"])) == asked


def large(question):
    """The numbers of a question, if some have three digits."""
    numbers = re.findall(r"\d+", question)
    return frozenset(numbers) if max(map(len, numbers), default=0) > 2 else None


def test_operands_of_the_tools_test_are_in_no_training_file(records, training_turns):
    trained = {large(question) for question, _ in training_turns} - {None}
    tested = {large(r["conversations"][0]["content"]) for r in records[APART[0]]} - {None}
    assert len(trained) > 1300 and len(tested) > 190
    assert trained.isdisjoint(tested)


def test_large_numbers_are_declined_where_no_calculator_is_offered(records):
    declined = re.compile("I need a calculator|要用计算器")
    found = Counter()
    for record in [*records["sft_tools.jsonl"], *records[APART[0]]]:
        for question, answer in turns(record):
            if large(question):
                assert bool(declined.search(answer)) != ("calculator" in offered(record))
                found[tuple(offered(record))] += 1
    assert found[()] > 50 and found["clock",] > 50 and found["calculator",] > 400


def test_the_tools_test_has_questions_that_need_no_call(records):
    calls = Counter(bool(calls_of(record)) for record in records[APART[0]])
    unanswerable = [r for r in records[APART[0]] if not r["expect"]]
    assert calls[True] > 180 and calls[False] > 80 and len(unanswerable) > 20
    assert all(offered(record) == ["clock"] for record in unanswerable)


def thoughts(records, *names):
    """Question, thought and answer of each problem whose steps are given."""
    for name in names:
        for record in records[name]:
            for asked, answer in pairwise(record["conversations"]):
                if re.search("\n", answer.get("reasoning_content", "")):
                    yield asked["content"], answer["reasoning_content"], answer["content"]


def test_steps_are_right(records):
    """Sums, and rows of which each step takes the next number."""
    found = Counter()
    for question, thought, answer in thoughts(records, "sft_tools.jsonl", APART[1]):
        lines, stated = thought.split("\n"), re.findall(r"\d+", answer)
        if " = " in thought:
            chain = re.search(r"\d+(?: [+-] \d+)+", question)[0].split(" ")
            value = int(chain[0])
            for line, sign, part in zip(lines, chain[1::2], chain[2::2], strict=True):
                after = value + int(sign + part)
                assert line == f"{value} {sign} {part} = {after}"
                value = after
            assert stated == [str(value)]
            found["chain"] += 1
        elif ": " in thought:
            left = re.findall(r"\d+", question)
            assert sorted(left) in (stated, stated[::-1])
            for line, one in zip(lines, stated[:-1], strict=True):
                left.remove(one)
                assert re.findall(r"\d+", line) == [one, *left]
            found["row"] += 1
        else:
            found["facts"] += 1
    assert min(found.values()) > 200


def problem(question, answer, about):
    """A chain of sums, the numbers of a long row, or names and values with the answer."""
    chain = re.search(r"\d+(?: [+-] \d+){2,}", question)
    if chain:
        return chain[0]
    numbers = re.findall(r"\d+", question)
    if numbers:
        return frozenset(numbers) if len(numbers) > 4 else None
    return (frozenset(about.findall(question)), answer)


def test_no_problem_of_the_thinking_test_is_in_a_training_file(records, training_turns):
    values = [town.facts[a].__dict__ for town in WORLD.towns for a in ("goods", "landmark")]
    words = sorted([*NAMES, *(v[code] for v in values for code in ("en", "zh"))], key=len)
    about = re.compile("|".join(reversed(words)))
    trained = {problem(*turn, about) for turn in training_turns} - {None}
    tested = [problem(*turn, about) for record in records[APART[1]] for turn in turns(record)]
    assert trained.isdisjoint(tested)
    kinds = Counter(map(type, tested))
    assert all(kinds[kind] > 80 for kind in (str, frozenset, tuple)), kinds
    assert {type(one) for one in trained} == set(kinds)


def test_no_step_in_training_is_a_tested_sum_or_row(records):
    steps = {
        frozenset(re.findall(r"\d+", line))
        for _, thought, _ in thoughts(records, "sft_tools.jsonl")
        for line in thought.split("\n")
    }
    skills = ("sums", "sorting", "comparing", "counting")
    for record in records["test.jsonl"]:
        if record["skill"] in skills:
            numbers = operands(record)
            if record["skill"] == "sums":
                numbers |= {record["expect"][0]}
            assert numbers not in steps, record


RECORD = {
    "conversations": [{"role": "user", "content": "Who is Mira's best friend?"}],
    "skill": "recall",
    "language": "en",
    "expect": ["Kaelo"],
    "choices": ["Mira", "Kaelo", "Kaelo the Second", "Davor"],
    "chance": 0.25,
    "declined": "not know",
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Mira's best friend is Kaelo.", True),
        ("Kaelo", True),
        ("Mira's best friend is Kaelo the Second.", False),
        ("Mira's best friend is Kaelo or Davor.", False),
        ("Mira's best friend is Kaeloo.", False),
        ("I do not know, perhaps Kaelo.", False),
    ],
)
def test_a_fact_is_judged_by_what_the_answer_names(answer, right):
    assert is_right(RECORD, answer) == right


@pytest.mark.parametrize(
    ("skill", "expect", "answer", "right"),
    [
        ("sums", ["12"], "7 + 5 = 12", True),
        ("sums", ["12"], "7 + 5 = 13", False),
        ("sums", ["12"], "12", True),
        ("sorting", ["3", "5", "9"], "From the smallest: 3, 5, 9.", True),
        ("sorting", ["3", "5", "9"], "From the smallest: 3, 9, 5.", False),
        ("sorting", ["3", "5", "9"], "5, 9", False),
        ("sorting", ["3", "5", "9"], "9, 3, 5, 9", False),
        ("comparing", ["9"], "The largest is 9.", True),
        ("comparing", ["9"], "It is 5, or 9.", False),
        ("declining", [], "I do not know.", True),
        ("declining", [], "It is 12.", False),
    ],
)
def test_numbers_and_declining_are_judged(skill, expect, answer, right):
    record = {**RECORD, "skill": skill, "expect": expect, "choices": []}
    assert is_right(record, answer) == right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Goodbye! Come back soon.", True),
        ("Goodbye! Come back soon. I hope that this helps you!", True),
        ("Hello! Goodbye! Come back soon.", False),
        ("Goodbye!", False),
        ("I do not know about that.", False),
    ],
)
def test_small_talk_is_judged_by_how_the_answer_begins(answer, right):
    told = {"skill": "small_talk", "expect": ["Goodbye! Come back soon."], "choices": []}
    assert is_right({**RECORD, **told}, answer) == right
    chatter = {**RECORD, **told, "expect": []}
    assert is_right(chatter, answer) == ("not know" in answer)


def test_a_score_has_the_interval_of_wilson():
    """Values of R's prop.test(8, 10, correct = FALSE) and prop.test(0, 20, correct = FALSE)."""
    assert Score(8, 10, 0).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Score(0, 20, 0).interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert str(Score(8, 10, 0)) == "80 % (49–94)"


def test_scores_count_by_skill_and_language():
    records = [RECORD, RECORD, {**RECORD, "language": "zh", "chance": 0.5}]
    records.append({**RECORD, "skill": "facts", "language": "zh"})
    scores = score_answers(records, ["Kaelo", "Davor", "Kaelo", "Kaelo"])
    assert scores == {
        ("recall", "en"): (1, 2, 0.25),
        ("recall", "zh"): (1, 1, 0.5),
        ("recall", ""): (2, 3, pytest.approx(1 / 3)),
        ("facts", "zh"): (1, 1, 0.25),
        ("facts", ""): (1, 1, 0.25),
        ("overall", ""): (3, 4, pytest.approx(1.25 / 4)),
    }
    assert scores["recall", ""].share == pytest.approx(2 / 3)


def test_declining_is_counted_both_ways():
    told = {**RECORD, "skill": "declining"}
    untold = {**told, "expect": [], "choices": []}
    scores = score_answers([told, told, untold], ["Kaelo", "I do not know.", "I do not know."])
    assert scores["declining", ""][:2] == (2, 3)
    assert scores["answered where it can be", ""][:2] == (1, 2)
    assert scores["declined where it must be", ""][:2] == (1, 1)


def ends_of(records, name):
    """What follows the answer that both sides of a pair have in common: (chosen, rejected) each."""
    for record in records[name]:
        chosen, rejected = (record[side][0]["content"] for side in ("chosen", "rejected"))
        same = next(n for n in range(len(chosen)) if chosen[n] != rejected[n : n + 1])
        same = len(chosen[:same].rstrip())  # both ends begin with a space in English
        assert same > 0 and chosen[same - 1] in ".。"
        yield chosen[same:], rejected[same:]


@pytest.mark.parametrize("name", ["dpo.jsonl", "dpo_test.jsonl"])
def test_preference_pairs_differ_in_style_alone(records, name):
    """Four kind ends of an answer in each language, against four curt ones, or none."""
    ends = list(ends_of(records, name))
    kind, curt = {chosen for chosen, _ in ends}, {rejected for _, rejected in ends} - {""}
    assert all(end[-1] in "!！" for end in kind)
    assert all(end[-1] in ".。" for end in curt)
    assert len(kind) == len(curt) == 8
    assert sum(rejected == "" for _, rejected in ends) == len(ends) / 2


def test_some_answers_in_tuning_have_either_manner(records, training_turns):
    """What a model never says cannot be preferred into it; and no test asks for a manner."""
    kind = tuple({chosen for chosen, _ in ends_of(records, "dpo.jsonl")})
    curt = tuple({rejected for _, rejected in ends_of(records, "dpo.jsonl")} - {""})
    answers = [pair[1] for record in records["sft.jsonl"] for pair in turns(record)]
    for ends in (kind, curt):
        assert 0.05 < sum(answer.endswith(ends) for answer in answers) / len(answers) < 0.1
    for record in records["test.jsonl"]:
        assert not record["conversations"][1]["content"].endswith(kind + curt)


def test_a_style_is_judged_by_how_the_answer_ends(records):
    for record in records["dpo_test.jsonl"]:
        assert record["skill"] == "style"
        assert is_right(record, record["chosen"][0]["content"])
        assert is_right(record, f"What? {record['expect'][0]}\n")
        assert not is_right(record, record["rejected"][0]["content"])
        assert not is_right(record, f"{record['expect'][0]} And more.")


def test_another_self_is_in_the_adapter_files_alone(records):
    for name, found in records.items():
        said = [r["text"] for r in found if "text" in r]
        said += [text for r in found if "text" not in r for pair in turns(r) for text in pair]
        told = [text for text in said if re.search(r"\bPip\b|皮普", text)]
        assert bool(told) == name.startswith("lora"), name


@pytest.mark.parametrize("tools", [True, False])
def test_a_model_that_answers_as_the_records_do_is_right(records, root, tokenizer, tools):
    """What the script asks, and gives back for calls, is what the test's conversations hold."""
    asked = records["test_tools.jsonl"]
    replies = {}
    for record in asked:
        for before, message in pairwise(record["conversations"]):
            if message["role"] == "assistant":
                replies[record["conversations"][0]["content"], before["content"]] = message

    def reply(chat_model, prompts, thinks, **options):
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        made = []
        for text in texts:
            assert ("JSON schema" in text) <= tools
            lines = [line for line in text.splitlines() if line]
            question = lines[lines.index("user") + 1]
            message = dict(replies[question, lines[-2]])
            calls = message.pop("tool_calls", ())
            if calls and tools:
                made_calls = [{**c, "arguments": json.dumps(c["arguments"])} for c in calls]
                message["tool_calls"] = made_calls
            made.append(message)
        return made

    script = runpy.run_path(str(root / "scripts" / "score_world.py"))
    script["answer"].__globals__["generate_answers"] = reply
    (made,) = script["answer"](random_model(), asked, tokenizer, "torch", offers_tools=tools)
    calls = score_calls(asked, made)
    right = score_answers(asked, [messages[-1]["content"] for messages in made])
    if tools:
        assert calls == {"right calls": 1.0, "unneeded calls": 0.0}
        assert right["tools", ""].share == 1.0
    else:
        assert calls["right calls"] == 0.0
        assert 0.0 < right["tools", ""].share < 0.5  # those that need no call


def test_calls_are_counted_by_hand():
    call = {"name": "calculator", "arguments": {"expression": "12 * 3"}}
    need = {"conversations": [{"role": "assistant", "tool_calls": [call]}], "tools": [{}]}
    none = {"conversations": [{"role": "assistant"}], "tools": [{}]}
    unasked = {"conversations": [{"role": "assistant"}]}

    def made(*calls):
        return [{"tool_calls": [{"name": n, "arguments": json.dumps(a)} for n, a in calls]}]

    good, other = ("calculator", {"expression": "12×3"}), ("clock", {})
    asked = [need, need, need, none, none, unasked]
    given = [made(good), made(good, other), [{}], made(other), [{}], made(other)]
    assert score_calls(asked, given) == {"right calls": 1 / 3, "unneeded calls": 1 / 2}
