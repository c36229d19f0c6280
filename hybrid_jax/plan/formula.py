"""Plans by formula, for devices whose compiler is not at hand: what a step computes and what its collectives send.

The state's bytes are exact. What is sent is counted of each parameter by its sharding, and of activations where their
bytes grow with the tokens: gathers, scatters and sums of parameters and gradients, tensor-parallel sums, keys around the
ring, tokens that visit experts, embeddings. Left out are halos of windows, states passed between chunks and scalars.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.hardware import Accelerator
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parallel.attention import takes_ring
from hybrid_jax.parallel.mesh import AXES, BATCH_AXES, abstract_mesh
from hybrid_jax.parallel.sharding import RULES, partition_spec
from hybrid_jax.parameters import abstract_parameters, logical_axes
from hybrid_jax.plan.program import Job
from hybrid_jax.train.phase_layout import trained_names

COMPUTE, SUM = 2, 4  # bytes of a number in the compute dtype (bf16), and of one that is summed in float32
TABLE = "embed_tokens.embedding"
Sizes = Mapping[str, int]
Axes = tuple[str, ...]


def parameter_count(config: ModelConfig) -> float:
    return float(sum(math.prod(x.shape) for x in abstract_parameters(config).values()))


def _windows(config: ModelConfig, kinds: Sequence[str]) -> list[tuple[str, int | None]]:
    """(mixer, how many keys a query sees at most; None: all before it) of the layers whose mixers attend to keys."""
    of_kind = {kind: config.options(row.options).window for kind, row in KINDS.items() if row.attends and row.options}
    layers = zip(kinds, config.attention_windows[: len(kinds)], strict=True)  # a stream may have none
    return [(kind, own if kind == ATTENTION else of_kind[kind]) for kind, own in layers if kind == ATTENTION or kind in of_kind]


def _keys_seen(job: Job, kinds: Sequence[str]) -> float:
    """Keys that a token sees, on average over a row, summed over the layers; of a context of `seq_len` when decoding."""
    T, total = job.seq_len, 0.0
    for _, window in _windows(job.config, kinds):
        w = min(window or T, T)
        total += w if job.stage == "decode" else w * (1 - w / (2 * T))
    return total


def _in_ring(job: Job, kinds: Sequence[str], devices: int) -> int:
    """Layers whose keys travel to all devices of `seq`; B'MOJO's windows never do."""
    return sum(
        takes_ring(window, job.seq_len, devices) for kind, window in _windows(job.config, kinds) if not KINDS[kind].recurrent
    )


def _kinds(job: Job) -> tuple[list[str], list[str]]:
    """The mixers of the stream that learns, and of the teacher's, empty but in aligning."""
    own = [s.kind for s in job.config.layers]
    return own, [s.teaching for s in job.model_config.layers] if job.stage == "align" else []


def flops_by_formula(job: Job) -> float:
    """2 for each of a layer's parameters and token, forward, again if rematerialised, backward, and for gradients of those
    that train; of a query's product with a key as much for each of its numbers, two such forward and five backward.

    The head's logits are made again for its gradient, whatever is kept. Aligning has no logits and a second stream that
    only goes forward. Of experts those that a token visits count. A recurrence's own work on its state is left out, and
    gradients are taken to reach the first layer.
    """
    c = job.config
    own, teaching = _kinds(job)
    shapes, fused = abstract_parameters(c), abstract_parameters(job.model_config)
    trains = set() if job.stage == "decode" else trained_names(job.model_config, job.phase.trainable)

    def numbers(names: Iterable[str]) -> float:
        """Of layers' parameters, those that a token meets."""
        visited = c.moe.experts_per_token / c.moe.num_experts if c.moe else 1
        return sum(math.prod(fused[n].shape) * (visited if ".experts." in n else 1) for n in names if n.startswith("layers."))

    product = 2 * c.num_heads * c.head_dim
    layers, seen, head = 2 * numbers(shapes), product * _keys_seen(job, own), 2 * c.vocab_size * c.hidden_size
    if job.stage == "decode":
        return job.tokens * (layers + 2 * seen + head)
    found = layers * (2 if job.remat == "none" else 3) + 2 * numbers(trains)
    found += seen * ((4 if job.remat == "full" else 2) + 5)
    if job.stage == "align":
        found += 2 * numbers(abstract_parameters(job.model_config.teacher())) + 2 * product * _keys_seen(job, teaching)
    else:
        learned = TABLE if c.tie_embeddings else "lm_head.kernel"
        found += head * (4 if learned in trains else 3)
    return job.tokens * found


