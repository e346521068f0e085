"""Writing keys into a recipe: a value changes, everything else stays as it was written."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

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
        pytest.param('{"a": 1,\n "hera_heads": "auto"}', f'{{"a": 1,\n "hera_heads": "{HEADS}"}}', id="JSON"),
        pytest.param("{a: 1}\n", f'{{"hera_heads": "{HEADS}", a: 1}}\n', id="a new key in a flow mapping"),
        pytest.param("a: &x auto\nhera_heads: *x\n", f"a: &x auto\n{NEW}\n", id="an alias"),
        pytest.param("? hera_heads\n: auto\n", f"? hera_heads\n: {HEADS}\n", id="an explicit key"),
        pytest.param("  a: 1\n  hera_k: 2\n", f"  a: 1\n  {NEW}\n  hera_k: 2\n", id="an indented root"),
        pytest.param("hera_heads: # why\n  - L1H0\n", f"hera_heads: # why\n  {HEADS}\n", id="a comment between"),
        pytest.param("hera_heads: >-\n  auto\n\nother: 1\n", f"{NEW}\n\nother: 1\n", id="a folded text"),
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


_NAMES = st.sampled_from(["hera_heads", '"hera_heads"', "? hera_heads\n", "hera_k", "stage", "'x y'", "<<"])
_VALUES = st.sampled_from(
    ["auto", "", "'L1H0'", '"a: b # c"', "[L1H0, L2H0]", "{a: [1, *x]}", "*x", "&x 1", "&y auto", "*y", "!!str 1", "~",
     ".nan", ">-\n auto\n", "|-\n  auto\n  more", "|+\n  a\n\n", ">\n", "\n - a\n - b: 1", "\n- a", "\n  b: &x {c: 1}",
     "\n  auto", "# c\n  auto", "# c: d\n  - 1"]
)  # fmt: skip
_ENTRY = st.tuples(_NAMES, _VALUES, st.sampled_from(["\n", "  # why\n", "\n\n# next: 1\n"]))


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(_ENTRY.map(lambda entry: "{}: {}{}".format(*entry))),
    flow=st.booleans(),
    start=st.sampled_from(["", "# top\n", "---\n", "\ufeff", "%YAML 1.1\n---\n"]),
    indent=st.sampled_from(["", "  "]),
    end=st.sampled_from(["", "# end\n", "...\n", "---\nb: 1\n"]),
    line=st.sampled_from(["\n", "\r\n"]),
)
def test_in_place_one_key_differs_or_nothing(entries, flow, start, indent, end, line):
    body = "".join(indent + each.replace("\n", f"\n{indent}").rstrip(" ") for each in entries)
    if flow:
        body = "{" + ", ".join(each.split("#")[0].strip().replace("\n", " ") for each in entries) + "}\n"
    text = (start + body + end).replace("\n", line)
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_bytes(text.encode())
        with suppress(ValueError):
            set_heads_in_place(path, HEADS)
        after = path.read_bytes().decode()
    if after == text:
        return
    expected = (yaml.safe_load(text) or {}) | {"hera_heads": str(HEADS)}
    assert set(map(repr, yaml.safe_load(after).items())) == set(map(repr, expected.items()))
    assert line == "\n" or line not in text or "\n" not in after.replace(line, "")
    kept = text.replace(line, "\n").split("\n")
    assert sum(each not in after for each in kept) <= 3  # the lines of one value


@pytest.mark.parametrize(
    "text", ["hera_heads: &x auto\nb: *x\n", "a: 1\n...\n", "- a\n", "a: 1\n---\nb: 1\n", "a: [\n", "a: \x00\n"]
)
def test_what_cannot_be_changed_alone_is_left_and_named(recipe, text):
    path = recipe(text)
    with pytest.raises(
        ValueError, match=r"^--in-place: .*recipe\.yaml is left as it is, as .*; write hera_heads: into"
    ):
        set_heads_in_place(path, HEADS)
    assert path.read_text() == text


def test_in_place_keeps_a_link_and_a_mode(recipe, tmp_path):
    path = recipe()
    path.chmod(0o600)
    link = tmp_path / "link.yaml"
    link.symlink_to(path.name)
    set_heads_in_place(link, HEADS)
    assert link.is_symlink()
    assert NEW in path.read_text()
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_run_recipe_of_a_recipe_that_cannot_be_spliced(recipe, tmp_path):
    write_run_yaml(recipe("hera_heads: &x auto\nb: *x\n"), {}, HEADS, Path("h.json"), tmp_path / "run.yaml")
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written == {"hera_heads": "h.json", "b": "auto", "stage": "hera"}


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
