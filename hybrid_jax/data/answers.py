"""Finds where the assistant's turns are in a rendered conversation, with proof, so that no other turn can be learned.

A chat template is a program, so a turn cannot be found by looking for its text: a user may have said the same, and a
template may trim, wrap or shorten what it is given. A turn is found by rendering parts of the conversation and comparing:

- It begins where the prompt for it ends (the messages before it, with the generation prompt).
- It ends with the end of turn in the rendering that stops after it. Nobody has spoken after it there, so if the complete
  rendering begins in the same way, the turn holds nothing of a later message.
- Templates that render a turn differently once others follow (Qwen3 removes earlier thoughts) fail that test. Then every
  other message is replaced by a placeholder: what stays the same after the beginning of the turn is the turn's own text.

A turn for which neither holds is left out of the loss and counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

PLACEHOLDERS = ("\u2021one", "\u2022two")  # they begin with characters that differ from each other
Render = Callable[..., str]
"""(messages, add_generation_prompt=False) -> text; raises ValueError if the template refuses the messages."""


class Answers(NamedTuple):
    """A rendered conversation and where the assistant's turns are in it.

    Args:
      text: the conversation as the model reads it.
      spans: (begin, end) characters of the assistant's turns in it, each with its end-of-turn token.
      rewritten: how many of these turns the complete rendering shows differently than the conversation up to them.
      left_out: how many of the assistant's turns are not in `spans`, because their place could not be proven.
      absent: how many messages of others have a content that is not in the text, as a template may change or ignore it.
    """

    text: str
    spans: list[tuple[int, int]]
    rewritten: int = 0
    left_out: int = 0
    absent: int = 0


def shared_prefix(*texts: str) -> int:
    """Returns how many characters the texts have in common at their beginning."""
    return len(os.path.commonprefix(texts))


def absent(messages: Sequence[dict], text: str) -> int:
    """Returns how many messages that are not the assistant's have a content that is not in the text."""
    return sum(m["role"] != "assistant" and m["content"].strip() not in text for m in messages)


def with_placeholders(messages: Sequence[dict], which: Iterable[int], number: int = 0) -> list[dict]:
    """Returns the messages with the contents of `which` replaced by a text that begins with another character.

    Args:
      messages: the conversation.
      which: indices of the messages to change.
      number: which of `PLACEHOLDERS` is tried first.
    """
    replaced = list(messages)
    for j in which:
        own = str(messages[j].get("content") or "").lstrip()
        text = next(p for p in PLACEHOLDERS[number:] + PLACEHOLDERS[:number] if p[0] != own[:1])
        replaced[j] = {**messages[j], "content": text}
    return replaced


