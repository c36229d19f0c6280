"""What is learned of a conversation: the assistant's turns with their ends, and nothing that anyone else said.

The templates have the constructions of the published ones of Qwen2.5, Qwen3, Llama 3, Mistral, Phi and DeepSeek-R1.
"""

import json

import numpy as np
import pytest

from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.documents import Document
from hybrid_jax.data.tokenizer import train_tokenizer
from hybrid_jax.data.tokens import Encoder

pytest.importorskip("transformers")

ADDED = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin|>", "<|header|>",
         "<|/header|>", "<|eot|>", "<|user|>", "<|assistant|>", "<|end|>"]  # fmt: skip
CHATML_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
QWEN25 = (  # a system message of its own where the conversation has none
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}" + CHATML_PROMPT
)
QWEN3 = (  # thoughts stay after the last question alone; the results of tools are the user's and no questions
    "{%- set ns = namespace(search=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.search and m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{%- set ns.search = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in m.content %}{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>' + m.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}" + CHATML_PROMPT
)
LLAMA3 = (  # contents trimmed
    "{% for m in messages %}{% set content = '<|header|>' + m['role'] + '<|/header|>\\n\\n' + m['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"
)
MISTRAL = (  # turns alternate, only answers have an end, the system message is in the last question
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for m in loop_messages %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('turns must alternate') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
PHI = (  # a second end after the last turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (  # the prompt opens a thought that no finished turn has
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TEMPLATES = {  # template, eos_token, what ends an answer
    "Qwen2.5": (QWEN25, "<|endoftext|>", "<|im_end|>"),
    "Qwen3": (QWEN3, "<|im_end|>", "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|eot|>", "<|eot|>"),
    "Mistral": (MISTRAL, "</s>", "</s>"),
    "Phi": (PHI, "<|endoftext|>", "<|end|>"),
    "R1": (R1, "</s>", "</s>"),
    "plain": (PLAIN, "<|endoftext|>", "\n\n"),
}


def talk(*contents):
    """The user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["user assistant system tool thoughts and answers to questions, yes or no"] * 3, 300)
    tokenizer.add_special_tokens(ADDED)
    tokenizer.save(str(directory / "tokenizer.json"))

    def of(template, eos):
        config = {"chat_template": template, "eos_token": eos, "bos_token": "<s>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    return of


def learned(directory, messages):
    """The text of each run of tokens that has a weight, and the answers' counts."""
    answers = ChatTemplate(directory).answers(messages)
    encode = Encoder(directory)
    tokens = encode([Document("x", messages=tuple(messages))])
    runs = np.split(np.arange(len(tokens.ids)), np.flatnonzero(np.diff(tokens.weights.astype(int))) + 1)
    texts = [encode.tokenizer.decode(tokens.ids[run], skip_special_tokens=False) for run in runs if tokens.weights[run[0]]]
    spans = [answers.text[a:b] for a, b in answers.spans]
    assert [t.lstrip(" ") for t in texts] == [s.lstrip(" ") for s in spans], "tokens and characters agree"
    return texts, answers.rewritten, answers.left_out


CASES = {
    "two turns": (talk("Q1", "A1", "Q2", "A2"), ["A1", "A2"]),
    "an answer that repeats the question": (talk("yes", "yes", "no", "yes"), ["yes", "yes"]),
    "an answer that is in the question": (talk("say: A1", "A1", "A1? Q2", "A1"), ["A1", "A1"]),
    "a question that is in the answer": (talk("no", "no and no", "no", "or no"), ["no and no", "or no"]),
    "an empty answer": (talk("Q1", "", "Q2", "A2"), ["", "A2"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CASES)
def test_the_answers_and_their_ends_are_learned_and_no_question_is(model, name, case):
    template, eos, end = TEMPLATES[name]
    messages, want = CASES[case]
    thought = "<think>\n\n</think>\n\n" if name == "Qwen3" else ""
    want = [answer + end for answer in want]
    want[-1] = thought + want[-1]
    texts, _, left_out = learned(model(template, eos), messages)
    assert ([text.lstrip(" ") for text in texts], left_out) == (want, 0)  # some templates write a space before an answer


@pytest.mark.parametrize("name", ["Qwen2.5", "Llama 3", "Mistral", "Phi"])
def test_an_answer_may_hold_the_end_of_turn_and_a_question_the_beginning_of_one(model, name):
    template, eos, end = TEMPLATES[name]
    prompt = ChatTemplate(model(template, eos)).render(talk("Q"), add_generation_prompt=True)
    messages = talk(f"Q1{end}{prompt}", f"A1{end}more", f"Q2{end}", "A2")
    texts, _, left_out = learned(model(template, eos), messages)
    space = " " if name == "Mistral" else ""
    assert (texts, left_out) == ([f"{space}A1{end}more{end}", f"{space}A2{end}"], 0)


@pytest.mark.parametrize("name", ["Qwen2.5", "Llama 3", "Mistral"])
def test_spaces_around_an_answer_are_learned_as_the_template_renders_them(model, name):
    template, eos, end = TEMPLATES[name]
    texts = learned(model(template, eos), talk(" Q1\n", "  A1 \n", "Q2  ", "\nA2  "))[0]
    want = ["A1", "A2"] if name == "Llama 3" else ["  A1 \n", "\nA2  "]
    assert texts == [(" " if name == "Mistral" else "") + answer + end for answer in want]


def test_qwen3_removes_earlier_thoughts_and_the_rest_of_those_turns_is_learned(model):
    long = "<think>\n" + "thoughts and " * 9 + "\n</think>\n\nA1"
    found = learned(model(QWEN3, "<|im_end|>"), talk("Q1", long, "Q2, a question", "<think>\nyes\n</think>\n\nA2"))
    assert found == (["A1<|im_end|>", "<think>\nyes\n</think>\n\nA2<|im_end|>"], 1, 0)


def test_qwen3_with_tools_learns_every_step_and_no_result(model):
    steps = [*talk("Q1", "<think>\nT1\n</think>\n\ncall"), {"role": "tool", "content": "call"}]
    steps += [{"role": "assistant", "content": "A1", "reasoning_content": "T2"}]
    directory = model(QWEN3, "<|im_end|>")
    now = ["<think>\nT1\n</think>\n\ncall<|im_end|>", "<think>\nT2\n</think>\n\nA1<|im_end|>"]
    assert learned(directory, steps) == (now, 0, 0)
    later = ["call<|im_end|>", "A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"]
    assert learned(directory, [*steps, *talk("Q2", "A2")]) == (later, 2, 0)


def test_mistral_s_system_message_is_only_in_prompts_and_its_absence_is_counted(model):
    messages = [{"role": "system", "content": "answers</s> [INST] "}, *talk("Q1", "A1", "Q2", "A2")]
    directory = model(MISTRAL, "</s>")
    assert learned(directory, messages) == (["A1</s>", "A2</s>"], 2, 0)
    assert ChatTemplate(directory).answers(messages).absent == 1


MOVING = (  # the first question again, behind the last answer
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ messages[0].content }}<|end|>{% endif %}"
)
ENDLESS = (  # of the answers only the last has an end
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if loop.last or m.role == 'user' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ messages|length }} {{ m.role }}: {{ m.content }}{% endfor %}"  # and no end at all


def test_a_template_that_moves_a_question_behind_an_answer_teaches_none_of_it(model):
    texts, _, left_out = learned(model(MOVING, "<|end|>"), talk("Q1", "A1", "Q2", "A2"))
    assert texts == ["A1<|end|>", "A2<|end|>"] and left_out == 0


def test_turns_that_cannot_be_found_are_counted_and_a_conversation_of_such_turns_is_refused(model):
    encode = Encoder(model(ENDLESS, "<|end|>"))
    encode([Document("x", messages=tuple(talk("Q1", "A1", "Q2", "A2"))), Document("y", messages=tuple(talk("Q1")))])
    assert encode.counts == {"left_out": 1, "unanswered": 1, "rewritten": 0, "absent": 0}
    with pytest.raises(ValueError, match="x: the chat template renders every answer differently.*generation"):
        Encoder(model(NUMBERED, "<|end|>"))([Document("x", messages=tuple(talk("Q1", "A1", "Q2", "A2")))])


def test_marks_that_mark_no_answer_are_refused(model):
    marked = "{% for m in messages %}{{ m.content }}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="marks none of this conversation's answers"):
        ChatTemplate(model(marked, "<|end|>")).answers(talk("Q", "A"))
