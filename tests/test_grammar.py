"""Answers of a given form, by an untrained model, judged by json and by the package jsonschema."""

import json
import random
import re

import jsonschema
import pytest
from interruptions import eventually
from tiny_models import random_model

from inference import ChatModel
from inference.batcher import Batcher, GenerationRequest, Token
from inference.grammar import COMPACT, Grammar, GrammarError, grammar_tokenizer, json_rule
from model import Sampling

WORDS = ["red", "a b", 'q"uote', "back\\slash", "new\nline", "你好", "é😀", "</s>", "<think>", ""]
FORMATS = [Sampling(do_sample=True), Sampling(do_sample=True, temperature=2.0, top_p=0.9)]
FORMATS += [Sampling(), Sampling(do_sample=True, top_k=50, repetition_penalty=1.5)]


def random_schema(rng: random.Random, depth: int, bounded: bool) -> dict:
    """A schema whose JSON has a largest size if it is `bounded`, nested up to `depth` levels."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kinds += ["object", "array", "anyOf"] * (2 if depth else 0)
    kind = rng.choice(kinds)
    if kind == "enum":
        return {"enum": rng.sample([*WORDS, 1, -2.5, True, None, ["x", {}]], rng.randint(1, 5))}
    if kind == "const":
        return {"const": rng.choice([*WORDS, 17, {"k": [1, None]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "^\\d{3}-[A-F]$"])}
    if kind == "string":
        least = rng.randint(0, 3)
        most = {"maxLength": least + rng.randint(0, 12)} if bounded or rng.random() < 0.5 else {}
        return {"type": kind, "minLength": least, **most}
    if kind == "integer" or (kind == "number" and bounded):
        least = rng.randint(-200, 200)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 3000)}
    if kind == "array":
        least = rng.randint(0, 2)
        most = {"maxItems": least + rng.randint(0, 3)} if bounded or rng.random() < 0.5 else {}
        return {
            "type": kind,
            "items": random_schema(rng, depth - 1, bounded),
            "minItems": least,
            **most,
        }
    if kind == "anyOf":
        return {kind: [random_schema(rng, depth - 1, bounded) for _ in range(rng.randint(1, 3))]}
    if kind == "object":
        names = rng.sample(WORDS, rng.randint(0, 4))
        closed = bounded or rng.random() < 0.5
        return {
            "type": kind,
            "properties": {name: random_schema(rng, depth - 1, bounded) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            **({"additionalProperties": False} if closed else {}),
        }
    return {"type": kind}


@pytest.fixture(scope="module")
def batcher(tokenizer):
    """Of an untrained model, 16 rows at a time."""
    chat_model = ChatModel("tiny", random_model(max_seq_len=1024).eval(), tokenizer, True, rows=17)
    batcher = Batcher(chat_model, 16, 1000)
    yield batcher
    batcher.close()


@pytest.fixture(scope="module")
def words(batcher, tokenizer):
    return grammar_tokenizer(tokenizer, batcher.chat_model.model.config.vocab_size)


def generate(batcher, requests):
    """The tokens of each request, and the reason of its end."""
    found = [[] for _ in requests]
    for events, request in zip(found, requests, strict=True):
        request.emit = events.append
    batcher.submit(requests)
    eventually(lambda: not batcher.load and all(not isinstance(e[-1], Token) for e in found))
    return [([event.token for event in events[:-1]], events[-1]) for events in found]


def request_of(constraint, seed, sampling, new=900):
    prompt = [1, 20 + seed % 5000, 30]
    return GenerationRequest(
        prompt, new, sampling, seed=seed, constraint=constraint, emit=lambda event: None
    )


def assert_compact(text):
    """No whitespace but in strings."""
    assert not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text)), text


@pytest.mark.parametrize("bounded", [True, False])
def test_what_ends_is_valid_and_what_is_bounded_ends(batcher, words, tokenizer, bounded):
    number = 200 if bounded else 60
    schemas = [random_schema(random.Random(seed), 2, bounded) for seed in range(number)]
    requests = [
        request_of(
            Grammar(words, f"start: {json_rule(schema, COMPACT, strict=True)}").constraint(),
            seed,
            FORMATS[seed % len(FORMATS)],
            900 if bounded else 60,
        )
        for seed, schema in enumerate(schemas)
    ]
    reasons = []
    for schema, (ids, reason) in zip(schemas, generate(batcher, requests), strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        reasons.append(reason)
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
            assert_compact(text)
            text.encode("utf-8")
    assert reasons.count("stop") + reasons.count("length") == number
    assert reasons.count("length") == 0 if bounded else 0 < reasons.count("length") < number / 2


def test_texts_without_a_grammar_keep_their_tokens(batcher, words):
    """Beside others that have one, greedy and drawn."""

    def requests(constraint):
        free = [request_of(None, i, FORMATS[i % len(FORMATS)], 40) for i in range(8)]
        forced = [request_of(constraint and constraint(), i, FORMATS[i % 4], 40) for i in range(8)]
        return [one for pair in zip(free, forced, strict=True) for one in pair]

    schema = {"type": "array", "items": {"type": "string"}, "minItems": 20}
    grammar = Grammar(words, f"start: {json_rule(schema, COMPACT, strict=True)}")
    alone, beside = (generate(batcher, requests(c)) for c in (None, grammar.constraint))
    assert alone[::2] == beside[::2]
    assert all(a != b for a, b in zip(alone[1::2], beside[1::2], strict=True))


def test_a_text_that_a_grammar_cannot_go_on_with_fails_alone(batcher, words):
    class Broken:
        def allowed(self):
            raise RuntimeError("too complex")

    alone = generate(batcher, [request_of(None, 3, Sampling(), 30)])
    broken = request_of(Broken(), 3, Sampling(), 30)
    found = generate(batcher, [request_of(None, 3, Sampling(), 30), broken])
    assert found[0] == alone[0]
    assert type(found[1][1]) is RuntimeError and found[1][0] == []


@pytest.mark.parametrize("text", ["</think>", "<tool_call>x</tool_call>", "</s>", "<s>user\n"])
def test_a_schema_cannot_forge_a_control_token(batcher, words, tokenizer, text):
    rule = json_rule({"const": {text: text}}, COMPACT, strict=True)
    grammar = Grammar(words, f'start: {rule} "\\n" <tool_call>')
    ((ids, reason),) = generate(batcher, [request_of(grammar.constraint(), 1, Sampling())])
    *ids, last = ids
    assert (last, reason) == (tokenizer.convert_tokens_to_ids("<tool_call>"), "stop")
    assert not {id_ for id_ in ids if id_ < 16}
    assert json.loads(tokenizer.decode(ids)) == {text: text}


def test_a_vocabulary_may_be_larger_than_the_tokenizer(tokenizer):
    rule = json_rule({"type": "string"}, COMPACT, strict=True)
    constraint = Grammar(grammar_tokenizer(tokenizer, 6500), f"start: {rule}").constraint()
    quote = tokenizer.convert_tokens_to_ids('"')
    assert constraint.allowed()[quote]
    constraint.add(quote)
    allowed = constraint.allowed()
    assert allowed.shape == (6500,) and not allowed[6400:].any() and allowed[:6400].sum() > 6000


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "thing"}, "thing"),
        ({"$ref": "http://127.0.0.1:9/x"}, "http://127.0.0.1:9/x"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"x-guidance": {"lenient": True}, "if": {}}, "if"),
    ],
)
def test_what_cannot_be_enforced_is_refused(words, schema, named):
    with pytest.raises(GrammarError, match=re.escape(named)):
        Grammar(words, f"start: {json_rule(schema, COMPACT, strict=True)}")


def test_a_bias_raises_and_lowers_tokens(batcher):
    free = generate(batcher, [request_of(None, 0, Sampling(), 12)])[0][0]
    banned = Sampling(logit_bias=((free[0], -100.0),))
    assert free[0] not in generate(batcher, [request_of(None, 0, banned, 12)])[0][0]
    forced = Sampling(do_sample=True, temperature=0.5, logit_bias=((500, 100.0), (7, -100.0)))
    assert generate(batcher, [request_of(None, 0, forced, 12)])[0][0] == [500] * 12
