"""Answers of a given form: JSON by a schema, or calls of given tools. Masks by llguidance.

An answer is one text for the grammar: an optional thought, then JSON or calls, where control tokens
are the tokenizer's own and no characters of a text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from model import Tokenizer

from .text import token_bytes

COMPACT = (",", ":")  # of JSON answers: no free whitespace, so that a bounded one always ends
SPACED = (", ", ": ")  # of calls, as the chat format renders them
TEXT = r"TEXT: /(.|\n)*/"


class GrammarError(ValueError):
    """A schema that is not valid, or that asks for what cannot be enforced."""


class GrammarConstraint:
    """The place of one text in a grammar: a `model.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def allowed(self) -> Tensor:
        """Which tokens may come next: (vocab_size,) bool. Raises RuntimeError beyond limits."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        bits = self._mask.view(np.uint8)[0]
        bits = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))

    def add(self, token: int) -> None:
        """Go on to the next place of the text."""
        self._matcher.consume_token(token)


class Grammar:
    """A grammar in llguidance's variant of Lark, for a tokenizer; compiling takes milliseconds.

    Raises GrammarError.
    """

    def __init__(self, tokenizer: LLTokenizer, lark: str):
        self._vocab_size = tokenizer.vocab_size
        grammar = LLMatcher.grammar_from_lark(f"{lark}\n{TEXT}")
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().partition("\n")[0])

    def constraint(self) -> GrammarConstraint:
        """A new text's constraint."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)


class _Vocabulary:
    """A tokenizer in the form that `TokenizerWrapper` reads.

    `llguidance.hf` would encode a literal of a schema that spells a control token as that token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self.special_token_ids = [id_ for id_, token in added if token.special]
        self.tokens = [token_bytes(tokenizer, id_) for id_ in range(len(tokenizer))]
        self.tokens += [b""] * (vocab_size - len(tokenizer))  # which no grammar allows
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """A tokenizer as grammars need it, which takes a part of a second to make."""
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))


def json_rule(schema: Mapping[str, Any], separators: tuple[str, str], strict: bool) -> str:
    """The grammar's expression for JSON of a schema, whose properties come in its order.

    If it is `strict`, keywords that cannot be enforced raise GrammarError when the grammar is made;
    else they are left out.
    """
    item, key = separators
    options = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    options |= {"lenient": not strict, "coerce_one_of": not strict}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def calls_rule(functions: Sequence[Mapping[str, Any]], several: bool) -> str:
    """The grammar's expression for a call of one of these functions, or `several`.

    A function has a `name`, and maybe `parameters`, a JSON schema, and whether it is `strict`.
    """
    calls = []
    for function in functions:
        schema = function.get("parameters") or {"additionalProperties": False}
        arguments = json_rule({**schema, "type": "object"}, SPACED, bool(function.get("strict")))
        begin = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
        calls.append(f'{begin} {arguments} "}}"')
    call = f'<tool_call> "\\n" ({" | ".join(calls)}) "\\n" </tool_call>'
    return f'{call} ("\\n" {call})*' if several else call


def answer_grammar(tokenizer: LLTokenizer, answer: str, thought: str) -> Grammar:
    """The grammar of an answer, given as an expression, after its thought.

    `thought` says what the prompt ends with: "open", within one; "closed", after one; "none": the
    model may begin one. Raises GrammarError.
    """
    end = 'TEXT </think> "\\n"'
    before = {"open": end, "closed": "", "none": f'(<think> "\\n" {end})?'}[thought]
    return Grammar(tokenizer, f"start: {before} ({answer})")
