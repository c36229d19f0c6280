"""Builds, traces and compiles the step that a job would run, for a mesh of devices that this machine does not have."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hybrid_jax.config import ATTENTION, ModelConfig
from hybrid_jax.data.layout import abstract_batch
from hybrid_jax.data.teacher_cache import tokens_kept
from hybrid_jax.flops import count_flops, traced
from hybrid_jax.hardware import GIB
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import abstract_decoder
from hybrid_jax.parallel.mesh import BATCH_AXES, check_mesh_fits
from hybrid_jax.parallel.sharding import TOKENS, parameter_sharding, partition_spec
from hybrid_jax.parameters import abstract_parameters, join_model, logical_axes, split_model
from hybrid_jax.plan.attentions import attentions
from hybrid_jax.plan.bound import RECURRENCES
from hybrid_jax.plan.wire import wire_bytes
from hybrid_jax.train.loop import apply_phase_settings
from hybrid_jax.train.objectives import OBJECTIVES
from hybrid_jax.train.phase import Phase
from hybrid_jax.train.phase_layout import TEACHER, PhaseLayout, parameter_shardings
from hybrid_jax.train.step import make_step
from hybrid_jax.train.teacher import with_student_ids
from kernels_pallas.lab.operations import Operation, read_operations

PROGRAMS = ("align", "train", "decode", "distill")
EPOCH = 10**6  # steps of an epoch, whose rows are not known: more than any warm-up and decay


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned.

    Args:
      config: the hybrid, in one-stream form.
      program: `align` (two streams, the mixers train), `train` (next token), `decode` (one token with caches) or `distill`
        (next-token distributions of another model, which runs in the same step).
      seq_len: tokens per row, or of context when decoding.
      rows: per step, on all devices together; 0: one for each shard of the batch (`planner.with_rows` fills it in).
      trainable: patterns of the names of parameters that train; empty: the mixers when aligning, else all.
      remat: what layers keep for the backward pass, see `model.REMAT`.
      source: what is converted, whose mixers teach those that begin from them (`copies.COPIES`); None: attention teaches.
      teacher: of `distill`, the model that teaches; its rows of ids that `config` has not are left out.
      given: the phase whose step is planned; None: one that is made from the other fields.
      changed: names of the parameters that are not the source's any more, because phases before have trained or rounded them.

    Raises:
      ValueError: an unknown program, `align` for a model without mixers, `distill` without a teacher or with one that cannot teach
        the model.
    """

    config: ModelConfig
    program: str
    seq_len: int
    rows: int
    trainable: tuple[str, ...] = ()
    remat: str = "full"
    source: ModelConfig | None = None
    teacher: ModelConfig | None = None
    given: Phase | None = None
    changed: frozenset[str] = frozenset()

    @classmethod
    def of_phase(
        cls,
        model: ModelConfig,
        phase: Phase,
        source: ModelConfig,
        teacher: ModelConfig | None = None,
        changed: frozenset[str] = frozenset(),
    ) -> Job:
        """Returns the job of one step of an experiment's phase.

        Args:
          model: with which the phase begins (`Experiment.models`).
          phase: what trains, on which rows, with which objective; its mesh is not read.
          source: what is converted.
          teacher: the model that the phase names as its teacher and runs in its step; None: there is none.
          changed: see `Job`.
        """
        phase = phase.with_rows(EPOCH * phase.batch_size)  # how many steps there are makes no difference to one of them
        program = "align" if model.is_fused else "train" if teacher is None else "distill"
        step = (phase.seq_len, phase.batch_size, phase.trainable, phase.remat)
        return cls(model.unfused(), program, *step, source, teacher, phase, changed)

    def __post_init__(self):
        if self.program not in PROGRAMS:
            raise ValueError(f"--program {self.program!r}: expected one of {', '.join(PROGRAMS)}")
        if self.program == "align" and not self.config.is_hybrid:
            raise ValueError("--program align needs a --pattern with a mixer in it: attention has nothing to be aligned with")
        if (self.program == "distill") != (self.teacher is not None):
            raise ValueError("--program distill and --teacher belong together: the model is compared with the teacher")
        if self.teacher is not None:
            object.__setattr__(self, "teacher", with_student_ids(self.teacher, self.config))

    @property
    def model_config(self) -> ModelConfig:
        """The model that the step runs: with both streams when aligning."""
        return self.config.fused(self.source) if self.program == "align" else self.config

    @property
    def phase(self) -> Phase:
        """The training phase of which one step is planned; bf16 matrix products and frozen parameters, where none is given."""
        if self.given is not None:
            return dataclasses.replace(self.given, batch_size=self.rows, remat=self.remat)
        mixers = sorted({KINDS[s.kind].parameter_key for s in self.config.layers if s.kind != ATTENTION})
        align = self.program == "align"
        return Phase(
            objective={"align": "align_none", "distill": "distill"}.get(self.program, "next_token"),
            form="fused" if align else "unfused",
            teacher="" if self.teacher is None else self.teacher.family,  # no directory: `teacher` is all that is needed of it
            trainable=self.trainable or (tuple(rf"\.{m}\." for m in mixers) if align else ("all",)),
            steps=1,
            batch_size=self.rows,
            seq_len=self.seq_len,
            compute_dtype="bfloat16",
            frozen_dtype="bfloat16",
            remat=self.remat,
        )

    @property
    def aligns(self) -> bool:
        """Whether the step runs the teacher's stream beside the student's; a phase may train a fused model without it."""
        return self.program == "align" and (self.given is None or OBJECTIVES[self.given.objective].two_streams)

    @property
    def title(self) -> str:
        """The program, or the objective of the phase that is given."""
        return self.program if self.given is None else self.given.objective

    @property
    def rows_at_a_time(self) -> int:
        """Rows of a part of a step: of a phase that is given, of one of its microbatches."""
        return self.rows if self.given is None else self.rows // self.given.accumulate

    @property
    def tokens(self) -> int:
        """Tokens per step, on all devices together."""
        return self.rows * (1 if self.program == "decode" else self.seq_len)


