"""Proof that a checkpoint is read as it is: each tensor, the bytes that come back, each layer's output beside transformers'."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hybrid_jax.config import ModelConfig
from hybrid_jax.convert import load_model
from hybrid_jax.convert.load import StoredParameters, open_parameters
from hybrid_jax.convert.names import along
from hybrid_jax.convert.quantized import QuantizedTensor
from hybrid_jax.convert.save import hf_pieces
from hybrid_jax.data.tokenizer import load_tokenizer
from hybrid_jax.evaluate.report.document import Block, Heading, Picture, Table, Text, as_html, as_markdown
from hybrid_jax.families import FAMILIES
from hybrid_jax.files import new_directory
from hybrid_jax.parallel.sharding import load_sharded
from hybrid_jax.parameters import abstract_marks

TOKENS = 96
TOLERANCE = 1e-4
CONTEXT = "original_max_position_embeddings"
SAMPLE = (
    "A recurrent layer keeps a state of a fixed size, and attention keeps every token. Both read the tokens that came before: "
    "x = [1, 2, 3]; y = sum(x) / len(x)\nThe first forgets what it has no room for, and the second pays for all of it, "
    "in memory and in time, with every token that is added to the text.\n"
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint's files.

    Args:
      name, file, dtype, shape: as stored; the dtype by safetensors' name.
      parameters: ours that are made of it; none: it is not used.
      returns: whether exactly these bytes are written by an export; None: it is not used.
      sha256: of its bytes.
      quantized: it is read as a dense tensor, whose dtype and shape these are, and is what an export is compared with.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    returns: bool | None
    sha256: str
    quantized: bool = False


@dataclasses.dataclass(frozen=True)
class Parity:
    """What `verify` found.

    Args:
      tensors: of the files, by name.
      missing: tensors that an export writes and the files do not hold.
      layers: relative error of the embeddings, of every layer's output and of the final norm's, largest difference over largest
        value, in float32; None: transformers was not asked.
      logits: the same of the logits; None as `layers`.
      why_not: why transformers was not asked; empty if it was.
      untested: what the sample was too short for, so that a mistake in it would not be found.
    """

    tensors: tuple[StoredTensor, ...]
    missing: tuple[str, ...]
    layers: tuple[float, ...] | None
    logits: float | None
    why_not: str = ""
    untested: tuple[str, ...] = ()

    def off(self, tolerance: float) -> list[str]:
        """Returns what is wrong, in words; nothing: the checkpoint is read as it is."""
        changed = [t for t in self.tensors if t.returns is False]
        found = []
        if changed:
            first = f"the first {changed[0].name}, {changed[0].dtype}"
            found.append(f"{len(changed)} tensors do not come back as they are stored, {first}")
        if self.missing:
            found.append(f"{len(self.missing)} tensors of an export are not in the files, the first {self.missing[0]}")
        if self.layers is not None and self.logits is not None:
            far = [
                (name, e)
                for name, e in (*zip(self.places(), self.layers, strict=True), ("logits", self.logits))
                if not e <= tolerance
            ]
            if far:
                found.append(f"{far[0][0]}: relative error {far[0][1]:.1e} to transformers, more than {tolerance:.1e}")
        return found

    def places(self) -> list[str]:
        """Returns the names of what `layers` compares."""
        layers = range(len(self.layers or ()) - 2)
        return ["embeddings", *(f"layer {i}" for i in layers), "final norm"]


def verify(path: str | pathlib.Path, tokens: int = TOKENS) -> Parity:
    """Reads a checkpoint, writes its tensors again, and compares every layer's output with transformers' own class in float32.

    Transformers is asked where it and torch are installed and the model is no hybrid.

    Args:
      path: a model directory.
      tokens: of the sample text.

    Raises:
      FileNotFoundError, ValueError: as `load_model`.
    """
    path = pathlib.Path(path)
    config, parameters = open_parameters(path)
    stored, missing = _round_trip(config, parameters)
    why_not = _why_not(config)
    if not why_not and any(t.quantized for t in stored):
        why_not = "its weights are quantized, and transformers would compute with them as they are"
    if why_not:
        return Parity(stored, missing, None, None, why_not)
    ids = _sample(path, config.vocab_size, min(tokens, config.max_position_embeddings))
    return Parity(stored, missing, *_errors(path, ids), untested=_untested(config, ids.shape[1]))


def _untested(config: ModelConfig, tokens: int) -> tuple[str, ...]:
    """Names the windows that hide no token of a sample of so many tokens, and factors of LongRoPE that it does not get."""
    limit = config.max_position_embeddings
    windows = sorted({w for w in config.attention_windows if w is not None and tokens <= w < limit})
    contexts = sorted({r.number(CONTEXT) for r in (config.rope, config.window_rope) if r is not None and r.kind == "longrope"})
    longer = [f"the long factors of longrope, for more than {n} tokens" for n in contexts if tokens <= n < limit]
    return (*(f"windows of {w} tokens" for w in windows), *longer)


def _round_trip(config: ModelConfig, parameters: StoredParameters) -> tuple[tuple[StoredTensor, ...], tuple[str, ...]]:
    """Loads one parameter after the other and compares the tensors of an export with the files.

    Returns:
      Every tensor of the files, and the names that an export has and the files have not.
    """
    stated = abstract_marks(config)
    stored_as = {t.name: stored for tensors in parameters.table.values() for t, stored in tensors}
    made_of: dict[str, list[str]] = {}
    for name, tensors in parameters.table.items():
        for stored in dict.fromkeys(stored for _, stored in tensors):
            made_of.setdefault(stored, []).append(name)
    returns: dict[str, bool] = {}
    missing = set()
    again = ((n, load_sharded(None, n, x, stated[n].axes)) for n, x in parameters.items())
    for name, value, row, axis, _ in hf_pieces(config, again):
        if name not in stored_as:
            missing.add(name)
            continue
        stored = stored_as[name]
        wanted = parameters.files[stored].view()[along(axis, row, row + value.shape[axis])]
        returns[stored] = returns.get(stored, True) and _same_bytes(value, wanted)
    found = [
        StoredTensor(
            name=name,
            file=t.path.name,
            dtype=t.dtype,
            shape=t.shape,
            parameters=tuple(made_of.get(name, ())),
            returns=returns.get(name, False) if name in made_of else None,
            sha256=t.hash(),
            quantized=isinstance(t, QuantizedTensor),
        )
        for name, t in sorted(parameters.files.items())
    ]
    return tuple(found), tuple(sorted(missing))


def _finite(value: Any) -> Any:
    """Returns a tree of JSON's types with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other))
    return np.array_equal(left, right)


