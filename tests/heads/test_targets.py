"""The notation of heads and layers, and their file."""

import json
import os
import re
from pathlib import Path

import pytest

from llamafactory_hera.heads import Target, Targets
from llamafactory_hera.heads.families import HeadLayout

HEADS = Targets((Target(13, 12), Target(7, 6), Target(0, 31)))
LAYERS = Targets((Target(14), Target(3), Target(0)))
both = pytest.mark.parametrize("targets", [HEADS, LAYERS], ids=["head", "layer"])


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (HEADS, ["L13H12,L7H6,L0H31", " l13h12, L7H6 L0H31\n", "L13H12\tL7H6,,L0H31,", ["L13H12", "L7H6", "L0H31"]]),
        (LAYERS, ["L14,L3,L0", " L14, l3 L0", "L14,,L3\tL0\n", ["L14", "L3", "L0"]]),
    ],
    ids=["head", "layer"],
)
def test_names_are_read_in_their_order_and_written_as_they_are_read(targets: Targets, written: list) -> None:
    for value in (*written, targets.items):
        assert Targets.parse(value, targets.granularity) == targets
        if isinstance(value, str):
            assert Targets.parse(value, targets.granularity) == targets
    assert str(targets) == f"{targets}" == written[0]
    assert targets.names == tuple(written[0].split(","))
    assert Target.parse(targets.names[0], targets.granularity) == targets.items[0]


def test_what_depends_on_the_kind() -> None:
    assert (HEADS.granularity, HEADS.key, HEADS.what, HEADS.file_name) == ("head", "hera_heads", "heads", "heads.json")
    assert (LAYERS.key, LAYERS.what, LAYERS.file_name) == ("hera_layers", "layers", "layers.json")
    assert HEADS.layers == (0, 7, 13)
    assert Targets.parse("L3H1,L1H0,L3H0").layers == (1, 3)  # each once
    assert sorted(HEADS.items) == [Target(0, 31), Target(7, 6), Target(13, 12)]


@pytest.mark.parametrize(
    ("granularity", "text"),
    [
        *(("head", text) for text in ("L3", "H4", "3H4", "L3H4;L5H6", "L3-H4", "LxHy", "L3H4x", "L-1H2", "L1.0H2")),
        *(("head", text) for text in ("all", "L3H4,layer 5")),
        *(("layer", text) for text in ("14", "L3H4", "middle", "L-1", "L", "L1,L2H0")),
    ],
)
def test_another_syntax_is_refused_with_an_example(granularity: str, text: str) -> None:
    wrong = re.split("[, ]", text.removeprefix("L3H4,").removeprefix("L1,"))[0]
    example = {"head": "L13H12,L7H6", "layer": "L14,L15"}[granularity]
    with pytest.raises(
        ValueError, match=f"^hera_{granularity}s: '{wrong}' is not a {granularity}; write {granularity}s .* {example}"
    ):
        Targets.parse(text, granularity)


@both
def test_none_and_the_same_twice_are_refused(targets: Targets) -> None:
    for text in ("", "  ", ",", " , \n"):
        with pytest.raises(
            ValueError, match=rf"^{targets.key}: no {targets.granularity} is named; write {targets.what}"
        ):
            Targets.parse(text, targets.granularity)
    first, second, third = targets.names
    for text in (f"{second},{first},{third},{second},{first.lower()}", [third, second, third, second]):
        with pytest.raises(
            ValueError, match=rf"^{targets.key}: (.*, )?{second}.* is named more than once; remove the"
        ):
            Targets.parse(text, targets.granularity)


def test_errors_name_the_callers_key() -> None:
    for call in (Targets.parse, Target.parse):
        with pytest.raises(ValueError, match=r"^--heads: "):
            call("nonsense", key="--heads")


