"""Times the operations against peers in the same run: `python -m kernels_pallas.bench --peer torch|fla [--heads 8 …]`.

Each line has a case, the median times of this package and of the peer, and their ratio, which is above 1 where this package is
faster. Calls of the two alternate.

- `--peer torch`: transformers' own chunked rule in PyTorch (`torch_chunk_gated_delta_rule`), for CPUs. XLA multiplies
  batches of small matrices on one core, so JAX gets one device per core, over which the heads are sharded, as on a mesh.
- `--peer fla`: flash-linear-attention's Triton kernels (gated delta rule, simple GLA), and cuDNN attention of the same
  sizes, for NVIDIA GPUs. It has not been run: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.lab.cases import CASES, Shape, program, random_arrays
from kernels_pallas.recorded import recorded, without_out


def our_call(
    name: str, shape: Shape, implementation: str | None, arrays: Sequence[jax.Array], devices: int = 1
) -> Callable[[], None]:
    """Returns a call of this package's case `name`, the heads sharded over `devices`."""
    function = program(CASES[name], shape, implementation)[0]
    if devices > 1:
        mesh, of_tokens, of_states = jax.make_mesh((devices,), ("heads",)), P(None, None, "heads"), P(None, "heads")
        outs = jax.tree.map(lambda x: of_tokens if x.shape[1] == shape.seq_len else of_states, jax.eval_shape(function, *arrays))
        arrays = [jax.device_put(x, NamedSharding(mesh, of_tokens)) for x in arrays]
        function = jax.shard_map(function, mesh=mesh, in_specs=of_tokens, out_specs=outs, check_vma=False)
    function = jax.jit(function)
    return lambda: jax.block_until_ready(function(*arrays))


def torch_call(function: Callable, arrays: Sequence[jax.Array], backward: bool, device: str) -> Callable[[], None]:
    """Returns a call of torch's `function(*tensors) -> o` on the same numbers.

    Args:
      arrays: the function's arguments; with `backward` the last one is the cotangent of o.
      backward: whether the gradient of every tensor is computed too.
      device: torch's name of it.
    """
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    *inputs, cotangent = arrays if backward else (*arrays, None)

    def tensor(x):
        return torch.tensor(np.asarray(x.astype(jnp.float32)), dtype=kinds[x.dtype.name], device=device)

    tensors = [tensor(x).requires_grad_(backward) for x in inputs]
    cotangent = None if cotangent is None else tensor(cotangent)

    def call():
        if backward:
            o = function(*tensors)
            torch.autograd.grad(o, tensors, None if cotangent is None else cotangent.to(o.dtype))
        else:
            with torch.no_grad():
                function(*tensors)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def transformers_peers() -> dict[str, Callable]:
    """Returns the functions of transformers that compute an operation, by its name."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return {"gated_delta_rule": lambda q, k, v, g, beta: torch_chunk_gated_delta_rule(q, k, v, g, beta)[0]}


def fla_peers() -> dict[str, Callable]:
    """Returns the functions of flash-linear-attention that compute an operation, by its name."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return {
        "gated_delta_rule": lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g=g, beta=beta)[0],
        "linear_attention": lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0],
    }


def attention_call(shape: Shape, arrays: Sequence[jax.Array], backward: bool) -> Callable[[], None]:
    """Returns a call of cuDNN's causal attention on the same q, k, v."""

    def forward(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def both(q, k, v, cotangent):
        o, pull = jax.vjp(forward, q, k, v)
        return o, pull(cotangent)

    function = jax.jit(both if backward else forward)
    inputs = (*arrays[:3], arrays[-1]) if backward else arrays[:3]
    return lambda: jax.block_until_ready(function(*inputs))


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Returns the seconds of each call: the median of 3 calls in each of `rounds`, in which the contenders alternate.

    Before the timed calls there are a pause and a call that is not timed: torch's worker threads spin for a while after a
    call, and would take the cores from the next contender.
    """
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.3)
            call()
            for _ in range(3):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.bench", description=(__doc__ or "").split(": ")[0])
    parser.add_argument("--peer", choices=("torch", "fla"), default="torch")
    parser.add_argument("--implementation", help="of this package; default: xla against torch, pallas_gpu against fla")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--seq-len", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--cores", type=int, help="CPU cores for both; default: all")
    parser.add_argument("--devices", type=int, help="CPU devices of JAX, over which the heads are sharded; default: one per core")
    parser.add_argument("--dim", type=int, nargs="+")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args(argv)
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before JAX or torch count them
        os.environ["OMP_NUM_THREADS"] = str(options.cores)
    gpu = options.peer == "fla"
    devices = 1 if gpu else options.devices or len(os.sched_getaffinity(0))
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    if gpu and jax.default_backend() != "gpu":
        print("--peer fla needs an NVIDIA GPU (its kernels are Triton's); on a CPU use --peer torch", file=sys.stderr)
        return 2
    try:
        peers = fla_peers() if gpu else transformers_peers()
    except ImportError as error:
        print(f"the peer is not installed: {error}", file=sys.stderr)
        return 2
    if gpu:
        shapes = [
            Shape(32768 // t, t, options.heads or 32, d, d)
            for d in options.dim or (128,)
            for t in options.seq_len or (2048, 8192, 32768)
        ]
    else:
        lengths = options.seq_len or (512, 2048)
        sizes = [(options.heads or 1024 // d, d) for d in options.dim or (32, 64, 128)]
        shapes = [Shape(1, t, h, d, d, "float32") for h, d in sizes for t in lengths]
    if options.batch:
        shapes = [s._replace(batch=b) for s in shapes for b in options.batch]
    with recorded(options.out, "kernels_pallas.bench", without_out(sys.argv[1:] if argv is None else argv)):
        compare(shapes, peers, options.implementation or ("pallas_gpu" if gpu else "xla"), devices, options.rounds, gpu)
    return 0


def compare(
    shapes: Sequence[Shape], peers: Mapping[str, Callable], implementation: str, devices: int, rounds: int, gpu: bool
) -> None:
    """Prints the milliseconds of this package and of the peer for every shape and operation, and their ratio.

    Args:
      peers: operation -> the peer's function of the same arrays.
      implementation: of this package.
      devices: JAX devices, over which this package's heads are sharded.
      rounds: see `medians`.
      gpu: also time cuDNN attention.
    """
    print(f"{'case':28} {'B':>3} {'T':>6} {'H':>3} {'D':>4}   ours ms   peer ms   peer / ours")
    for shape in shapes:
        for op, peer in peers.items():
            for name in (op, f"{op}.backward"):
                case = CASES[name]
                arrays = random_arrays(case, shape)
                calls = {
                    "ours": our_call(name, shape, implementation, arrays, devices),
                    "peer": torch_call(peer, arrays, case.backward, "cuda" if gpu else "cpu"),
                }
                if gpu:
                    calls["cudnn"] = attention_call(shape, arrays, case.backward)
                t = medians(calls, rounds)
                sizes = f"{shape.batch:>3} {shape.seq_len:>6} {shape.heads:>3} {shape.key_dim:>4}"
                line = f"{name:28} {sizes}  {1e3 * t['ours']:8.2f}  {1e3 * t['peer']:8.2f}  {t['peer'] / t['ours']:8.2f}"
                print(line + (f"   cuDNN attention {1e3 * t['cudnn']:.2f} ms" if gpu else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