def _why_not(config: ModelConfig) -> str:
    if config.is_hybrid:
        return "transformers has no class for hybrids; the source that it was made of can be verified"
    if FAMILIES[config.family].own_layout is not None:
        return f"transformers has no class for {FAMILIES[config.family].architecture}"
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install {' '.join(absent)})" if absent else ""


def _sample(path: pathlib.Path, vocab_size: int, tokens: int) -> np.ndarray:
    """Returns the ids [1, tokens] of the sample text; of a model without a tokenizer, ids spread over the vocabulary."""
    if (path / "tokenizer.json").is_file():
        ids = load_tokenizer(path).encode(SAMPLE * (1 + tokens // 16)).ids[:tokens]
        if ids and max(ids) < vocab_size:
            return np.array([ids], np.int32)
    return (np.arange(tokens, dtype=np.int64)[None] * 7919 % vocab_size).astype(np.int32)


def _errors(path: pathlib.Path, ids: np.ndarray) -> tuple[tuple[float, ...], float]:
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = theirs(torch.tensor(ids.astype(np.int64)), output_hidden_states=True, use_cache=False)
    wanted = [h.numpy() for h in out.hidden_states]
    del theirs
    model = load_model(path, dtype=jnp.float32)
    hidden, at = model.inputs(jnp.asarray(ids))

    def run(layer, h):
        h = layer.run(layer.spec.kind, h, **at)[0].hidden
        return h, h

    last, layers = model.through_layers(run, hidden)
    normed = model.norm(last)
    found = [hidden, *layers[:-1], normed]  # transformers gives the last layer's output behind the final norm
    return tuple(_error(a, b) for a, b in zip(found, wanted, strict=True)), _error(model.head(normed), out.logits.numpy())


def _error(found, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float32) - wanted).max() / np.abs(wanted).max())


