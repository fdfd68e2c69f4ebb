"""Which turns of a conversation fit: the one rule, for training, chat and server.

A turn is a user message and all that follows it up to the next. Where a conversation is too long,
its system message stays, and the oldest turns are left out, each whole. Positions are counted in
the ids of all conversations looked at together.
"""

from typing import NamedTuple

import numpy as np

from .token_store import ROLES, Encoded

USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


class Turns(NamedTuple):
    """Where the turns of conversations are: `users` (turns,), all others (conversations,)."""

    users: np.ndarray  # positions of the first id of each user message
    prefixes: np.ndarray  # numbers of ids before the first turn
    first: np.ndarray  # the first turn, as an index of `users`
    last: np.ndarray  # the last turn that is answered, as an index of `users`
    answers: np.ndarray  # positions of the first id of the last assistant message
    ends: np.ndarray  # ends of that message

    def oldest_that_fits(
        self, ends: np.ndarray, max_length: int, first: np.ndarray, last: np.ndarray
    ) -> np.ndarray:
        """The oldest turn, `first` to `last`, from which on prefix and turns up to `ends` fit.

        It is `last` where not even that does.
        """
        oldest = np.searchsorted(self.users, ends + self.prefixes - max_length)
        return np.clip(oldest, first, last)


class Spans(NamedTuple):
    """The ids taken of each conversation: its first `prefixes`, and those from `begins` to `ends`.

    All are (conversations,) int64. Nothing is taken where `ends` is not above `begins`.
    """

    prefixes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    dropped_turns: np.ndarray  # that are left out because the conversation is too long
    cut: np.ndarray  # 1 where the end of the last answer is cut off


def find_turns(chats: Encoded) -> Turns:
    """Find the turns of conversations, each of which has a user and an assistant message."""
    users, assistants = (chats.messages[chats.roles == role] for role in (USER, ASSISTANT))
    starts, stops = chats.offsets[:-1], chats.offsets[1:]
    answers = assistants[np.searchsorted(assistants, stops) - 1]
    following = np.searchsorted(chats.messages, answers, side="right")
    first = np.searchsorted(users, starts)
    return Turns(
        users=users,
        prefixes=users[first] - starts,
        first=first,
        last=np.searchsorted(users, answers) - 1,
        answers=answers,
        ends=np.append(chats.messages, len(chats.ids))[following],
    )


def fit_prompt(prompt: Encoded, max_length: int) -> np.ndarray:
    """The ids of a chat's prompt without its oldest turns where it is longer than `max_length`.

    `prompt` ends with the header of an assistant message. The last turn stays, however long it is.
    """
    if USER not in prompt.roles:
        return prompt.ids
    turns = find_turns(prompt)
    oldest = turns.oldest_that_fits(prompt.offsets[1:], max_length, turns.first, turns.last)
    return np.concatenate([prompt.ids[: turns.prefixes[0]], prompt.ids[turns.users[oldest[0]] :]])


def keep_answers(
    turns: Turns, weights: np.ndarray, newline: int, max_length: int, max_turns: int | None
) -> Spans:
    """What to train on: at most `max_length` ids with a target among them.

    The last `max_turns` turns are taken. If that is too long, what follows the last target is left
    out; then the oldest turns; then the end of the last answer. At the end of a sample the
    `newline` ids after the `</s>` of a message may be missing. `weights`: of each id as a target.
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
    oldest = turns.oldest_that_fits(learnt, max_length, first, last_learnt)
    oldest = np.where(fits, first, oldest)
    begins = users[oldest]
    room = begins + max_length - prefixes
    uncut = np.where(fits, turns.ends, learnt + newline)
    ends = np.where(learnt <= room, np.minimum(uncut, room), last_target(room) + 1)
    used = last_target(ends) >= begins
    return Spans(
        prefixes=prefixes,
        begins=begins,
        ends=np.where(used, ends, begins),
        dropped_turns=np.where(fits | ~used, 0, last - first - (last_learnt - oldest)),
        cut=(used & (learnt > room)).astype(np.int64),
    )


def keep_prompts(
    turns: Turns, prompt_ends: np.ndarray, ends: np.ndarray, max_prompt: int, max_reply: int
) -> Spans:
    """A prompt without the oldest turns that do not fit, and the beginning of the reply after it.

    Replies reach from `prompt_ends` to `ends`. Nothing is taken where the last turn of a prompt
    alone is longer than `max_prompt` ids.
    """
    last = np.searchsorted(turns.users, prompt_ends) - 1
    oldest = turns.oldest_that_fits(prompt_ends, max_prompt, turns.first, last)
    begins = turns.users[oldest]
    used = turns.prefixes + prompt_ends - begins <= max_prompt
    return Spans(
        prefixes=turns.prefixes,
        begins=begins,
        ends=np.where(used, np.minimum(ends, prompt_ends + max_reply), begins),
        dropped_turns=np.where(used, oldest - turns.first, 0),
        cut=(used & (ends > prompt_ends + max_reply)).astype(np.int64),
    )


def equal_answers(weights: np.ndarray) -> np.ndarray:
    """Divide each run of positive weights, which is an answer, by its length: float32."""
    learnt = weights > 0
    runs = np.cumsum(np.diff(learnt, prepend=False) & learnt)  # a number for each run
    lengths = np.bincount(runs, learnt)
    return np.where(learnt, weights / np.maximum(lengths, 1)[runs], 0).astype(np.float32)
