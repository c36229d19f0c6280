"""The published recipes: their numbers, and that every phase of every one is a step that compiles."""

import dataclasses

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
from hybrid_jax.priming.initialize import check_convertible
from hybrid_jax.train.phase_layout import trained_names

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


def model_of(config, phase, pattern=""):
    """The hybrid in the phase's form, and in a pattern other than the config's."""
    model = config_from_hf(PUBLIC[config.source.removesuffix("-Instruct")]).with_pattern(pattern or config.pattern)
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
    assert sum(len(layer.attention_heads) for layer in hybrid.layers) == 10
    assert [phase for phase, _ in experiment.phases] == ["layers", "distill"]
    assert {layer.kind for layer in hybrid.layers} == {"discrete_mamba2"}
    states = hybrid.options(DiscreteMamba2Config)
    assert states.bias and states.state_size == (8 if name.endswith("-8") else 64)
    for _, phase in experiment.phases:
        assert select_names(abstract_parameters(hybrid.fused(source) if phase.form == "fused" else hybrid), phase.trainable)


def test_an_unknown_retrieval_aware_recipe_is_refused():
    with pytest.raises(ValueError, match="knows Llama-1B, Llama-1B-8, Llama-8B"):
        load_config(["--config=configs/retrieval_aware.py:Llama-7B"])


PROGRESSIVE = "configs/mamba_in_llama.py"
CONVERTED = {  # the layers that each of the first phases converts, at least
    "Stepwise-100": [{*range(0, 32, 4)}, {*range(2, 32, 4)}, {*range(1, 32, 4)}, {3, 11, 19, 27}, {7, 15, 23, 31}, set()],
    "Layerwise": [{layer} for layer in (*range(0, 32, 2), *range(1, 32, 4), *range(3, 32, 8), 7, 23, 15, 31)],
    "EndToEnd": [{*range(0, 32, 2)}, set()],
    "M1": [{*range(28)} - {3, 8, 13, 18, 23, 27}, set(), set()],
}


def progressive(name):
    """The recipe's phases by name, each with the model's pattern in it."""
    config = load_config([f"--config={PROGRESSIVE}:{name}"])
    phases, pattern, found = dict(Experiment.from_config(config, with_data=False).phases), config.pattern, {}
    for key, phase in phases.items():
        pattern = phase.pattern or pattern
        found[key] = phase, pattern
    return config, found


@pytest.mark.parametrize("name", CONVERTED)
def test_a_progressive_recipe_converts_the_published_layers_one_phase_after_the_other(name):
    config, phases = progressive(name)
    model = before = model_of(config, next(iter(phases.values()))[0], "-".join("*" * len(config.pattern.split("-")))).unfused()
    assert len(phases) == len(CONVERTED[name])
    for (phase, pattern), converted in zip(phases.values(), CONVERTED[name], strict=True):
        model = model_of(config, phase, pattern)
        check_convertible(before, model.unfused())
        assert {i for i, (a, b) in enumerate(zip(before.layers, model.unfused().layers, strict=True)) if a != b} == converted
        before = model.unfused()
    names = trained_names(model, phase.trainable)
    assert all(".mamba." in n for n in names) == (phase.trainable != ("all",))


def test_the_numbers_of_progressive_recipes_are_those_of_the_released_code():
    *stepwise, preferences = [phase for phase, _ in progressive("Stepwise-50")[1].values()]
    assert (preferences.objective, preferences.options["beta"], preferences.learning_rate) == ("dpo", 0.01, 5e-7)
    assert len(stepwise) == 2 and [phase.warmup_steps for phase in stepwise] == [1500, 500]
    for phase in stepwise:
        assert (phase.learning_rate, phase.schedule, phase.clip, phase.beta1, phase.beta2) == (8e-5, "cosine", 0.1, 0.9, 0.98)
        assert dict(phase.options) == {"divergence_weight": 0.1 * phase.seq_len, "next_token_weight": 1.0}
    (end, _), (last, _) = progressive("EndToEnd")[1].values()
    assert last == preferences and end.teacher.endswith("70B-Instruct")
    assert dict(end.options) == {"divergence_weight": end.seq_len, "next_token_weight": 0} and end.learning_rate == 2e-5
    distill, answers, reasoning = (phase for phase, _ in progressive("M1")[1].values())
    assert distill.options["kind"] == "reverse" and (distill.seq_len, distill.learning_rate) == (8192, 1e-5)
    assert (answers.objective, answers.seq_len, answers.learning_rate) == ("next_token", 8192, 1e-5)
    assert (reasoning.objective, reasoning.seq_len, reasoning.learning_rate) == ("next_token", 24_576, 6e-6)


def test_progressive_recipes_take_other_mixers_and_refuse_what_is_none():
    assert set(load_config([f"--config={PROGRESSIVE}:Stepwise-87.5-GDN"]).pattern.split("-")) == {"*", "GDN"}
    for wrong in ("Stepwise", "Stepwise-60", "M1-SWA"):
        with pytest.raises(ValueError, match="expected RECIPE or RECIPE-MIXER of Stepwise-25.*Layerwise, EndToEnd, M1 and .*M2"):
            load_config([f"--config={PROGRESSIVE}:{wrong}"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["Stepwise-50", "EndToEnd", "M1"])
def test_every_phase_of_a_progressive_recipe_compiles_and_fits_eight_chips(name, hasty_compiler):
    config, phases = progressive(name)
    mesh = make_mesh({"fsdp": 8}, topology_devices("v5p", "2x2x2"))
    for key, (phase, pattern) in phases.items():
        phase = dataclasses.replace(phase.with_rows(100_000), accumulate=phase.batch_size // 8)
        teacher = config_from_hf(PUBLIC[phase.teacher.removesuffix("-Instruct")]) if phase.teacher else None
        compiled = compile_program(training_program(model_of(config, phase, pattern), phase, mesh, teacher))
        print(f"{name} {key}: {compiled.total / 1e9:.1f} GB per device, compiled in {compiled.seconds:.0f} s")
        assert compiled.total < 102.8e9, key
