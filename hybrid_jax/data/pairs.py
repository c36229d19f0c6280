"""Records of preference pairs: a prompt, an answer that was chosen, and one that was rejected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIDES = ("chosen", "rejected")
Messages = tuple[dict[str, Any], ...]


def is_pair(record: dict) -> bool:
    """Returns whether a record has both answers."""
    return all(record.get(side) is not None for side in SIDES)


def pair_of(record: dict, message: Callable[[Any], dict[str, Any]]) -> tuple[Messages, Messages]:
    """Returns the two conversations of a pair, which differ in their last message alone, an assistant's.

    Args:
      record: has `chosen` and `rejected`: a text or one message each, which answers `prompt` (a text or messages) or `messages`; or
        complete conversations.
      message: makes {role, content} of a turn, or raises ValueError.

    Raises:
      ValueError: there is no prompt, the prompts differ, an answer is not the assistant's, or both answers are the same.
    """
    chosen, rejected = (_side(record, side, message) for side in SIDES)
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] == "assistant":
            raise ValueError(f"{side!r} of a pair must be one answer of the assistant to a prompt: give 'prompt' or 'messages'")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the conversations of a pair must have the same messages up to their last one, the answer")
    if chosen == rejected:
        raise ValueError("the two answers of a pair are the same, so there is nothing to prefer; leave the record out")
    return chosen, rejected


def _side(record: dict, side: str, message: Callable[[Any], dict[str, Any]]) -> Messages:
    said = record[side]
    if isinstance(said, str):
        return *_prompt(record, message), message({"role": "assistant", "content": said})
    if not isinstance(said, (list, tuple)):
        raise ValueError(f"{side!r} of a pair must be a text or messages, got {said!r:.80}")
    turns = tuple(message(turn) for turn in said)
    return (*_prompt(record, message), *turns) if len(turns) == 1 else turns


def _prompt(record: dict, message: Callable[[Any], dict[str, Any]]) -> Messages:
    asked = record.get("prompt") or record.get("messages") or ()
    return (message({"role": "user", "content": asked}),) if isinstance(asked, str) else tuple(message(turn) for turn in asked)
