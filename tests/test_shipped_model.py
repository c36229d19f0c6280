"""The source model that the quickstart primes: transformers loads it, it reads code, and it retrieves."""

import numpy as np
import pytest
import transformers

from hybrid_jax import load_model
from hybrid_jax.data import load_tokenizer, read_corpus
from hybrid_jax.evaluate.measures import held_out_rows, retrieval_rows
from tests.conftest import GOLDEN, loss_and_accuracy, relative_error

torch = pytest.importorskip("torch")

SOURCE = GOLDEN.parents[1] / "launch" / "tiny_qwen3"


@pytest.fixture(scope="module")
def model():
    return load_model(SOURCE, dtype="float32")


@pytest.fixture(scope="module")
def corpus():
    return read_corpus({"text": "stdlib"}, SOURCE, 0)


def test_it_is_a_qwen3_of_the_promised_size(model):
    files = list(SOURCE.iterdir())
    assert sum(f.stat().st_size for f in files) <= 16_000_000
    assert "README.md" in {f.name for f in files}
    assert model.config.num_layers >= 8 and model.config.num_heads == 8 and model.config.num_kv_heads < 8


def test_transformers_loads_it_and_gives_our_logits(model):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SOURCE)
    text = "class Path:\n    def __init__(self, name):\n        self.name = name\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == load_tokenizer(SOURCE).encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    assert relative_error(model(np.asarray([ids])), want) < 1e-4


def test_it_predicts_held_out_code_far_better_than_token_frequencies_do(model, corpus):
    tokens = corpus.train["text"][0].ids
    share = (np.bincount(tokens, minlength=4096) + 1) / (len(tokens) + 4096)
    held_out = corpus.held_out["text"][0].ids
    unigram = -np.log(share[held_out]).mean()
    assert loss_and_accuracy(model, held_out_rows(corpus, 256, 24))[0] < 0.6 * unigram


def test_it_retrieves_sixteen_pairs(model, corpus):
    assert loss_and_accuracy(model, retrieval_rows(corpus, 256, 16))[1] >= 0.95
