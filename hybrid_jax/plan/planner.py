"""Answers for one job: does it fit, what is it bound by, how long will it take; and what would fit if it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from hybrid_jax.config import ATTENTION, ModelConfig, parse_pattern
from hybrid_jax.hardware import TPUS, Accelerator, accelerator, device_count
from hybrid_jax.model import REMAT
from hybrid_jax.parallel.mesh import BATCH_AXES, abstract_mesh, check_mesh_fits, make_mesh, mesh_shape
from hybrid_jax.plan.formula import flops_by_formula, parameter_count, traffic
from hybrid_jax.plan.program import (
    Compiled,
    Job,
    Program,
    compile_program,
    make_program,
    program_flops,
    state_bytes,
    topology_devices,
)

LOCAL_TOKENS = 16384  # tokens of a row on a device, that a mesh chosen by us aims at


@dataclasses.dataclass
class Plan:
    """A job on a mesh. Bytes are of a device, FLOPs of all devices; seconds of a step."""

    topology: str
    mesh: dict[str, int]
    job: Job
    accelerator: Accelerator
    devices: int
    fits: bool
    compiled: bool
    parameters: float
    optimizer: float
    caches: float
    kept: float
    temporaries: float
    total: float
    wire: dict[str, float]
    wire_seconds: float
    flops: float
    compile_seconds: float
    note: str = ""
    advice: str = ""
    teacher: float = 0.0  # of `parameters`, a fixed teacher's own copies

    @property
    def floors(self) -> dict[str, float]:
        """Seconds that each resource alone would need for a step."""
        held = self.parameters + self.optimizer + self.caches
        return {
            "compute": self.flops / (self.accelerator.flops * self.devices),
            "memory": held / self.accelerator.bandwidth,
            "wire": self.wire_seconds,
        }

    @property
    def floor(self) -> float:
        return max(self.floors.values())

    def hours(self, tokens: float, efficiency: float) -> float:
        """For `tokens`, at `efficiency` of the floor."""
        return tokens / self.job.tokens * self.floor / efficiency / 3600


def spread_pattern(text: str, config: ModelConfig) -> str:
    """A pattern; `GKA:0.5` stands for that mixer in so large a part of the layers, evenly spread.

    Raises:
      ValueError: not a pattern of this model.
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
        raise ValueError(f"--pattern {text!r}: expected MIXER:FRACTION with a fraction in (0, 1], e.g. GKA:0.5, or a whole pattern")
    n = config.num_layers
    return "-".join(symbol if math.floor((i + 1) * share) > math.floor(i * share) else "*" for i in range(n))


