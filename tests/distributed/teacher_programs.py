"""Distillation from a larger mixture of experts on a mesh of eight CPU devices, beside one device; run by test_teachers.py.

    python -m tests.distributed.teacher_programs 0 1 PORT

prints one line of JSON: [relative error of the loss, largest relative error of a gradient, share of the teacher on a device].
"""

import json
import sys

import jax
import numpy as np

from hybrid_jax.config import MoEConfig
from hybrid_jax.data.layout import training_batch
from hybrid_jax.parallel.mesh import make_mesh
from hybrid_jax.parallel.placement import in_mesh, own_rows, to_mesh
from hybrid_jax.parallel.sharding import parameter_sharding
from hybrid_jax.parameters import join_model, logical_axes, split_model
from hybrid_jax.train.objectives import make_objective
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout
from hybrid_jax.train.teacher import teach_student_ids
from tests.conftest import relative_error, tiny_model
from tests.train.conftest import LARGER, phase

ROWS, LENGTH = 4, 16


def placed(model, mesh):
    """The model with its parameters sharded over the mesh."""
    (structure, parameters), axes = split_model(model), logical_axes(model)
    if mesh is None:
        return model
    return join_model(
        structure, {n: jax.device_put(x, parameter_sharding(mesh, n, x.shape, axes[n])) for n, x in parameters.items()}
    )


def loss_and_gradients(mesh):
    """They, and which share of the teacher's numbers the first device has."""
    student = placed(tiny_model("*-SWA", vocab_size=62), mesh)
    experts = {**LARGER, "family": "qwen3_moe", "moe": MoEConfig(4, 2, 16)}
    teacher = teach_student_ids(placed(tiny_model("*-GDN-*-*", seed=1, **experts), mesh), student.config)
    layout = PhaseLayout(student, phase(objective="distill", teacher="larger", form="unfused"), teacher)
    state, frozen, _ = layout.begin(mesh, split_model(student)[1], split_model(teacher)[1])
    ids = np.random.default_rng(0).integers(0, 62, (ROWS, LENGTH)).astype(np.int32)
    rows = {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_weights": np.ones(ids.shape, np.float32)}
    batch = training_batch(rows, 1 if mesh is None else mesh.shape["seq"])
    objective = make_objective("distill", {})

    def loss(trainable, frozen, batch):
        student, teacher = layout.models(trainable, frozen)
        return objective(student, batch, teacher).loss.value

    with in_mesh(mesh):
        batch = to_mesh(mesh, batch, ROWS, own_rows(mesh, ROWS))
        found = jax.jit(jax.value_and_grad(loss))(state.trainable, frozen, batch)
    sizes = [(x.addressable_shards[0].data.size, x.size) for n, x in frozen.items() if n.startswith(TEACHER)]
    return *found, sum(own for own, _ in sizes) / sum(all_of_it for _, all_of_it in sizes)


def main(process, processes, port):
    del process, processes, port
    want, gradients, _ = loss_and_gradients(None)
    got, on_mesh, share = loss_and_gradients(make_mesh({"expert": 2, "seq": 2, "tensor": 2}))
    errors = [relative_error(on_mesh[n], gradients[n]) for n in gradients]
    print(json.dumps([relative_error(got, want), max(errors), share]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
