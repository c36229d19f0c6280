"""Tokenizers: reading a model's `tokenizer.json`, and training a byte-level BPE for the shipped tiny model."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybrid_jax.files import read_json

END_OF_TEXT, PAIRS, ASK = "<|endoftext|>", "<|pairs|>", "<|ask|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAIRS, ASK)

SHOWN = 3  # tokens that a message names

EosTokenId = int | Sequence[int] | None
"""`eos_token_id` as a model's config has it: one id, several, or none; a negative id counts as none."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE on texts; it has `SPECIAL_TOKENS` as ids 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path, max_length: int) -> None:
    """Writes tokenizer.json, and the tokenizer_config.json that transformers needs to load it."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [PAIRS, ASK],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Loads the tokenizer of a model directory so that the same text always gives the same, complete tokens.

    Truncation, padding and BPE dropout (a random choice among the ways to split a word), which tokenizer.json may switch on,
    are switched off.

    Raises:
      FileNotFoundError: the directory has no tokenizer.json.
      ValueError: tokenizer.json is not a tokenizer.
    """
    path = pathlib.Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {directory}; give a model directory that has its tokenizer")
    read_json(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer ({e})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        model = tokenizer.model
        model.dropout = None
        tokenizer.model = model
    return tokenizer


def check_tokenizer_fits(tokenizer: Tokenizer, vocab_size: int, directory: str | pathlib.Path) -> Tokenizer:
    """Returns the tokenizer if the model has all of its ids; a model may have more, as vocabularies are padded.

    Args:
      tokenizer: to be checked.
      vocab_size: rows of the model's embedding.
      directory: where the tokenizer came from, for the message.

    Raises:
      ValueError: an id is not below `vocab_size`.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has ids up to {largest}, the model has a vocabulary of {vocab_size}; "
            "take the tokenizer files that belong to the model"
        )
    return tokenizer


def check_same_ids(directory: str | pathlib.Path, other: str | pathlib.Path) -> None:
    """Checks that the tokenizers of two model directories have the same tokens with the same ids.

    How they divide a text into tokens is not compared, as one tokenizer divides it for both models.

    Raises:
      FileNotFoundError: a directory has no tokenizer.json.
      ValueError: a token has another id, or is in one of them alone; names the first ones.
    """
    own, others = (load_tokenizer(path).get_vocab(with_added_tokens=True) for path in (directory, other))
    different = [token for token in {**own, **others} if own.get(token) != others.get(token)]
    if different:
        known = {**others, **own}
        first = sorted(different, key=lambda token: known[token])[:SHOWN]
        shown = ", ".join(f"{token!r} is {own.get(token, 'absent')} and {others.get(token, 'absent')}" for token in first)
        raise ValueError(
            f"{len(different):,} tokens have other ids in the tokenizer of {directory} than in that of {other}: {shown}; take a "
            "teacher of the same tokenizer"
        )


def ordinary_ids(tokenizer: Tokenizer, number: int) -> range:
    """Returns up to `number` consecutive ids that stand for text.

    Special and other added tokens are excluded, and so is 0, which pads rows. The result is the first run that is long
    enough, or else the longest.
    """
    added = tokenizer.get_added_tokens_decoder()
    ids = sorted(i for i in tokenizer.get_vocab(with_added_tokens=False).values() if i and i not in added)
    longest, begin = range(0), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[end - 1] + 1 or end - begin == number:
            longest = max(longest, range(ids[begin], ids[end - 1] + 1), key=len)
            if len(longest) == number:
                break
            begin = end
    return longest


def added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer itself puts before and after a text, e.g. a beginning-of-sequence token.

    They come from the post-processor in tokenizer.json, as in transformers; for most models of the Qwen family there are none.
    """
    for probe in ("a", "1", "."):
        plain = tokenizer.encode(probe, add_special_tokens=False).ids
        found = tokenizer.encode(probe, add_special_tokens=True).ids
        for n in range(len(found) - len(plain) + 1 if plain else 0):
            if found[n : n + len(plain)] == plain:
                return found[:n], found[n + len(plain) :]
    return [], []


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text to be continued: they begin as a document does in training, and nothing ends them.

    A rendered conversation must not be given, as its template has written the beginning.
    """
    return added_around(tokenizer)[0] + tokenizer.encode(text, add_special_tokens=False).ids


def decode_continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Returns the text that the ids `new` add to the text of `prompt`.

    Decoded alone, they would lose the space before the first word if the tokenizer marks the beginnings of words (as
    sentencepiece does).
    """
    before, all_of_it = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return all_of_it.removeprefix(before) if all_of_it.startswith(before) else tokenizer.decode(new)


def end_of_text_id(tokenizer: Tokenizer, eos_token_id: EosTokenId = None) -> int:
    """Returns the id that ends a document: the model's if it names one (the first of a list), else `END_OF_TEXT`'s.

    Raises:
      ValueError: neither the model nor the tokenizer names one, or the tokenizer does not have the model's.
    """
    if isinstance(eos_token_id, Sequence):
        eos_token_id = eos_token_id[0] if eos_token_id else None
    if eos_token_id is not None and eos_token_id >= 0:
        if tokenizer.id_to_token(eos_token_id) is None:
            raise ValueError(
                f"the model's eos_token_id is {eos_token_id}, which its tokenizer does not have; correct it in config.json"
            )
    else:
        eos_token_id = tokenizer.token_to_id(END_OF_TEXT)
    if eos_token_id is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token and the model's config names no eos_token_id")
    return eos_token_id
