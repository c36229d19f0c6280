"""Tokenizers as models bring them: what begins and ends a document, and what a tokenizer.json stores beside its vocabulary."""

import datetime
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from hybrid_jax.data import read_corpus
from hybrid_jax.data.chat import ChatTemplate
from hybrid_jax.data.documents import Document
from hybrid_jax.data.tokenizer import encode_prompt, load_tokenizer
from hybrid_jax.data.tokens import Encoder, _inside, tokenizer_fingerprint

SOURCE = "launch/tiny_qwen3/tokenizer.json"
BOS, EOS = ("<|pairs|>", 1), ("<|endoftext|>", 0)  # any two tokens of the vocabulary
TEXT = "def f(x):\n    return x\n"


def changed(directory, change):
    """A model directory whose tokenizer is the tiny model's, changed."""
    tokenizer = Tokenizer.from_file(SOURCE)
    change(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": BOS[0], "eos_token": EOS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    return directory


def processor(*parts):
    def change(tokenizer):
        tokenizer.post_processor = Sequence(list(parts)) if len(parts) != 1 else parts[0]

    return change


BEGINS = TemplateProcessing(single=f"{BOS[0]} $A", special_tokens=[BOS])
BEGINS_AND_ENDS = TemplateProcessing(single=f"{BOS[0]} $A {EOS[0]}", special_tokens=[BOS, EOS])


@pytest.mark.parametrize(
    "change, begin, end",
    [
        (lambda tokenizer: None, [], [7]),
        (processor(ByteLevel()), [], [7]),
        (processor(BEGINS), [1], [7]),
        (processor(ByteLevel(), BEGINS), [1], [7]),
        (processor(BEGINS_AND_ENDS), [1], [0]),
    ],
    ids=["nothing", "bytes", "begins", "bytes and begins", "begins and ends"],
)
def test_documents_begin_as_transformers_begins_a_text_and_end_once(tmp_path, change, begin, end):
    transformers = pytest.importorskip("transformers")
    encode = Encoder(changed(tmp_path, change), eos_token_id=[7, 8])
    tokens = encode([Document("a", TEXT), Document("b", "x")])
    plain = Tokenizer.from_file(SOURCE).encode(TEXT).ids
    assert tokens.ids[: tokens.starts[1]].tolist() == [*begin, *plain, *end]
    assert tokens.ids[tokens.starts[1] :].tolist()[: len(begin)] == begin, "every document has its own beginning"
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    closing = [] if end == [0] else end
    assert reference(TEXT).input_ids + closing == tokens.ids[: tokens.starts[1]].tolist()
    assert encode_prompt(encode.tokenizer, TEXT) == [*begin, *plain]


def test_conversations_begin_as_their_template_says_and_not_twice(tmp_path):
    pytest.importorskip("transformers")
    directory = changed(tmp_path, processor(BEGINS))
    config = {"bos_token": BOS[0], "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    talk = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    ids = Encoder(directory, 0)([Document("a", messages=talk)]).ids.tolist()
    assert ids.count(1) == 1 and ids[0] == 1 and 0 not in ids


def test_spaces_of_a_prompt_are_not_learned_where_the_tokenizer_trims_offsets(tmp_path):
    pytest.importorskip("transformers")
    directory = changed(tmp_path, processor(ByteLevel(trim_offsets=True)))
    template = "{% for m in messages %}{{ m.role }}:    {{ m.content }}<|ask|>{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:    ' }}{% endif %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|ask|>", "chat_template": template}))
    talk = ({"role": "user", "content": "y"}, {"role": "assistant", "content": ""})
    encode = Encoder(directory, 0)
    tokens = encode([Document("a", messages=talk)])
    assert tokens.ids[tokens.weights == 1].tolist() == [encode.tokenizer.token_to_id("<|ask|>")]


def test_a_space_that_ends_an_answer_is_learned_where_the_tokenizer_trims_offsets(tmp_path):
    """A post-processor that trims gives the token of a space an empty span, which is inside of no answer."""
    pytest.importorskip("transformers")
    directory = changed(tmp_path, processor(ByteLevel(trim_offsets=True)))
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    )
    template += "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|ask|>", "chat_template": template}))
    tokens = Encoder(directory, 0)(
        [Document("a", messages=({"role": "user", "content": "y"}, {"role": "assistant", "content": "x "}))]
    )
    assert load_tokenizer(directory).decode(tokens.ids[tokens.weights == 1].tolist()) == "x "