def meshes(job: Job, devices: int, copies: int = 1) -> Iterator[dict[str, int]]:
    """Meshes of so many devices that divide the model, best first: few devices a row, parameters cut by the rest.

    Args:
      copies: of the parameters, the size of `data`.
    """
    config = job.config
    wanted = 1 if job.stage == "decode" else max(1, job.seq_len // LOCAL_TOKENS)
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    found = []
    for seq in powers if job.stage != "decode" else [1]:
        for tensor in powers:
            for expert in powers if config.moe else [1]:
                rest, left = divmod(devices, copies * seq * tensor * expert)
                if left or not rest:
                    continue
                sizes = {"data": copies, "fsdp": rest, "expert": expert, "seq": seq, "tensor": tensor}
                far = abs(math.log2(seq / wanted)) + 1.5 * math.log2(tensor) + 0.5 * math.log2(expert)
                found.append((far, {a: n for a, n in sizes.items() if n > 1} or {"data": 1}))
    tokens = job.seq_len if job.stage != "decode" else None
    for _, sizes in sorted(found, key=lambda f: f[0]):
        try:
            check_mesh_fits(config, abstract_mesh(sizes), _with_rows(job, sizes).rows, tokens)
        except ValueError:
            continue
        yield sizes


def torus_meshes(job: Job, chip: str, hardware: Accelerator, shape: str) -> Iterator[dict[str, int]]:
    """`meshes` of a slice. Where it is a torus of three long dimensions (v5p) first the one whose parameters are cut over
    two of them, if it fits by estimate: over all three the compiler gathers by all-reduce, twice the bytes."""
    devices = device_count(chip, shape)
    if chip == "v5p" and min(map(int, shape.split("x"))) >= 4 and job.stage != "decode":
        copied = next(meshes(job, devices, copies=2), None)
        if copied and estimate(_with_rows(job, copied), copied) < 0.8 * hardware.hbm:
            yield copied
    yield from meshes(job, devices)


def rows_of(sizes: dict[str, int]) -> int:
    """Rows of a step: one for every part of the batch."""
    return math.prod(sizes.get(a, 1) for a in BATCH_AXES)


def estimate(job: Job, sizes: dict[str, int]) -> float:
    """A guess of a device's bytes, to rank what to compile: state, gradients and casts cut as parameters are; what layers
    keep; one layer's work. Its constants fit what the compiler said of Qwen3 8B and 32B on v5p.
    """
    c = job.config
    cut = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    local = job.tokens / math.prod(sizes.get(a, 1) for a in (*BATCH_AXES, "seq"))
    matrices = parameter_count(job.model_config) / (cut * sizes.get("expert", 1))
    mixers = parameter_count(c) / (cut * sizes.get("expert", 1))
    if job.stage == "decode":
        return 2 * matrices + state_bytes(c, job.rows, job.seq_len) / math.prod(sizes.values())
    matrices, mixers = (n / sizes.get("seq", 1) for n in (matrices, mixers))
    held = 22 * mixers if job.stage == "train" else 2 * matrices + 0.25 * 14 * mixers
    inner = c.moe.intermediate_size * c.moe.experts_per_token if c.moe else c.intermediate_size
    width = {"full": 1, "attention": 2, "none": 12}[job.remat] * c.num_layers * c.hidden_size + 12 * c.hidden_size
    work = local * (2 * width + (8 * inner + 40 * c.num_heads * c.head_dim) / sizes.get("tensor", 1))
    head = 10 * c.vocab_size * c.hidden_size / sizes.get("tensor", 1)
    return held + 2.5 * matrices + work + head


def make_plan(job: Job, topology: str, sizes: dict[str, int] | None = None, tell=print) -> Plan:
    """Plans a job.

    Args:
      job: its rows are replaced by one for each part of the batch if 0.
      topology: `v5p:4x4x4`, `h100:64`; a TPU's name alone asks for the smallest slice that fits.
      sizes: of the mesh; None: chosen.
      tell: takes lines of progress.

    Raises:
      ValueError: an unknown topology, or a mesh that does not divide the model.
    """
    chip, hardware, shape = accelerator(topology)
    if shape:
        return _on(job, chip, hardware, shape, sizes, tell, advise=True)
    if sizes:
        raise ValueError("--mesh needs a whole --topology, e.g. v5p:4x4x4; without one both are chosen")
    last = None
    for shape in hardware.slices:
        candidate = next(torus_meshes(job, chip, hardware, shape), None)
        if candidate is None or estimate(_with_rows(job, candidate), candidate) > hardware.hbm:
            tell(f"{chip}:{shape}: by estimate too small")
            continue
        last = _on(job, chip, hardware, shape, candidate, tell)
        if last.fits:
            return last
    if last is None:
        raise ValueError(f"no slice of {chip} is large enough by estimate; choose a larger chip, or fewer tokens a row")
    return last


def _with_rows(job: Job, sizes: dict[str, int]) -> Job:
    return job if job.rows else dataclasses.replace(job, rows=rows_of(sizes))


def _on(job, chip, hardware, shape, sizes, tell, advise=False) -> Plan:
    devices = device_count(chip, shape)
    if sizes is None:
        sizes = next(torus_meshes(job, chip, hardware, shape), None)
        if sizes is None:
            rows = f"{job.rows} rows" if job.rows else "rows"
            raise ValueError(f"no mesh of {devices} devices divides this model and {rows} of {job.seq_len} tokens; give --mesh")
    else:
        sizes = {axis: n for axis, n in mesh_shape(sizes, devices).items() if n > 1 or axis in sizes}
    asked, job = job, _with_rows(job, sizes)
    if chip not in TPUS:
        return _analytic(job, chip, hardware, shape, devices, sizes)
    mesh = make_mesh(sizes, topology_devices(chip, shape))
    program = make_program(job, mesh)
    tell(f"{chip}:{shape}, {mesh_text(sizes)}: tracing and compiling the {job.stage} step …")
    compiled = compile_program(program)
    plan = _plan(job, f"{chip}:{shape}", hardware, devices, sizes, program, compiled)
    if not plan.fits and advise:
        plan.advice = _advice(plan, asked, chip, shape, sizes, tell)
    return plan


def _plan(job, topology, hardware, devices, sizes, program: Program, compiled: Compiled) -> Plan:
    return Plan(
        topology=topology,
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
        flops=program_flops(program),
        compile_seconds=compiled.seconds,
    )


def _advice(plan: Plan, asked: Job, chip: str, shape: str, sizes, tell) -> str:
    """The nearest change that fits: less kept, another mesh of the same devices; confirmed by the compiler.

    Args:
      asked: the job as it was given: its rows hold for every mesh, or are one for each part of the batch if 0.
    """
    scale = plan.total / estimate(plan.job, sizes)
    options = []
    if plan.job.remat != "full" and plan.job.stage != "decode":
        kept = list(REMAT)
        options += [(r, sizes) for r in kept[kept.index(plan.job.remat) + 1 :]]
    options += [("full", other) for other in torus_meshes(asked, chip, plan.accelerator, shape) if other != dict(sizes)]
    for remat, other in options:
        job = _with_rows(dataclasses.replace(asked, remat=remat), other)
        if scale * estimate(job, other) > 0.95 * plan.accelerator.hbm:
            continue
        said = f"--mesh {mesh_text(other)} --remat {remat}"
        tell(f"it does not fit; trying {said} …")
        compiled = compile_program(make_program(job, make_mesh(other, topology_devices(chip, shape))))
        if compiled.total <= plan.accelerator.hbm:
            return f"{said} fits: {compiled.total / 1e9:.1f} GB a device"
    return f"no mesh of {plan.topology} is expected to fit; try a larger slice (--topology {chip} finds the smallest)"


def _analytic(job, chip, hardware, shape, devices, sizes) -> Plan:
    """For GPUs, of which no compiler is at hand: the state is exact, activations and traffic are estimates (`plan.formula`)."""
    program = make_program(job, abstract_mesh(sizes))
    total = estimate(job, sizes)
    held = program.parameters + program.optimizer + program.caches
    sent = traffic(job, sizes)
    return Plan(
        topology=f"{chip}:{shape}",
        mesh=dict(sizes),
        job=job,
        accelerator=hardware,
        devices=devices,
        fits=max(total, held + program.kept) < 0.95 * hardware.hbm,
        compiled=False,
        parameters=program.parameters,
        optimizer=program.optimizer,
        caches=program.caches,
        kept=program.kept,
        teacher=program.teacher,
        temporaries=max(total - held - program.kept, 0.0),
        total=max(total, held + program.kept),
        wire=sent.by_kind(),
        wire_seconds=sent.seconds(hardware),
        flops=flops_by_formula(job),
        compile_seconds=0.0,
        note="GPU: by formula, not compiled",
    )


def mesh_text(sizes: dict[str, int]) -> str:
    return ",".join(f"{a}={n}" for a, n in sizes.items())
