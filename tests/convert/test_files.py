"""Checkpoint files that are wrong or odd: read as transformers reads them, or refused by name before any work."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax import load_model, save_model
from hybrid_jax.convert import check_model_directory, weights
from hybrid_jax.files import read_json
from tests.conftest import tiny_model

torch = pytest.importorskip("torch")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHANGED_FILES = int(os.environ.get("CHANGED_FILES", 1000))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tied") / "model"
    save_model(tiny_model("*", tie_embeddings=True), directory)
    return directory


@pytest.fixture
def directory(tied, tmp_path):
    return shutil.copytree(tied, tmp_path / "model")


def change(directory, function):
    tensors = load_file(directory / SINGLE)
    function(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def head_and_embedding(model):
    return model.get_output_embeddings().weight.detach().numpy(), model.get_input_embeddings().weight.detach().numpy()


def test_a_head_that_differs_from_the_tied_embedding_is_kept_as_in_transformers(directory, tmp_path, capsys):
    other = load_file(directory / SINGLE)[EMBEDDING]
    other[-1, -1] += 1
    change(directory, lambda t: t.update({HEAD: other}))
    head, embedding = head_and_embedding(theirs(directory))
    assert np.array_equal(head, other)
    ours = load_model(directory)
    assert np.array_equal(ours.lm_head.kernel[...].T, head) and np.array_equal(ours.embed_tokens.embedding[...], embedding)
    assert "lm_head.weight differs" in capsys.readouterr().err
    assert not check_model_directory(directory).tie_embeddings
    save_model(ours, tmp_path / "again")
    assert np.array_equal(head_and_embedding(theirs(tmp_path / "again"))[0], other)


@pytest.mark.parametrize("row", [0, 5, 11])
def test_tensors_that_differ_in_one_part_are_not_equal(tmp_path, monkeypatch, row):
    monkeypatch.setattr(weights, "ROWS", 4)
    one = np.arange(24.0, dtype=np.float32).reshape(12, 2)
    other = one.copy()
    other[row] += 1
    save_file({"a": one, "b": other, "c": one.copy()}, tmp_path / SINGLE)
    files = weights.TensorFiles(tmp_path)
    assert files.equal("a", "c") and not files.equal("a", "b")


def test_an_equal_head_is_tied_without_a_word(directory, capsys):
    change(directory, lambda t: t.update({HEAD: t[EMBEDDING].copy()}))
    assert load_model(directory).lm_head is None and capsys.readouterr().err == ""


def test_a_tied_embedding_stored_as_the_head_is_read_as_in_transformers(directory):
    change(directory, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    ours, (head, embedding) = load_model(directory), head_and_embedding(theirs(directory))
    assert np.array_equal(head, embedding)
    assert ours.lm_head is None and np.array_equal(ours.embed_tokens.embedding[...], embedding)


def test_one_file_goes_before_a_stale_index_as_in_transformers(directory, capsys):
    tensors = load_file(directory / SINGLE)
    save_file({n: v * 0 + 3 for n, v in tensors.items()}, directory / "old.safetensors", metadata={"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    embedding = head_and_embedding(theirs(directory))[1]
    assert np.array_equal(load_model(directory).embed_tokens.embedding[...], embedding)
    assert np.array_equal(embedding, tensors[EMBEDDING])
    assert "index ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype, named",
    [
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
        ("int8", "I8"),
        ("int32", "I32"),
        ("bool", "BOOL"),
        ("complex64", "C64"),
    ],
)
def test_weights_that_are_not_floating_point_are_refused_at_the_check(directory, dtype, named):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    scale = {name + "_scale_inv": torch.ones(1)}  # as quantized checkpoints have
    save_file({**tensors, **scale, name: tensors[name].to(getattr(torch, dtype))}, directory / SINGLE)
    for check in (check_model_directory, load_model, lambda d: load_model(d, dtype="float32")):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} has dtype {named}.*bfloat16"):
            check(directory)


def test_float64_weights_are_read_as_float32_and_the_user_is_told(directory, capsys):
    change(directory, lambda t: t.update({n: v.astype(np.float64) for n, v in t.items()}))
    assert load_model(directory).norm.weight[...].dtype == np.float32
    assert "float64" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, largest", [("float16", 65504.0), ("bfloat16", 1e38)])
def test_a_value_beyond_the_range_of_the_dtype_is_refused_by_name(directory, dtype, largest):
    change(directory, lambda t: t["model.norm.weight"].__setitem__(3, -largest))
    assert float(load_model(directory, dtype=dtype).norm.weight[...][3]) == pytest.approx(-largest, rel=0.01)
    change(directory, lambda t: t["model.norm.weight"].__setitem__(3, -3.4e38 if dtype == "bfloat16" else -65536.0))
    with pytest.raises(ValueError, match=rf"model.norm.weight has values up to .* beyond the range of {dtype}"):
        load_model(directory, dtype=dtype)
    assert np.isfinite(load_model(directory, dtype="float32").norm.weight[...]).all()


def test_a_model_cannot_be_loaded_in_an_integer_dtype(directory):
    with pytest.raises(ValueError, match="dtype must be one of 'float16'"):
        load_model(directory, dtype="int8")


def test_a_wrong_shape_is_refused_at_the_check(directory):
    change(directory, lambda t: t.update({"model.norm.weight": np.ones(25, np.float32)}))
    with pytest.raises(ValueError, match=r"model.norm.weight must have shape \(24,\) by config.json, it has \(25,\)"):
        check_model_directory(directory)


def sharded(directory, table):
    (directory / SINGLE).rename(directory / "a.safetensors")
    (directory / INDEX).write_text(table if isinstance(table, str) else json.dumps(table))


@pytest.mark.parametrize(
    "table, message",
    [
        ([], "an array"),
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"x": 3}}, "tensor 'x' is in '3'"),
        ({"weight_map": {"x": "../model/a.safetensors"}}, "without a path"),
        ({"weight_map": {"x": "/etc/passwd"}}, "without a path"),
        ({"weight_map": {"x": "..\\a.safetensors"}}, "without a path"),
        ({"weight_map": {"x": ".."}}, "without a path"),
        ({"weight_map": {"x": "."}}, "without a path"),
        ({"weight_map": {"x": ""}}, "without a path"),
        ({"weight_map": {"x": "a\0b"}}, "without a path"),
        ({"weight_map": {"x": "a" * 5000}}, "without a path"),
        ("[" * 200_000, "deeply nested"),
    ],
    ids=str,
)
def test_an_index_of_another_shape_or_with_a_path_is_refused(directory, table, message):
    sharded(directory, table)
    with pytest.raises(ValueError, match=message) as e:
        check_model_directory(directory)
    assert INDEX in str(e.value) and len(str(e.value)) < 600


def test_a_link_to_a_shard_elsewhere_is_followed(directory, tmp_path):
    sharded(directory, {"weight_map": dict.fromkeys(load_file(directory / SINGLE), "link.safetensors")})
    (directory / "a.safetensors").rename(tmp_path / "blob")
    (directory / "link.safetensors").symlink_to(tmp_path / "blob")
    assert load_model(directory).config.pattern == "*"


def test_a_tensor_in_two_shards_is_refused(directory):
    tensors = load_file(directory / SINGLE)
    sharded(directory, {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), "model.norm.weight": "b.safetensors"}})
    save_file({"model.norm.weight": np.zeros(24, np.float32)}, directory / "b.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is in both a.safetensors and b.safetensors"):
        check_model_directory(directory)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"[]", "holds an array"),
        (b"null", "holds null"),
        (b"3", "holds a number"),
        (b'"text"', "holds a string"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": ' * 200_000, "deeply nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_json_file_that_holds_no_object_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_json(tmp_path / "some.json")
    assert "some.json" in str(e.value)


def test_infinity_in_a_json_file_is_read(tmp_path):
    (tmp_path / "some.json").write_text('{"limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "some.json") == {"limit": [0.0, float("inf")]}


def test_a_runs_working_directory_is_answered_with_its_model(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="it has no model yet"):
        load_model(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"its model is {tmp_path / 'model'}"):
        load_model(tmp_path)


def header_of(directory):
    data = (directory / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def write_header(directory, header, rest):
    (directory / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + rest)


def offsets(header, change):
    """The header with other offsets of its first tensor."""
    table = json.loads(header)
    name = next(n for n in table if n != "__metadata__")
    table[name]["data_offsets"] = change(*table[name]["data_offsets"])
    return json.dumps(table).encode()


HOSTILE = {
    "offsets beyond the file": lambda h: offsets(h, lambda a, b: (a, b + 2**40)),
    "offsets that overlap": lambda h: offsets(h, lambda a, b: (a + 4, b + 4)),
    "offsets that run back": lambda h: offsets(h, lambda a, b: (b, a)),
    "a shape of absurd size": lambda h: re.sub(rb'"shape":\s*\[', b'"shape":[4611686018427387904,', h, count=1),
    "nested without end": lambda h: b'{"a":' * 100_000,
    "no JSON": lambda h: b"\xff" * len(h),
    "a list": lambda h: b"[]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_by_the_file_s_name(directory, name):
    header, rest = header_of(directory)
    write_header(directory, HOSTILE[name](header), rest)
    with pytest.raises(ValueError, match="model.safetensors"):
        check_model_directory(directory)


def test_a_header_that_claims_more_bytes_than_the_file_has_is_refused_without_reading_them(directory):
    data = (directory / SINGLE).read_bytes()
    for length in (2**63, len(data), 200_000_000):
        (directory / SINGLE).write_bytes(length.to_bytes(8, "little") + data[8:])
        with pytest.raises(ValueError, match="its header would have"):
            check_model_directory(directory)


def test_a_tensor_that_is_described_twice_is_named(directory):
    header, rest = header_of(directory)
    table = json.loads(header)
    name = next(n for n in table if n != "__metadata__")
    twice = header.rstrip()[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(table[name]).encode() + b"}"
    write_header(directory, twice, rest)
    with pytest.raises(ValueError, match=f"its header describes '{name}' twice"):
        check_model_directory(directory)


def test_absurd_numbers_of_layers_are_refused_before_a_model_of_so_many_is_described(directory, monkeypatch):
    config = read_json(directory / "config.json")
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9_999}))
    monkeypatch.setattr("hybrid_jax.convert.load.abstract_decoder", lambda *a, **k: pytest.fail("described"))
    with pytest.raises(ValueError, match="num_hidden_layers 9,999, the files hold tensors of 1 layers"):
        check_model_directory(directory)


def test_a_json_file_of_absurd_size_is_refused_unread(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 29)  # sparse
    with pytest.raises(ValueError, match="config.json has 536,870,912 bytes"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("part", ["header", "config", "index"])
def test_files_with_random_changes_give_our_own_errors_or_a_model_and_nothing_else(tied, tmp_path, part):
    """A thousand files of each kind; CHANGED_FILES=100000 in the environment tries more."""
    directory = shutil.copytree(tied, tmp_path / "model")
    header, rest = header_of(directory)
    if part == "index":
        names = [n for n in json.loads(header) if n != "__metadata__"]
        (directory / SINGLE).rename(directory / "one.safetensors")
        (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
    texts = {"header": lambda: header, "config": (directory / "config.json").read_bytes, "index": (directory / INDEX).read_bytes}
    rng, original, refused = np.random.default_rng(0), texts[part](), 0
    for _ in range(CHANGED_FILES):
        changed = mutated(rng, original)
        if part == "header":
            write_header(directory, changed, rest)
        else:
            (directory / ("config.json" if part == "config" else INDEX)).write_bytes(changed)
        try:
            check_model_directory(directory)
        except (ValueError, FileNotFoundError) as e:
            assert len(str(e)) < 2000 and not isinstance(e, UnicodeDecodeError), changed
            refused += 1
    assert refused > CHANGED_FILES // 2


def mutated(rng, data):
    """Bytes with one to three changes: one flipped, a range removed or repeated, or a number replaced by an odd one."""
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
        kind = rng.integers(4)
        if kind == 0:
            data = data[:at] + bytes([rng.integers(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[: at + length] + data[at:]
        else:
            odd = [b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b'""', b"[]", b"{}", b"true", b"2147483648"]
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
            if numbers:
                chosen = numbers[rng.integers(len(numbers))]
                data = data[: chosen.start()] + odd[rng.integers(len(odd))] + data[chosen.end() :]
    return data
