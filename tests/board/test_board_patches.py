"""The web UI's patches on a host that has changed."""

import inspect
from types import ModuleType, SimpleNamespace

import pytest

from hera_patches import engine, locales, loss_plot, model_list, registry, runner, saved_settings, train_tab
from hera_patches import training_stages as stages


@pytest.mark.parametrize(
    ("patch", "host", "reason"),
    [
        (stages, SimpleNamespace(TRAINING_STAGES={"DPO": "dpo"}), "no dictionary with sft"),
        (stages, SimpleNamespace(TRAINING_STAGES={"A": "sft", "B": "hera"}), registry.NOT_NEEDED),
        (model_list, SimpleNamespace(), "no SUPPORTED_MODELS"),
        (loss_plot, SimpleNamespace(gen_loss_plot=lambda log: None), "gen_loss_plot takes ['log']"),
        (saved_settings, SimpleNamespace(save_args=lambda path: None), "save_args takes ['path']"),
        (locales, SimpleNamespace(LOCALES={"training_stage": {"en": {}}, "hera_k": {}}), "already has hera_k"),
        (train_tab, SimpleNamespace(create_train_tab=lambda engine: None), "does not use get_base_elems"),
        (runner, SimpleNamespace(Runner=object), "Runner has no _parse_train_args"),
        (engine, SimpleNamespace(Engine=object), "Engine.resume is no generator"),
    ],
)
def test_another_host_is_named(patch: ModuleType, host: SimpleNamespace, reason: str) -> None:
    assert reason in patch.check(host)


def test_training_goes_on_where_only_the_web_ui_has_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_statuses", {})
    module = ModuleType("llamafactory.extras.ploting")
    registry.apply_to(module)
    assert "HeRA in the web UI may be unavailable" in capsys.readouterr().err
    assert [status.state for status in registry.statuses()] == ["does not fit"]
    registry.require()


def test_the_host_s_functions_keep_their_signature() -> None:
    from llamafactory.extras import ploting
    from llamafactory.webui import common, runner
    from llamafactory.webui.components import train

    for function in (ploting.gen_loss_plot, common.save_args, train.create_train_tab, runner.Runner._initialize):
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)
