"""The names of heads and layers, and the file that lists them."""

import json
from pathlib import Path

import pytest

from llamafactory_hera.heads import Target, Targets
from llamafactory_hera.heads.families import HeadLayout, LayerHeads
from llamafactory_hera.heads.targets import file_name

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
def test_names_keep_their_order(targets, written):
    for value in written:
        assert Targets.parse(value, targets.granularity) == targets
    assert str(targets) == written[0]


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("head", ("L3", "H4", "3H4", "L3H4;L5H6", "L3-H4", "LxHy", "L3H4x", "L-1H2", "L1.0H2", "all", "L" + "9" * 40)),
        ("layer", ("14", "L3H4", "middle", "L-1", "L")),
    ],
)
def test_another_syntax_is_refused_with_an_example(granularity, names):
    example = {"head": "L13H12,L7H6", "layer": "L14,L15"}[granularity]
    for name in names:
        message = f"^hera_{granularity}s: '{name[:40]}' is not a {granularity}; write {granularity}s .* {example}"
        with pytest.raises(ValueError, match=message):
            Targets.parse(f"{name},L1H1", granularity)


@both
def test_empty_and_repeated_names_and_targets_of_the_other_kind_are_refused(targets):
    first, second, third = targets.names
    message = f"^{targets.key}: no {targets.granularity} is given; write {targets.plural}"
    for text in ("", "  ", ",", " , \n"):
        with pytest.raises(ValueError, match=message):
            Targets.parse(text, targets.granularity)
    for text in (f"{second},{first},{third},{second.lower()}", [third, second, second]):
        with pytest.raises(ValueError, match=f"^{targets.key}: {second} is repeated; remove the"):
            Targets.parse(text, targets.granularity)
    other = "layer" if targets == HEADS else "head"
    with pytest.raises(ValueError, match=f"^hera_{other}s: {targets} is not a {other}; write {other}s as"):
        Targets.parse(targets, other)


def test_errors_name_the_key_of_the_caller():
    for call in (Targets.parse, Target.parse):
        with pytest.raises(ValueError, match=r"^--heads: "):
            call("nonsense", key="--heads")


def layout(n_layers: int, n_heads: int) -> HeadLayout:
    return HeadLayout("llama", 64, (LayerHeads("attention", n_heads, 8, "self_attn.o_proj"),) * n_layers)


@pytest.mark.parametrize(
    ("targets", "n_layers", "n_heads", "outside"),
    [
        (HEADS, 13, 32, "L13H12 does not exist: the model has layers L0 to L12. Choose other heads"),
        (HEADS, 14, 12, "L13H12 does not exist: in this model, L13 is an attention layer with 12 heads of 8. Choose"),
        (LAYERS, 14, 1, "L14 does not exist: .* layers L0 to L13. Choose other layers"),
    ],
)
def test_targets_outside_a_model_are_refused(targets, n_layers, n_heads, outside):
    targets.check(layout(15, 32))
    with pytest.raises(ValueError, match=f"^{targets.key}: {outside}"):
        targets.check(layout(n_layers, n_heads))


# -- files -----------------------------------------------------------------------------------------------------------


@both
def test_a_file_keeps_targets_and_provenance(tmp_path, targets):
    chosen = Targets(targets.items, {"model": "Modell Ä", "scores": [[0.1, None]], "k": 10})
    path = tmp_path / file_name(targets.granularity)
    chosen.save(path)
    for read in (Targets.load(path), Targets.parse(str(path), targets.granularity)):
        assert read == chosen
        assert read.provenance == chosen.provenance
    path.write_text(json.dumps({targets.plural: list(targets.names)}))
    assert Targets.load(path) == targets


@both
def test_a_value_is_a_file_if_it_ends_in_json_contains_a_folder_or_exists(tmp_path, monkeypatch, targets):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.json", "those_of_mine"):
        targets.save(name)
        assert Targets.parse(name, targets.granularity) == targets
    Path("folder").mkdir()
    for missing in ("missing.json", "folder/missing"):
        message = rf"^{targets.key}: {missing} cannot be read .No such file.*; give a file that a selection or "
        with pytest.raises(ValueError, match=message):
            Targets.parse(missing, targets.granularity)


@pytest.mark.parametrize(
    ("granularity", "content", "message"),
    [
        ("head", b"L1H2", "is not JSON"),
        ("head", b"[" * 100_000, "is not JSON"),
        ("head", b"\xff\xfe\x00", "is not JSON"),
        ("head", b'["L1H2"]', 'has no "heads" list'),
        ("head", b'{"heads": "L1H2"}', 'has no "heads" list'),
        ("head", b'{"layers": ["L1"]}', 'has no "heads" list'),
        ("layer", b'{"heads": ["L0H1"]}', 'has no "layers" list'),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, granularity, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^hera_{granularity}s: .*{message}"):
        Targets.load(path, granularity)
