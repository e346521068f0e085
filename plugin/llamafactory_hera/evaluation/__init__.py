"""Evaluation with lmms-eval: suites of benchmarks, a model class for trained models, and the paper's numbers."""

from typing import Any


def manifest() -> Any:
    """Describes ``hera_vlm`` to lmms-eval, which calls this entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("hera_vlm", chat_class_path="llamafactory_hera.evaluation.vlm.HeraVLM")
