"""Hub ids, against a hub cache, a closed port, and a server on this machine that answers as the hub does."""

import hashlib
import json
import shutil
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants, hf_api, snapshot_download
from safetensors.torch import save_file

from llamafactory_hera.hub import local_folder, weight_files

COMMIT = "c" * 40
REPO = "some-org/tiny-model"
find = partial(local_folder, key="my_key", what="a vision model such as facebook/dinov2-large")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "preprocessor_config.json").write_text("{}")
    save_file({"a": torch.arange(6.0), "b": torch.ones(3)}, folder / "model.safetensors")
    return folder


def cut_in_parts(folder, stem="model", suffix="safetensors"):
    parts = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name in parts:
        save = torch.save if suffix == "bin" else save_file
        save({name: torch.ones(2)}, folder / name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": {name: name for name in parts}}))
    return parts


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def offline(hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def put_in_cache(hub_cache, folder, without=()):
    repo = hub_cache / ("models--" + REPO.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(*without))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def point_to(monkeypatch, url):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)


@pytest.fixture
def serve(hub_cache, monkeypatch):
    """serve(folder, status, error) -> what is fetched of it, as the model REPO, by huggingface_hub's routes."""
    servers = []

    def start(folder, status=200, error="EntryNotFound"):
        fetched = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                files = {file.name: file.read_bytes() for file in folder.iterdir()}
                path = self.path.split("?")[0].removeprefix("/api/models").removeprefix(f"/{REPO}")
                route, _, name = path.rpartition("/")
                code, headers, content = 404, {"X-Error-Code": error}, b""
                if status != 200:
                    code = status
                elif route == "/tree":
                    listed = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                    code, content = 200, json.dumps(listed).encode()
                elif route in ("", "/revision"):
                    code, content = 200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode()
                elif route == f"/resolve/{COMMIT}" and name in files:
                    code, content = 200, files[name]
                    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
                    fetched.extend([name] if self.command == "GET" else [])
                self.send_response(code)
                for header, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(content if self.command == "GET" else b"")

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        point_to(monkeypatch, f"http://127.0.0.1:{servers[-1].server_port}")
        return fetched

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# folders


def test_a_folder_is_taken_as_it_is_also_with_a_tilde(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(str(model)) == find("~/model") == model


@pytest.mark.parametrize("value", ["/no/such/folder", "./teacher", "../a/b", "~/teacher", "teacher", "a/b/c", "a b/c"])
def test_a_missing_folder_is_named_with_key_and_remedy(value):
    with pytest.raises(ValueError) as caught:
        find(value)
    remedy = "Give the folder or the hub id of a vision model such as facebook/dinov2-large."
    assert str(caught.value) == f"my_key: the folder {value} does not exist. {remedy}"


def test_a_file_and_a_folder_without_what_is_needed_are_named(model):
    with pytest.raises(ValueError, match=r"my_key: .*config\.json is a file\. Give the folder"):
        find(str(model / "config.json"))
    with pytest.raises(ValueError, match=r"my_key: the folder .* holds no adapter_config\.json\. Give the folder"):
        find(str(model), needs="adapter_config.json")


# without the hub


@pytest.mark.parametrize("without", [("*",), ("config.json",), ("model.safetensors",)])
def test_offline_what_is_not_cached_is_named_with_the_command_that_fetches_it(without, offline, hub_cache, model):
    put_in_cache(hub_cache, model, without)
    with pytest.raises(ValueError) as caught:
        find(REPO)
    assert str(caught.value) == (
        f"my_key: {REPO} is not a folder here, HF_HUB_OFFLINE is set, and the hub cache {hub_cache} does not hold the "
        f"whole model. On a machine with access run `hf download {REPO} --local-dir models/tiny-model`, copy that "
        "folder here, and set my_key: models/tiny-model."
    )
    option = r"^--model: .*--revision v1 --local-dir.* and give --model models/tiny-model\.$"
    with pytest.raises(ValueError, match=option):
        local_folder(REPO, "--model", "a model", revision="v1")


def test_offline_a_cached_model_is_used_also_without_files_that_are_not_needed(
    serve, offline, hub_cache, model, monkeypatch
):
    snapshot = put_in_cache(hub_cache, model)
    assert find(REPO) == snapshot
    # fetched file by file: the cache then knows of files that it does not hold
    shutil.rmtree(hub_cache)
    (model / "tokenizer.json").write_text("{}")
    serve(model)
    snapshot_download(REPO, allow_patterns=["config.json", "model.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (find(REPO) / "model.safetensors").is_file()


def test_a_hub_that_cannot_be_reached_is_named(hub_cache, monkeypatch):
    # a port that was free a moment ago: nothing listens there
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}"
    server.server_close()
    point_to(monkeypatch, url)
    # the hub's client waits between its attempts
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=f"my_key: {REPO} is not a folder here, {url} does not give it"):
        find(REPO)


# with the hub


def test_weights_are_fetched_only_when_asked_for(serve, model):
    fetched = serve(model)
    find(REPO, weights=False, patterns=["preprocessor_config.json"])
    assert sorted(fetched) == ["config.json", "preprocessor_config.json"]
    folder = find(REPO)
    assert folder.name == COMMIT
    assert sorted(fetched) == ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("parts", [False, True])
def test_what_transformers_or_diffusers_would_load_is_fetched_and_nothing_else(name, parts, serve, model):
    weights = {name}
    if parts:
        weights = {*cut_in_parts(model, *name.partition(".")[::2]), f"{name}.index.json"}
    else:
        (model / "model.safetensors").rename(model / name)
    (model / "consolidated.safetensors").write_bytes(b"the same again, for another program")
    fetched = serve(model)
    find(REPO)
    assert set(fetched) == weights | {"config.json", "preprocessor_config.json"}


def test_what_the_hub_does_not_have_is_named(serve, model):
    (model / "model.safetensors").unlink()
    serve(model)
    with pytest.raises(ValueError, match=f"my_key: the hub model {REPO} holds no weights .*Give the folder"):
        find(REPO)
    with pytest.raises(ValueError, match=rf"my_key: the hub model {REPO} holds no inside/adapter_config\.json"):
        find(REPO, needs="inside/adapter_config.json")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", f"my_key: {REPO} is neither a folder here nor a model on the hub"),
        (403, "GatedRepo", f"my_key: access to the hub model {REPO} must be granted"),
        (404, "RevisionNotFound", "does not give it .RevisionNotFoundError"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_named(status, code, message, serve, tmp_path):
    serve(tmp_path, status, code)
    with pytest.raises(ValueError, match=message):
        find(REPO)


# weights


def test_weight_files_are_those_that_transformers_would_load(model):
    torch.save({"a": torch.ones(2)}, model / "pytorch_model.bin")
    assert weight_files(model) == [model / "model.safetensors"]
    (model / "model.safetensors").unlink()
    assert weight_files(model) == [model / "pytorch_model.bin"]
    parts = cut_in_parts(model)
    assert weight_files(model) == [model / name for name in parts]


DAMAGE = {
    "empty": lambda content: b"",
    "5 bytes": lambda content: content[:5],
    "header cut": lambda content: content[:30],
    "last byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "header": lambda content: content[:20] + b"\xff" * 20 + content[40:],
    "git-lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_are_not_whole_are_named(damage, model):
    file = model / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .* run `git lfs pull`"):
        weight_files(model)


def test_weights_that_are_missing_are_named(model):
    parts = cut_in_parts(model)
    (model / parts[1]).unlink()
    with pytest.raises(ValueError, match=f"{parts[1]} is missing; the index in its folder names it"):
        weight_files(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"index\.json cannot be read as an index of weights"):
        weight_files(model)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds no weights \(looked for model\.safetensors and pytorch_model\.bin"):
        weight_files(model)