def dropout(tokenizer):
    model = tokenizer.model
    model.dropout = 0.9
    tokenizer.model = model


@pytest.mark.parametrize(
    "change",
    [lambda t: t.enable_truncation(8), lambda t: t.enable_padding(pad_id=0, pad_token=EOS[0], length=50), dropout],
    ids=["truncation", "padding", "dropout"],
)
def test_what_a_tokenizer_json_stores_for_batches_does_not_touch_training_text(tmp_path, change):
    documents = [Document("a", TEXT * 20), Document("b", "y = 2\n")]
    plain = Encoder(changed(tmp_path, lambda tokenizer: None), 0)
    want = plain(documents)
    found = Encoder(changed(tmp_path, change), 0)
    tokens = found(documents)
    assert np.array_equal(tokens.starts, want.starts) and np.array_equal(tokens.ids, want.ids)
    assert load_tokenizer(tmp_path).encode(TEXT * 20).ids == want.ids[: want.starts[1] - 1].tolist()
    assert tokenizer_fingerprint(found.tokenizer) == tokenizer_fingerprint(plain.tokenizer), "the same ids, the same tokenizer"


def words(number, special):
    """A tokenizer of so many words, some of which are added tokens."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(number)}, unk_token="w0"))
    tokenizer.add_special_tokens([f"w{i}" for i in special])
    return tokenizer


@pytest.mark.parametrize(
    "special, markers, symbols",
    [
        ([], (1, 2), (3, 131)),
        ([0, 1, 2], (3, 4), (5, 133)),
        ([*range(5), 100, 300], (101, 102), (103, 231)),
        ([*range(50, 400, 50)], (1, 2), (3, 50)),
    ],
    ids=["Qwen", "Llama 2", "a hole", "no run is long enough"],
)
def test_synthetic_tasks_of_a_foreign_tokenizer_use_no_special_token(tmp_path, special, markers, symbols):
    words(400, special).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w7 " * 50)
    corpus = read_corpus({"text": str(tmp_path / "a.txt")}, tmp_path, 3)
    assert (corpus.markers, corpus.symbols) == (markers, symbols)


def test_an_end_of_documents_that_the_tokenizer_does_not_have_is_refused(tmp_path):
    words(10, []).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="eos_token_id is 10, which its tokenizer does not have"):
        Encoder(tmp_path, 10)
    assert Encoder(tmp_path, 9).end_ids == [9]
    assert Encoder("launch/tiny_qwen3", -1).end_ids == [0], "a negative id is none"


@pytest.mark.parametrize("strip", [{}, {"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_an_end_of_turn_that_takes_in_spaces_is_learned_and_nothing_of_the_next_turn(strip):
    tokenizer = Tokenizer.from_file(SOURCE)
    tokenizer.add_special_tokens([AddedToken("<|end|>", **strip)])
    text = "user: x <|end|>\n\nassistant: y <|end|>\n\nuser: z <|end|>\n"
    begin = text.index(" y")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    weights = _inside(encoding.offsets, text, [(begin, begin + len(" y <|end|>"))])
    learned = tokenizer.decode([i for i, w in zip(encoding.ids, weights, strict=True) if w], skip_special_tokens=False)
    assert learned.replace(" ", "").replace("Ġ", "") == "y<|end|>"
    assert encoding.ids[np.flatnonzero(weights)[-1]] == tokenizer.token_to_id("<|end|>")


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tmp_path, capsys):
    pytest.importorskip("transformers")
    directory = changed(tmp_path, lambda tokenizer: None)
    template = "{{ strftime_now('%d %b %Y') }}"
    template += "{% macro a() %}{{ strftime_now('%B %y') }}{% endmacro %}{{ a() }}"
    template += "{% for m in messages %}<|ask|>{{ m.content }}<|ask|>{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    talk, chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], ChatTemplate(directory)
    assert chat.answers(talk).text == "26 Jul 2024July 24<|ask|>x<|ask|><|ask|>y<|ask|>"
    assert "writes today's date" in capsys.readouterr().err
    assert chat.render(talk).startswith(datetime.date.today().strftime("%d %b %Y")), "a prompt has today's"