@pytest.mark.parametrize(
    ("targets", "n_layers", "n_heads", "outside"),
    [
        (HEADS, 13, 32, "L13H12 does not exist: .* layers L0 to L12 with heads H0 to H31. Choose heads"),
        (HEADS, 14, 12, "L13H12, L0H31 does not exist: .* layers L0 to L13 with heads H0 to H11. Choose heads"),
        (LAYERS, 14, 1, "L14 does not exist: the model has layers L0 to L13. Choose layers of this model"),
    ],
)
def test_what_lies_outside_a_model_is_refused(targets: Targets, n_layers: int, n_heads: int, outside: str) -> None:
    def layout(n_layers: int, n_heads: int) -> HeadLayout:
        return HeadLayout("llama", n_layers, n_heads, n_heads, 8, 64)

    targets.check(layout(15, 32))
    with pytest.raises(ValueError, match=f"^{targets.key}: {outside}"):
        targets.check(layout(n_layers, n_heads))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("scores", "abc"), ("scores", 3), ("scores", [1, 2]), ("scores", [[1], [1, 2]]), ("scores", [["a"]]),
     ("layer_scores", "abc"), ("layer_scores", [1, 2, 3]), ("chance_level", "x"), ("chance_level", [1])],
)  # fmt: skip
def test_provenance_of_another_type_is_refused_when_it_is_read(tmp_path: Path, name: str, value: object) -> None:
    """Not after training, when the model card shows it."""
    content = {"scores": [[0.1, None], [0.2, 0.3]], "layer_scores": [0.1, 0.2], "chance_level": 0.1, name: value}
    (tmp_path / "heads.json").write_text(json.dumps({"heads": ["L0H0"], "provenance": content}))
    with pytest.raises(ValueError, match=f'^hera_heads: "{name}" in .*heads.json is not what'):
        Targets.load(tmp_path / "heads.json")


@pytest.mark.parametrize("name", ["L" + "9" * 5000, f"L1H{'9' * 5000}"])
def test_a_name_of_5000_digits_is_no_page_of_text(name: str) -> None:
    with pytest.raises(ValueError, match=r"^hera_heads: 'L.{0,39}' is not a head; "):
        Targets.parse(name)


@both
def test_round_trip_through_a_file(tmp_path: Path, targets: Targets) -> None:
    chosen = Targets(targets.items, {"model": "Modell Ä", "scores": [[0.1, None]], "k": 10})
    path = tmp_path / targets.file_name
    chosen.save(path)
    for read in (
        Targets.load(path),
        Targets.load(str(path), targets.granularity),
        Targets.parse(str(path), targets.granularity),
    ):
        assert read == chosen
        assert read.provenance == chosen.provenance
    assert json.loads(path.read_text(encoding="utf-8"))[targets.what] == list(targets.names)
    assert os.listdir(tmp_path) == [targets.file_name]
    path.write_text(json.dumps({targets.what: list(targets.names)}))  # without provenance
    assert Targets.load(path) == targets


@both
def test_a_file_is_found_by_its_suffix_its_folder_or_its_existence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: Targets
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.json", "those_of_mine"):
        targets.save(name)
        assert Targets.parse(name, targets.granularity) == targets
        assert Targets.parse(f"./{name}", targets.granularity) == targets
    for missing, why in (
        ("missing.json", "No such file"),
        ("folder/missing", "No such file"),
        (".", "Is a directory"),
    ):
        value = missing if why == "No such file" else str(tmp_path)
        with pytest.raises(
            ValueError, match=rf"^{targets.key}: {value} cannot be read .{why}.*; give a .* or name the"
        ):
            Targets.parse(value, targets.granularity)


@pytest.mark.parametrize(
    ("granularity", "content", "message"),
    [
        ("head", b"L1H2", "is not JSON"),
        ("head", b"\xff\xfe\x00", "is not JSON"),
        ("layer", b"", "is not JSON"),
        ("head", b'["L1H2"]', 'has no list "heads"'),
        ("head", b'{"heads": "L1H2"}', 'has no list "heads"'),
        ("head", b'{"scores": []}', 'has no list "heads"'),
        ("head", b'{"layers": ["L1"]}', 'has no list "heads"'),
        ("head", b'{"heads": []}', "no head is named"),
        ("head", b'{"heads": ["L1"]}', "'L1' is not a head"),
        ("head", b'{"heads": [[1, 2]]}', "is not a head"),
        ("head", b'{"heads": ["L1H2", "L1H2"]}', "L1H2 is named more than once"),
        ("layer", b'{"heads": ["L0H1"]}', 'has no list "layers"'),
        ("layer", b'{"layers": 3}', 'has no list "layers"'),
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, granularity: str, content: bytes, message: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    remedy = rf".*; give a {granularity}s\.json .* name the {granularity}s" if "JSON" in message else ""
    with pytest.raises(ValueError, match=f"^hera_{granularity}s: .*{message}{remedy}"):
        Targets.load(path, granularity)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    HEADS.save(path)
    with pytest.raises(TypeError):
        Targets((Target(1, 2),), {"bad": object()}).save(path)
    assert Targets.load(path) == HEADS
    assert os.listdir(tmp_path) == ["heads.json"]
