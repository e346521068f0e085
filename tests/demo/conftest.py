from pathlib import Path

import pytest

from llamafactory_hera.demo import build_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> dict[str, Path]:
    """The demo of size "test", built once."""
    return build_demo(tmp_path_factory.mktemp("demo") / "hera_demo", seed=0, size="test")
