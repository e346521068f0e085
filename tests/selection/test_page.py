"""The HTML page: every value that it shows is that of a file, and nothing on it is fetched."""

import json
import re
from html import unescape

import pytest

from llamafactory_hera.cli import main
from llamafactory_hera.selection.page import write_page
from llamafactory_hera.selection.scores import ScoreFile

from .test_gallery import BEFORE, write_seen
from .tiny import write_scores

AFTER = [[0.35, 0.4], [0.45, 0.55], [0.25, 0.4]]
CARD = {
    "heads": ["L0H1", "L2H0"],
    "objective": "contrastive",
    "selection": {"strategy": "worst<"},
    "versions": {"torch": "9.9"},
    "log": [{"step": step, "lm_loss": 2 / step, "hera_mknn": 0.1, "hera_mknn_chance": 0.01} for step in (1, 2)],
    "command": "llamafactory-cli train 'my recipe.yaml'",
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run: its selection, its scores, its card, and who is whose neighbor."""
    folder = tmp_path / "run"
    for seed, (name, scores) in enumerate({"heads": BEFORE, "scores": AFTER}.items(), 1):
        write_seen(write_scores(folder / f"hera/{name}.json", scores), tmp_path / "images", seed)
    (folder / "hera/card.json").write_text(json.dumps(CARD))
    return folder


def test_values_are_those_of_the_files(run, tmp_path):
    page = write_page([run], tmp_path / "new/page.html").read_text()
    for name in ("heads", "scores"):
        scored = ScoreFile.load(run / f"hera/{name}.json")
        for target, score in scored.ranked().items():
            assert f'title="{target} {score:.4f}, {score / 0.01:.2f} × chance"' in page
    assert re.findall('class=chosen.*?title="(.*?) ', page) == CARD["heads"] * 2  # not the worst: what it aligned
    bars = dict(re.findall(r"<title>(L\dH\d \w+): ([\d.]+)</title>", page))
    assert bars == {
        f"L{layer}H{head} {name}": f"{scores[layer][head]:.4f}"
        for name, scores in (("before", BEFORE), ("after", AFTER))
        for layer, head in ((0, 1), (2, 0), (0, 0), (2, 1), (1, 1))
    }
    assert re.findall('alt="Nearest images of (.*?)"', page) == ["L0H1", "L0H0", "L1H1"]
    for told in ("worst&lt;", "9.9", "contrastive", "Over the steps: language-modeling loss, MKNN in batches"):
        assert told in page
    assert CARD["command"] in unescape(page)


def test_the_heads_of_a_run_and_its_card_are_shown(run, tmp_path):
    files = [write_scores(tmp_path / f"{name}.json", BEFORE) for name in ("one", "two")]
    page = write_page(files, tmp_path / "page.html", aligned=str(run / "hera/heads.json")).read_text()
    assert "<h2>aligned and top-5</h2>" in page
    assert re.findall('class=chosen.*?title="(.*?) ', page) == ["L0H1", "L2H0"] * 2
    assert CARD["command"] in unescape(page)
    assert re.search("gallery: .*one.neighbors.safetensors cannot be read", page)  # where it would stand
    assert "No card.json" in write_page(files, tmp_path / "page.html").read_text()


def test_layers_are_one_column(tmp_path):
    files = [write_scores(tmp_path / f"{name}.json", BEFORE, layers=["L1"]) for name in ("one", "two")]
    page = write_page(files, tmp_path / "page.html").read_text()
    assert re.findall('<td.*?title="(.*?) ', page) == ["L0", "L1", "L2"] * 2


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: run.rename(run.with_name("gone")), "give two score files or more.* or a run's folder"),
        (lambda run: (run / "hera/heads.json").unlink(), "heads.json is missing: select writes"),
        (
            lambda run: (run / "hera/scores.json").unlink(),
            "scores.json is missing: .*score .*run --recipe",
        ),
        (lambda run: (run / "hera/card.json").write_text("{"), "card.json is not JSON"),
        (lambda run: (run.parent / "page.html").mkdir(), "page.html cannot be written"),
        (lambda run: (run.parent / "page.html").write_text("{}"), "--html: .*page.html is there and is no HTML page"),
    ],
    ids=["no run", "no selection", "no scores", "a damaged card", "no place", "a file of something else"],
)
def test_what_is_missing_is_named(run, tmp_path, capsys, harm, message):
    harm(run)
    assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_with_html_the_other_files_are_written_where_they_are_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["report", str(run), "--html", "page.html"]) == 0
    assert {path.name for path in tmp_path.iterdir()} - before == {"page.html"}
    first = (tmp_path / "page.html").read_text()
    assert main(["report", str(run), "--html", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text() == first
    assert main(["report", str(run), "--html", "page.html", "--output", "r"]) == 0
    assert {path.name for path in tmp_path.iterdir()} - before == {"page.html", "r.md", "r.png"}
