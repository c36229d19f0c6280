"""Meshes, the sharding table, ring attention, state passing, losses over a sharded vocabulary, and jobs of several processes.

Vocabulary: an *axis* is an axis of the mesh (`data`, `fsdp`, `seq`, `tensor`, `expert`), a *dim* a dimension of an array, and a
*logical axis* the name of a dim in the sharding table (`sharding.RULES`). A *row* is one row of a batch, a *segment* one
document in it. Along `seq` each device holds two *chunks* of every row, its front and its back (zig-zag order, see `sequence`); a
chunk in `kernels_pallas` is another thing, the tokens that a kernel processes at a time. A *halo* is the few tokens before a
chunk. *Passing states* means that each chunk is summarized as an affine map of a state, and an exclusive scan composes the maps
of all chunks before it.

Shapes: B rows, T tokens, S keys, H query heads, Hkv key heads, K key dim, V value dim, D head dim, c tokens of a chunk, N devices.
`README.md` in this folder explains it with pictures, and what to do about a wrong gradient.
"""