def write_parity(parity: Parity, out: str | pathlib.Path, title: str, tolerance: float = TOLERANCE) -> pathlib.Path:
    """Writes report.md, report.html, parity.json and, if transformers was asked, layers.png into a new directory.

    Args:
      title: names the checkpoint.
      tolerance: relative error that is not off.

    Returns:
      The path of report.md.

    Raises:
      FileExistsError, PermissionError, NotADirectoryError: `out` cannot be made.
    """
    wrong = parity.off(tolerance)
    used = [t for t in parity.tensors if t.returns is not None]
    dequantized = sum(t.quantized for t in used)
    dense = f", {dequantized} of them as they are dequantized" if dequantized else ""
    verdict = "; ".join(wrong) or f"{len(used)} tensors come back bit for bit{dense}"
    with new_directory(out) as directory:
        blocks: list[Block] = [Heading(f"Parity of {title}", 1), Text(f"Off: {verdict}." if wrong else f"In order: {verdict}.")]
        if parity.layers is not None and parity.logits is not None:
            errors = [*zip(parity.places(), parity.layers, strict=True), ("logits", parity.logits)]
            _draw(errors, tolerance, directory / "layers.png")
            blocks += [
                Heading("Outputs beside transformers'"),
                Text(f"Largest difference over largest value, in float32; more than {tolerance:.1e} is off."),
                *([Text(f"Not tested, because the sample is too short: {'; '.join(parity.untested)}.")] if parity.untested else []),
                Picture(directory / "layers.png", "relative error by layer"),
                Table(("output", "relative error"), [(name, f"{error:.1e}") for name, error in errors]),
            ]
        else:
            blocks.append(Text(f"Outputs were not compared with transformers: {parity.why_not}."))
        blocks += [Heading("Tensors"), _tensor_table(parity)]
        (directory / "report.md").write_text(as_markdown(blocks))
        (directory / "report.html").write_text(as_html(blocks))
        (directory / "parity.json").write_text(json.dumps(_finite({**dataclasses.asdict(parity), "off": wrong}), indent=1) + "\n")
    return pathlib.Path(out) / "report.md"


def _tensor_table(parity: Parity) -> Table:
    came = {True: "bit for bit", False: "CHANGED", None: "not used"}
    rows = []
    for t in parity.tensors:
        dtype, made = f"{t.dtype} (quantized)" if t.quantized else t.dtype, ", ".join(t.parameters) or "–"
        rows.append((t.name, t.file, dtype, str(t.shape), made, came[t.returns], t.sha256[:16]))
    return Table(("tensor", "file", "dtype", "shape", "parameter", "comes back", "SHA-256"), rows, code=(0, 4))


def _draw(errors: list[tuple[str, float]], tolerance: float, path: pathlib.Path) -> None:
    figure, axis = plt.subplots(figsize=(max(5, 0.25 * len(errors)), 3.5), layout="constrained")
    axis.semilogy([max(e, 1e-9) for _, e in errors], "o-")
    axis.axhline(tolerance, color="tab:red", linestyle="--", label=f"tolerance {tolerance:.1e}")
    axis.set_xticks(range(len(errors)), [name for name, _ in errors], rotation=90, fontsize=7)
    axis.set_ylabel("relative error")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
