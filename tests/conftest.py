"""Shared by all tests: where the golden data lives, tiny models, corpora and sources, relative errors, other processes."""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # commands in tests keep no compiled programs in the user's home
# Most of the tests' time is XLA's, compiling programs for the CPU that run once: the newer emitters of fusions (JAX 0.11 has no
# others), and dividing a small program's code between threads, would take more than half of it. Interpreted kernels run in XLA
# too, which else takes x -> bf16 -> float32 for x; Mosaic and Triton round, and the kernels count on it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_parallel_codegen_split_count=1 --xla_allow_excess_precision=false {os.environ.get('XLA_FLAGS', '')}"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from hybrid_jax.config import BMojoConfig, GKAConfig, ModelConfig, SWAConfig, parse_pattern
from hybrid_jax.convert import save_model
from hybrid_jax.data import Corpus, read_corpus
from hybrid_jax.data.tokenizer import save_tokenizer, train_tokenizer
from hybrid_jax.evaluate.measures import batch_sums, padded_batches
from hybrid_jax.mixers import KINDS
from hybrid_jax.model import Decoder
from hybrid_jax.parameters import split_model

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
TEXT = "def f(x):\n    return x + 1\n\nclass A:\n    pass\n" * 40


@pytest.fixture(scope="module", autouse=True)
def free_compiled_programs():
    """A process may map only so many pieces of memory, and every program for the CPU takes some: 300 tests' are too many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


def guides() -> list[pathlib.Path]:
    """Returns the Markdown files of the project, without those of virtual environments, runs and golden data."""
    folders = ("configs", "hybrid_jax", "kernels_pallas", "launch", "tests")
    found = [*ROOT.glob("*.md"), *(p for folder in folders for p in (ROOT / folder).rglob("*.md"))]
    return sorted(p for p in found if GOLDEN not in p.parents)


def relative_error(got, want):
    """|got - want| / |want| (norms), or |got| where want is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tiny_config(pattern, **changes) -> ModelConfig:
    """A Qwen3 of odd sizes: head_dim != hidden / heads, two query heads per key head, windows of 6.

    Args:
      changes: fields of `ModelConfig`, or options of mixers by kind (`gka=GKAConfig(...)`).
    """
    layers = parse_pattern(pattern)
    values = dict(
        family="qwen3",
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layers=layers,
        qk_norm=True,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    mixers = {"swa": SWAConfig(6), "bmojo": BMojoConfig(4, "gka"), "gka": GKAConfig(chunk_size=16)}
    mixers |= {kind: changes.pop(kind) for kind in KINDS if kind in changes}
    return ModelConfig(**{**values, "mixers": tuple(mixers.values()), **changes})


def tiny_model(pattern, seed=0, **changes) -> Decoder:
    return Decoder(tiny_config(pattern, **changes), rngs=nnx.Rngs(seed))


def loss_and_accuracy(model, rows) -> tuple[float, float]:
    """The mean loss (nats) of a model on the tokens of rows that count, and the share of them that it finds most likely."""
    structure, parameters = split_model(model)
    loss, right, weight = sum(np.asarray(batch_sums(structure, parameters, b), np.float64) for b in padded_batches(rows))
    return float(loss / weight), float(right / weight)


def cpu_devices(count) -> dict[str, str]:
    """Returns the environment in which another process of the tests has so many CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def run_processes(module, processes, *arguments, devices=8, timeout=900):
    """Starts `python -m module PROCESS PROCESSES PORT *arguments` in every process; the first one's output."""
    port = free_port()
    env = cpu_devices(devices // processes)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(i), str(processes), str(port), *arguments],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    outs = []
    try:
        outs = [p.communicate(timeout=timeout) for p in running]
    finally:
        for p in running:
            p.kill()
    for p, (_, errors) in zip(running, outs, strict=True):
        assert p.returncode == 0, errors[-3000:]
    return outs[0][0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Forty small Python files, with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"file{i}.py").write_text(TEXT + f"# file {i}\n" * i)
    model = tmp_path_factory.mktemp("model")
    save_tokenizer(train_tokenizer([TEXT], 300), model, 256)
    return read_corpus({"text": str(folder)}, model)


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level tokenizer of 270 tokens at most."""
    return train_tokenizer(["abc def " * 50], 270)


@pytest.fixture
def model(tokenizer, tmp_path) -> pathlib.Path:
    """The directory of a model of one attention layer, with `tokenizer`."""
    save_model(tiny_model("*", vocab_size=tokenizer.get_vocab_size()), tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model", 256)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def made_source(tmp_path_factory):
    """A run that makes a source from nothing; (its model directory, its text)."""
    from hybrid_jax.experiment import run_experiment  # imports the training stack, which few tests need

    folder = tmp_path_factory.mktemp("source")
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"file{i}.py").write_text("def f(x):\n    return x + 1\n" * 20)
    model = dict(
        model_type="qwen3",
        vocab_size=270,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    pretrain = dict(objective="next_token", steps=2, batch_size=2, seq_len=32)
    config = ConfigDict(
        {
            "model": model,
            "schedule": ("pretrain",),
            "phases": {"pretrain": pretrain},
            "data": {"text": str(folder / "text"), "mix": {"text": 1.0}},
            "seed": 0,
        }
    )
    return run_experiment(config, folder / "run"), str(folder / "text")
