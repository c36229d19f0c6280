"""Plans one job: whether it fits, what bounds its speed, how long it takes, and what would fit if it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from jax.sharding import Mesh

from hybrid_jax.config import ATTENTION, ModelConfig, parse_pattern
from hybrid_jax.hardware import TPUS, Accelerator, accelerator, device_count
from hybrid_jax.model import REMAT
from hybrid_jax.parallel.mesh import AXES, BATCH_AXES, abstract_mesh, check_mesh_fits, make_mesh, mesh_shape
from hybrid_jax.plan.bound import step_seconds
from hybrid_jax.plan.formula import flops_by_formula, traffic
from hybrid_jax.plan.program import Job, compile_program, make_program, program_flops, topology_devices

LOCAL_TOKENS = 16384  # chosen meshes divide rows over `seq` until a device has this many tokens of a row
FORMULAS = ("next_token", "align_none")  # objectives that `plan.formula` counts
TRIES = 4  # changes that are compiled to find one that fits; each takes minutes
Log = Callable[[str], object]
"""Takes a line of progress."""


@dataclasses.dataclass
class Plan:
    """A job on a mesh. Bytes are per device, FLOPs of all devices together, seconds per step.

    Args:
      topology: e.g. `v5p:4x4x4`.
      mesh: sizes of the axes that are larger than 1, or were asked for.
      job: with its number of rows.
      accelerator: one device.
      devices: how many there are.
      fits: whether `total` fits into the memory of a device; None: not known, because the plan was not compiled.
      compiled: whether the numbers are the compiler's.
      parameters, optimizer, caches, kept, teacher: see `Program`.
      temporaries: bytes beside those and what layers keep; None: not known.
      total: bytes that must fit; a lower bound if `temporaries` is None.
      wire: bytes that a device sends, by kind of collective.
      wire_seconds: for all collectives one after the other.
      flops: rematerialization included.
      parts: seconds that the parts of a step take at least, one after the other (`bound.step_seconds`); empty: not compiled.
      compile_seconds: 0 if it was not compiled.
      note: a condition of the answer, in words.
      advice: a change that fits, if the plan does not.
    """

    topology: str
    mesh: dict[str, int]
    job: Job
    accelerator: Accelerator
    devices: int
    fits: bool | None
    compiled: bool
    parameters: float
    optimizer: float
    caches: float
    kept: float
    temporaries: float | None
    total: float
    wire: dict[str, float]
    wire_seconds: float
    flops: float
    compile_seconds: float
    note: str = ""
    advice: str = ""
    teacher: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def floors(self) -> dict[str, float]:
        """Seconds that each resource alone needs for a step at its peak."""
        held = self.parameters + self.optimizer + self.caches
        return {
            "compute": self.flops / (self.accelerator.flops * self.devices),
            "memory": held / self.accelerator.bandwidth,
            "wire": self.wire_seconds,
        }

    @property
    def floor(self) -> float:
        """Seconds of a step if the slowest resource works at its peak."""
        return max(self.floors.values())

    @property
    def bound(self) -> float:
        """Seconds that a step takes at least: the sum of its parts, or the floor where that is larger or they are not known."""
        return max(sum(self.parts.values()), self.floor)

    def hours(self, tokens: float, efficiency: float) -> float:
        """Returns the hours that `tokens` take if steps reach the fraction `efficiency` of the bound's speed."""
        return tokens / self.job.tokens * self.bound / efficiency / 3600


def spread_pattern(text: str, config: ModelConfig) -> str:
    """Returns the pattern that a text asks for.

    Args:
      text: a pattern, or MIXER:FRACTION for that mixer in this fraction of the layers, evenly spread.
      config: of the model, for its number of layers.

    Raises:
      ValueError: the text is not a pattern for this model.
    """
    symbol, colon, fraction = text.partition(":")
    if not colon:
        parse_pattern(text, config.num_layers)
        return text
    try:
        share = float(fraction)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1 or parse_pattern(symbol)[0].kind == ATTENTION:
        raise ValueError(
            f"--pattern {text!r}: expected MIXER:FRACTION with a fraction in (0, 1], e.g. GKA:0.5, or a complete pattern"
        )
    n = config.num_layers
    return "-".join(symbol if math.floor((i + 1) * share) > math.floor(i * share) else "*" for i in range(n))


