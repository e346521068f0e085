"""Saved settings: complete with the plugin, readable without it."""

from pathlib import Path

from llamafactory_hera.integrations.llamaboard.fields import FIELDS, default

PLAIN = {
    "top.model_name": "Custom",
    "top.template": "qwen",
    "train.training_stage": "Supervised Fine-Tuning",
    "train.dataset": ["hera_demo"],
    "train.learning_rate": "1e-3",
}
HERA = PLAIN | {f"train.{key}": default(key) for key in FIELDS}
HERA |= {"top.model_name": "LLaVA-Qwen3-4B-HeRA", "top.template": "llava_qwen3", "train.training_stage": "HeRA"}
HERA |= {"train.hera_heads": "L1H2: «ж»\n# no comment", "train.hera_weight": 0.5, "train.hera_k": None}


def test_the_plugin_reads_all_settings_and_the_host_alone_reads_its_own(tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = str(tmp_path / "saved.yaml")
    for saved in (PLAIN, HERA):
        save_args(path, saved)
        assert load_args(path) == saved
        assert load_args.__wrapped__(path) == PLAIN | {"top.template": "qwen" if saved is PLAIN else "default"}
    assert load_args(str(tmp_path / "missing.yaml")) is None


def test_settings_that_the_host_saved_or_that_have_an_unknown_field_can_be_read(tmp_path: Path) -> None:
    from llamafactory.webui.common import load_args, save_args

    path = str(tmp_path / "saved.yaml")
    save_args.__wrapped__(path, PLAIN)
    assert load_args(path) == PLAIN
    save_args(path, HERA | {"train.hera_of_another_version": 1})
    assert load_args(path) == HERA
