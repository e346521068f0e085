"""The notation of layers, and their file."""

from pathlib import Path

import pytest

from llamafactory_hera.heads import LayerSet


def test_text_and_back() -> None:
    layers = LayerSet.parse(" L14, l3 L0")
    assert layers.layers == (14, 3, 0)
    assert str(layers) == "L14,L3,L0"
    assert LayerSet.parse(["L1", "L2"]) == LayerSet((1, 2))


@pytest.mark.parametrize("wrong", ["14", "L3H4", "middle", "L-1", "L"])
def test_another_syntax_is_named(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^hera_layers: '{wrong}' is not a layer; write layers as .* L14,L15"):
        LayerSet.parse(wrong)


def test_none_and_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^hera_layers: no layer is named"):
        LayerSet.parse(" , ")
    with pytest.raises(ValueError, match=r"^hera_layers: L2 is named more than once"):
        LayerSet.parse("L2,L1,L2")
    LayerSet.parse("L0,L4").check(5)
    with pytest.raises(ValueError, match=r"^hera_layers: L5 does not exist: this model has layers L0 to L4; choose"):
        LayerSet.parse("L0,L5").check(5)


def test_a_file_keeps_order_and_provenance(tmp_path: Path) -> None:
    layers = LayerSet((3, 1), {"m": 2})
    layers.save(tmp_path / LayerSet.FILE)
    assert LayerSet.load(tmp_path / LayerSet.FILE) == layers
    assert [path.name for path in tmp_path.iterdir()] == [LayerSet.FILE]
    assert LayerSet.resolve(str(tmp_path / LayerSet.FILE)) == layers
    assert LayerSet.resolve("L3,L1") == LayerSet((3, 1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[]", 'has no list "layers"'),
        ('{"heads": ["L0H1"]}', 'has no list "layers"'),
        ('{"layers": 3}', 'has no list "layers"'),
        (None, "cannot be read .No such file"),
    ],
)
def test_another_file_is_named_with_the_remedy(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError,
        match=rf"^hera_layers: the layers file .*bad\.json {said}.*; give a layers\.json .* name the layers",
    ):
        LayerSet.resolve(str(path))
