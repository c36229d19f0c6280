"""A teacher's cache serves the rows it was made of, and no others."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from hybrid_jax.data import Corpus, training_batches
from hybrid_jax.data.corpus import Source
from hybrid_jax.data.teacher_cache import TeacherCache
from hybrid_jax.data.tokens import Tokens

ROWS = dict(batch_size=2, length=8, seed=0, answer_weight=1.0)
MIX = {"text": 1.0, "induction": 0.0}
STARTS = np.array([0, 20, 50, 64])


def corpus(ids=None, weights=None, starts=STARTS, **changes):
    tokens = Tokens(np.arange(3, 67, dtype=np.uint16) if ids is None else ids, starts, weights)
    encoding = {"tokenizer": "a" * 64, "document_begin": [], "document_end": [0], "chat_template": ""}
    made = Corpus(Tokenizer(models.BPE()), {"text": Source("a.txt")}, {"text": [tokens]}, {}, (1, 2), (3, 50), encoding)
    return dataclasses.replace(made, **changes)


def swapped():
    ids = np.arange(3, 67, dtype=np.uint16)
    ids[[40, 41]] = ids[[41, 40]]
    return ids


OTHERS = {
    "text.tokens": [corpus(ids=swapped()), corpus(starts=np.array([0, 21, 50, 64])), corpus(weights=np.ones(64, np.uint8))],
    "text.packing": [corpus(sources={"text": Source("a.txt", packing="first_fit")})],
    "tokenizer": [corpus(encoding={**corpus().encoding, "tokenizer": "b" * 64})],
    "document_begin": [corpus(encoding={**corpus().encoding, "document_begin": [1]})],
}


@pytest.fixture
def cache(tmp_path):
    made = TeacherCache(tmp_path / "cache", 2, made_of=corpus().identity(MIX), mix=MIX, **ROWS)
    made.write(0, np.arange(32).reshape(2, 8, 2), np.zeros((2, 8, 2)))
    return tmp_path / "cache"


def first_batch(of, cache):
    return next(training_batches(of, MIX, **ROWS, teacher_cache=str(cache)))


def test_the_same_text_is_accepted_from_another_path(cache):
    batch = first_batch(corpus(sources={"text": Source("elsewhere/b.txt")}), cache)
    assert np.array_equal(batch["teacher_ids"], np.arange(32).reshape(2, 8, 2))


@pytest.mark.parametrize("field", OTHERS)
def test_rows_of_another_text_packing_or_tokenizer_are_refused_by_name(cache, field):
    for other in OTHERS[field]:
        with pytest.raises(ValueError, match=f"was made with {field} = "):
            first_batch(other, cache)


def test_rows_with_another_rule_for_long_documents_are_refused(tmp_path):
    split, cut = (corpus(sources={"text": Source("a.txt", "first_fit", long)}) for long in ("split", "truncate"))
    TeacherCache(tmp_path, 2, made_of=split.identity(MIX), mix=MIX, **ROWS)
    training_batches(split, MIX, **ROWS, teacher_cache=str(tmp_path))
    with pytest.raises(ValueError, match="was made with text.long = split, this phase has truncate"):
        training_batches(cut, MIX, **ROWS, teacher_cache=str(tmp_path))


def test_a_cache_that_does_not_say_what_it_was_made_of_is_refused(cache):
    record = json.loads((cache / "cache.json").read_text())
    del record["text.tokens"]
    (cache / "cache.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not say with which text.tokens it was made"):
        first_batch(corpus(), cache)


def test_a_cache_says_which_step_is_the_first_that_it_lacks(cache):
    made = TeacherCache(cache, mix=MIX, **ROWS)
    made.check(1)
    with pytest.raises(FileNotFoundError, match="has no step 1 of 2"):
        made.check(2)
