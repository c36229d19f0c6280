"""Counts what a step computes and what its collectives send, for devices whose compiler is not available here.

All numbers are counted from shapes and shardings; none is fitted to measurements. Counted are: all-gathers of each parameter
and reduce-scatters or all-reduces of its gradient, by its sharding; all-reduces of activations over `tensor`; keys and values
sent around the ring; tokens sent to experts and to shards of the embedding table. Not counted are halos of windows, states
passed between chunks, all-reduces of low-rank expansions of keys and values, and scalars. Memory for temporaries is not a
formula's to say: the compiler decides it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax

from hybrid_jax.config import MixerSpec, ModelConfig
from hybrid_jax.hardware import Accelerator
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parallel.attention import takes_ring
from hybrid_jax.parallel.mesh import AXES, BATCH_AXES, abstract_mesh
from hybrid_jax.parallel.sharding import RULES, partition_spec
from hybrid_jax.parameters import abstract_parameters, logical_axes
from hybrid_jax.plan.attentions import attentions
from hybrid_jax.plan.program import Job
from hybrid_jax.train.phase_layout import trained_names

COMPUTE, SUM = 2, 4  # bytes per number in the compute dtype (bf16), and per number that is summed in float32
TABLE = "embed_tokens.embedding"
Sizes = Mapping[str, int]
"""Mesh axis -> its number of devices; axes that are missing have one."""
Axes = tuple[str, ...]
"""Names of mesh axes."""


def _keys_seen(job: Job, config: ModelConfig, layers: Sequence[MixerSpec]) -> float:
    """Returns how many keys a token sees, averaged over a row and summed over heads and layers; when decoding, at the row's end."""
    T, total = job.seq_len, 0.0
    for attention in attentions(config, layers):
        w = min(attention.window or T, T)
        total += attention.heads * (w if job.program == "decode" else w * (1 - w / (2 * T)))
    return total


def _sent_heads(job: Job, config: ModelConfig, layers: Sequence[MixerSpec], sizes: Sizes) -> float:
    """Returns the key-value heads of a device whose keys are sent to all devices of `seq`, summed over the layers."""
    seq, tensor = sizes.get("seq", 1), sizes.get("tensor", 1)
    ring = [a for a in attentions(config, layers) if a.ring and takes_ring(a.window, job.seq_len, seq)]
    return sum(a.kv_heads / (tensor if a.sharded else 1) for a in ring)


def _streams(job: Job) -> tuple[list[MixerSpec], list[MixerSpec]]:
    """Returns the layers of the stream that learns, and those of the teacher's stream, which there is only when aligning; another
    model that teaches is no stream.
    """
    teacher = job.model_config.teacher().layers if job.aligns else ()
    return list(job.config.layers), list(teacher)


def flops_by_formula(job: Job) -> float:
    """Returns the FLOPs of a step on all devices together.

    A product with a matrix takes 2 FLOPs per parameter and token. There is one forward, one more if it is rematerialized, one
    for the gradient of its input, and one for the gradient of the matrix if it trains. A product of queries with keys takes 2
    per number; attention has two such products forward and five backward. The head's logits are made again for its
    gradient whatever is kept, so a frozen head has three products and one that trains four. Aligning has no logits, and a
    second stream that only goes forward. A teacher that is another model goes forward too, and makes its logits as often as the
    student. Only the experts that a token visits count.

    Not counted are a recurrence's work on its state and learned mixtures of key heads (`kv_learnable_residual`). Gradients are
    assumed to reach the first layer.
    """
    c = job.config
    own, teaching = _streams(job)
    shapes, fused = abstract_parameters(c), abstract_parameters(job.model_config)
    trains = set() if job.program == "decode" else trained_names(job.model_config, job.phase.trainable)

    def numbers(names: Iterable[str]) -> float:
        """Returns how many of the model's parameters a token is multiplied with in the layers."""
        return _visited(c, {n: fused[n] for n in names})

    product = 2 * c.head_dim
    layers, seen, head = 2 * numbers(shapes), product * _keys_seen(job, c, own), 2 * c.vocab_size * c.hidden_size
    if job.program == "decode":
        return job.tokens * (layers + 2 * seen + head)
    found = layers * (2 if job.remat == "none" else 3) + 2 * numbers(trains)
    found += seen * ((4 if job.remat == "full" else 2) + 5)
    if job.aligns:
        found += 2 * numbers(abstract_parameters(job.model_config.teacher())) + 2 * product * _keys_seen(job, c, teaching)
    else:
        learned = TABLE if c.tie_embeddings else "lm_head.kernel"
        found += head * (4 if learned in trains else 3)
    if (t := job.teacher) is not None:
        found += 2 * _visited(t, abstract_parameters(t)) + 4 * t.head_dim * _keys_seen(job, t, t.layers)
        found += 2 * 2 * c.vocab_size * t.hidden_size
    return job.tokens * found


