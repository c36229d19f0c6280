"""The synthetic suite: a solver written from each task's definition answers every question from the tokens before it."""

import functools
import math
import re
from collections import Counter

import numpy as np
import pytest

from hybrid_jax.data.tasks import Material, make_task
from tests.data.conftest import Text

PAIRS, ASK, FIRST = 1, 2, 3


MATERIAL = Material((FIRST, FIRST + 120), PAIRS, ASK, functools.partial(Text, first=200))


def segments(row):
    """Yields (ids, weights, distances) of every segment."""
    for n in range(1, row["segment_ids"].max() + 1):
        where = row["segment_ids"] == n
        yield row["input_ids"][where].tolist(), row["loss_weights"][where], row["distances"][where]


def recall(before, options):
    """The value that followed the last token when it stood before."""
    return before[before.index(before[-1]) + 1]


def pairs(before, options):
    """The values behind the key of the last question, in the one pair that has it."""
    k, v, ask = options.get("key_tokens", 1), options.get("value_tokens", 1), before.index(ASK)
    facts = {tuple(before[i : i + k]): before[i + k : i + k + v] for i in range(1, ask, k + v)}
    question = before[ask + 1 + (len(before) - ask - 1) // (k + v) * (k + v) :]
    return facts[tuple(question[:k])][len(question) - k]


def repetition(before, options):
    """What follows the part of the beginning that stands at the end."""
    n = len(before)
    return next(before[n - p] for p in range(options.get("min_period", 4), n) if before[p:] == before[: n - p])


def needle(before, options):
    """The values behind the key of the last question in their order: as many pairs as values have that key, and no other."""
    k, v = options.get("key_tokens", 1), options.get("value_tokens", 2)
    ask = max(i for i, t in enumerate(before) if t == ASK)
    question = before[ask + 1 :]
    found = [before[i + 1 + k :][:v] for i in range(ask) if before[i] == PAIRS and before[i + 1 :][:k] == question[:k]]
    found = found if "values" in options else found[:1] if all(values == found[0] for values in found) else []
    assert len(found) == options.get("values", 1)
    return [token for values in found for token in values][len(question) - k]


def copy(before, options):
    ask = before.index(ASK)
    return [t for t in before[:ask] if t != PAIRS][len(before) - ask - 1]


def parity(before, options):
    return FIRST + (sum(t - FIRST for t in before[:-1]) % 2)


def arithmetic(before, options):
    m = options.get("modulus", 5)
    marks = dict(zip(range(m, m + 5), "+-*()", strict=True))
    return FIRST + eval("".join(marks.get(t - FIRST, str(t - FIRST)) for t in before[:-1])) % m


def letter(before, options):
    n = options.get("options", 4)
    facts = before[1 : before.index(ASK)]
    question = before[-2 - 2 * n : -1]
    value = dict(zip(facts[::2], facts[1::2], strict=True))[question[0]]
    return dict(zip(question[2::2], question[1::2], strict=True))[value]


def addition(before, options):
    reverse = -1 if options.get("reverse") else 1
    parts = re.split("a", "".join("a" if t == ASK else "+" if t == FIRST + 10 else str(t - FIRST) for t in before))
    terms = [int(t[::reverse]) for t in parts[0].split("+")]
    return FIRST + int(str(sum(terms[: len(parts)]))[::reverse][len(parts[-1])])


def words_of(ids, w):
    return [tuple(ids[i : i + w]) for i in range(0, len(ids) - len(ids) % w, w)]


def variables(before, options):
    w, ask = options.get("word_tokens", 2), before.index(ASK)
    statements = [words_of(before[i + 1 : i + 1 + 2 * w], w) for i, t in enumerate(before[:ask]) if t == PAIRS]
    known = [tuple(before[ask + 1 : ask + 1 + w])]
    for name, value in statements:
        known += [name] if value in known else []
    return [t for word in known for t in word][len(before) - ask - 1]


def listed(before, options):
    ask = before.index(ASK)
    return Counter(words := words_of(before[:ask], options.get("word_tokens", 2))), words, len(before) - ask - 1


def common(before, options):
    counts, words, at = listed(before, options)
    chosen = {word for word, _ in counts.most_common(options.get("common", 4))}
    return [t for word in dict.fromkeys(words) if word in chosen for t in word][at]


def frequent(before, options):
    counts, _, at = listed(before, options)
    return [t for word, _ in counts.most_common(options.get("asked", 3) + 1)[1:] for t in word][at]


SUITE = [
    ("retrieval", {}, pairs, True),
    ("retrieval", dict(max_pairs=11, key_tokens=3, value_tokens=4), pairs, True),
    ("induction", {}, repetition, True),
    ("induction", dict(min_period=80, max_period=80), repetition, True),
    ("needles", {}, needle, True),
    ("needles", dict(ask="end", key_tokens=2, value_tokens=3), needle, True),
    ("needles", dict(ask="end", values=3, max_needles=3), needle, True),
    ("needles", dict(values=2, min_needles=2, max_needles=4, asked=2), needle, True),
    ("mqar", {}, recall, True),
    ("mqar", dict(min_pairs=4, max_pairs=30, random_filler=False), recall, True),
    ("mqar", dict(max_pairs=10, symbols=21), recall, True),
    ("selective_copying", {}, copy, True),
    ("selective_copying", dict(tokens=5, alphabet=3, selective=False), copy, True),
    ("parity", {}, parity, False),
    ("parity", dict(min_length=1, max_length=2), parity, False),
    ("modular_arithmetic", {}, arithmetic, False),
    ("modular_arithmetic", dict(modulus=7, max_length=9), arithmetic, False),
    ("modular_arithmetic", dict(brackets=True, max_length=30), arithmetic, False),
    ("letter_choice", {}, letter, False),
    ("letter_choice", dict(options=2, min_facts=2, max_facts=3), letter, False),
    ("addition", {}, addition, False),
    ("addition", dict(reverse=True, terms=2, max_digits=5), addition, False),
    ("variable_tracking", {}, variables, True),
    ("variable_tracking", dict(hops=2, chains=3, word_tokens=1), variables, True),
    ("common_words", {}, common, True),
    ("common_words", dict(common=2, common_times=5, other_times=3, word_tokens=3), common, True),
    ("frequent_words", {}, frequent, True),
    ("frequent_words", dict(alpha=1.7, asked=2, word_tokens=3), frequent, True),
]


@pytest.mark.parametrize("name, options, solve, copies", SUITE)
def test_every_answer_follows_from_the_tokens_before_it(name, options, solve, copies):
    """And its evidence is at its distance: the answer itself where it is copied, else a token of the question's segment."""
    task = make_task(name, options, MATERIAL, 160, seed=5, weight=2.5)
    answers = 0
    for index in range(12):
        row = task.example(index)
        assert len(row["input_ids"]) == 160 and all(np.array_equal(row[k], again) for k, again in task.example(index).items())
        for ids, weights, distances in segments(row):
            asked = np.flatnonzero(distances)
            assert len(asked) and (weights[asked] == 2.5).all() and weights[0] <= 1
            for t in asked.tolist():
                assert ids[t] == solve(ids[:t], options), (index, t)
                assert 0 < distances[t] <= t and (not copies or ids[t - distances[t]] == ids[t])
            answers += len(asked)
    assert answers >= 24
    assert not np.array_equal(task.example(0)["input_ids"], make_task(name, options, MATERIAL, 160, seed=6).example(0)["input_ids"])


@pytest.mark.parametrize(
    "name, options, answers",
    [("retrieval", {}, 120), ("needles", {}, 120), ("mqar", {}, 60),
     ("mqar", dict(symbols=24), 12), ("letter_choice", dict(options=3, min_facts=3), 3),
     ("parity", {}, 2), ("modular_arithmetic", dict(modulus=7), 7), ("induction", {}, None)],
)  # fmt: skip
def test_chance_is_one_of_the_answers_that_there_can_be(name, options, answers):
    task = make_task(name, options, MATERIAL, 160, seed=5)
    if answers is None:
        assert task.chance is None
        return
    seen = {row["input_ids"][t] for row in map(task.example, range(40)) for t in np.flatnonzero(row["distances"])}
    assert task.chance == 1 / answers and 0.9 * answers <= len(seen) <= answers


def test_every_task_draws_from_as_many_symbols_as_it_is_told():
    task = make_task("induction", dict(symbols=7, max_period=9), MATERIAL, 160, seed=5)
    assert {int(i) for n in range(9) for ids, *_ in segments(task.example(n)) for i in ids} == set(range(FIRST, FIRST + 7))


def test_no_filler_of_mqar_gives_a_key_a_second_value():
    task = make_task("mqar", dict(min_pairs=20, max_pairs=20), MATERIAL, 160, seed=5)
    for i in range(8):
        ids = task.example(i)["input_ids"].tolist()
        assert all(ids.count(key) == 2 for key in ids[:40:2])


@pytest.mark.parametrize(
    "name, options, solve",
    [("needles", dict(max_needles=3), needle), ("variable_tracking", dict(hops=1, word_tokens=1), variables)],
)
def test_text_with_the_marker_of_pairs_in_it_does_not_answer(name, options, solve):
    """Where a tokenizer has no markers of its own, ordinary tokens serve, e.g. a quotation mark, which stand in text too."""
    quotes = {FIRST + i for i in range(10)}  # behind every one of the text's markers stand two of these symbols

    class Quoting(Text):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            row["input_ids"][::4], row["input_ids"][1::4] = PAIRS, FIRST + i
            row["input_ids"][2::4] = FIRST + 3 + i + np.arange(len(row["input_ids"][2::4])) % 5
            return row

    task = make_task(name, options, Material((FIRST, FIRST + 14), PAIRS, ASK, functools.partial(Quoting, first=200)), 160)
    answers = 0
    for index in range(40):
        ids, far = (task.example(index)[key].tolist() for key in ("input_ids", "distances"))
        for t in (t for t, d in enumerate(far) if d):
            assert ids[t] == solve(ids[:t], options), (index, t)
            answers += ids[t - 1] in quotes
    assert answers  # some keys are among the symbols that text has elsewhere


def test_gaps_of_mqar_follow_the_power_law():
    task = make_task("mqar", dict(min_pairs=1, max_pairs=1, power=0.5), MATERIAL, 66, seed=0)
    slots = np.array([(task.example(i)["distances"].max() - 2) // 2 + 1 for i in range(3000)])
    want = 0.5 * np.arange(1, 33) ** -0.5
    want = want / want.sum()
    got = np.bincount(slots, minlength=33)[1:] / len(slots)
    assert slots.min() == 1 and slots.max() == 32 and np.abs(np.cumsum(got) - np.cumsum(want)).max() < 0.03


def test_lists_of_words_have_the_published_frequencies():
    task = make_task("common_words", dict(common=3, common_times=6, other_times=2), MATERIAL, 120, seed=0)
    counts, _, _ = listed(task.example(0)["input_ids"].tolist()[: 120 - 3 * 2], {})
    assert sorted(counts.values())[-4:] == [2, 6, 6, 6]
    task = make_task("frequent_words", {}, MATERIAL, 1200, seed=0)
    n = 1199 // 2 - 3
    assert task.counts()[:4].tolist() == [int(n * k**-2.0 / sum(j**-2.0 for j in range(1, n + 1))) for k in range(1, 5)]


def test_letters_are_right_equally_often():
    task = make_task("letter_choice", {}, MATERIAL, 160, seed=0)
    found = Counter(int(t) for i in range(60) for ids, _, far in segments(task.example(i)) for t in np.array(ids)[far > 0])
    assert set(found) == set(range(FIRST, FIRST + 4)) and min(found.values()) > 0.17 * sum(found.values())


def test_brackets_are_as_long_as_asked_for_and_answers_are_spread():
    task = make_task("modular_arithmetic", dict(brackets=True, min_length=21, max_length=21), MATERIAL, 160, seed=0)
    found = [(len(ids) - 2, ids[-1] - FIRST) for i in range(100) for ids, _, _ in segments(task.example(i))]
    assert {n for n, _ in found} == {21} and min(Counter(a for _, a in found).values()) > 0.1 * len(found)


@pytest.mark.parametrize(
    "name, options, length, message",
    [
        ("mqar", dict(max_pairs=50), 160, "needs rows of 200 tokens"),
        ("mqar", dict(max_pairs=70), 600, "mqar draws from 140 or more token ids"),
        ("mqar", dict(symbols=15), 160, "mqar draws from 16 or more token ids"),
        ("needles", dict(symbols=-1), 160, "needles: symbols must be an integer at least 0, got -1"),
        ("mqar", dict(symbols=999), 160, "mqar draws from 999 or more token ids"),
        ("mqar", dict(power=0), 160, "mqar: power must be"),
        ("mqar", dict(min_pairs=9), 160, "1 <= min <= max"),
        ("mqar", dict(min_pairs=2.5), 160, "mqar: min_pairs must be an integer, got 2.5"),
        ("mqar", dict(max_pairs="8"), 160, "mqar: max_pairs must be an integer, got '8'"),
        ("mqar", dict(random_filler="no"), 160, "mqar: random_filler must be true or false"),
        ("needles", dict(depth=math.nan, ask="end"), 160, "needles: depth must be a number at most 1, got nan"),
        ("needles", dict(text_weight=-1.0), 160, "needles: text_weight must be a number at least 0"),
        ("needles", dict(values=0), 160, "needles: values must be an integer at least 1, got 0"),
        ("needles", dict(asked=2), 160, "needles: asked must be an integer at least 0 and at most 1, got 2"),
        ("needles", dict(values=9, max_needles=4), 160, "4 needles need rows of 225 tokens"),
        ("needles", dict(key_tokens="1"), 160, "needles: key_tokens must be an integer"),
        ("selective_copying", dict(tokens=80), 160, "needs rows of 161 tokens"),
        ("selective_copying", dict(alphabet=1), 160, "alphabet must be"),
        ("selective_copying", dict(selective=3), 160, "selective must be"),
        ("parity", dict(max_length=159), 160, "needs rows of 161 tokens"),
        ("parity", dict(min_length=0), 160, "1 <= min <= max"),
        ("modular_arithmetic", dict(modulus=1), 160, "modulus must be"),
        ("modular_arithmetic", dict(min_length=2), 160, "3 <= min <= max"),
        ("letter_choice", dict(min_facts=3), 160, "4 <= min <= max"),
        ("letter_choice", dict(max_facts=80), 160, "draws from 164 or more"),
        ("letter_choice", dict(max_facts=50), 100, "needs rows of 113 tokens"),
        ("addition", dict(max_digits=18), 160, "at most 17"),
        ("addition", dict(terms=1), 160, "terms must be"),
        ("addition", {}, 20, "needs rows of 21 tokens"),
        ("variable_tracking", dict(hops=0), 160, "hops must be"),
        ("variable_tracking", dict(chains=9), 160, "needs rows of more than"),
        ("variable_tracking", dict(word_tokens=1, chains=30), 900, "words|draws from"),
        ("common_words", dict(common_times=2), 160, "common_times must be"),
        ("common_words", dict(common=20), 160, "no room for a word that is not common"),
        ("frequent_words", dict(alpha=1.0), 160, "alpha must be"),
        ("frequent_words", {}, 40, "do not have different frequencies"),
    ],
)
def test_options_that_make_no_task_are_refused(name, options, length, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, options, MATERIAL, length)


def test_rows_as_long_as_the_longest_sum_hold_it():
    task = make_task("addition", dict(min_digits=3), MATERIAL, 21)
    assert max((task.example(index)["segment_ids"] > 0).sum() for index in range(60)) == 21  # both sums have four digits


def test_statements_need_text():
    with pytest.raises(ValueError, match="there is none"):
        make_task("variable_tracking", {}, Material((3, 120), 1, 2), 160)
