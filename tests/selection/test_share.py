"""Heads on the hub: the real client pushes, pulls and trains with them; the hub is a local stand-in."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from transformers import LlavaConfig, Qwen3Config

from llamafactory_hera.cli import main
from llamafactory_hera.heads.paper import PAPER_HEADS
from llamafactory_hera.heads.targets import Targets
from llamafactory_hera.training.aligner import Aligner
from tests.integrations.test_trainer_selection import config, selecting
from tests.tiny_models import vlm

from .tiny import write_scores

ID = "someone/worst-heads"


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that the client asks for: create, commit, and serve small files."""

    files: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        repository, _, path = self.path[1:].partition("/resolve/main/")
        content = self.files.get(f"{repository}/{path}")
        if content is None:
            known = any(name.startswith(repository) for name in self.files)
            return self.answer(b"", 404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            named = json.loads(body)
            self.files.setdefault(f"{named['organization']}/{named['name']}/.gitattributes", b"")
            return self.answer(json.dumps({"url": f"{address}/{ID}"}).encode())
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer(json.dumps({"files": [{**file, "shouldIgnore": False} for file in files]}).encode())
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    name = f"{self.path.split('/models/')[1].split('/commit/')[0]}/{line['value']['path']}"
                    self.files[name] = base64.b64decode(line["value"]["content"])
            return self.answer(json.dumps({"commitUrl": f"{address}/{ID}/commit/c", "commitOid": "c" * 40}).encode())
        return self.answer(b'{"errors": [], "warnings": []}')  # of the card's metadata


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the hub; the test works in its own folder."""
    Hub.files = {"someone/model/README.md": b"# A model"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_run_is_pushed_with_a_card_and_pulled(hub: dict[str, bytes], capsys: pytest.CaptureFixture) -> None:
    path = write_scores(Path("run/hera/heads.json"), [[0.5, 0.1], [0.02, 0.9]], model="/home/me/models/tiny")
    assert main(["heads", "push", "run", ID]) == main(["heads", "push", str(path), ID]) == 0
    assert f"use hera_heads: hf:{ID}" in capsys.readouterr().out
    card = hub[f"{ID}/README.md"].decode()
    for line in ("The heads of tiny", "| L1H0 | 0.0200 | 2.00 |", "| k | 10 |", "| teacher | facebook/dinov2-large |"):
        assert line in card
    assert b"/home/me" not in b"".join(hub.values())
    assert main(["heads", "pull", ID, "here"]) == 0
    assert Targets.load("here/heads.json").items == Targets.load(path).items


@pytest.mark.parametrize("heads", [f"hf:{ID}", ID])
@pytest.mark.parametrize("host", ["trainer", "loop"])
def test_a_trainer_and_a_loop_take_only_the_heads_of_their_model(hub: dict[str, bytes], host: str, heads: str) -> None:
    def align(seed: int) -> Aligner:
        model = vlm("llava-llama", seed=seed)
        return selecting(Path("new"), model, heads=heads).aligner if host == "trainer" else Aligner(model, settings)

    selected, settings = selecting(Path("run")).aligner.targets, config(heads=heads)
    assert main(["heads", "push", "run", ID]) == 0
    assert align(seed=0).targets.items == selected.items
    with pytest.raises(ValueError, match=r"^(hera_)?heads: .* selected for another (run: )?model"):
        align(seed=1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["pull", "someone/model", "."], "someone/model contains no heads.json or layers.json; give"),
        (
            ["pull", "someone/nothing", "."],
            "someone/nothing cannot be fetched from the hub (404 Client Error. Repository",
        ),
        (["pull", "hf:folder/name/x", "."], "hf:folder/name/x cannot be fetched from the hub (Repo id must be"),
        (["pull", ID, "mine"], "mine/heads.json exists and is another file; give another folder."),
        (["push", "cache", ID], "cache contains no heads.json of a selection; give a run that selected heads."),
        (["push", "run", "someone/model"], "someone/model has a README.md about something else; give a repository"),
        (["push", "run", "a b"], "a b cannot be written (Repo id must"),
    ],
)
def test_bad_input_is_one_line(
    hub: dict[str, bytes], capsys: pytest.CaptureFixture, command: list[str], message: str
) -> None:
    main(["heads", "push", str(write_scores(Path("run/heads.json"), [[0.5, 0.1]])), ID])
    Path("mine").mkdir()
    Path("mine/heads.json").write_text('{"heads": ["L0H0"]}')
    capsys.readouterr()
    assert main(["heads", *command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llamafactory-hera: heads: {message}")
    assert error.count("\n") == 1


def test_a_value_that_is_no_repository_with_the_heads_of_a_model_is_refused(
    hub: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[f"{ID}/heads.json"] = b'{"heads": ["L0H1"]}'
    Path("folder/name").mkdir(parents=True)
    for value, message in {
        ID: f"{ID} does not name its model, so it may not fit; write L0H1",
        "folder/name": "folder/name is a folder here, and could be a hub id; write hf:folder/name for a repository",
        "folder/missing": "folder/missing cannot be read",
        "hf:someone/model": "hf:someone/model contains no heads.json; give",
    }.items():
        with pytest.raises(ValueError, match=f"^hera_heads: {re.escape(message)}"):
            Targets.parse(value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hera_heads: a/b cannot be fetched from the hub \([^\n]*\)\.$"):
        Targets.parse("a/b")


def test_the_heads_of_the_paper_are_those_of_the_models_language_model() -> None:
    model = LlavaConfig(text_config=Qwen3Config(num_hidden_layers=36, num_attention_heads=32), vision_config={})
    for name, checkpoint in {
        "Qwen/Qwen3-8B": "Qwen/Qwen3-8B",
        "Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B-Instruct-2507",
    }.items():
        model.hera_built = name
        assert str(Targets.parse("paper", configuration=model)) == PAPER_HEADS[checkpoint]
    model.hera_built = "Qwen/Qwen3-8B-Base"
    with pytest.raises(ValueError, match=r"^hera_heads: paper is for Qwen/Qwen2.5-3B-Instruct, .* not for this model"):
        Targets.parse("paper", configuration=model)
