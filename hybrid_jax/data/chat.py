"""Conversations through the tokenizer's own chat template, with the spans that the assistant said.

The Jinja template is rendered by transformers, in its sandbox, in a process of its own (`chat_process`).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from hybrid_jax.data.chat_process import check_renderer, render_in_process
from hybrid_jax.files import read_json

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """The chat template of a model directory: `chat_template.jinja`, or the one in `tokenizer_config.json`.

    Raises:
      ValueError: the directory has none, or transformers is not installed.
    """

    def __init__(self, directory: str | pathlib.Path):
        directory = pathlib.Path(directory)
        config = directory / "tokenizer_config.json"
        self.config = read_json(config) if config.is_file() else {}
        own = directory / "chat_template.jinja"
        template = own.read_text() if own.is_file() else self.config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if not template:
            raise ValueError(
                f"{directory} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "conversations need one: take an instruct model's tokenizer files"
            )
        check_renderer()
        self.template = template
        tokens = {n: self.config.get(n) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.special = {n: t["content"] if isinstance(t, dict) else t for n, t in tokens.items() if t is not None}

    def _render(self, messages, **options):
        return render_in_process(self.template, list(messages), **options, **self.special)

    def render(self, messages: Sequence[dict], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it.

        Raises:
          ValueError: the template refuses it, fails, or takes too long or too much memory.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def spans(self, messages: Sequence[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the (begin, end) characters of the assistant's turns, their ends included.

        From `{% generation %}` marks where the template has them; else a turn begins where the prompt for it ends, and
        ends with the end-of-turn token.

        Raises:
          ValueError: the template refuses the conversation, or rewrites earlier turns so that none can be found.
        """
        if GENERATION.search(self.template):
            return self._render(messages, return_assistant_tokens_mask=True)
        text, found = self.render(messages), []
        end_token = self.special.get("eos_token") or ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError(
                    f"the chat template renders turn {i} differently in the whole conversation than as a prompt; give a "
                    "template with {% generation %} marks"
                )
            begin = len(prompt)
            said = text.find(message["content"].strip(), begin)
            after = (begin if said < 0 else said) + len(message["content"].strip())
            end = text.find(end_token, after) + len(end_token) if end_token and end_token in text[after:] else len(text)
            found.append((begin, end))
        return text, found
