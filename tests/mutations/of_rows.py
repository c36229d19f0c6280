"""Mutations of what makes rows and batches: packing, synthetic tasks, layout, placement on a mesh."""

from tests.mutations import Mutation

PACKING, DATA, PARTS = "tests/data/test_packing.py", "tests/data/test_data.py", "tests/parallel/test_parts.py"
ROWS, LAYOUT = "hybrid_jax/data/packing.py", "hybrid_jax/data/layout.py"
RETRIEVAL, INDUCTION, NEEDLES = (f"hybrid_jax/data/tasks/{name}.py" for name in ("retrieval", "induction", "needles"))
TASKS = "tests/data/test_tasks.py"
SEQUENCE = "hybrid_jax/parallel/sequence.py"

MUTATIONS = [
    Mutation(ROWS, "weights[at + 1 : end] =", "weights[at:end] =", "the first token of a segment is learned", (PACKING, DATA)),
    Mutation(
        ROWS,
        "self.tokens.weights[begin + 1 : begin + size]",
        "self.tokens.weights[begin : begin + size - 1]",
        "weights one token late",
        (PACKING,),
    ),
    Mutation(
        ROWS,
        "begin = np.union1d(starts[starts < end], first_of_row[:-1])",
        "begin = first_of_row[:-1]",
        "documents of a row share a segment",
        (DATA,),
    ),
    Mutation(ROWS, "keep = size <= length", "keep = size < length", "a document of exactly a row is dropped", (PACKING,)),
    Mutation(
        ROWS,
        "np.minimum(np.repeat(size, parts) - nth * length, length)",
        "np.minimum(np.repeat(size, parts), length)",
        "the rest of a split document is too long",
        (PACKING,),
    ),
    Mutation(
        RETRIEVAL,
        "rng.choice(base**tokens, number, replace=False)",
        "rng.choice(base**tokens, number)",
        "keys of a block repeat",
        (DATA,),
    ),
    Mutation(
        RETRIEVAL,
        "order = rng.permutation(n)",
        "order = np.arange(n)",
        "keys are asked in the order in which they were given",
        (DATA,),
    ),
    Mutation(
        RETRIEVAL,
        "np.arange(size) >= self.key_tokens",
        "np.arange(size) < self.key_tokens",
        "keys are learned instead of values",
        (DATA,),
    ),
    Mutation(
        RETRIEVAL,
        "n = int(rng.integers(self.min_pairs, self.max_pairs + 1))",
        "n = self.max_pairs",
        "every block has the most pairs",
        (DATA,),
    ),
    Mutation(
        INDUCTION,
        "weights[period + 1 :] = self.weight",
        "weights[period:] = self.weight",
        "the token that nothing predicts is learned",
        (DATA,),
    ),
    Mutation(RETRIEVAL, "(np.arange(n) - order)", "(order - np.arange(n))", "distances are those of another answer", (TASKS,)),
    Mutation(
        INDUCTION, "distances[period + 1 :] = period", "distances[period + 1 :] = period + 1", "distances are one too far", (TASKS,)
    ),
    Mutation(RETRIEVAL, "base ** np.arange(tokens)[::-1] % base", "base ** np.arange(tokens)[::-1] % 2", "keys repeat", (TASKS,)),
    Mutation(NEEDLES, "= at - places_of[i][value]", "= at - places_of[i][value] - 1", "distances are one too short", (TASKS,)),
    Mutation(NEEDLES, "round(self.depth * room)", "round(self.depth * self.length)", "a needle's depth is of the row", (TASKS,)),
    Mutation(
        NEEDLES,
        "weights[at : at + self.value_tokens]",
        "weights[at - self.key_tokens : at + self.value_tokens]",
        "keys are learned",
        (TASKS,),
    ),
    Mutation(LAYOUT, "np.pad(ids[:, 1:], ((0, 0), (0, 1)))", "ids", "targets are the inputs", (PARTS,)),
    Mutation(LAYOUT, "np.pad(weights[:, 1:], ((0, 0), (0, 1)))", "weights", "weights belong to the wrong targets", (PARTS,)),
    Mutation(
        LAYOUT,
        '"positions": positions_of(segments)',
        '"positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)',
        "positions go on over segments",
        (PARTS,),
    ),
    Mutation(
        SEQUENCE,
        "chunks[[i, 2 * devices - 1 - i]]",
        "chunks[[i, 2 * devices - 2 - i]]",
        "a device has the wrong late chunk",
        (PARTS,),
    ),
    Mutation(
        SEQUENCE,
        "np.argsort(zigzag_order(x.shape[axis], devices))",
        "zigzag_order(x.shape[axis], devices)",
        "the layout is applied twice instead of undone",
        (PARTS,),
    ),
]