class Traffic:
    """What one device sends in a step, by kind of collective and the mesh axes it runs over."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.sent = sizes, Counter()

    def devices(self, axes: Axes) -> int:
        return math.prod(self.sizes.get(a, 1) for a in axes)

    def add(self, kind: str, axes: Axes, whole: float, times: float = 1):
        """A collective that brings or takes (n - 1) / n of `whole` bytes among the n devices of these axes."""
        n = self.devices(axes)
        if n > 1 and whole:
            self.sent[kind, tuple(a for a in AXES if a in axes and self.sizes.get(a, 1) > 1)] += times * whole * (n - 1) / n

    def by_kind(self) -> dict[str, float]:
        found = Counter()
        for (kind, _), n in self.sent.items():
            found[kind] += n
        return dict(found)

    def seconds(self, hardware: Accelerator) -> float:
        """Of all collectives one after the other, each at the speed of the links it needs."""
        return sum(n / link_speed(hardware, self.sizes, axes) for (_, axes), n in self.sent.items())


def link_speed(hardware: Accelerator, sizes: Sizes, axes: Axes) -> float:
    """Bytes a second that a device can send among the devices of these mesh axes.

    Devices are numbered with the last mesh axis fastest, `hardware.node` of them in a node. Groups that leave their node
    share its network: of a group's ring one member in each node sends over it, at the speed of the adapters of all its
    members there.
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
    """What a step sends on a mesh of these sizes."""
    found = Traffic(sizes)
    _parameters(found, job, sizes)
    _activations(found, job, sizes)
    return found


def _passes(job: Job) -> tuple[int, int]:
    """How often a layer runs forward and backward."""
    if job.stage == "decode":
        return 1, 0
    return (1 if job.remat == "none" else 2), 1


def _parameters(found: Traffic, job: Job, sizes: Sizes):
    """Gathers where parameters are used, and of those that train the gradients: scattered where gathered, else summed.

    What the teacher's stream alone reads is not gathered again for the gradient; aligning does not read the head.
    """
    model, shapes = abstract_decoder(job.model_config), abstract_parameters(job.model_config)
    axes, mesh, (forward, backward) = logical_axes(model), abstract_mesh(sizes), _passes(job)
    trains = set() if job.stage == "decode" else trained_names(job.model_config, job.phase.trainable)
    own = abstract_parameters(job.config)
    tokens = (*BATCH_AXES, "seq")
    for name, x in shapes.items():
        spec = [(e,) if isinstance(e, str) else e or () for e in partition_spec(mesh, axes[name])]
        cut = tuple(a for entry in spec for a in entry)
        gathered = tuple(a for a, entry in zip(axes[name], spec, strict=True) if a == "embed" for a in entry)
        whole = COMPUTE * math.prod(x.shape) / found.devices(tuple(a for a in cut if a not in gathered))
        table = name == TABLE
        head = name.startswith("lm_head.") or (table and job.config.tie_embeddings)
        if not (table or head):
            found.add("all-gather of parameters", gathered, whole, forward if name in own else 1)
        elif head and job.stage != "align":  # once for forward and backward; of a table that is not the head the tokens travel
            found.add("all-gather of parameters", gathered, whole)
        if name in trains and backward:
            if not table:
                found.add("reduce-scatter of gradients", gathered, whole)
            rest = tuple(a for a in tokens if a not in cut)
            share = whole / found.devices(gathered) * (SUM / COMPUTE if table else 1)
            found.add("all-reduce of gradients", rest, share, 2)


def _activations(found: Traffic, job: Job, sizes: Sizes):
    """What grows with the tokens. The teacher's stream goes forward once: nothing of it is needed for the gradient."""
    c, (forward, backward) = job.config, _passes(job)
    own, teaching = _kinds(job)
    local = job.tokens / found.devices((*BATCH_AXES, "seq"))
    hidden = COMPUTE * local * c.hidden_size
    passes = forward + backward + bool(teaching)
    learned = backward and TABLE in trained_names(job.model_config, job.phase.trainable)
    # forward after the mixer and after the MLP, backward before them
    found.add("all-reduce of activations", ("tensor",), hidden * c.num_layers * 2 * passes, 2)
    # the embedding, and the head's gradient
    found.add("all-reduce of activations", ("tensor",), hidden * (1 + (job.stage == "train")), 2)
    found.add("all-to-all of embeddings", RULES["embed"], hidden * (1 + learned))
    if c.moe and (n := sizes.get("expert", 1)) > 1:  # each token, and what experts add to it, visits every device and comes home
        found.add("tokens to experts", ("expert",), 2 * hidden * c.num_layers * passes * n * n / (n - 1))
    n = sizes.get("seq", 1)
    ours, taught = (_in_ring(job, kinds, n) for kinds in (own, teaching))
    again = 1 if job.remat == "attention" else forward  # attention's outputs are kept
    runs = COMPUTE * (ours * again + taught) + backward * ours * (COMPUTE + SUM)
    found.add("ring attention", ("seq",), 2 * local * c.num_kv_heads * c.head_dim / sizes.get("tensor", 1) * runs * n)
