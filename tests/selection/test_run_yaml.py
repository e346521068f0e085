"""Setting keys in a recipe: their values change, and everything else stays."""

from pathlib import Path

import pytest
import yaml

from llamafactory_hera.selection.run_yaml import RecipeFile

ROOT = Path(__file__).parents[2]
HEADS = {"hera_heads": "L13H12,L7H6"}
NEW = "hera_heads: L13H12,L7H6"


def changed(text: str, keys: dict = HEADS) -> str:
    return RecipeFile(Path("recipe.yaml"), text).with_keys(keys)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Writes a recipe with one key."""
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\n")
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: 1  # why\n\nhera_heads: auto\nb: 'x'\n", f"a: 1  # why\n\n{NEW}\nb: 'x'\n"),
        ("hera_heads: [L1H0, L2H0]\na: [1, 2]\n", f"{NEW}\na: [1, 2]\n"),
        ("a:\n  - 1\n  - 2\nhera_heads:\n", f"a:\n  - 1\n  - 2\n{NEW}\n"),
        ("a: &x auto\nhera_heads: *x\n", f"a: &x auto\n{NEW}\n"),
        ("base: &b {x: 1}\n<<: *b\nhera_heads: auto\n", f"base: &b {{x: 1}}\n<<: *b\n{NEW}\n"),
        ("a: |\n  x\n\n# hera\nhera_k: 2\n", f"a: |\n  x\n\n# hera\nhera_k: 2\n{NEW}\n"),
        ("a: 1.0e-3\nb: 1e-5\nc: 010\nd: yes", f"a: 1.0e-3\nb: 1e-5\nc: 010\nd: yes\n{NEW}\n"),
        ("", f"{NEW}\n"),
        ('{"a": "ü", "hera_heads": "auto"}', '{\n  "a": "ü",\n  "hera_heads": "L13H12,L7H6"\n}\n'),
    ],
)
def test_only_the_key_changes(before, after):
    assert changed(before) == after


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_only_one_line_of_a_shipped_recipe_changes(path):
    before = RecipeFile.read(path)
    lines = set(before.with_keys(HEADS).splitlines())
    kept = [line for line in before.text.splitlines() if line in lines]
    assert len(kept) >= len(before.text.splitlines()) - 1


def test_values_of_any_type_are_read_back_as_they_are():
    keys = {"rate": 1e-5, "text": "yes", "nested": ["a: b", 1], "new": {"key": None}, "flag": False}
    assert yaml.safe_load(changed("rate: 2\na: 1\n", keys)) == {"a": 1} | keys


@pytest.mark.parametrize("text", ["- a\n", "a: 1\n---\nb: 1\n", "a: [\n", "a: \x00\n", "text", "[1]"])
def test_a_text_that_is_not_a_mapping_is_refused(text):
    with pytest.raises(ValueError, match=r"^recipe\.yaml is not a mapping of keys \(.*\); write"):
        changed(text)


def test_in_place_keeps_symbolic_links_and_the_file_mode(path, tmp_path):
    link = tmp_path / "link.yaml"
    path.chmod(0o600)
    link.symlink_to(path.name)
    RecipeFile.read(link).set_in_place(HEADS, check_only=True)
    assert path.read_text() == "a: 1\n"
    RecipeFile.read(link).set_in_place(HEADS)
    assert link.is_symlink()
    assert path.read_text() == f"a: 1\n{NEW}\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda path: path.write_text("a: 2\n"), "was edited since it was read"),
        (lambda path: path.unlink(), "is not a writable file"),
    ],
)
def test_a_recipe_that_was_edited_meanwhile_is_not_changed(path, harm, problem):
    read = RecipeFile.read(path)
    harm(path)
    left = path.read_text() if path.exists() else None
    with pytest.raises(ValueError, match=rf"^--in-place: .*recipe\.yaml {problem}; set hera_heads in it by hand"):
        read.set_in_place(HEADS)
    assert left == (path.read_text() if path.exists() else None)
    # a new recipe can still be made from the text that was read
    assert read.with_keys(HEADS) == f"a: 1\n{NEW}\n"


@pytest.mark.parametrize("text", ["hera_heads:\n  - L1H0\n  # why\n  - L2H0\n", "a: # why\n  auto  # b\n"])
def test_a_comment_that_would_be_lost_is_named(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match="would lose the comment '# why'"):
        RecipeFile.read(path).set_in_place(HEADS)
    assert "hera_heads: L13H12,L7H6" in changed(text)
