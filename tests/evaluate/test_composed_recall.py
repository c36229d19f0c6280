"""The instrument `composed_recall` and `generate --compose`: what they measure and say, and what they refuse."""

import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.commands.main import main
from hybrid_jax.composition import Composition, generate_composed
from hybrid_jax.data.tokenizer import decode_continuation
from hybrid_jax.evaluate.instruments import make_instrument
from hybrid_jax.evaluate.instruments.contract import Subject
from tests.conftest import tiny_config, tiny_model

TASK = dict(task="needles", options=dict(min_needles=1, max_needles=1, ask="end"))


def composed_recall(**options):
    return make_instrument("x", {"instrument": "composed_recall", **TASK, "rows": 3, "batch_size": 2, **options})


def test_an_ordinary_pass_scores_as_recall_does_and_one_chunk_like_it(corpus):
    subject = Subject(tiny_model("*-DM2", vocab_size=300), corpus.tokenizer, corpus)
    names = ("full:ordinary", "concat:soup", "concat:kv_only")
    instrument = composed_recall(lengths=(32,), compositions=names, chunk=30, prefix=2)
    instrument.check(subject.model.config, corpus)
    found = {(m.measure, *m.at.values()): m for m in instrument.measure(subject)}
    recall = make_instrument("x", {"instrument": "recall", **TASK, "seq_len": 32, "rows": 3}).measure(subject)
    for measure in ("accuracy", "exact", "loss"):
        want = next(m for m in recall if m.measure == measure and not m.at)
        for name in names[:2]:
            assert found[measure, name, 32].sums == pytest.approx(np.array(want.sums), rel=1e-4)
    assert found["loss", names[2], 32].value != pytest.approx(found["loss", names[0], 32].value, rel=1e-4)
    assert found["accuracy", names[0]].value == found["accuracy", names[0], 32].value


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(compositions=("concat",)), "a composition is KEYS:STATES"),
        (dict(lengths=()), "at least one of lengths"),
        (dict(prefix=-1), "prefix must be an integer at least 0, got -1"),
        (dict(chunk=0), "chunk must be an integer at least 1, got 0"),
        (dict(task="none"), "no synthetic task is named 'none'"),
        (dict(lengths=(64,), prefix=60), "tokens before its question, of which 60 are the prefix"),
        (dict(lengths=(600,), compositions=("full:ordinary",)), "need 600 positions, more than the model's 256"),
        (dict(lengths=(64,), compositions=("sw:soup",)), r"layer 1 \(M3\).*cannot be composed by 'soup'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        composed_recall(**options).check(tiny_config("*-M3" if "sw:soup" in options.get("compositions", ()) else "*"), corpus)


def test_generate_composes_on_the_command_line_and_refuses_what_does_not_go_together(model, tokenizer, capsys):
    prompt = "abc def abc abc def"
    options = ["--max-new-tokens", "4", "--question", " def", "--prefix", "def "]
    assert main(["generate", str(model), prompt, "--compose", "concat:soup", "--chunk", "4", *options]) == 0
    prefix, context, question = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("def ", prompt, " def"))
    how = Composition("concat", "soup", 4)
    new = generate_composed(load_model(model), context, question, composition=how, prefix=prefix, max_new_tokens=4)
    assert capsys.readouterr().out == f"def {prompt} def{decode_continuation(tokenizer, prefix + context + question, new)}\n"
    for arguments, message in (
        (["--question", "a"], "--question needs --compose"),
        (["--compose", "concat:soup"], "--compose needs --question"),
        (["--compose", "concat:soup", "--question", "a", "--chat"], "leave --chat out"),
        (["--compose", "some:soup", "--question", "a"], "must be one of 'full', 'concat', 'sw', got 'some'"),
        (["--compose", "full:soup", "--question", "a", "--max-new-tokens", "255"], "more than the model's 256"),
    ):
        assert main(["generate", str(model), prompt, *arguments]) == 1
        assert message in capsys.readouterr().err
