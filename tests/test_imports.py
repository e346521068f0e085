"""The import arrows of the project: packages point down, and only the host's side knows LLaMA-Factory."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"llamafactory_hera": ROOT / "plugin", "hera_patches": ROOT / "patches"}

TOP = {"selection", "calibration", "backbones", "demo", "host"}
BELOW = {"alignment", "heads", "objectives", "samples", "teachers", "training"}
#: Package -> what it may import of the project besides itself and the version in ``llamafactory_hera``.
ALLOWED: dict[str, set[str]] = {
    "alignment": set(),
    "heads": {"alignment"},
    "teachers": {"alignment"},
    "objectives": {"alignment"},
    "samples": {"teachers"},
    "training": {"alignment", "objectives"},
    **dict.fromkeys(TOP, BELOW | TOP),
    "cli": BELOW | TOP,
    "hera_patches": {"host"},
}
#: Module -> what it may import against the arrows, and why.
EXCEPTIONS = {
    "llamafactory_hera.integrations.llamafactory.doctor": {"hera_patches"},  # reports on the patches
}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, and whether it is imported with the importing module itself."""

    importer: str
    line: int
    module: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}"


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: Path) -> Iterator[Import]:
    importer = module_name(path, source)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]  # a name may be a module
        for name in names:
            yield Import(importer, node.lineno, name, node not in inside and node not in typing_only)


@cache
def all_imports() -> list[Import]:
    files = [(path, source) for source in SOURCES.values() for path in sorted(source.rglob("*.py"))]
    assert len(files) > 30
    return [found for path, source in files for found in imports_of(path, source)]


def package_of(module: str) -> str | None:
    """The package that a module of the project belongs to; None for the project's root and for other projects."""
    root, *rest = module.split(".")
    if root == "hera_patches":
        return root
    if root == "llamafactory_hera" and rest and (ROOT / "plugin" / root / rest[0]).with_suffix("").is_dir():
        return rest[0]
    return "cli" if module.startswith("llamafactory_hera.cli") else None


def test_every_package_has_its_place():
    folders = {path.name for path in (ROOT / "plugin/llamafactory_hera").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ALLOWED)


def test_only_the_host_side_imports_the_host():
    wrong = [
        str(found)
        for found in all_imports()
        if found.module.split(".")[0] == "llamafactory" and package_of(found.importer) not in ("host", "hera_patches")
    ]
    assert not wrong


def test_imports_point_down():
    wrong = []
    for found in all_imports():
        importer, imported = package_of(found.importer), package_of(found.module)
        allowed = ALLOWED.get(importer, set()) | EXCEPTIONS.get(found.importer, set())
        if imported not in (None, importer) and imported not in allowed:
            wrong.append(str(found))
    assert not wrong


def test_packages_do_not_import_each_other_in_a_circle():
    """Sideways, between the upper packages, one direction at most may be taken while modules load."""
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        importer, imported = package_of(found.importer), package_of(found.module)
        if found.at_import and importer and imported and importer != imported:
            graph.setdefault(importer, set()).add(imported)
    assert graph["host"] >= {"heads", "teachers"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_each_exception_is_still_needed():
    used = {
        found.importer for found in all_imports() if package_of(found.module) in EXCEPTIONS.get(found.importer, ())
    }
    assert used == set(EXCEPTIONS)


def test_alignment_needs_nothing_but_torch_and_the_standard_library():
    allowed = {"torch", "llamafactory_hera", *sys.stdlib_module_names}
    wrong = [
        str(found)
        for found in all_imports()
        if package_of(found.importer) == "alignment" and found.module.split(".")[0] not in allowed
    ]
    assert not wrong


HEAVY = ("torch", "transformers", "peft", "numpy", "PIL", "llamafactory", "matplotlib")


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement, forbidden",
    [
        ("import llamafactory_hera", HEAVY),
        ("import hera_patches", HEAVY),
        (
            "from llamafactory_hera import alignment, heads; from llamafactory_hera.training import term; "
            "from llamafactory_hera.integrations.llamafactory import arguments",
            ("transformers", "peft", "llamafactory"),
        ),
    ],
)
def test_what_an_import_loads(statement, forbidden):
    code = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES.values()))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    loaded = set(result.stdout.split())
    assert not loaded & set(forbidden)
    assert (
        any(name.startswith(("llamafactory_hera", "hera_patches")) for name in loaded) or "hera_patches" in statement
    )
