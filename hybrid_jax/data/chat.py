"""Conversations rendered by the tokenizer's chat template, with the spans of the assistant's turns.

The Jinja template is rendered by transformers, in its sandbox, in a process of its own (`chat_process`).
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

from hybrid_jax.data.answers import Answers, Finder, absent
from hybrid_jax.data.chat_process import check_renderer, render_in_process
from hybrid_jax.files import read_json
from hybrid_jax.parallel.distributed import notice

# A template that writes today's date writes this one in training conversations, so that they have the same tokens every day. It
# is the default of Llama 3's templates.
DATE = datetime.datetime(2024, 7, 26)
_PARTS = "".join(f"|replace('%{part}', '{DATE.strftime('%' + part)}')" for part in "aAbBdjmyYHIMSp")
FIXED_DATE = "{%- macro strftime_now(format) -%}{{ format" + _PARTS + " }}{%- endmacro -%}"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_template(directory: pathlib.Path) -> tuple[str | None, dict[str, str]]:
    """Reads a model directory's chat template, and the special tokens that it may name."""
    path, own = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    template = own.read_text() if own.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    older = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.is_file():  # as in transformers, it goes before the config then
        config = {**config, **read_json(older)}
    tokens = {n: config.get(n) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return template, {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t is not None}


def template_fingerprint(directory: str | pathlib.Path) -> str:
    """Returns a hash of the chat template and the special tokens that it may name; empty if there is no template."""
    template, special = read_template(pathlib.Path(directory))
    return hashlib.sha256(json.dumps([template, special], sort_keys=True).encode()).hexdigest() if template else ""


class ChatTemplate:
    """The chat template of a model directory: `chat_template.jinja`, or the one in `tokenizer_config.json`.

    Args:
      directory: a model directory with its tokenizer.

    Raises:
      ValueError: the directory has none, or transformers is not installed.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = directory = pathlib.Path(directory)
        template, self.special = read_template(directory)
        if not template:
            raise ValueError(
                f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "conversations need one: take an instruct model's tokenizer files"
            )
        check_renderer()
        self.template = template

    def _learned(self, messages: Sequence[dict], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """Renders a training conversation."""
        return self._render(messages, self._with_fixed_date, **options)

    @functools.cached_property
    def _with_fixed_date(self) -> str:
        """The template with `DATE` in place of today's date."""
        if "strftime_now" not in self.template:
            return self.template
        notice(f"the chat template of {self.directory} writes today's date; conversations to learn from have {DATE:%d %b %Y}")
        return FIXED_DATE + self.template

    def _render(self, messages: Sequence[dict], template: str, **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """Renders messages by `template`."""
        return render_in_process(template, list(messages), **options, **self.special)

    def render(
        self,
        messages: Sequence[dict],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        fixed_date: bool = False,
    ) -> str:
        """Renders a conversation as the model reads it.

        Args:
          messages: {role, content} each.
          add_generation_prompt: end with what begins an answer.
          continue_final_message: end within the last message, so that the model continues it.
          fixed_date: write `DATE` in place of today's date, as in conversations to learn from.

        Raises:
          ValueError: the template refuses it, fails, or takes too long or too much memory.
        """
        template = self._with_fixed_date if fixed_date else self.template
        options = dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
        return self._render(messages, template, **options)[0]

    @functools.cached_property
    def _find(self) -> Finder:
        file = self.directory / "tokenizer.json"
        added = read_json(file).get("added_tokens", []) if file.is_file() else []
        names = {*(token["content"] for token in added), *self.special.values()}
        return Finder(lambda messages, **options: self._learned(messages, **options)[0], names)

    def answers(self, messages: Sequence[dict]) -> Answers:
        """Renders a conversation and finds the assistant's turns in it.

        If the template has `{% generation %}` marks, they say where the turns are; else `data.answers` finds them.

        Raises:
          ValueError: the template refuses the conversation, or no answer can be found in what it renders.
        """
        if not GENERATION.search(self.template):
            return self._find(messages)
        text, found = self._learned(messages, return_assistant_tokens_mask=True)
        if not found and any(message["role"] == "assistant" for message in messages):
            raise ValueError("the chat template has {% generation %} marks, but marks none of this conversation's answers")
        return Answers(text, found, absent=absent(messages, text))
