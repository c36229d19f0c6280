"""Compares loss and gradients on a mesh with those of one device; run by test_parity.py, one process or several.

    python -m tests.distributed.parity PROCESS PROCESSES PORT CASE...

Prints `CASE: loss ERROR, gradients ERROR (worst NAME)` a case, from process 0.
"""

import dataclasses
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybrid_jax.config import DiscreteMamba2Config, GDNConfig, GKAConfig, Mamba3Config, MoEConfig
from hybrid_jax.data.layout import training_batch
from hybrid_jax.mixers import mixer_symbols
from hybrid_jax.parallel.mesh import make_mesh, parse_mesh
from hybrid_jax.parallel.placement import own_rows, to_mesh
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.step import gradients_of
from tests.conftest import relative_error, tiny_model

# At the usual ridge of 0.02 the solve's condition number, squared in gradients, lifts float32's rounding to 1e-4 on one
# device too (the sum of the gradients of a batch's rows differs so much from the batch's gradient).
# Kernels of 0.2, the tests' usual size, lift it to 1e-5 ... 1e-4, depending on the seed; a mistake is as large with small ones.
SMALL = 0.08
WELL_CONDITIONED = GKAConfig(ridge_strength=1.0, chunk_size=16)
MIXTURE = {"moe": MoEConfig(8, 2, 12), "family": "qwen3_moe"}
LLAMA4 = {
    "moe": MoEConfig(
        8, 2, 12, norm_topk_prob=False, shared_intermediate_size=12, shared_gate=False, sigmoid_router=True, weighted_inputs=True
    ),
    "family": "llama4_text",
    "attention_windows": (5, 11, None),
    "chunked_windows": True,
    "rotary_layers": (True, True, False),
    "qk_norm": False,
    "qk_norm_rotated": True,
    "rotate_halves": False,
    "unrotated_query_scaling": (0.3, 5),
}
MIMO = {"mamba3": Mamba3Config(state_size=4, rank=2, rope_fraction=1.0, rotate_halves=True)}
BIASED = {"discrete_mamba2": DiscreteMamba2Config(bias=True, qk_heads=2, conv_activation=True)}
GROUPED = {"mamba3": Mamba3Config(groups=1, norm_per_head=True)}
RANK = dict(kv_proj_rank=3, kv_learnable_residual=True)
OWN_HEADS = dict(key_heads=2, value_heads=6, value_size=4, state_size=5)
EXPANDED = {"gka": dataclasses.replace(WELL_CONDITIONED, **OWN_HEADS, **RANK), "gdn": GDNConfig(**RANK), "moved": True}
ALL = "*-GKA-GDN-M2-DM2-M3-SWA-BMF"
MIXERS = mixer_symbols()