def topology_devices(chip: str, shape: str) -> list[Any]:
    """Returns descriptions of a TPU slice's devices for the compiler; no TPU is needed.

    Args:
      chip: e.g. `v5p`.
      shape: e.g. `4x4x4`.

    Raises:
      FileNotFoundError: libtpu is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{shape}").devices)
    except (RuntimeError, ImportError) as error:
        raise FileNotFoundError(
            f"the TPU compiler cannot be loaded ({str(error).splitlines()[0]}); install it with pip install 'jax[tpu]'"
        ) from None


def _local_bytes(tree: Any) -> float:
    """Returns the bytes per device of abstract arrays with shardings."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "sharding"))
    )


def _sharded_shapes(shardings: Any, shapes: Any) -> Any:
    """Adds the shardings of one tree to the shapes of another."""
    return jax.tree.map(lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shardings, shapes)


@dataclasses.dataclass
class Program:
    """A step ready to be traced: the function, its abstract arguments, and a breakdown of memory in bytes per device.

    Args:
      function: the jitted step.
      arguments: abstract, with shardings.
      mesh: what the step runs on; one without devices can be traced but not compiled.
      parameters: bytes of all parameters.
      optimizer: bytes of the optimizer's state.
      caches: bytes of caches and recurrent states when decoding.
      kept: bytes of what layers keep for the backward pass under the phase's `remat`; 0 for `none`, which keeps everything
        that the compiler does not make again.
      teacher: bytes of a fixed teacher's own copies, which are part of `parameters`.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    parameters: float
    optimizer: float
    caches: float
    kept: float
    teacher: float = 0.0

    @property
    def at_least(self) -> float:
        """Bytes per device that the step cannot do without: its arguments and what its layers keep."""
        return self.parameters + self.optimizer + self.caches + self.kept


def training_program(
    config: ModelConfig,
    phase: Phase,
    mesh: Mesh,
    teacher: ModelConfig | None = None,
    changed: frozenset[str] = frozenset(),
) -> Program:
    """Builds exactly the step that `train.loop` runs.

    Args:
      config: the model in the phase's form.
      phase: what trains, on which rows, with which objective.
      mesh: of all five axes.
      teacher: the model of `phase.teacher`, of which no weights are needed.
      changed: names of the model's parameters that are not the source's; where the source teaches, it has its own.

    Raises:
      ValueError: the mesh does not divide the model or the batch, or the teacher is missing or cannot teach the model.
    """
    if OBJECTIVES[phase.objective].two_streams and bool(phase.teacher) != (teacher is not None):
        raise ValueError(
            f"phase.teacher is {phase.teacher!r}; a step is planned with its config, and with none where it names none"
        )
    check_mesh_fits(config, mesh, phase.rows_at_a_time, phase.seq_len, teacher)
    model = apply_phase_settings(abstract_decoder(config), phase)
    shapes: Any = abstract_parameters(config)  # shapes go where `PhaseLayout` is annotated with arrays
    taught, source = shapes, None
    if teacher is not None:
        teacher = with_student_ids(teacher, config)
        taught, source = abstract_parameters(teacher), abstract_decoder(teacher)
    elif OBJECTIVES[phase.objective].two_streams:
        structure, own = split_model(model)
        known: Any = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) if n in changed else x for n, x in own.items()}
        source = join_model(structure, known)
    layout = PhaseLayout(model, phase, source)
    trainable, frozen = layout.split(shapes)
    copies = layout.copies(taught)
    state, frozen = jax.eval_shape(layout.make_state, trainable), jax.eval_shape(layout.make_frozen, frozen, copies)
    state_shardings = layout.state_shardings(mesh, state)
    state = _sharded_shapes(state_shardings, state)
    frozen = _sharded_shapes(layout.frozen_shardings(mesh, frozen), frozen)
    kept = tokens_kept(phase.teacher_cache) if phase.teacher_cache else 0
    batch = abstract_batch(phase.batch_size, phase.seq_len, NamedSharding(mesh, partition_spec(mesh, TOKENS)), kept)
    local = phase.rows_at_a_time * phase.seq_len / math.prod(mesh.shape[a] for a in (*BATCH_AXES, "seq"))
    inputs, heads = config.num_layers * config.hidden_size, attentions(config, config.layers)
    outputs = config.head_dim * sum(a.heads // (mesh.shape["tensor"] if a.sharded else 1) for a in heads)
    numbers = {"none": 0, "full": inputs, "attention": inputs + outputs}  # that all layers keep of a token
    return Program(
        make_step(layout, phase, state_shardings),
        (state, frozen, batch),
        mesh,
        parameters=_local_bytes(state.trainable) + _local_bytes(frozen),
        optimizer=_local_bytes(state.optimizer),
        caches=0.0,
        kept=2.0 * local * numbers[phase.remat],
        teacher=_local_bytes({n: x for n, x in frozen.items() if n.startswith(TEACHER)}),
    )


def decoding_program(job: Job, mesh: Mesh) -> Program:
    """Builds the step that decodes one token per row, with caches of `seq_len` tokens and recurrent states; all in bf16.

    Raises:
      ValueError: the mesh does not divide the model or the batch, or shards tokens.
    """
    if mesh.shape["seq"] > 1:
        raise ValueError("--program decode: tokens are not sharded when decoding; use seq=1 and more 'tensor' or 'data'")
    check_mesh_fits(job.config, mesh, job.rows)
    model = abstract_decoder(job.config, jnp.bfloat16)
    structure, _ = nnx.split(model)
    shapes = abstract_parameters(job.config, jnp.bfloat16)
    parameters = _sharded_shapes(parameter_shardings(mesh, shapes, logical_axes(model)), shapes)
    states = jax.eval_shape(lambda: model.init_state(job.rows, job.seq_len))

    def sharded(x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parameter_sharding(mesh, "a decoding state", x.shape, axes))

    states = jax.tree.map(sharded, states, model.state_axes())
    ids = sharded(jax.ShapeDtypeStruct((job.rows, 1), jnp.int32), ("batch", None))

    def step(states, parameters, ids, positions):
        decoder = join_model(structure, parameters)
        hidden, states = decoder.hidden_states(ids, jnp.ones_like(ids), positions, states)
        return states, jnp.argmax(decoder.head(hidden), axis=-1)

    function = jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, states), None))
    sizes = dict(parameters=_local_bytes(parameters), optimizer=0.0, caches=_local_bytes(states), kept=0.0)
    return Program(function, (states, parameters, ids, ids), mesh, **sizes)


def make_program(job: Job, mesh: Mesh) -> Program:
    """Builds the step of a job.

    Raises:
      ValueError: the mesh does not divide the model or the batch.
    """
    return (
        decoding_program(job, mesh)
        if job.program == "decode"
        else training_program(job.model_config, job.phase, mesh, job.teacher, job.changed)
    )


@dataclasses.dataclass
class Compiled:
    """What the TPU compiler says about a step.

    Args:
      total: bytes per device that must fit: arguments and temporaries.
      temporaries: bytes per device beside the arguments, what layers keep included.
      wire: bytes that a device sends per step, by kind of collective; empty where the compiler only says that it does not fit.
      operations: the compiled ones; likewise.
      seconds: that tracing and compiling took.
    """

    total: float
    temporaries: float
    wire: dict[str, float]
    operations: list[Operation]
    seconds: float


def compile_program(program: Program) -> Compiled:
    """Compiles a step for its mesh; of one whose temporaries alone exceed the device's memory the compiler says only their size."""
    begin = time.perf_counter()
    with jax.set_mesh(program.mesh):
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            too_large = re.search(r"HLO temporaries \(([\d.]+)G\) exceeds", str(error))
            if too_large is None:
                raise
            temporaries, held = float(too_large.group(1)) * GIB, program.parameters + program.optimizer + program.caches
            return Compiled(held + temporaries, temporaries, {}, [], time.perf_counter() - begin)
    m = compiled.memory_analysis()
    alias = m.alias_size_in_bytes
    temporaries = m.temp_size_in_bytes + m.generated_code_size_in_bytes + m.output_size_in_bytes - alias
    text, seconds = compiled.as_text(), time.perf_counter() - begin
    return Compiled(m.argument_size_in_bytes + temporaries, temporaries, wire_bytes(text), read_operations(text), seconds)


def program_flops(program: Program) -> tuple[float, float]:
    """Returns the FLOPs of a step on all devices together, rematerialization included, and those of the recurrences' kernels."""
    with jax.set_mesh(program.mesh):
        jaxpr = traced(program.function, *program.arguments)
    return count_flops(jaxpr), count_flops(jaxpr, RECURRENCES)
