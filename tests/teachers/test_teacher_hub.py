"""Hub ids, against a hub cache, a closed port, and a server on this machine that answers as the hub does."""

import hashlib
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from llamafactory_hera.teachers.check import check_teacher
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.files import teacher_fingerprint

COMMIT = "c" * 40
REPO = "some-org/tiny-teacher"


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


def test_offline_a_cached_model_is_used(offline, hub_cache, save_teacher, make_images):
    folder = save_teacher("dinov2")
    snapshot = put_in_cache(hub_cache, folder)
    info = check_teacher(REPO)
    assert (info.path, info.name, info.hidden_size) == (snapshot, REPO, 32)
    teacher = VisionTeacher.from_pretrained(REPO)
    assert teacher.fingerprint == teacher_fingerprint(folder)
    assert teacher.encode(teacher.preprocess(make_images(1))).shape == (1, 32)


@pytest.mark.parametrize("without", [("*",), ("config.json",), ("model.safetensors",)])
def test_offline_what_is_not_cached_is_told_with_the_files_to_place(without, offline, hub_cache, save_teacher):
    put_in_cache(hub_cache, save_teacher("dinov2"), without)
    with pytest.raises(ValueError) as caught:
        check_teacher(REPO, key="my_key")
    message = str(caught.value)
    assert message.startswith(f"my_key: {REPO} is no folder here, HF_HUB_OFFLINE is set")
    assert str(hub_cache) in message
    assert f"hf download {REPO} config.json preprocessor_config.json model.safetensors --local-dir FOLDER" in message
    assert "set my_key: FOLDER" in message


def test_offline_a_cached_model_without_processor_is_told_so(offline, hub_cache, save_teacher):
    put_in_cache(hub_cache, save_teacher("dinov2"), ("preprocessor_config.json",))
    with pytest.raises(ValueError, match=r"hera_teacher: .*holds no image processor"):
        check_teacher(REPO)


class Hub:
    """Serves one folder as the model REPO, with the routes and headers that huggingface_hub asks for."""

    def __init__(self, folder, status=200, error_code=""):
        self.asked = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                hub.asked.append(self.path)
                name = self.path.rsplit("/", 1)[-1]
                file = folder / name
                prefixes = [f"/{REPO}/resolve/{revision}/" for revision in ("main", COMMIT)]
                if status != 200 or not self.path.startswith(tuple(prefixes)):
                    return self.reply(status if status != 200 else 404, b"", {"X-Error-Code": error_code})
                if not file.is_file():
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                content = file.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
                return self.reply(200, content if body else b"", headers, len(content))

            def reply(self, code, content, headers, length=0):
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(length)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(hub_cache, monkeypatch):
    hubs = []

    def start(folder, **kwargs):
        hubs.append(Hub(folder, **kwargs))
        point_to(monkeypatch, hubs[-1].url)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


def point_to(monkeypatch, url):
    from huggingface_hub import hf_api

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)


def fetched(hub_cache):
    return {path.name for path in hub_cache.rglob("snapshots/*/*")}


def test_online_the_check_fetches_the_config_files_only(serve, hub_cache, save_teacher):
    serve(save_teacher("dinov2"))
    info = check_teacher(REPO)
    assert (info.model_type, info.hidden_size) == ("dinov2", 32)
    assert fetched(hub_cache) == {"config.json", "preprocessor_config.json"}


@pytest.mark.parametrize("part_size", [None, "20KB"])
def test_online_a_teacher_is_fetched_and_works(part_size, serve, hub_cache, save_teacher, make_images):
    import transformers

    folder = save_teacher("dinov2")
    if part_size:
        model = transformers.Dinov2Model.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=part_size)
    hub = serve(folder)
    teacher = VisionTeacher.from_pretrained(REPO)
    # all files are of the commit that the config came from, even if the model changes meanwhile
    assert {path.split("/")[4] for path in hub.asked if not path.endswith("/config.json")} == {COMMIT}
    assert teacher.fingerprint == teacher_fingerprint(folder)
    assert teacher.encode(teacher.preprocess(make_images(1))).shape == (1, 32)


def test_online_a_model_without_weights_is_told_so(serve, save_teacher):
    folder = save_teacher("dinov2")
    (folder / "model.safetensors").unlink()
    serve(folder)
    with pytest.raises(ValueError, match=f"hera_teacher: the hub model {REPO} holds no weights"):
        check_teacher(REPO)


def test_online_a_model_without_config_is_told_so(serve, save_teacher):
    folder = save_teacher("dinov2")
    (folder / "config.json").unlink()
    serve(folder)
    with pytest.raises(ValueError, match=rf"hera_teacher: the hub model {REPO} holds no config\.json"):
        check_teacher(REPO)


def test_online_a_language_model_is_refused_before_its_weights_are_fetched(serve, hub_cache, save_teacher):
    folder = save_teacher("dinov2")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    serve(folder)
    with pytest.raises(ValueError, match=f"hera_teacher: {REPO} is not a vision model"):
        VisionTeacher.from_pretrained(REPO)
    assert "model.safetensors" not in fetched(hub_cache)


def test_online_an_unknown_model(serve, tmp_path):
    serve(tmp_path, status=404, error_code="RepoNotFound")
    with pytest.raises(ValueError, match=f"hera_teacher: {REPO} is neither a folder here nor a model on the hub"):
        check_teacher(REPO)


def test_online_a_gated_model(serve, tmp_path):
    serve(tmp_path, status=403, error_code="GatedRepo")
    with pytest.raises(ValueError, match=f"hera_teacher: access to the hub model {REPO} must be granted"):
        check_teacher(REPO)


def test_a_hub_that_cannot_be_reached_is_named(hub_cache, monkeypatch):
    # a port that was free a moment ago: nothing listens there
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{server.server_port}"
    server.server_close()
    point_to(monkeypatch, url)
    # the hub's client waits between its attempts
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=f"hera_teacher: {REPO} is no folder here, {url} cannot be reached"):
        check_teacher(REPO)
