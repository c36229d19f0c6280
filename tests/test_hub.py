"""Models by name: a directory goes first, a name is downloaded from a hub (one of our own, on this machine), and resumed."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from hybrid_jax import save_model
from hybrid_jax.convert.weights import TensorFiles
from hybrid_jax.hub import local_model
from tests.conftest import cpu_devices, tiny_model

pytest.importorskip("huggingface_hub")
COMMIT = "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path):
    """A hub with the model `some/model`, a pickle and a second copy; yields (its address, the paths that were asked for)."""
    folder = tmp_path / "hub"
    save_model(tiny_model("*"), folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00001.safetensors")  # as some conversions name them
    save_model(tiny_model("*"), tmp_path / "same")
    names = list(TensorFiles(tmp_path / "same"))
    table = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"):
        (folder / name).write_bytes(b"never to be read")
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, code, body, **headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            asked.append((self.command, self.path))
            if re.match(r"/api/models/some/model(/revision/\w+)?(\?|$)", self.path):
                files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
                info = {"id": "some/model", "modelId": "some/model", "sha": COMMIT, "siblings": files, "private": False, "tags": []}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            if match := re.match(r"/api/models/some/model/tree/\w+", self.path):
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in sorted(folder.iterdir())]
                return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
            if match := re.match(r"/some/model/resolve/\w+/([\w.-]+)", self.path):
                body = (folder / match[1]).read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                return self.answer(200, body, ETag=etag, X_Repo_Commit=COMMIT)
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def convert(hub, tmp_path, name, out):
    env = cpu_devices(1) | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "hybrid_jax", "convert", name, str(tmp_path / out), "--pattern", "GKA"]
    return subprocess.run(command, env={**os.environ, **env}, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_a_name_is_downloaded_without_pickles_and_only_once(hub, tmp_path):
    address, asked = hub
    done = convert(address, tmp_path, "some/model", "out")
    assert done.returncode == 0 and "asking the hub" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "out/config.json").exists()
    assert [p for c, p in asked if c == "GET" and p.endswith("pytorch_model-00001-of-00001.safetensors")]
    assert not any(name in p for _, p in asked for name in ("pytorch_model.bin", "consolidated", "fp16"))
    asked.clear()
    again = convert(address, tmp_path, "some/model", "again")
    assert again.returncode == 0 and not [p for c, p in asked if c == "GET" and "resolve" in p]
    absent = convert(address, tmp_path, "some/other", "absent")
    assert absent.returncode == 1 and "there is no directory some/other, and the hub did not give some/other" in absent.stderr
    assert not (tmp_path / "absent").exists()


def test_a_directory_goes_before_a_name_and_a_path_is_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    for name in ("some/model", "./some/other", "/some/other", "other", "some/../model"):
        assert local_model(name) == name
