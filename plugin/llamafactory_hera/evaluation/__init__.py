"""Evaluation with lmms-eval: benchmarks as suites, any output of ours as a model, the paper's table beside them."""

from typing import Any


def manifest() -> Any:
    """Names ``hera_vlm`` to lmms-eval, which asks for it by an entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("hera_vlm", chat_class_path="llamafactory_hera.evaluation.vlm.HeraVLM")
