"""Plans by formula, for devices whose compiler is not at hand: what a step computes and what its collectives send.

The state's bytes are exact. What is sent is counted of each parameter by its sharding, and of activations where their
bytes grow with the tokens: gathers, scatters and sums of parameters and gradients, tensor-parallel sums, keys around the
ring, tokens that visit experts, embeddings. Left out are halos of windows, states passed between chunks and scalars.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from hybrid_jax.config import ATTENTION, MixerSpec, ModelConfig
from hybrid_jax.hardware import Accelerator
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parallel.mesh import AXES, BATCH_AXES, abstract_mesh
from hybrid_jax.parallel.sharding import RULES, partition_spec
from hybrid_jax.parameters import abstract_parameters, logical_axes
from hybrid_jax.plan.program import Job
from hybrid_jax.train.arrangement import Arrangement

COMPUTE, SUM = 2, 4  # bytes of a number in the compute dtype (bf16), and of one that is summed in float32
Sizes = Mapping[str, int]
Axes = tuple[str, ...]


def parameter_count(config: ModelConfig) -> float:
    return float(sum(math.prod(x.shape) for x in abstract_parameters(config).values()))


def flops_by_formula(job: Job) -> float:
    """6 N a token and attention's scores; with full rematerialisation 8 N."""
    c = job.config
    n = parameter_count(job.model_config) - c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    if c.moe:
        experts = 3 * c.hidden_size * c.moe.intermediate_size * c.num_layers
        n -= experts * (c.moe.num_experts - c.moe.experts_per_token)
    full = sum(s == MixerSpec(ATTENTION) for s in c.layers)
    scores = 2 * full * c.num_heads * c.head_dim * job.seq_len
    per_token = n + c.vocab_size * c.hidden_size
    if job.stage == "decode":
        return job.tokens * 2 * (per_token + scores)
    return job.tokens * ((8 if job.remat == "full" else 6) * per_token + (4 if job.remat == "full" else 3) * scores)


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
    """Gathers where parameters are used, and of those that train the gradients: scattered where gathered, else summed."""
    model, shapes = abstract_decoder(job.model_config), abstract_parameters(job.model_config)
    axes, mesh, (forward, backward) = logical_axes(model), abstract_mesh(sizes), _passes(job)
    trains = set() if job.stage == "decode" else set(Arrangement(model, job.phase).split(shapes)[0])
    tokens = (*BATCH_AXES, "seq")
    for name, x in shapes.items():
        spec = [(e,) if isinstance(e, str) else e or () for e in partition_spec(mesh, axes[name])]
        cut = tuple(a for entry in spec for a in entry)
        gathered = tuple(a for a, entry in zip(axes[name], spec, strict=True) if a == "embed" for a in entry)
        whole = COMPUTE * math.prod(x.shape) / found.devices(tuple(a for a in cut if a not in gathered))
        table = name.startswith("embed_tokens.")
        if not table or job.config.tie_embeddings:  # else its tokens travel, not the table
            once = table or name.startswith("lm_head.")  # the head is gathered once for forward and backward
            found.add("all-gather of parameters", gathered, whole, 1 if once else forward)
        if name in trains and backward:
            if not table:
                found.add("reduce-scatter of gradients", gathered, whole)
            rest = tuple(a for a in tokens if a not in cut)
            share = whole / found.devices(gathered) * (SUM / COMPUTE if table else 1)
            found.add("all-reduce of gradients", rest, share, 2)


def _activations(found: Traffic, job: Job, sizes: Sizes):
    """What grows with the tokens. Aligning runs two streams forward and one of them backward."""
    c, (forward, backward) = job.config, _passes(job)
    streams = 2 if job.stage == "align" else 1
    local = job.tokens / found.devices((*BATCH_AXES, "seq"))
    hidden = COMPUTE * local * c.hidden_size
    passes = streams * forward + backward
    # forward after the mixer and after the MLP, backward before them
    found.add("all-reduce of activations", ("tensor",), hidden * c.num_layers * 2 * passes, 2)
    found.add("all-reduce of activations", ("tensor",), hidden * (1 + backward), 2)  # the embedding, and the head's gradient
    found.add("all-to-all of embeddings", RULES["embed"], hidden * (1 + backward))
    if c.moe and (n := sizes.get("expert", 1)) > 1:  # each token, and what experts add to it, visits every device and comes home
        found.add("tokens to experts", ("expert",), 2 * hidden * c.num_layers * passes * n * n / (n - 1))
    n = sizes.get("seq", 1)
    full = sum(s == MixerSpec(ATTENTION) for s in c.layers)
    again = 1 if job.remat == "attention" else forward  # attention's outputs are kept
    runs = COMPUTE * (full * again + (streams - 1) * c.num_layers * again) + backward * full * (COMPUTE + SUM)
    found.add("ring attention", ("seq",), 2 * local * c.num_kv_heads * c.head_dim / sizes.get("tensor", 1) * runs * n)