def packed(length, rows):
    """Segments that cross the borders of every shard, and one row with a tail of padding."""
    segments = np.ones((rows, length), np.int32)
    segments[0, length // 3 :] = 2
    segments[0, length - 3 :] = 3
    segments[-1, length // 2 :] = 0  # so many shards hold padding only
    return segments


# case -> (mesh, pattern, tokens per row, rows, objective, changes to the model)
CASES = {
    **{f"seq8 {s}": ("seq=8", s, 48, 2, "next_token", {}) for s in MIXERS},
    "seq8, chunks of one token": ("seq=8", ALL, 16, 2, "next_token", {}),
    "data2 seq4": ("data=2,seq=4", ALL, 40, 2, "next_token", {}),
    "fsdp2 seq2 tensor2": ("fsdp=2,seq=2,tensor=2", ALL, 24, 2, "next_token", {}),
    "fsdp4 tensor2": ("fsdp=4,tensor=2", ALL, 20, 4, "next_token", {}),
    "both streams": ("data=2,seq=2,tensor=2", "*DA-GKA*-GDN*-M2*-M3*", 24, 2, "align_all", {}),
    "kept heads": ("data=2,seq=2,tensor=2", "GDN[1,2,3]-M2[0]", 24, 2, "next_token", {}),
    "experts": ("expert=4,seq=2", "*-GKA", 24, 4, "next_token", MIXTURE),
    "experts of weighted inputs, chunks": ("expert=2,seq=2,tensor=2", "*-*-*", 24, 4, "next_token", LLAMA4),
    "experts tensor": ("expert=2,fsdp=2,tensor=2", "*-GDN", 16, 4, "next_token", MIXTURE),
    "data2 seq4 of two processes": ("data=2,seq=4", "*-GKA-GDN", 40, 2, "next_token", {}),
    "fsdp2 seq2 tensor2 of two processes": ("fsdp=2,seq=2,tensor=2", "SWA-GKA-M2", 24, 2, "next_token", {}),
    "a teacher of its own": ("data=2,seq=2,tensor=2", "*DA-SWA*", 24, 2, "align_all", {"teacher": True}),
    "distilled": ("data=2,seq=2,tensor=2", "*DA-SWA*", 24, 2, "distill", {}),
    "preferences": ("data=2,seq=2,tensor=2", "*-SWA", 24, 4, "dpo", {"teacher": True}),
    "cached": ("fsdp=2,seq=2,tensor=2", "*-SWA", 24, 2, "distill_cached", {}),
    "in parts": ("data=2,fsdp=2,seq=2", "*-SWA", 24, 8, "next_token", {"parts": 2}),
    "expanded heads": ("fsdp=2,seq=2,tensor=2", "GKA-GDN", 24, 2, "next_token", EXPANDED),
    "several inputs per token": ("data=2,seq=2,tensor=2", "M3", 24, 2, "next_token", MIMO),
    "biases of parts of a map": ("fsdp=2,seq=2,tensor=2", "DM2", 24, 2, "next_token", BIASED),
    "one group of B and C": ("data=2,seq=2,tensor=2", "M3", 24, 2, "next_token", GROUPED),
    "without MLPs": ("fsdp=2,seq=2,tensor=2", "M3", 24, 2, "next_token", {"intermediate_size": 0}),
    "matrices": ("data=2,seq=2,tensor=2", "*DA-GDN*-M2*-DM2*", 24, 2, "align_matrices", {}),
    "scanned": ("fsdp=2,seq=4", "*-GKA-*-GKA-*-GKA", 24, 2, "next_token", {}),
}


def run_case(name):
    mesh_text, pattern, length, rows, objective, changes = CASES[name]
    parts, own_teacher = changes.get("parts", 1), changes.get("teacher", False)
    moved = changes.get("moved", False)  # what begins at 0 does not, so that all of it counts
    changes = {n: x for n, x in changes.items() if n not in ("parts", "teacher", "moved")}
    mesh = make_mesh(parse_mesh(mesh_text))
    model = tiny_model(pattern, vocab_size=62, initializer_range=SMALL, **{"gka": WELL_CONDITIONED, **changes})
    structure, parameters = split_model(model)
    rng = np.random.default_rng(0)
    if moved:
        parameters = {n: x if x.any() else x + SMALL * rng.normal(size=x.shape).astype(x.dtype) for n, x in parameters.items()}
    segments = packed(length, rows)
    if objective == "dpo":  # two pairs in a row, one in the last
        segments = np.where(segments > 0, 1 + np.arange(length) // 6, 0)
    raw = {"input_ids": rng.integers(0, 62, (rows, length)), "segment_ids": segments, "loss_weights": segments > 0}
    if objective == "distill_cached":
        log_q, ids = jax.lax.top_k(jax.nn.log_softmax(rng.normal(size=(rows, length, 62))), 5)
        raw |= {"teacher_ids": np.asarray(ids), "teacher_log_probabilities": np.asarray(log_q)}

    source = tiny_model("-".join("*" * len(model.layers)), seed=1, vocab_size=62) if own_teacher else model
    source_structure, taught = split_model(source)

    def loss(parameters, batch, taught):
        teacher = join_model(source_structure, taught) if own_teacher else None
        return OBJECTIVES[objective](join_model(structure, parameters), batch, teacher).loss.value

    both = jax.value_and_grad(loss)
    want_loss, want = jax.device_get(jax.jit(both)(parameters, training_batch(raw), taught))

    axes = {**logical_axes(source), **logical_axes(model)}
    placed, placed_taught = ({n: load_sharded(mesh, n, np.asarray(p), axes[n]) for n, p in x.items()} for x in (parameters, taught))
    mine = own_rows(mesh, rows)
    batch = to_mesh(mesh, {n: x[mine] for n, x in training_batch(raw, mesh.shape["seq"]).items()}, rows, mine)

    def in_parts(parameters, batch, _):
        grads, metrics = gradients_of(loss_and_metrics, parameters, {}, batch, parts)
        return metrics["loss"].value, grads

    def loss_and_metrics(parameters, frozen, batch):
        return OBJECTIVES[objective](join_model(structure, parameters), batch)[:2]

    with jax.set_mesh(mesh):
        got_loss, got = jax.jit(in_parts if parts > 1 else both)(placed, batch, placed_taught)
    got = {n: multihost_utils.process_allgather(g, tiled=True) for n, g in got.items()}
    # of its own norm, or of a hundredth of the largest gradient's: rounding of six layers weighs on the smallest
    scale = max(float(np.linalg.norm(g)) for g in want.values())
    errors = {n: min(relative_error(got[n], want[n]), float(np.linalg.norm(got[n] - want[n])) / (1e-2 * scale)) for n in want}
    worst = max(errors, key=errors.get)
    got_loss = float(multihost_utils.process_allgather(got_loss, tiled=True))
    return abs(got_loss - want_loss) / abs(want_loss), errors[worst], worst


def main(process, processes, port, *cases):
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    assert jax.device_count() == 8, jax.devices()
    for name in cases or CASES:
        loss, grads, worst = run_case(name)
        if process == "0":
            print(f"{name}: loss {loss:.1e}, gradients {grads:.1e} (worst {worst})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
