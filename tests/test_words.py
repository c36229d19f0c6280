"""Code and guides use the field's words: what reviewers stumbled over does not come back."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    p
    for suffix in ("py", "md", "sh")
    for p in ROOT.glob(f"**/*.{suffix}")
    if not {".venv", ".venv-newest", "golden", "runs", "out", "build", "benchmarks"} & set(p.relative_to(ROOT).parts)
    and p != pathlib.Path(__file__)
)

# What is not to be written -> what to write instead.
WORDS = {
    r"\bthe house\b": "the project, or the code layout",
    r"\blikeliest\b": "top-k, or most likely",
    r"\bcan not\b": "cannot",
    r"\b(public|own|at its) doors?\b": "public function, or entry point",
    r"\b(arrays?|shards?|parts?|parameters?|moments|it|they|everything|tokens) (lies?|lay)\b": "is sharded, is on",
    r"\b(is|are|be|were) cut\b|\bcuts? (over|the|in|tokens)\b": "shard, divide, truncate",
    r"\bwhole (softmax|batch|gradient|array|parameter)\b": "complete, gathered",
    r"\b(bytes|tokens|rows|FLOPs|symbols?|seconds|steps|heads|cycles|process|scalars|GB) a "
    r"(device|layer|step|row|second|head|host|run|kernel)\b": "per: bytes per device",
    r"\bone (symbol|line|entry) a \w+": "per",
    r"\b(is|are|was|be) told\b": "is reported, is printed",
}
ALLOWED = {
    "hybrid_jax/plan/formula.py": ("how many keys a token sees",),
}


@pytest.mark.parametrize("pattern", WORDS)
def test_no_file_has_a_word_of_our_own(pattern):
    found = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if (match := re.search(pattern, line)) and not any(text in line for text in ALLOWED.get(name, ())):
                found.append(f"{name}:{number}: {match[0]!r}: write {WORDS[pattern]}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for():
    for sentence in (
        "mixers of the house",
        "the table is cut over the mesh",
        "where the moments lie",
        "93 GB a device",
        "tokens a second",
        "the whole gradient",
        "a bad row is told",
        "the likeliest token",
    ):
        assert any(re.search(pattern, sentence) for pattern in WORDS), sentence
    for sentence in ("a truncated row", "he lies", "a layer as a whole", "which keys a query sees", "cut off"):
        assert not any(re.search(pattern, sentence) for pattern in WORDS), sentence