def _visited(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> float:
    """Returns how many of these parameters a token is multiplied with in the layers: of experts, those that it visits."""
    visited = config.moe.experts_per_token / config.moe.num_experts if config.moe else 1
    return sum(math.prod(x.shape) * (visited if ".experts." in n else 1) for n, x in shapes.items() if n.startswith("layers."))


class Traffic:
    """The bytes that one device sends per step, by kind of collective and the mesh axes it runs over.

    Args:
      sizes: of the mesh.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.sent: defaultdict[tuple[str, Axes], float] = defaultdict(float)

    def devices(self, axes: Axes) -> int:
        """Returns the number of devices along these axes together."""
        return math.prod(self.sizes.get(a, 1) for a in axes)

    def add(self, kind: str, axes: Axes, size: float, times: float = 1) -> None:
        """Adds a collective in which each of the n devices along `axes` sends (n - 1) / n of `size` bytes, `times` times."""
        n = self.devices(axes)
        if n > 1 and size:
            self.sent[kind, tuple(a for a in AXES if a in axes and self.sizes.get(a, 1) > 1)] += times * size * (n - 1) / n

    def by_kind(self) -> dict[str, float]:
        """Returns the bytes by kind of collective, whatever the axes."""
        found: defaultdict[str, float] = defaultdict(float)
        for (kind, _), n in self.sent.items():
            found[kind] += n
        return dict(found)

    def seconds(self, hardware: Accelerator) -> float:
        """Returns the time of all collectives one after the other, each at the speed of the links it needs."""
        return sum(n / link_speed(hardware, self.sizes, axes) for (_, axes), n in self.sent.items())


def link_speed(hardware: Accelerator, sizes: Sizes, axes: Axes) -> float:
    """Returns the bytes per second that a device can send among the devices along these mesh axes.

    Devices are numbered with the last mesh axis fastest, `hardware.node` of them per node. A group that spans nodes forms a
    ring in which one member per node sends to the next node, with the network adapters of all of the group's members there.
    """
    grid = [sizes.get(a, 1) for a in AXES]
    strides = {a: math.prod(grid[i + 1 :]) for i, a in enumerate(AXES)}
    places = [0]
    for axis in axes:
        places = [p + i * strides[axis] for p in places for i in range(sizes.get(axis, 1))]
    if not hardware.node or max(places) < hardware.node:
        return hardware.interconnect
    beside = sum(p < hardware.node for p in places)
    return min(hardware.interconnect, beside * hardware.network)


def traffic(job: Job, sizes: Sizes) -> Traffic:
    """Counts what a device sends per step on a mesh of these sizes."""
    found = Traffic(sizes)
    _parameters(found, job, sizes)
    _activations(found, job, sizes)
    if job.teacher is not None:
        _teacher(found, job, job.teacher, sizes)
    return found


def _passes(job: Job) -> tuple[int, int]:
    """Returns how often a layer runs forward and backward."""
    if job.program == "decode":
        return 1, 0
    return (1 if job.remat == "none" else 2), 1


def _parameters(found: Traffic, job: Job, sizes: Sizes) -> None:
    """Counts all-gathers of parameters, and reduce-scatters or all-reduces of the gradients of those that train.

    Parameters that only the teacher's stream reads are not gathered again for the gradient. Aligning does not read the head.
    Every microbatch sums its own gradients over the devices; parameters are the same in all of them, and are gathered once.
    """
    (forward, backward), parts = _passes(job), job.rows // job.rows_at_a_time
    trains = set() if job.program == "decode" else trained_names(job.model_config, job.phase.trainable)
    own = abstract_parameters(job.config)
    tokens = (*BATCH_AXES, "seq")
    for name, sharded, gathered, size in _sharded(found, job.model_config if job.aligns else job.config, sizes):
        table = name == TABLE
        head = name.startswith("lm_head.") or (table and job.config.tie_embeddings)
        if not (table or head):
            found.add("all-gather of parameters", gathered, size, forward if name in own else 1)
        elif head and not job.aligns:  # once for both passes; a table that is no head is never gathered
            found.add("all-gather of parameters", gathered, size)
        if name in trains and backward:
            if not table:
                found.add("reduce-scatter of gradients", gathered, size, parts)
            rest = tuple(a for a in tokens if a not in sharded)
            share = size / found.devices(gathered) * (SUM / COMPUTE if table else 1)
            found.add("all-reduce of gradients", rest, share, 2 * parts)


def _sharded(found: Traffic, config: ModelConfig, sizes: Sizes) -> Iterator[tuple[str, Axes, Axes, float]]:
    """Yields of every parameter its name, the mesh axes that shard it, those over which it is gathered, and its bytes then."""
    axes, mesh = logical_axes(abstract_decoder(config)), abstract_mesh(sizes)
    for name, x in abstract_parameters(config).items():
        spec = [(e,) if isinstance(e, str) else e or () for e in partition_spec(mesh, axes[name])]
        sharded = tuple(a for entry in spec for a in entry)
        gathered = tuple(a for a, entry in zip(axes[name], spec, strict=True) if a == "embed" for a in entry)
        yield name, sharded, gathered, COMPUTE * math.prod(x.shape) / found.devices(tuple(a for a in sharded if a not in gathered))


def _teacher(found: Traffic, job: Job, config: ModelConfig, sizes: Sizes) -> None:
    """Counts what another model sends that teaches: it goes forward once, and what is gathered of its head serves both passes."""
    for name, _, gathered, size in _sharded(found, config, sizes):
        if name != TABLE or config.tie_embeddings:
            found.add("all-gather of parameters", gathered, size)
    local = job.tokens / found.devices((*BATCH_AXES, "seq"))
    hidden = COMPUTE * local * config.hidden_size
    found.add("all-reduce of activations", ("tensor",), hidden * (config.num_layers * (1 + config.has_mlp) + 1), 2)
    found.add("all-to-all of embeddings", RULES["embed"], hidden)
    if config.moe and (n := sizes.get("expert", 1)) > 1:
        found.add("tokens to experts", ("expert",), 2 * hidden * config.num_layers * n * n / (n - 1))
    heads = _sent_heads(job, config, config.layers, sizes)
    found.add("ring attention", ("seq",), COMPUTE * 2 * local * config.head_dim * heads * sizes.get("seq", 1))


def _activations(found: Traffic, job: Job, sizes: Sizes) -> None:
    """Counts what grows with the number of tokens. The teacher's stream goes forward once and has no gradient."""
    c, (forward, backward) = job.config, _passes(job)
    own, teaching = _streams(job)
    local = job.tokens / found.devices((*BATCH_AXES, "seq"))
    hidden = COMPUTE * local * c.hidden_size
    passes = forward + backward + bool(teaching)
    learned = backward and TABLE in trained_names(job.model_config, job.phase.trainable)
    # per layer and pass: forward behind the mixer and behind the MLP, if there is one, backward in front of them
    found.add("all-reduce of activations", ("tensor",), hidden * c.num_layers * (1 + c.has_mlp) * passes, 2)
    # the embedding, and the head's gradient
    found.add("all-reduce of activations", ("tensor",), hidden * (1 + (job.program != "decode" and not job.aligns)), 2)
    found.add("all-to-all of embeddings", RULES["embed"], hidden * (1 + learned))
    if c.moe and (n := sizes.get("expert", 1)) > 1:  # each token and what experts add to it pass every device and return
        found.add("tokens to experts", ("expert",), 2 * hidden * c.num_layers * passes * n * n / (n - 1))
    ours, teachers = (_sent_heads(job, c, layers, sizes) for layers in (own, teaching))
    again = 1 if job.remat == "attention" else forward  # attention's outputs are kept
    runs = COMPUTE * (ours * again + teachers) + backward * ours * (COMPUTE + SUM)
    found.add("ring attention", ("seq",), 2 * local * c.head_dim * runs * sizes.get("seq", 1))
