"""The process that compiles layers for a TPU that the machine does not have; started by `layers.py` with libtpu's options."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.checks import check_known
from hybrid_jax.config import ModelConfig, parse_pattern
from hybrid_jax.config_file import parse_value
from hybrid_jax.families import config_from_hf
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.hardware import TPUS
from hybrid_jax.layers.mixer import Mixer
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parameters import join_model, split_model
from hybrid_jax.plan.program import topology_devices
from kernels_pallas.lab.chips import CHIPS
from kernels_pallas.lab.compile import MARK
from kernels_pallas.lab.operations import Operation, read_operations
from kernels_pallas.lab.schedule import read_schedules


def config_of_layer(model: str, mixer: str) -> ModelConfig:
    """Returns the config of one layer of a public model with a mixer: `GKA`, or with its options, `GKA:solver=cg,num_iter=20`.

    Raises:
      ValueError: an unknown symbol or option, or a bad value.
    """
    symbol, colon, given = mixer.partition(":")
    hf = {**PUBLIC[model], "num_hidden_layers": 1, "vocab_size": 1024}
    if colon:
        kind = KINDS[parse_pattern(symbol)[0].kind]
        if kind.options is None:
            raise ValueError(f"{mixer!r}: {symbol} has no options")
        pairs = {name: text for name, _, text in (option.partition("=") for option in given.split(","))}
        known = vars(kind.options())
        check_known(f"{mixer!r}", pairs, known)
        hf[kind.options.KEY] = {name: parse_value(f"{mixer!r}: {name}", text, known[name]) for name, text in pairs.items()}
    return config_from_hf(hf).with_pattern(symbol)


def mixer_program(model: str, mixer: str, seq_len: int, backward: bool) -> tuple[Callable, list[Any]]:
    """Returns a function of parameters, x [1, seq_len, hidden] and, with `backward`, the output's cotangent, and its arguments.

    It computes the input norm and the mixer of a layer in bfloat16, and with `backward` the gradients of x and of the parameters
    of both, as a step that trains the mixers does.
    """
    config = config_of_layer(model, mixer)
    decoder = abstract_decoder(config, dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    structure, parameters = split_model(decoder)
    own = {n: x for n, x in parameters.items() if n.startswith("layers.0.") and ".mlp." not in n and "post_" not in n}
    rest = {n: x for n, x in parameters.items() if n not in own}
    tokens = dict(positions=jnp.arange(seq_len)[None], segment_ids=jnp.ones((1, seq_len), jnp.int32))

    def forward(own, x):
        layer = join_model(structure, {**own, **{n: jnp.zeros(p.shape, p.dtype) for n, p in rest.items()}}).layers[0]
        of_layer: Mixer = layer.mixer(layer.spec.kind)
        return of_layer(layer.mixer_input(x), **tokens)[0]

    def forward_backward(own, x, cotangent):
        y, pull = jax.vjp(forward, own, x)
        return y, pull(cotangent)

    x = jax.ShapeDtypeStruct((1, seq_len, config.hidden_size), jnp.bfloat16)
    return (forward_backward, [own, x, x]) if backward else (forward, [own, x])


def layer_costs(chip: str, model: str, mixer: str, seq_len: int, backward: bool, dump: pathlib.Path) -> dict[str, Any]:
    """Compiles a layer's mixer and returns its costs in cycles per token and head; see `layers.LayerCost`."""
    for old in dump.glob("*"):
        old.unlink()
    function, arguments = mixer_program(model, mixer, seq_len, backward)
    mesh = make_mesh({"data": 1}, topology_devices(chip, CHIPS[chip].topology.partition(":")[2])[:1])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), arguments)
    with jax.set_mesh(mesh):
        hlo = jax.jit(function).lower(*arguments).compile().as_text() or ""
    return summed(read_operations(hlo), chip, seq_len * PUBLIC[model]["num_attention_heads"], dump)


def summed(operations: list[Operation], chip: str, token_heads: int, dump: pathlib.Path) -> dict[str, Any]:
    """Returns the sums over a program's operations, divided by `token_heads`."""
    hardware = CHIPS[chip]
    per_byte = hardware.clock / hardware.bandwidth / token_heads
    forms = {o.form: s.bundles for o in operations if o.grid_steps for s in read_schedules(dump, f"-{o.name}-")}
    kernels: dict[str, tuple[float, float]] = {}
    lines: dict[str, tuple[float, float]] = {}
    result: dict[str, float] = dict.fromkeys(
        ("matmul_floor", "matmul_estimate", "matmul_hbm", "glue_estimate", "glue_hbm", "prefetch_hbm"), 0.0
    )
    for o in operations:
        estimate, hbm = o.cycles / token_heads, o.hbm_bytes * per_byte
        if o.kind == "matmul":
            result["matmul_floor"] += o.flops * hardware.clock / TPUS[chip].flops / token_heads
            result["matmul_estimate"] += estimate
            result["matmul_hbm"] += hbm
        elif o.kind == "prefetch":
            result["prefetch_hbm"] += hbm
        elif o.kind == "kernel":
            name = o.name.split(".")[0]
            bundles = forms.get(o.form, 0) * o.grid_steps / (hardware.cores if o.grid_steps > 1 else 1) / token_heads
            had = kernels.get(name, (0.0, 0.0))
            kernels[name] = (had[0] + bundles, had[1] + hbm)
        else:
            result["glue_estimate"] += estimate
            result["glue_hbm"] += hbm
            had = lines.get(o.source, (0.0, 0.0))
            lines[o.source] = (had[0] + estimate, had[1] + hbm)
    return {**result, "kernels": kernels, "lines": lines}


def main(request: str) -> None:
    """Prints one marked line of JSON per mixer; one that does not compile has `error`, the compiler's message."""
    options = json.loads(request)
    for mixer in options["mixers"]:
        try:
            names = ("chip", "model", "seq_len", "backward")
            result = layer_costs(mixer=mixer, dump=pathlib.Path(options["dump"]), **{n: options[n] for n in names})
        except Exception as error:
            result = dict(error=f"{type(error).__name__}: {error}"[:2000])
        print(MARK + json.dumps(dict(mixer=mixer) | result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
