"""Backbones in the host's model list."""

import pytest

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS

BACKBONES = [(f"models/{model.key}", model.template) for model in LANGUAGE_MODELS.values()]
BACKBONES += [(model.checkpoint, model.template) for model in NATIVE_MODELS.values()]


@pytest.mark.parametrize(("path", "template"), BACKBONES)
def test_each_backbone_is_listed_once_as_multimodal_with_its_template(path: str, template: str) -> None:
    from llamafactory.extras import constants

    names = [
        name
        for name, paths in constants.SUPPORTED_MODELS.items()
        if paths.get(constants.DownloadSource.DEFAULT) == path and constants.DEFAULT_TEMPLATE.get(name) == template
    ]
    assert len(names) == 1
    assert names[0] in constants.MULTIMODAL_SUPPORTED_MODELS


def test_a_model_that_the_host_lists_is_not_listed_again() -> None:
    from llamafactory.extras import constants

    from llamafactory_hera.integrations.llamaboard.models import REGISTERED

    assert len(REGISTERED) == len(set(REGISTERED)) < len(BACKBONES)
    assert all(name.endswith("-HeRA") for name in REGISTERED)
    assert "Qwen2.5-VL-7B-Instruct" in constants.SUPPORTED_MODELS
    assert "Qwen2.5-VL-7B-HeRA" not in constants.SUPPORTED_MODELS
