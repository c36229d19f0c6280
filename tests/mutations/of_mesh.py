"""Mutations of sequence parallelism, sharding and the mesh's checks."""

from tests.mutations import Mutation

PARTS, MESHES, COLLECTIVES = (
    "tests/parallel/test_parts.py",
    "tests/distributed/test_parity.py",
    "tests/distributed/test_collectives.py",
)
RECURRENCE, SEQUENCE, SHARDING = (
    "hybrid_jax/parallel/recurrence.py",
    "hybrid_jax/parallel/sequence.py",
    "hybrid_jax/parallel/sharding.py",
)
MESH = "hybrid_jax/parallel/mesh.py"

MUTATIONS = [
    Mutation(
        RECURRENCE,
        "A = jnp.where(link.reshape(*link.shape, *[1] * (A.ndim - 2)), A, 0)",
        "A = A",
        "a chunk that begins a segment passes on the earlier state",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        RECURRENCE,
        "jnp.where(link[:, :, None, None, None], s, 0)",
        "s",
        "a segment that begins at a chunk's border starts from the earlier state",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        RECURRENCE,
        "return _act(A2, A1) if A1.ndim == 5 else A2 * A1",
        "return _act(A1, A2) if A1.ndim == 5 else A2 * A1",
        "transition matrices are multiplied in the wrong order",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        RECURRENCE,
        "jax.tree.map(jnp.add, _act(A2, b1), b2)",
        "jax.tree.map(jnp.add, _act(A1, b1), b2)",
        "earlier states decay by their own chunk's decay",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        RECURRENCE,
        "before = halo(chunks, width - 1) * same[..., None].astype(x.dtype)",
        "before = halo(chunks, width - 1)",
        "a conv sees the segment before its own over a border",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        SEQUENCE,
        "if n <= i + distance < 2 * n",
        "if n < i + distance < 2 * n",
        "the middle of the row does not pass on",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        SEQUENCE,
        "return halo(segment_ids + 1, length) - 1",
        "return halo(segment_ids, length)",
        "the row's first tokens continue a segment of id 0",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        SEQUENCE,
        "        distance *= 2",
        "        distance += 2",
        "chunks are counted more than once in the scan",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        SEQUENCE,
        "return jax.tree.map(lambda x: shift(x, 1), maps)",
        "return maps",
        "the scan includes the chunk itself",
        (COLLECTIVES, MESHES),
    ),
    Mutation(
        SHARDING,
        '"vocab": ("tensor",),',
        '"vocab": ("seq",),',
        "the vocabulary is sharded over the tokens' axis",
        (MESHES, "tests/parallel/test_traffic.py", "tests/plan/test_plan.py"),
    ),
    Mutation(
        SHARDING,
        "(constrain(d, *axes),)",
        "(d,)",
        "gradients of gathered parameters are not scattered",
        ("tests/parallel/test_traffic.py",),
    ),
    Mutation(
        MESH,
        '("tensor", tensor, "num_key_value_heads", config.num_kv_heads),',
        "",
        "key heads that do not divide over the mesh are accepted",
        (PARTS,),
    ),
    Mutation(
        MESH,
        'wants.append(("seq", 2 * seq, "seq_len", seq_len))',
        'wants.append(("seq", seq, "seq_len", seq_len))',
        "a row that has no two chunks per device is accepted",
        (PARTS,),
    ),
]
