import json
import os
from pathlib import Path

import pytest

from llamafactory_hera.heads import Target, Targets

HEADS = Targets((Target(13, 12), Target(7, 6), Target(0, 31)))


@pytest.mark.parametrize("text", ["L13H12,L7H6,L0H31", " l13h12, L7H6 L0H31\n", "L13H12\tL7H6,,L0H31,"])
def test_names_are_read_in_their_order(text):
    assert Targets.parse(text) == HEADS
    assert Targets.resolve(text) == HEADS


def test_it_is_written_as_it_is_read():
    assert str(HEADS) == "L13H12,L7H6,L0H31"
    assert str(HEADS.heads[0]) == f"{HEADS.heads[0]}" == "L13H12"
    assert Targets.parse(str(HEADS)) == HEADS
    assert Targets.parse(["L13H12", "L7H6", "L0H31"]) == HEADS
    assert Targets.parse(HEADS.heads) == HEADS


def test_heads_sort_by_layer_then_head():
    assert sorted(HEADS.heads) == [Target(0, 31), Target(7, 6), Target(13, 12)]


@pytest.mark.parametrize(
    "text", ["L3", "H4", "3H4", "L3H4;L5H6", "L3-H4", "LxHy", "L3H4x", "L-1H2", "L1.0H2", "all", "L3H4,layer 5"]
)
def test_another_syntax_is_refused_with_an_example(text):
    wrong = text.removeprefix("L3H4,").split()[0]
    with pytest.raises(ValueError, match=f"^hera_heads: '{wrong}' is not a head; write heads as .* L13H12,L7H6"):
        Targets.parse(text)


@pytest.mark.parametrize("text", ["", "  ", ",", " , \n"])
def test_no_head_is_refused(text):
    with pytest.raises(ValueError, match=r"^hera_heads: no head is named; write heads as"):
        Targets.parse(text)


def test_a_head_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"^hera_heads: L1H2, L3H4 is named more than once; name each head once"):
        Targets.parse("L3H4,L1H2,L5H0,L3H4,l1h2")


def test_errors_name_the_callers_key():
    for call in (Targets.parse, Target.parse, Targets.resolve):
        with pytest.raises(ValueError, match=r"^--heads: "):
            call("nonsense", key="--heads")


@pytest.mark.parametrize("n_layers, n_heads, outside", [(13, 32, "L13H12"), (14, 12, "L13H12, L0H31")])
def test_heads_outside_a_model_are_refused(n_layers, n_heads, outside):
    HEADS.check(14, 32)
    layers, heads = f"layers L0 to L{n_layers - 1}", f"heads H0 to H{n_heads - 1}"
    with pytest.raises(ValueError, match=f"^hera_heads: {outside} does not exist: .* {layers} with {heads}; choose"):
        HEADS.check(n_layers, n_heads)


# -- files -----------------------------------------------------------------------------------------------------------


def test_round_trip_through_a_file(tmp_path: Path):
    heads = Targets(HEADS.heads, {"model": "Modell Ä", "scores": [0.1, 0.2], "k": 10})
    path = tmp_path / "heads.json"
    heads.save(path)
    for read in (Targets.load(path), Targets.load(str(path)), Targets.resolve(str(path))):
        assert read == heads
        assert read.provenance == heads.provenance
    assert json.loads(path.read_text(encoding="utf-8"))["heads"] == ["L13H12", "L7H6", "L0H31"]
    assert os.listdir(tmp_path) == ["heads.json"]


def test_a_file_is_found_by_its_suffix_its_folder_or_its_existence(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.json", "heads_of_mine"):
        HEADS.save(name)
        assert Targets.resolve(name) == HEADS
        assert Targets.resolve(f"./{name}") == HEADS
    for missing in ("missing.json", "folder/missing"):
        with pytest.raises(ValueError, match=f"^hera_heads: the heads file {missing} cannot be read .No such file"):
            Targets.resolve(missing)


def test_a_file_without_provenance_is_read(tmp_path: Path):
    (tmp_path / "heads.json").write_text('{"heads": ["L1H2"]}')
    assert Targets.load(tmp_path / "heads.json") == Targets((Target(1, 2),))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"L1H2", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"", "is not JSON"),
        (b'["L1H2"]', 'has no list "heads"'),
        (b'{"heads": "L1H2"}', 'has no list "heads"'),
        (b'{"scores": []}', 'has no list "heads"'),
        (b'{"heads": []}', "no head is named"),
        (b'{"heads": ["L1"]}', "'L1' is not a head"),
        (b'{"heads": [[1, 2]]}', "is not a head"),
        (b'{"heads": ["L1H2", "L1H2"]}', "L1H2 is named more than once"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content, message):
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^hera_heads: .*{message}"):
        Targets.load(path)


def test_a_folder_is_no_heads_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^hera_heads: the heads file .* cannot be read .Is a directory"):
        Targets.resolve(str(tmp_path))


@pytest.mark.parametrize("broken", ["content", "disk", "rename"])
def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch, broken):
    path = tmp_path / "heads.json"
    HEADS.save(path)
    before = path.read_bytes()
    new = Targets((Target(1, 2),), {"bad": object()} if broken == "content" else {})

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    if broken == "disk":
        # as a full disk does it: the file is there, a part of it is written
        monkeypatch.setattr(Path, "write_text", lambda self, text, **_: (self.write_bytes(text[:5].encode()), fail()))
    if broken == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OSError, TypeError)):
        new.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert Targets.load(path) == HEADS
