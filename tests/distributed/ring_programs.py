"""Programs whose compiled form test_collectives.py reads: compiled for CPU devices or for TPU slices that are not there.

    python -m tests.distributed.ring_programs 0 1 PORT WHAT

prints one line of JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hybrid_jax.data.layout import abstract_batch
from hybrid_jax.mixers import mixer_symbols
from hybrid_jax.parallel.attention import attend
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.sharding import TOKENS, partition_spec
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.program import topology_devices
from hybrid_jax.plan.wire import wire_bytes
from tests.conftest import tiny_model


def model_wire():
    """{pattern: {tokens per row: bytes of collectives a device}} of a layer and its gradients, eight devices along `seq`."""
    mesh, found = make_mesh({"seq": 8}), {}
    for pattern in mixer_symbols():
        found[pattern] = {}
        for tokens in (128, 256):
            model = tiny_model(pattern, vocab_size=62)
            structure, parameters = split_model(model)
            where = NamedSharding(mesh, partition_spec(mesh, TOKENS))
            embedded = jax.ShapeDtypeStruct((1, tokens, model.config.hidden_size), jnp.float32, sharding=where)

            def loss(parameters, embedded, batch, structure=structure):
                model = join_model(structure, parameters)
                model.embed_tokens = lambda ids, dtype: embedded.astype(dtype)  # whose tokens do travel
                hidden, _ = model.hidden_states(batch["input_ids"], batch["segment_ids"], batch["positions"])
                return jnp.sum(hidden**2)

            with jax.set_mesh(mesh):
                step = jax.jit(jax.grad(loss, argnums=(0, 1)))
                compiled = step.lower(parameters, embedded, abstract_batch(1, tokens, where)).compile()
            found[pattern][tokens] = sum(wire_bytes(compiled.as_text()).values())
    return found


def _ring(topology, devices, tokens, **compiler_options):
    mesh = make_mesh({"seq": devices}, topology_devices("v5e", topology))

    def at(shape, *axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(mesh, axes)))

    heads = (*TOKENS, "heads")
    arguments = (
        at((1, tokens, 2, 128), *heads),
        at((1, tokens, 1, 128), *heads),
        at((1, tokens, 1, 128), *heads),
        at((1, tokens), *TOKENS, dtype=jnp.int32),
    )

    def loss(q, k, v, segments):
        return jnp.sum(attend(q, k, v, segments).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile(compiler_options)


def ring_memory():
    """Bytes of a device for ring attention, forward and backward, of 16K tokens on 8 and on 16 devices, and of 32K on 8.

    Everything is in HBM: else the compiler puts up to 128 MB of temporaries into the core's memory (VMEM), which its
    `temp_size_in_bytes` leaves out, so that what is left grows faster than what is needed.
    """
    found = {}
    for name, case in {"8": ("2x4", 8, 16384), "16": ("4x4", 16, 16384), "8 twice": ("2x4", 8, 32768)}.items():
        m = _ring(*case, xla_vf_vmem_memory_space_assignment="false").memory_analysis()
        found[name] = m.temp_size_in_bytes + m.argument_size_in_bytes
    return found


def ring_overlap():
    """Of the ring's loops, how many custom calls (the kernels) run while keys are under way."""
    text, best = _ring("2x2", 4, 4096).as_text(), []
    for computation in text.split("\n\n"):
        under_way, calls = set(), 0
        for line in computation.splitlines():
            name = line.strip().split(" = ")[0].removeprefix("ROOT ").lstrip("%")
            if " collective-permute-start(" in line:
                under_way.add(name)
            elif " collective-permute-done(" in line:
                under_way -= {n for n in under_way if f"%{n})" in line or f"({n})" in line}
            elif under_way and (" custom-call(" in line or " conditional(" in line):
                calls += 1
        if calls:
            best.append(calls)
    return best


def main(process, processes, port, what):
    del process, processes, port
    print(json.dumps({"model_wire": model_wire, "ring_memory": ring_memory, "ring_overlap": ring_overlap}[what]()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