def meshes(job: Job, devices: int) -> Iterator[dict[str, int]]:
    """Yields meshes that divide the model and the rows, best first.

    Rows are divided over `seq` until a device has `LOCAL_TOKENS` of one, the other devices shard the parameters over `fsdp`.
    Meshes that differ from this follow in the order of `distance`. It counts doublings: one over or under the size of `seq` is
    1; one of `tensor` 1.5, as each layer's activations are summed over it; one of `expert` 0.5, as each token travels.

    Args:
      job: its rows must be divided by the batch axes, unless they are 0.
      devices: how many.
    """
    config = job.config
    decodes = job.program == "decode"
    wanted = 1 if decodes else max(1, job.seq_len // LOCAL_TOKENS)
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    found = []
    for seq in [1] if decodes else powers:
        for tensor in powers:
            for expert in powers if config.moe or job.teacher is not None and job.teacher.moe else [1]:
                rest, left = divmod(devices, seq * tensor * expert)
                if left or not rest:
                    continue
                sizes = {"fsdp": rest, "expert": expert, "seq": seq, "tensor": tensor}
                distance = abs(math.log2(seq / wanted)) + 1.5 * math.log2(tensor) + 0.5 * math.log2(expert)
                found.append((distance, {a: n for a, n in sizes.items() if n > 1} or {"data": 1}))
    tokens = None if decodes else job.seq_len
    for _, sizes in sorted(found, key=lambda f: f[0]):
        try:
            check_mesh_fits(config, abstract_mesh(sizes), with_rows(job, sizes).rows_at_a_time, tokens, job.teacher)
        except ValueError:
            continue
        yield sizes


def at_least(job: Job, sizes: Mapping[str, int]) -> float:
    """Returns a lower bound of the bytes per device of a job on a mesh: what is known without compiling it."""
    return make_program(job, _without_devices(sizes)).at_least


def make_plan(job: Job, topology: str, sizes: Mapping[str, int] | None = None, log: Log = print) -> Plan:
    """Plans a job.

    Args:
      job: 0 rows stand for one row for each shard of the batch.
      topology: `v5p:4x4x4`, `h100:64`; the name of a TPU alone asks for the smallest slice that fits.
      sizes: of the mesh's axes; default: chosen.
      log: takes lines of progress.

    Raises:
      ValueError: an unknown topology, or a mesh that does not divide the model or the rows.
    """
    chip, hardware, shape = accelerator(topology)
    if shape:
        return _plan_on(job, chip, hardware, shape, sizes, log, advise=True)
    if sizes:
        raise ValueError("--mesh needs a complete --topology, e.g. v5p:4x4x4; without one both are chosen")
    last = None
    for shape in hardware.slices:
        candidate = next(meshes(job, device_count(chip, shape)), None)
        if candidate is None or at_least(with_rows(job, candidate), candidate) > hardware.hbm:
            log(f"{chip}:{shape}: too small for what a step must hold")
            continue
        last = _plan_on(job, chip, hardware, shape, candidate, log)
        if last.fits:
            return last
    if last is None:
        raise ValueError(f"no slice of {chip} is large enough; choose a larger chip, or fewer tokens per row")
    return last


def with_rows(job: Job, sizes: Mapping[str, int]) -> Job:
    """Returns the job with one row for each shard of the batch if it does not say how many."""
    return job if job.rows else dataclasses.replace(job, rows=math.prod(sizes.get(a, 1) for a in BATCH_AXES))


def _without_devices(sizes: Mapping[str, int]) -> Mesh:
    """Returns a mesh that shardings and tracing can use; only the compiler needs devices."""
    return cast(Mesh, abstract_mesh(sizes))


def _plan_on(
    job: Job, chip: str, hardware: Accelerator, shape: str, sizes: Mapping[str, int] | None, log: Log, advise: bool = False
) -> Plan:
    """Plans a job on one topology; with `advise`, looks for a change that fits if it does not."""
    devices = device_count(chip, shape)
    if sizes is None:
        sizes = next(meshes(job, devices), None)
        if sizes is None:
            rows = f"{job.rows} rows" if job.rows else "rows"
            raise ValueError(f"no mesh of {devices} devices divides this model and {rows} of {job.seq_len} tokens; give --mesh")
    else:
        sizes = {axis: n for axis, n in mesh_shape(sizes, devices).items() if n > 1 or axis in sizes}
    asked, job = job, with_rows(job, sizes)
    if chip not in TPUS:
        return _plan_by_formula(job, f"{chip}:{shape}", hardware, devices, sizes)
    program = make_program(job, make_mesh(sizes, topology_devices(chip, shape)))
    log(f"{chip}:{shape}, {mesh_text(sizes)}: tracing and compiling the {job.title} step …")
    compiled = compile_program(program)
    flops, of_recurrences = program_flops(program)
    plan = Plan(
        topology=f"{chip}:{shape}",
        mesh=dict(sizes),
        job=job,
        accelerator=hardware,
        devices=devices,
        fits=compiled.total <= hardware.hbm,
        compiled=True,
        parameters=program.parameters,
        optimizer=program.optimizer,
        caches=program.caches,
        kept=program.kept,
        teacher=program.teacher,
        temporaries=max(compiled.temporaries - program.kept, 0.0),
        total=compiled.total,
        wire=compiled.wire,
        wire_seconds=sum(compiled.wire.values()) / hardware.interconnect,
        flops=flops,
        parts=step_seconds(compiled.operations, chip, hardware, (flops - of_recurrences) / devices),
        compile_seconds=compiled.seconds,
    )
    return dataclasses.replace(plan, advice=_advice(plan, asked, chip, shape, log)) if advise and not plan.fits else plan


def _advice(plan: Plan, asked: Job, chip: str, shape: str, log: Log) -> str:
    """Describes the nearest change that fits, confirmed by the compiler: layers that keep less, or another mesh.

    Changes are skipped if they cannot fit, or would not if the temporaries that the compiler reported shrink only with a
    device's tokens and its share of the heads. At most `TRIES` are compiled.

    Args:
      asked: the job before its rows were filled in: if it has 0, other meshes get their own number of rows.
    """
    sizes, hbm = plan.mesh, plan.accelerator.hbm
    changes = [("full", other) for other in meshes(asked, plan.devices) if other != sizes]
    if plan.job.remat != "full" and plan.job.program != "decode":
        stricter = list(REMAT)[list(REMAT).index(plan.job.remat) + 1 :]
        changes = [(remat, sizes) for remat in stricter] + changes

    def work(job: Job, sizes: Mapping[str, int]) -> float:
        return job.tokens / math.prod(sizes.get(a, 1) for a in AXES)

    tried = 0
    for remat, other in changes:
        job = with_rows(dataclasses.replace(asked, remat=remat), other)
        expected = at_least(job, other) + (plan.temporaries or 0.0) * work(job, other) / work(plan.job, sizes)
        if expected > hbm:
            continue
        if (tried := tried + 1) > TRIES:
            break
        change = f"--mesh {mesh_text(other)} --remat {remat}"
        log(f"it does not fit; trying {change} …")
        compiled = compile_program(make_program(job, make_mesh(other, topology_devices(chip, shape))))
        if compiled.total <= hbm:
            return f"{change} fits: {compiled.total / 1e9:.1f} GB per device"
    return f"no mesh of {plan.topology} is expected to fit; try a larger slice (--topology {chip} finds the smallest)"


def _plan_by_formula(job: Job, topology: str, hardware: Accelerator, devices: int, sizes: Mapping[str, int]) -> Plan:
    """Plans for GPUs, whose compiler is not available here: state exactly, FLOPs and traffic by `plan.formula`.

    What the compiler decides, the temporaries, is not known. So `total` is a lower bound, and a plan below the memory of the
    device may fit or not.

    Raises:
      ValueError: the job is a phase whose objective no formula describes.
    """
    if job.given is not None and job.phase.objective not in FORMULAS:
        raise ValueError(
            f"a step of {job.phase.objective!r} cannot be planned for {topology}: GPUs are planned by formula, and there is one "
            f"for {', '.join(FORMULAS)}; plan it for a TPU, whose compiler answers for every objective"
        )
    program, sent = make_program(job, _without_devices(sizes)), traffic(job, sizes)
    return Plan(
        topology=topology,
        mesh=dict(sizes),
        job=job,
        accelerator=hardware,
        devices=devices,
        fits=False if program.at_least > hardware.hbm else None,
        compiled=False,
        parameters=program.parameters,
        optimizer=program.optimizer,
        caches=program.caches,
        kept=program.kept,
        teacher=program.teacher,
        temporaries=None,
        total=program.at_least,
        wire=sent.by_kind(),
        wire_seconds=sent.seconds(hardware),
        flops=flops_by_formula(job),
        compile_seconds=0.0,
        note="by formula, not compiled: gradients and temporaries are not counted",
    )


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Formats a mesh as `--mesh` takes it."""
    return ",".join(f"{a}={n}" for a, n in sizes.items())
