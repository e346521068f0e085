"""Relative links in the pages lead to existing files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "patches").glob("*.md")),
    ROOT / "recipes" / "README.md",
    ROOT / "recipes" / "data" / "README.md",
    ROOT / "recipes" / "rah_lora" / "README.md",
    ROOT / "recipes" / "harc" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_existing_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in inside if target and not (page.parent / target).exists()]
    assert not missing
