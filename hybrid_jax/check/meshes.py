"""Ring attention, state passing and sharded parameters on all devices against one device: loss and every gradient."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from hybrid_jax.check.finding import Finding
from hybrid_jax.check.measuring import largest_error
from hybrid_jax.check.small_model import small_batch, small_model, small_rows
from hybrid_jax.data.layout import training_batch
from hybrid_jax.mixers import mixer_symbols
from hybrid_jax.parallel.distributed import whole_array
from hybrid_jax.parallel.mesh import make_mesh, parse_mesh
from hybrid_jax.parallel.placement import in_mesh, own_rows, to_mesh
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.train.objectives import OBJECTIVES

BOUND = 2e-3  # of loss and gradients in float32


def check(workdir: pathlib.Path) -> Iterator[Finding]:
    """Yields, for every mixer and two meshes over all devices, how far loss and gradients are from those of one device."""
    del workdir
    n = jax.device_count()
    if n == 1:
        yield Finding("meshes", "are not there", None, "one device")
        return
    with jax.default_matmul_precision("highest"):
        for symbol in mixer_symbols():
            for mesh in (f"seq={n}", f"fsdp={n}"):
                loss, gradients = _errors(symbol, mesh, n)
                passed = max(loss, gradients) < BOUND
                yield Finding(f"{symbol} on {mesh}", f"is one device's within {BOUND:g}", passed, f"{loss:.1e}, {gradients:.1e}")


def _errors(symbol: str, mesh_text: str, devices: int) -> tuple[float, float]:
    """Returns the relative errors of the loss and of all gradients together."""
    mesh, model = make_mesh(parse_mesh(mesh_text)), small_model(devices, (symbol,))
    seq = mesh.shape["seq"]
    rows, length = devices if seq == 1 else 2, 8 * 2 * devices if seq > 1 else 24
    structure, parameters = split_model(model)

    def loss(parameters, batch):
        return OBJECTIVES["next_token"](join_model(structure, parameters), batch, None).loss.value

    both = jax.jit(jax.value_and_grad(loss))
    with jax.default_device(jax.local_devices()[0]):
        want = jax.device_get(both(parameters, small_batch(rows, length)))
    axes = logical_axes(model)
    placed = {n: load_sharded(mesh, n, np.asarray(p), axes[n]) for n, p in parameters.items()}
    mine = own_rows(mesh, rows)
    own = {name: x[mine] for name, x in training_batch(small_rows(rows, length), seq).items()}
    with in_mesh(mesh):
        got = both(placed, to_mesh(mesh, own, rows, mine))
    got_loss, got_gradients = whole_array(got[0]), {n: whole_array(g) for n, g in got[1].items()}
    flat = [np.concatenate([np.ravel(g[n]) for n in sorted(g)]) for g in (got_gradients, want[1])]
    return largest_error(got_loss, want[0]), largest_error(*flat)