class Finder:
    """Finds the assistant's turns in conversations.

    Args:
      render: see `Render`.
      added_tokens: the tokenizer's added tokens, one of which ends a turn in most templates.
    """

    def __init__(self, render: Render, added_tokens: Iterable[str]):
        self.render = render
        named = sorted(filter(None, added_tokens), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, named)) or "(?!)")
        self.end_of_turn = self._end_of_turn()

    def _try(self, messages: Sequence[dict], **options: bool) -> str | None:
        """Renders messages; None if the template refuses them."""
        try:
            return self.render(messages, **options)
        except ValueError:
            return None

    def _end_of_turn(self) -> str:
        """Returns what the template writes after every answer, up to its last added token; empty: unknown."""
        said, talk = PLACEHOLDERS[0], [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACEHOLDERS[0]}]
        last, before_another = self._try(talk), self._try([*talk, {"role": "user", "content": "b"}])
        if not last or not before_another or said not in last or said not in before_another:
            return ""
        tails = [text.partition(said)[2] for text in (last, before_another)]
        after = tails[0][: self._outside(tails[0], shared_prefix(*tails))]
        return after[: self._last_added(after)]

    def _last_added(self, text: str) -> int:
        """Returns where the last added token in a text ends; the text's length if it has none."""
        return max((match.end() for match in self.added.finditer(text)), default=len(text))

    def _outside(self, text: str, at: int) -> int:
        """Returns `at`, or where the added token begins if `at` is inside of one."""
        return next((match.start() for match in self.added.finditer(text) if match.start() < at < match.end()), at)

    def __call__(self, messages: Sequence[dict]) -> Answers:
        """Renders a conversation and finds the answers in it.

        Raises:
          ValueError: the template refuses the conversation, or the place of none of its answers can be proven.
        """
        text, rewritten, left_out = self.render(messages), 0, 0
        spans: list[tuple[int, int]] = []
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in turns:
            if (span := self._plain(messages, i, text)) is not None:
                spans.append(span)
            elif (span := self._rewritten(messages, i, text)) is not None:
                spans.append(span)
                rewritten += 1
            else:
                left_out += 1
        if turns and not spans:
            raise ValueError(
                "the chat template renders every answer differently in the complete conversation than by itself, so what the "
                "assistant said cannot be found; give a template with {% generation %} marks around it"
            )
        return Answers(text, spans, rewritten, left_out, absent(messages, text))

    def _plain(self, messages: Sequence[dict], i: int, text: str) -> tuple[int, int] | None:
        """Returns the span of turn i if it is rendered in the same way whatever follows."""
        begin, alone = self._after_prompt(messages, i, text), self._try(messages[: i + 1])
        if begin is None or alone is None or alone[:begin] != text[:begin]:
            return None
        said = alone[begin:]
        at = said.rfind(self.end_of_turn) if self.end_of_turn else -1
        end = begin + (at + len(self.end_of_turn) if at >= 0 else self._last_added(said))
        if not text.startswith(alone[:end]):
            return None
        others = [m["content"].strip() for m in messages if m["role"] != "assistant"]
        if any(other and other in text[begin:end] for other in others):  # by chance, or the template moved it here
            own = self._own_text(messages, i, text)
            return (begin, end) if own is not None and own[0] == begin and own[1] >= end else None
        return begin, end

    def _rewritten(self, messages: Sequence[dict], i: int, text: str) -> tuple[int, int] | None:
        """Returns the span of turn i if it is rendered differently because of what follows."""
        own = self._own_text(messages, i, text)
        if own is None or not self.end_of_turn:
            return None
        at = text.rfind(self.end_of_turn, *own)
        return (own[0], at + len(self.end_of_turn)) if at >= 0 else None

    def _own_text(self, messages: Sequence[dict], i: int, text: str) -> tuple[int, int] | None:
        """Returns the span that begins with turn i and holds the characters that no other message changes."""
        others = with_placeholders(messages, (j for j in range(len(messages)) if j != i))
        changed = self._try(others)
        if changed is None:
            return None
        for find in (self._after_prompt, self._content):
            begin, same = find(messages, i, text), find(others, i, changed)
            if begin is not None and same is not None:
                return begin, begin + shared_prefix(text[begin:], changed[same:])
        return None

    def _after_prompt(self, messages: Sequence[dict], i: int, text: str) -> int | None:
        """Returns where turn i begins if the text begins with the prompt for it."""
        prompt = self._try(messages[:i], add_generation_prompt=True)
        if prompt is None:
            return None
        if text.startswith(prompt):
            return len(prompt)
        # A prompt may open a block of thoughts that the finished turn does not have.
        before, shared = self._try(messages[:i]), shared_prefix(text, prompt)
        if not before or len(before) > shared or not prompt.startswith(before):
            return None
        return self._outside(text, shared)

    def _content(self, messages: Sequence[dict], i: int, text: str) -> int | None:
        """Returns where the content of message i begins in the complete rendering."""
        bare = [*messages[:i], {"role": messages[i]["role"], "content": ""}, *messages[i + 1 :]]
        one, two = (self._try(with_placeholders(bare, [i], n)) for n in (0, 1))
        if one is None or two is None:
            return None
        begin = shared_prefix(one, two)
        return begin if one[:begin] == text[:begin] else None
