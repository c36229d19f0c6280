"""A process that renders chat templates, so that one that never ends or fills the memory cannot stop the program.

Chat templates come with checkpoints: they are programs of strangers. transformers' sandbox keeps them from files and the
network but not from running for ever. Started as a script, this file renders what it reads on stdin, one JSON object per
line, within `SECONDS` and `MEMORY`; `render_in_process` is the other end.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any

SECONDS = 10  # for one conversation
MEMORY = 2**30  # bytes of address space beyond what the process has at its start


def _address_space() -> int | None:
    """Returns the bytes of memory that this process has mapped; None if the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _limit_memory() -> None:
    """Limits this process to `MEMORY` more bytes than it has mapped now."""
    import resource

    used = _address_space()
    if used is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _answer(render: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """Renders a request; the answer has `text` and `spans`, or `error`."""
    signal.alarm(request["seconds"])  # its default action ends the process, inside a single long operation too
    try:
        texts, spans = render([request["messages"]], chat_template=request["template"], **request["options"])
        answer = {"text": texts[0], "spans": spans[0] if spans else []}
    except Exception as e:
        answer = {"error": str(e) if type(e).__module__.startswith("jinja2") else f"{type(e).__name__}: {e}"}
    signal.alarm(0)
    return answer


def _serve() -> None:
    """Answers the requests on stdin, one line each, on the original stdout."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not be taken for an answer
    _limit_memory()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(render_jinja_template, json.loads(line))) + "\n")
        answers.flush()


@functools.lru_cache
def _process(owner: int) -> tuple[subprocess.Popen[str], IO[str], IO[str]]:
    """Starts the rendering process of the process `owner` (a forked child has its own); returns it, its stdin and stdout."""
    command = [sys.executable, "-P", __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdin and process.stdout
    return process, process.stdin, process.stdout


def check_renderer() -> None:
    """Checks that templates can be rendered.

    Raises:
      ValueError: transformers or jinja2 is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "jinja2")):
        raise ValueError("chat templates need transformers: pip install transformers jinja2")


def render_in_process(template: str, messages: list[dict], **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """Renders one conversation by `template`, within limits of time and memory.

    Args:
      template: Jinja source.
      messages: {role, content} each.
      options: of transformers' `render_jinja_template`, and the special tokens by name.

    Returns:
      The text, and with `return_assistant_tokens_mask` the (begin, end) characters of the `{% generation %}` blocks.

    Raises:
      ValueError: the template refuses the conversation, fails, or exceeds a limit.
    """
    process, requests, answers = _process(os.getpid())
    request = {"template": template, "messages": messages, "options": options, "seconds": SECONDS}
    try:
        requests.write(json.dumps(request, default=str) + "\n")
        requests.flush()
        line = answers.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        _process.cache_clear()
        with contextlib.suppress(BrokenPipeError):  # closing writes what is left
            requests.close()
        answers.close()
        late = process.wait() == -signal.SIGALRM
        why = f"it takes longer than {SECONDS} s" if late else f"its process ended with {process.returncode}"
        raise ValueError(f"the chat template cannot be rendered: {why}; take another template")
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(f"the chat template refuses this conversation: {answer['error']}")
    return answer["text"], [(begin, end) for begin, end in answer["spans"]]


if __name__ == "__main__":
    _serve()
