"""Heads on the hub: the real client pushes and pulls them, and runs use them; a local server replaces the hub."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from transformers import LlavaConfig, Qwen3Config

from llamafactory_hera.cli import main
from llamafactory_hera.heads import Targets
from llamafactory_hera.training.aligner import Aligner
from tests.integrations.test_trainer_selection import config, selecting
from tests.tiny_models import vlm

from .tiny import write_scores

ID, COMMIT = "someone/heads", "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that the client needs to create a repository, commit to it, and read small files."""

    files: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def do_GET(self) -> None:
        repository, _, path = self.path[1:].partition("/resolve/main/")
        if (content := self.files.get(f"{repository}/{path}")) is not None:
            return self.reply(content, ETag=f'"{hash(content)}"', X_Repo_Commit=COMMIT)
        found = any(name.startswith(f"{repository}/") for name in self.files)
        return self.reply(b"", 404, X_Error_Code="EntryNotFound" if found else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        repository = "/".join(self.path.split("/")[3:5])
        for line in lines if "/commit/" in self.path else ():
            if line["key"] == "file":
                self.files[f"{repository}/{line['value']['path']}"] = b64decode(line["value"]["content"])
        wanted = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in lines[0].get("files", ())
        ]
        url = f"http://{self.headers['Host']}/{ID}"
        reply = {"url": url, "files": wanted, "commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT}
        self.reply(json.dumps(reply | {"errors": [], "warnings": []}).encode())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the hub. The test works in its own folder, where ``run`` has selected heads."""
    Hub.files = {"someone/model/README.md": b"# A model", "someone/names/heads.json": b'{"heads": ["L0H1"]}'}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_scores(Path("run/hera/heads.json"), [[0.5, 0.1], [0.02, 0.9]], model="/home/me/models/tiny")
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_a_run_is_pushed_with_a_card_and_without_paths_and_pulled(hub):
    for source in ("run", "run/hera/heads.json"):  # the second time, the card is replaced
        assert main(["heads", "push", source, ID]) == 0
    card = hub[f"{ID}/README.md"].decode()
    for line in (
        "# The heads of tiny for HeRA",
        "| L1H0 | 0.0200 | 0.0100 | 0.0100 ± 0.0020 | +5.0 | 93/100 |",
        "| k | 10 |",
        "| dataset | captions |",
    ):
        assert f"{line}\n" in card
    assert b"/home/me" not in b"".join(hub.values())
    assert main(["heads", "pull", ID, "here"]) == 0
    assert Targets.load("here/heads.json").items == Targets.load("run/hera/heads.json").items


@pytest.mark.parametrize(("host", "heads"), [("trainer", ID), ("loop", f"hf:{ID}")])
def test_a_trainer_and_a_loop_accept_only_heads_of_their_model(hub, host, heads):
    def align(seed: int) -> Aligner:
        model = vlm("llava-llama", seed=seed)
        return selecting(Path("new"), model, heads=heads).aligner if host == "trainer" else Aligner(model, settings)

    selected, settings = selecting(Path("auto")).aligner.targets, config(heads=heads)
    assert main(["heads", "push", "auto", ID]) == 0
    assert align(seed=0).targets.items == selected.items
    with pytest.raises(ValueError, match=r"^(hera_)?heads: .* selected for another (run: )?model"):
        align(seed=1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pull someone/model .", "someone/model contains no heads.json or layers.json; give"),
        ("pull someone/nothing .", "someone/nothing cannot be fetched from the hub (404 Client Error. Repository"),
        ("pull someone/names run/hera", "run/hera/heads.json exists and is another file; give another folder."),
        ("push cache someone/new", "cache contains no heads.json of a selection; give a run that selected heads."),
        ("push run someone/model", "someone/model has a README.md about something else; give a separate"),
        ("push run wrong:id", "wrong:id cannot be written (Repo id must"),
    ],
)
def test_a_command_refuses_bad_input_in_one_line(hub, capsys, command, message):
    assert main(["heads", *command.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llamafactory-hera: heads: {message}")
    assert error.count("\n") == 1


def test_a_key_refuses_anything_but_a_repository_with_heads(hub, monkeypatch):
    for value, message in {
        "someone/names": "someone/names does not name its model; if it fits yours, write L0H1",
        "run/hera": "run/hera is a local folder, but could also be a hub id; write hf:run/hera for the repository",
        "hf:someone/model": "hf:someone/model contains no heads.json; give",
        "no/network": "no/network cannot be fetched from the hub (An error happened while",
    }.items():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value == "no/network")
        with pytest.raises(ValueError, match=rf"^hera_heads: {re.escape(message)}[^\n]*$"):
            Targets.parse(value)


def test_the_papers_heads_are_for_its_language_models():
    model = LlavaConfig(text_config=Qwen3Config(num_hidden_layers=36), hera_built="Qwen/Qwen3-8B")
    assert str(Targets.parse("paper", configuration=model)) == "L13H12,L7H6,L3H5,L13H13,L13H15"
    model.hera_built = "Qwen3-8B-Base"
    with pytest.raises(ValueError, match=r"^hera_heads: paper supports Qwen/Qwen2.5-3B-Instruct, .*; use auto\.$"):
        Targets.parse("paper", configuration=model)
