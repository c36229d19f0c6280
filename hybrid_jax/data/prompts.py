"""Files of prompts to answer: JSON lines, each with `prompt` (a text) or `messages` (a conversation that the user has ended)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.documents import document
from hybrid_jax.data.text import check_text, decode

KINDS = ("prompt", "messages")
KNOWN = (*KINDS, "id")
SHAPING = ("system", "input", "tools", "functions")  # what changes a conversation, as `documents.document` reads it


class Prompt(NamedTuple):
    """A prompt of a file.

    Args:
      line: its number in the file, from 1.
      text: as the model reads it: rendered by the chat template, or the text to continue.
      messages: of a conversation; empty for a text to continue.
      named: {"id": ...} if the line has one.
    """

    line: int
    text: str
    messages: tuple[dict[str, Any], ...] = ()
    named: dict[str, Any] = {}

    def answered(self, answer: str) -> dict[str, Any]:
        """Returns the record of an answer, as `prepare` reads it."""
        if self.messages:
            return {**self.named, "messages": [*self.messages, {"role": "assistant", "content": answer}]}
        return {**self.named, "prompt": self.text, "completion": answer}


def read_prompts(
    path: str | pathlib.Path, template: Callable[[], ChatTemplate], *, chat: bool = False, system: str | None = None
) -> tuple[list[Prompt], dict[str, int]]:
    """Reads a file of prompts.

    Args:
      path: empty lines in it are skipped.
      template: makes the model's chat template; called if there is a conversation.
      chat: a `prompt` is a user's message, else a text to continue.
      system: with `chat`, the message before each `prompt`.

    Returns:
      The prompts, and the fields of lines that are not read, with the number of lines that have them.

    Raises:
      ValueError: a line is no prompt, or an empty one, or the template refuses it; the message has the line's number. Or there is
        no prompt at all.
    """
    found: list[Prompt] = []
    unread: dict[str, int] = {}
    renderer: ChatTemplate | None = None
    for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            messages = _messages(record, chat, system)
            if messages:
                renderer = renderer or template()
            text = record["prompt"] if renderer is None or not messages else _rendered(renderer, messages)
            prompt = Prompt(number, text, messages, {"id": record["id"]} if "id" in record else {})
            check_text(json.dumps(prompt.answered(""), ensure_ascii=False))  # all that is written with the answer
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}, line {number}: {e}") from None
        found.append(prompt)
        for name in record.keys() - {*KNOWN, *SHAPING}:
            unread[name] = unread.get(name, 0) + 1
    if not found:
        raise ValueError(f"{path} has no prompts; expected JSON lines with 'prompt' or 'messages'")
    return found, unread


def _rendered(template: ChatTemplate, messages: tuple[dict[str, Any], ...]) -> str:
    """Returns the text that an answer follows, as it is learned: with a fixed date, so that every day makes the same answers."""
    return template.render(messages, add_generation_prompt=True, fixed_date=True)


def _record(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line that has one kind of prompt."""
    text, _ = decode(line)
    try:
        record = json.loads(text)
    except ValueError as e:
        raise ValueError(f"not JSON ({e})") from None
    if not isinstance(record, dict) or sum(kind in record for kind in KINDS) != 1:
        raise ValueError(f"expected a JSON object with one of 'prompt' (a text) and 'messages', got {text.strip():.80}")
    return record


def _messages(record: dict[str, Any], chat: bool, system: str | None) -> tuple[dict[str, Any], ...]:
    """Returns the conversation that ends with the user's message; empty: the prompt is a text to continue.

    Raises:
      ValueError: it is empty, does not end with the user, or has what a text to continue cannot have.
    """
    shaping = {name: record[name] for name in SHAPING if record.get(name)}
    if "messages" in record:
        if not isinstance(record["messages"], list) or not record["messages"]:
            raise ValueError(f"'messages' must be a list of at least one message, got {record['messages']!r:.80}")
        if system is not None:
            raise ValueError("--system is for lines with 'prompt'; this one has 'messages': put the system message there")
        messages = document("", {"messages": record["messages"], **shaping}).messages
        if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise ValueError(f"the last of the messages must be the user's and not empty, got {messages[-1]!r:.80}")
        return messages
    if not isinstance(record["prompt"], str) or not record["prompt"].strip():
        raise ValueError(f"'prompt' must be a text that is not empty, got {record['prompt']!r:.80}")
    if not chat:
        if shaping:
            raise ValueError(f"{next(iter(shaping))!r} is for conversations, and a prompt is a text to continue; give --chat too")
        return ()
    before = {"system": system} if system is not None else {}
    return document("", {"prompt": record["prompt"], "completion": "", **before, **shaping}).messages[:-1]
