"""Writing keys into a recipe: a value changes, everything else stays as it was written."""

from pathlib import Path

import pytest
import yaml

from llamafactory_hera.heads import Targets
from llamafactory_hera.selection.run_yaml import set_heads_in_place, write_run_yaml

ROOT = Path(__file__).parents[2]
HEADS = Targets.parse("L13H12,L7H6")
NEW = "hera_heads: L13H12,L7H6"
RECIPE = """\
# a comment on top

### model
model_name_or_path: some/model   # where it lies
learning_rate: 1.0e-3
quoted: "no"
flag: false

### hera
stage: sft
hera_heads: L1H0,L2H0  # first guess
hera_teacher: 'facebook/dinov2-large'
a_list: [1, 2]
nested:
  - one
  - two

### end
text: |
  of several
  lines
last: value with spaces
"""


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> its path."""

    def write(text=RECIPE):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("value", ["auto", "'L1H0'", "[L1H0, L2H0]", "null", "", "saves/x/heads.json"])
@pytest.mark.parametrize("end", ["\n", "  # why\nother: 1\n", ""])
def test_in_place_replaces_any_value(recipe, value, end):
    path = recipe(f"stage: hera\nhera_heads: {value}{end}")
    set_heads_in_place(path, HEADS)
    spaces = " " if value == "" else ""  # those in front of nothing are kept
    assert path.read_text() == f"stage: hera\n{NEW}{spaces}{end}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(RECIPE, RECIPE.replace("L1H0,L2H0", str(HEADS)), id="one line"),
        pytest.param(
            RECIPE.replace("hera_heads: L1H0,L2H0  # first guess\n", ""),
            RECIPE.replace("hera_heads: L1H0,L2H0  # first guess", NEW),
            id="in front of its like",
        ),
        pytest.param(
            "hera_heads:\n  - L1H0\n  - L2H0  # two\n\n# next\nother: 1\n",
            f"{NEW}  # two\n\n# next\nother: 1\n",
            id="a list in lines",
        ),
        pytest.param('{"stage": "hera", "hera_heads": "auto"}', f"stage: hera\n{NEW}\n", id="JSON"),
        ("", f"{NEW}\n"),
        ("model: x", f"model: x\n{NEW}\n"),
        ("model: x\n", f"model: x\n{NEW}\n"),
        ("# only a comment\n", f"# only a comment\n{NEW}\n"),
    ],
)
def test_in_place_changes_nothing_else(recipe, before, after):
    path = recipe(before)
    set_heads_in_place(path, HEADS)
    assert path.read_text() == after


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_in_place_changes_one_line_of_every_recipe(path, recipe):
    before = path.read_text()
    content = yaml.safe_load(before)
    copy = recipe(before)
    set_heads_in_place(copy, HEADS)
    assert yaml.safe_load(copy.read_text()) == content | {"hera_heads": str(HEADS)}
    if "hera_heads" in content:
        pairs = zip(before.splitlines(), copy.read_text().splitlines(), strict=True)
        assert sum(old != new for old, new in pairs) == 1


def test_a_recipe_that_cannot_be_written_is_named(recipe, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = recipe()
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(ValueError, match=r"recipe\.yaml cannot be written \(Permission denied\)"):
        set_heads_in_place(path, HEADS)
    assert path.read_text() == RECIPE


def test_the_run_recipe_is_the_recipe_with_overrides_and_heads(recipe, tmp_path):
    target, heads_file = tmp_path / "run.yaml", tmp_path / "saves/hera/heads.json"
    overrides = {"hera_select_m": 2, "learning_rate": 1e-5, "text": "yes", "nested": ["a: b", 1], "new": {"key": None}}
    write_run_yaml(recipe(), overrides, HEADS, heads_file, target)
    text = target.read_text()
    expected = yaml.safe_load(RECIPE) | overrides | {"stage": "hera", "hera_heads": str(heads_file)}
    assert yaml.safe_load(text) == expected
    assert f"llamafactory-cli train {target}" in text
    assert str(HEADS).replace(",", " ") in text.splitlines()[0]
    for kept in ("# a comment on top\n", "some/model   # where it lies\n", 'quoted: "no"\n', "\n\n### end\n"):
        assert kept in text
    assert recipe().read_text() == RECIPE
