"""Which part of each conversation becomes a sample: what fits, and has something to learn.

A conversation is a system message, perhaps, and turns: a user message and all that follows it up
to the next. What is kept of it is the system message and a run of its ids, from the beginning of a
turn on. Positions are counted in the ids of all the conversations that are looked at together.
"""

from typing import NamedTuple

import numpy as np

from .chat import ChatEncoder


class Turns(NamedTuple):
    """Where the turns of conversations are, as positions.

    `users` are all user messages' first ids. The others are (conversations,): `prefixes` the ids
    before the first turn; `first` and `last` the first and last answered turn, as indices of
    `users`; `answers` the first id of the last assistant message, and `ends` where it ends.
    """

    users: np.ndarray
    prefixes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    answers: np.ndarray
    ends: np.ndarray


class Kept(NamedTuple):
    """What is kept of conversations, each (conversations,) int64.

    Of each are kept the first `prefixes` ids and those from `begins` to `ends`; nothing where
    `ends` is not above `begins`. `dropped_turns` are those left out because it is too long, and
    `cut` is 1 where its last answer is cut besides.
    """

    prefixes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    dropped_turns: np.ndarray
    cut: np.ndarray


def find_turns(ids: np.ndarray, offsets: np.ndarray, encoder: ChatEncoder) -> Turns:
    """Find the turns of conversations, of which `offsets` (conversations + 1,) are the borders."""
    starts, stops = offsets[:-1], offsets[1:]
    messages = np.flatnonzero(ids == encoder.start)

    def with_role(role: str) -> np.ndarray:
        found = np.ones(len(messages), dtype=bool)
        for place, id_ in enumerate(encoder.headers[role], 1):
            found &= ids[np.minimum(messages + place, len(ids) - 1)] == id_
        return messages[found]

    users, assistants = with_role("user"), with_role("assistant")
    answers = assistants[np.searchsorted(assistants, stops) - 1]
    following = np.append(messages, len(ids))[np.searchsorted(messages, answers, side="right")]
    first = np.searchsorted(users, starts)
    return Turns(
        users=users,
        prefixes=users[first] - starts,
        first=first,
        last=np.searchsorted(users, answers) - 1,
        answers=answers,
        ends=np.minimum(following, stops),
    )


def keep_answers(
    turns: Turns, weights: np.ndarray, newline: int, max_length: int, max_turns: int | None
) -> Kept:
    """What to train on: at most `max_length` ids with a target among them.

    The last `max_turns` turns are kept. If that is too long, what follows the last target is left
    out; then the oldest turns, each whole; then the end of the last answer.

    Args:
        turns: of the conversations.
        weights: of their ids as targets.
        newline: ids after the `</s>` of a message; at the end of a sample they may be missing.
        max_length: the most ids to keep.
        max_turns: the most turns to keep, or None.
    """
    users, prefixes = turns.users, turns.prefixes
    targets = np.append(-1, np.flatnonzero(weights > 0))

    def last_target(before: np.ndarray) -> np.ndarray:
        return targets[np.searchsorted(targets, before) - 1]

    first, last = turns.first, turns.last
    if max_turns is not None:
        first = np.maximum(first, last + 1 - max_turns)
    fits = prefixes + turns.ends - newline - users[first] <= max_length
    learnt = last_target(turns.ends) + 1
    last_learnt = np.maximum(np.searchsorted(users, learnt) - 1, first)
    oldest = np.searchsorted(users, learnt + prefixes - max_length)
    oldest = np.where(fits, first, np.clip(oldest, first, last_learnt))
    begins = users[oldest]
    room = begins + max_length - prefixes
    uncut = np.where(fits, turns.ends, learnt + newline)
    ends = np.where(learnt <= room, np.minimum(uncut, room), last_target(room) + 1)
    used = last_target(ends) >= begins
    ends = np.where(used, ends, begins)
    return Kept(
        prefixes=prefixes,
        begins=begins,
        ends=ends,
        dropped_turns=np.where(fits | ~used, 0, last - first - (last_learnt - oldest)),
        cut=(used & (learnt > room)).astype(np.int64),
    )


def keep_prompts(turns: Turns, header: int, max_length: int) -> Kept:
    """What comes before the last answer: at most `max_length` ids, the oldest turns left out.

    Args:
        turns: of the conversations.
        header: ids of an assistant message before its content; they belong to the prompt.
        max_length: the most ids to keep.
    """
    ends = turns.answers + header
    oldest = np.searchsorted(turns.users, ends + turns.prefixes - max_length)
    oldest = np.clip(oldest, turns.first, turns.last)
    begins = turns.users[oldest]
    used = turns.prefixes + ends - begins <= max_length
    return Kept(
        prefixes=turns.prefixes,
        begins=begins,
        ends=np.where(used, ends, begins),
        dropped_turns=np.where(used, oldest - turns.first, 0),
        cut=np.zeros_like(begins),
    )


def keep_replies(
    turns: Turns, weights: np.ndarray, offsets: np.ndarray, max_prompt: int, max_reply: int
) -> Kept:
    """A prompt, which ends where the first target is, and the reply that begins there.

    Of a prompt that is too long the oldest turns are left out, each whole, the last one excepted;
    of a reply, the end. Nothing is kept where the last turn alone is too long.

    Args:
        turns: of the conversations, each of which has a target.
        weights: of their ids as targets.
        offsets: (conversations + 1,) their borders.
        max_prompt, max_reply: the most ids to keep of either.
    """
    targets = np.flatnonzero(weights > 0)
    first = targets[np.searchsorted(targets, offsets[:-1])]
    ends = targets[np.searchsorted(targets, offsets[1:]) - 1] + 1
    last_turn = np.searchsorted(turns.users, first) - 1
    oldest = np.searchsorted(turns.users, first + turns.prefixes - max_prompt)
    oldest = np.clip(oldest, turns.first, last_turn)
    begins = turns.users[oldest]
    used = turns.prefixes + first - begins <= max_prompt
    return Kept(
        prefixes=turns.prefixes,
        begins=begins,
        ends=np.where(used, np.minimum(ends, first + max_reply), begins),
        dropped_turns=np.where(used, oldest - turns.first, 0),
        cut=(used & (ends > first + max_reply)).astype(np.int64),
    )


def equal_answers(weights: np.ndarray) -> np.ndarray:
    """Divide each run of positive weights, which is an answer, by its length: float32."""
    learnt = weights > 0
    runs = np.cumsum(np.diff(learnt, prepend=False) & learnt)  # a number for each run
    lengths = np.bincount(runs, learnt)
    return np.where(learnt, weights / np.maximum(lengths, 1)[runs], 0).astype(np.float32)
