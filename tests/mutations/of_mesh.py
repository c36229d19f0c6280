"""Mutations of sequence parallelism, sharding and the mesh's checks."""

from tests.mutations import Mutation

PARTS, MESHES, RING = "tests/parallel/test_parts.py", "tests/distributed/test_parity.py", "tests/parallel/test_ring.py"
STATES = (f"{RING}::test_a_chunk_starts_from_what_its_own_segment_left_before_it",)
CONVS = (f"{RING}::test_a_conv_wider_than_a_chunk_sees_the_tokens_of_its_segment",)
SCANS = (f"{RING}::test_an_exclusive_scan_composes_all_maps_before_a_chunk_in_their_order",)
WINDOWS = (f"{RING}::test_the_ring_gives_attention_and_its_gradient_whatever_the_window",)
COSTS = (f"{RING}::test_a_window_costs_no_more_than_all_of_the_row",)
VOCABULARY = (f"{RING}::test_a_vocabulary_in_parts_gives_the_losses_and_the_top_k_tokens_of_all_of_it",)
RECURRENCE, SEQUENCE, SHARDING = (
    "hybrid_jax/parallel/recurrence.py",
    "hybrid_jax/parallel/sequence.py",
    "hybrid_jax/parallel/sharding.py",
)
MESH, ATTENTION, BLOCK, TILES = (f"hybrid_jax/parallel/{name}.py" for name in ("mesh", "attention", "attention_block", "tiles"))

MUTATIONS = [
    Mutation(
        "hybrid_jax/parallel/recurrence.py",
        "if norm is not None and not divides_heads(x.shape[-1] // norm.dim):",
        "if False:",
        "a norm is computed of the part of a head that a device has",
        ("tests/distributed/test_groups.py",),
    ),
    Mutation(
        "hybrid_jax/parallel/norms.py",
        "axis if divides_heads(x.shape[2], axis) else None",
        "axis",
        "keys are sharded over a mesh that does not divide their heads",
        ("tests/distributed/test_groups.py",),
    ),
    Mutation(
        RECURRENCE,
        "A = jnp.where(link.reshape(*link.shape, *[1] * (A.ndim - 2)), A, 0)",
        "A = A",
        "a chunk that begins a segment passes on the earlier state",
        STATES,
    ),
    Mutation(
        RECURRENCE,
        "jnp.where(link[:, :, None, None, None], s, 0)",
        "s",
        "a segment that begins at a chunk's border starts from the earlier state",
        STATES,
    ),
    Mutation(
        RECURRENCE,
        "return applied(A2, A1) if A1.ndim == 5 else A2 * A1",
        "return applied(A1, A2) if A1.ndim == 5 else A2 * A1",
        "transition matrices are multiplied in the wrong order",
        STATES,
    ),
    Mutation(
        RECURRENCE,
        "jax.tree.map(jnp.add, applied(A2, b1), b2)",
        "jax.tree.map(jnp.add, applied(A1, b1), b2)",
        "earlier states decay by their own chunk's decay",
        STATES,
    ),
    Mutation(
        RECURRENCE,
        "before = as_rows(halo(chunks, width - 1) * same[..., None].astype(x.dtype))",
        "before = as_rows(halo(chunks, width - 1))",
        "a conv sees the segment before its own over a border",
        CONVS,
    ),
    Mutation(
        SEQUENCE,
        "if n <= i + hops < 2 * n",
        "if n < i + hops < 2 * n",
        "the middle of the row does not pass on",
        (f"{RING}::test_a_shift_brings_each_chunk_what_one_so_far_before_it_has",),
    ),
    Mutation(
        SEQUENCE,
        "return halo(segment_ids + 1, length) - 1",
        "return halo(segment_ids, length)",
        "the row's first tokens continue a segment of id 0",
        (f"{RING}::test_a_halo_is_the_tokens_before_each_chunk_however_many_chunks_they_span",),
    ),
    Mutation(
        SEQUENCE,
        "        distance *= 2",
        "        distance += 2",
        "chunks are counted more than once in the scan",
        SCANS,
    ),
    Mutation(
        SEQUENCE,
        "return jax.tree.map(lambda x: shift(x, 1), maps)",
        "return maps",
        "the scan includes the chunk itself",
        SCANS,
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
    Mutation(
        ATTENTION,
        "window + tokens // (2 * devices) > tokens // 2",
        "window > tokens // 2",
        "long windows fetch more keys than the ring brings",
        COSTS,
    ),
    Mutation(ATTENTION, "(d + 1) * c <= window", "d * c <= window", "a chunk at a window's edge is seen in full", WINDOWS),
    Mutation(ATTENTION, "Mask(None, 1 - c), []", "Mask(None, 2 - c), []", "a chunk beyond the window is seen a little", WINDOWS),
    Mutation(ATTENTION, "jnp.where(i >= step, 0, 1)", "jnp.where(i > step, 0, 1)", "front chunks miss the row's first", WINDOWS),
    Mutation(ATTENTION, "2 * n - 1 - i - other), (same", "2 * n - i - other), (same", "back chunks stand a chunk too far", WINDOWS),
    Mutation(
        ATTENTION,
        "(from_pair(x + y) for x, y in zip(arrived",
        "(from_pair(y) for x, y in zip(arrived",
        "gradients of keys do not arrive at their device",
        WINDOWS,
    ),
    Mutation(ATTENTION, "dq + own[0], own[1:]", "own[0], own[1:]", "queries forget the keys of other devices", WINDOWS),
    Mutation(
        BLOCK,
        "seen &= nearest < mask.window",
        "seen &= nearest <= mask.window",
        "a tile just beyond a window is computed",
        ("tests/parallel/test_tiled_attention.py::test_exactly_the_tiles_in_which_a_query_sees_a_key_are_visited",),
    ),
    Mutation(
        TILES,
        "ids = ids + jax.lax.axis_index(vocabulary.axis) * size",
        "ids = ids + jax.lax.axis_index(vocabulary.axis)",
        "top-k tokens of later parts have too small ids",
        VOCABULARY,
    ),
    Mutation(TILES, "ids - jax.lax.axis_index(self.axis) * size", "ids", "each part has the first part's targets", VOCABULARY),
    Mutation(
        MESH,
        "shape[free[0]] = devices // fixed",
        "shape[free[0]] = devices",
        "-1 takes all devices",
        ("tests/plan/test_plan.py::test_a_mesh_is_chosen_for_the_rows_that_are_asked_for",),
    ),
    Mutation(
        "hybrid_jax/parallel/head.py",
        "(1 - jnp.square(logits / self.soft_cap)) / self.scaling",
        "1 / self.scaling",
        "a capped head is trained without the cap's derivative",
        ("tests/parallel/test_head.py",),
    ),
    Mutation(
        "hybrid_jax/parallel/tiles.py",
        "dbias = jnp.sum(dproducts, axis=0, dtype=dtype)",
        "dbias = jnp.sum(dproducts[:1], axis=0, dtype=dtype)",
        "the head's bias learns from one token",
        ("tests/parallel/test_head.py",),
    ),
    Mutation(
        "hybrid_jax/parallel/head.py",
        "return 1 / self.scaling",
        "return 1.0",
        "a scaled head is trained without the scale's derivative",
        ("tests/parallel/test_head.py",),
    ),
    Mutation(
        "hybrid_jax/parallel/attention_cudnn.py",
        "jnp.where(jnp.arange(T) < lengths[:, None], first, 0)",
        "first",
        "padding stops rows of one document from being told",
        ("tests/parallel/test_cudnn.py",),
    ),
]
