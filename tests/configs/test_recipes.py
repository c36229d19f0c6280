"""The published recipes: their numbers, and that every phase of every one is a step that compiles."""

import jax
import pytest

from hybrid_jax.config_file import load_config
from hybrid_jax.experiment_config import Experiment
from hybrid_jax.families import config_from_hf
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.mixers import KINDS, DiscreteMamba2Config, kinds_by_symbol
from hybrid_jax.parallel.mesh import abstract_mesh, check_mesh_fits, make_mesh
from hybrid_jax.parameters import abstract_parameters, select_names
from hybrid_jax.plan.program import compile_program, program_flops, topology_devices, training_program

RECIPE = "configs/priming_qwen3.py"
SIZES, MIXERS = ("4B", "8B", "32B"), ("GKA", "GDN", "M2", "SWA")  # as published
SLICES = {"4B": "4x4x4", "8B": "4x4x4", "32B": "4x4x8"}


@pytest.fixture(autouse=True)
def as_a_job_would_compile():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def hasty_compiler():
    """A third of the time, and the memory within a percent; JAX 0.12 has no such option."""
    option = "jax_exec_time_optimization_effort"
    if option not in jax.config.values:
        yield
        return
    jax.config.update(option, -1.0)
    yield
    jax.config.update(option, 0.0)


def recipe(size, mixer, last=""):
    config = load_config([f"--config={RECIPE}:{size}-{mixer}{last}"])
    return config, dict(Experiment.from_config(config, with_data=False).phases)


def model_of(config, phase):
    """The hybrid in the phase's form."""
    model = config_from_hf(PUBLIC[config.source]).with_pattern(config.pattern)
    return model.fused() if phase.form == "fused" else model


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_trains_what_it_says_on_a_mesh_that_fits(size, mixer):
    config, phases = recipe(size, mixer)
    assert config.pattern.split("-").count(mixer) == len(config.pattern.split("-")) // 2
    for name, phase in phases.items():
        model, mesh = model_of(config, phase), abstract_mesh(dict(phase.mesh))
        check_mesh_fits(model, mesh, phase.rows_at_a_time, phase.seq_len)
        assert mesh.size == (128 if size == "32B" else 64)
        names = select_names(abstract_parameters(model), phase.trainable)
        if name == "align":
            assert names and all(f".{KINDS[kinds_by_symbol()[mixer]].parameter_key}." in n for n in names)


def test_the_numbers_are_the_published_ones():
    _, phases = recipe("8B", "GKA")
    align, long, instruct = phases["align"], phases["long_context"], phases["instruct"]
    assert align.tokens_per_step == 2**21 and align.steps == 19_000 and align.warmup_steps == 720
    assert (align.learning_rate, align.schedule, align.clip, align.objective) == (1e-4, "constant", 1.0, "align_none")
    assert long.tokens_per_step == 48 * 131_072 and (long.steps, long.warmup_steps) == (4480, 209)
    assert (long.rope_theta, long.max_position_embeddings, long.schedule) == (5e6, 131_072, "cosine")
    assert instruct.tokens_per_step == 2**21 and instruct.with_rows(6400).steps == 200
    assert instruct.with_rows(6400).warmup_steps == 6
    reasoning = recipe("8B", "GKA", "-reasoning")[1]["reasoning"]
    assert reasoning.tokens_per_step == 2**22 and reasoning.with_rows(1280).warmup_steps == 1


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="SIZE-MIXER"):
        load_config([f"--config={RECIPE}:14B-GKA"])


def test_a_recipe_s_step_compiles_for_its_slice(hasty_compiler):
    pytest.importorskip("libtpu")
    config, phases = recipe("4B", "SWA")
    mesh = make_mesh(dict(phases["align"].mesh), topology_devices("v5p", "4x4x4"))
    program = training_program(model_of(config, phases["align"]), phases["align"], mesh)
    compiled = compile_program(program)
    assert compiled.total < 95e9 and program_flops(program)[0] > 0


@pytest.mark.long
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_phase_of_every_recipe_compiles_and_fits_its_slice(size, mixer, hasty_compiler):
    config, phases = recipe(size, mixer)
    phases |= recipe(size, mixer, "-reasoning")[1]
    devices = topology_devices("v5p", SLICES[size])
    for name, phase in phases.items():
        phase = phase.with_rows(100_000)
        compiled = compile_program(training_program(model_of(config, phase), phase, make_mesh(dict(phase.mesh), devices)))
        print(f"{size} {mixer} {name}: {compiled.total / 1e9:.1f} GB per device, compiled in {compiled.seconds:.0f} s")
        assert compiled.total < 102.8e9, name


MOHAWK = {"Phi-Mamba": 3e9, "Hybrid-Phi-Mamba": 5e9, "Llamba-1B": 8e9, "Llamba-3B": 10e9, "Llamba-8B": 12e9}  # tokens in all


@pytest.mark.parametrize("name", MOHAWK)
def test_a_recipe_of_mohawk_has_its_budget_and_trains_the_mixers_first(name):
    config = load_config([f"--config=configs/mohawk.py:{name}"])
    phases = dict(Experiment.from_config(config, with_data=False).phases)
    assert sum(p.steps * p.tokens_per_step for p in phases.values()) == pytest.approx(MOHAWK[name], rel=1e-3)
    assert config.copy_attention is False and list(phases) == ["matrices", "layers", "distill"]
    for phase in phases.values():
        assert phase.decay_steps == phase.steps // 10 and select_names(
            abstract_parameters(model_of(config, phase)), phase.trainable
        )
    kept = [i for i, symbol in enumerate(config.pattern.split("-")) if symbol == "*"]
    assert kept == ([4, 10, 16, 22] if name.startswith("Hybrid") else [])


def test_mohawk_s_recipes_take_other_mixers_and_refuse_what_is_none():
    assert set(load_config(["--config=configs/mohawk.py:Llamba-1B-GDN"]).pattern.split("-")) == {"GDN"}
    for wrong in ("Llamba", "Llamba-1B-XYZ", "Llamba-1B-SWA"):
        with pytest.raises(ValueError, match="expected RECIPE or RECIPE-MIXER of Phi-Mamba.*Llamba-8B and .*DM2"):
            load_config([f"--config=configs/mohawk.py:{wrong}"])


@pytest.mark.parametrize("name", ["Llama-1B", "Llama-8B", "Llama-1B-8"])
def test_a_retrieval_aware_recipe_keeps_ten_heads_and_skips_the_matrices(name):
    config = load_config([f"--config=configs/retrieval_aware.py:{name}"])
    experiment = Experiment.from_config(config, with_data=False)
    source = experiment.with_mixer_options(config_from_hf(PUBLIC[config.source]))
    hybrid = source.with_pattern(config.pattern)
    assert sum(len(layer.attention_heads) for layer in hybrid.layers) == 10 and [n for n, _ in experiment.phases] == [
        "layers",
        "distill",
    ]
    assert {layer.kind for layer in hybrid.layers} == {"discrete_mamba2"}
    states = hybrid.options(DiscreteMamba2Config)
    assert states.bias and states.state_size == (8 if name.endswith("-8") else 64)
    for _, phase in experiment.phases:
        assert select_names(abstract_parameters(hybrid.fused(source) if phase.form == "fused" else hybrid), phase.trainable)


def test_an_unknown_retrieval_aware_recipe_is_refused():
    with pytest.raises(ValueError, match="knows Llama-1B, Llama-1B-8, Llama-8B"):
        load_config(["--config=configs/retrieval_aware.py:Llama-7B"])
