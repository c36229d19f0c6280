"""Chat templates that fail, never end or fill the memory end in one stated error, and the next conversation is rendered."""

import pytest

from hybrid_jax.data import chat_process
from hybrid_jax.data.chat import ChatTemplate

pytest.importorskip("transformers")
CHAT = [{"role": "user", "content": "hi"}]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{% endfor %}"


def render(directory, template):
    (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    return ChatTemplate(directory).render(CHAT)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{% for %}", "refuses"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
    ],
)
def test_a_template_that_fails_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        render(tmp_path, template)


def test_a_template_that_never_ends_is_stopped_and_the_next_one_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_process, "SECONDS", 1)
    with pytest.raises(ValueError, match="longer than 1 s"):
        render(tmp_path, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert render(tmp_path, TEMPLATE) == "<s>user: hi"
