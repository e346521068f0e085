"""Writing heads into a recipe: one key changes, everything else stays as it was written."""

from pathlib import Path

import pytest
import yaml

from llamafactory_hera.heads import Targets
from llamafactory_hera.selection.run_yaml import set_heads_in_place, write_run_yaml

ROOT = Path(__file__).parents[2]
HEADS = Targets.parse("L13H12,L7H6")
GUESS = "L1H0,L2H0  # first guess"
RECIPE = """\
# a comment on top

### model
model_name_or_path: some/model   # where it lies
learning_rate: 1.0e-3
quoted: "no"
flag: false

### hera
stage: hera
hera_heads: L1H0,L2H0  # first guess
hera_teacher: 'facebook/dinov2-large'
a_list: [1, 2]
nested:
  - one
  - two

### end
last: value with spaces
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("value", ["auto", "'L1H0'", "[L1H0, L2H0]", "null", "saves/x/heads.json"])
@pytest.mark.parametrize("end", ["\n", "  # why\nother: 1\n", ""])
def test_in_place_replaces_any_value(tmp_path, value, end):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: hera\nhera_heads: {value}{end}")
    set_heads_in_place(path, HEADS)
    assert path.read_text() == f"stage: hera\nhera_heads: L13H12,L7H6{end}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (RECIPE, RECIPE.replace("L1H0,L2H0", "L13H12,L7H6")),
        (
            RECIPE.replace("hera_heads: L1H0,L2H0  # first guess\n", ""),
            RECIPE.replace(GUESS, str(HEADS)),
        ),
        (
            "hera_heads:\n  - L1H0\n  - L2H0  # two\n\n# next\nother: 1\n",
            "hera_heads: L13H12,L7H6  # two\n\n# next\nother: 1\n",
        ),
        ("", "hera_heads: L13H12,L7H6\n"),
        ("model: x", "model: x\nhera_heads: L13H12,L7H6\n"),
        ("model: x\n", "model: x\nhera_heads: L13H12,L7H6\n"),
        ("# only a comment\n", "# only a comment\nhera_heads: L13H12,L7H6\n"),
    ],
    ids=[
        "one line",
        "in front of its like",
        "a list in lines",
        "empty",
        "no end of line",
        "no key of ours",
        "comment",
    ],
)
def test_in_place_changes_nothing_else(tmp_path, before, after):
    path = tmp_path / "recipe.yaml"
    path.write_text(before)
    set_heads_in_place(path, HEADS)
    assert path.read_text() == after


@pytest.mark.parametrize("end", ["\n", "  # why\nother: 1\n", ""])
def test_in_place_gives_an_empty_key_its_value(tmp_path, end):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: hera\nhera_heads: {end}")
    set_heads_in_place(path, HEADS)
    assert yaml.safe_load(path.read_text())["hera_heads"] == "L13H12,L7H6"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_in_place_changes_one_line_of_every_recipe(path, tmp_path):
    before = path.read_text()
    content = yaml.safe_load(before)
    copy = tmp_path / path.name
    copy.write_text(before)
    set_heads_in_place(copy, HEADS)
    assert yaml.safe_load(copy.read_text()) == content | {"hera_heads": str(HEADS)}
    if "hera_heads" in content:
        pairs = zip(before.splitlines(), copy.read_text().splitlines(), strict=True)
        assert sum(old != new for old, new in pairs) == 1


def test_a_recipe_that_cannot_be_written_is_named(tmp_path, recipe, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(ValueError, match=r"recipe\.yaml cannot be written \(Permission denied\)"):
        set_heads_in_place(recipe, HEADS)
    assert recipe.read_text() == RECIPE


def test_the_run_recipe_is_the_recipe_with_overrides_and_heads(recipe, tmp_path):
    target = tmp_path / "run.yaml"
    heads_file = tmp_path / "saves/hera/heads.json"
    write_run_yaml(recipe, {"hera_select_m": 2, "learning_rate": 0.1, "new": "key"}, HEADS, heads_file, target)
    expected = yaml.safe_load(RECIPE) | {"hera_heads": str(heads_file), "hera_select_m": 2, "learning_rate": 0.1}
    assert yaml.safe_load(target.read_text()) == expected | {"new": "key"}
    text = target.read_text()
    assert f"llamafactory-cli train {target}" in text
    assert "# a comment on top" in text
    assert "# L13H12 L7H6" in text
    assert recipe.read_text() == RECIPE


def test_a_run_recipe_without_a_recipe(tmp_path):
    target = tmp_path / "run.yaml"
    write_run_yaml(None, {"model_name_or_path": "x"}, HEADS, tmp_path / "heads.json", target)
    assert yaml.safe_load(target.read_text()) == {
        "model_name_or_path": "x",
        "stage": "hera",
        "hera_heads": str(tmp_path / "heads.json"),
    }
