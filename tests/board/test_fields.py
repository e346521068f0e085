"""The fields of the web UI, their values, labels and lists in the host, and the loss plot."""

import re
from typing import Any

import numpy as np
import pytest
from llamafactory.extras.ploting import gen_loss_plot
from matplotlib.axes import Axes

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.llamaboard.fields import FIELDS, labels, texts, with_fields


def of_page(args: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Returns the arguments of a run after only some fields of the page were changed."""
    values = {f"train.{key}": changed.get(key, declared.default) for key, declared in FIELDS.items()}
    return with_fields(args or {}, values.__getitem__)


def test_untouched_fields_give_the_default_of_every_key():
    assert HeraConfig.from_keys(of_page()) == HeraConfig()


def test_extra_arguments_win_over_the_fields():
    args = of_page({"stage": "hera", "hera_k": 3, "hera_max_nan": 7}, hera_heads=" L1H2 ")
    assert (args["hera_heads"], args["hera_k"], args["hera_max_nan"]) == ("L1H2", 3, 7)


@pytest.mark.parametrize("lang", texts())
def test_each_language_has_all_texts(lang):
    elements = texts()[lang]
    assert {name: list(each) for name, each in elements.items()} == {
        name: list(each) for name, each in texts()["en"].items()
    }
    assert all(list(elements[key]) == ["label", "info"] for key in FIELDS)
    assert len({elements[key]["label"] for key in FIELDS}) == len(FIELDS)
    letters = {"ru": "[а-я]", "zh": "[一-鿿]", "ko": "[가-힣]", "ja": "[ぁ-ヿ一-鿿]"}.get(lang, "[a-z]")
    assert [text for each in elements.values() for text in each.values() if not re.search(letters, text)] == []


def test_the_host_has_the_texts_in_its_languages():
    from llamafactory.webui.locales import LOCALES

    for name, by_language in labels([*texts(), "fr"]).items():
        assert by_language.pop("fr") == by_language["en"]  # a language that the host may add
        assert set(by_language) == set(LOCALES["training_stage"])
        assert LOCALES[name] == by_language


@pytest.mark.parametrize("model", LANGUAGE_MODELS.values(), ids=lambda model: model.key)
def test_the_host_lists_each_model_of_the_recipes_once_as_multimodal(model):
    from llamafactory.extras import constants

    folder = f"models/{model.key}"
    (name,) = (name for name, paths in constants.SUPPORTED_MODELS.items() if folder in paths.values())
    assert constants.DEFAULT_TEMPLATE[name] == model.template
    assert name in constants.MULTIMODAL_SUPPORTED_MODELS


def line(step: int, **values: float) -> dict[str, Any]:
    return {"current_steps": step, "total_steps": 30, **values}


def hera_line(step: int, shift: float = 0.0) -> dict[str, Any]:
    values = {"lm_loss": 3 - step / 10 + shift, "hera_loss": 2.0 + shift, "hera_mknn": step / 100 + shift}
    return line(step, loss=values["lm_loss"] + 0.01 * values["hera_loss"], **values, hera_mknn_chance=1 / step)


def raw_curve(axes: Axes) -> dict[float, float]:
    """Returns the unsmoothed curve, which is drawn first, and checks that its steps increase."""
    steps, values = map(np.ndarray.tolist, axes.get_lines()[0].get_data())
    assert steps == sorted(set(steps))
    return dict(zip(steps, values, strict=True))


def test_both_losses_and_mknn_have_labeled_axes_and_chance_varies():
    log = [hera_line(step) for step in range(1, 21)]
    losses, alignment, hera = gen_loss_plot(log).axes
    for axes, key, label in (
        (losses, "lm_loss", "LM loss"),
        (hera, "hera_loss", "HeRA loss"),
        (alignment, "hera_mknn", "MKNN"),
    ):
        assert axes.get_ylabel() == label
        assert raw_curve(axes) == pytest.approx({entry["current_steps"]: entry[key] for entry in log})
    assert hera.yaxis.get_label_position() == "right"
    assert list(alignment.get_lines()[-1].get_ydata()) == [1 / step for step in range(1, 21)]


def test_steps_that_a_resumed_run_repeats_replace_the_original_steps():
    first = [hera_line(step) for step in range(1, 13)]
    again = [hera_line(step, shift=1.0) for step in range(11, 21)]
    for end_of_first in ([], [line(12, train_loss=1.0)]):
        log = [*first, *end_of_first, *again, line(20, train_loss=1.0)]
        curve = raw_curve(gen_loss_plot(log).axes[0])
        assert curve == pytest.approx({entry["current_steps"]: entry["lm_loss"] for entry in first[:10] + again})


def test_lines_and_logs_without_some_curves_are_plotted():
    filling = line(1, loss=2.0, lm_loss=2.0)  # the memory is not full
    log = [filling, hera_line(2), line(3, loss=2.0), line(3, eval_loss=1.0), hera_line(4)]
    for entries, steps in ((log, [2, 4]), (log[:1], [])):
        figure = gen_loss_plot(entries)
        assert list(raw_curve(figure.axes[0])) == [1, *steps]
        assert figure.axes[0].get_ylabel() == "LM loss"
        assert all(list(raw_curve(axes)) == steps for axes in figure.axes[1:])
    no_mknn = [{key: value for key, value in entry.items() if "mknn" not in key} for entry in log]
    assert [axes.get_ylabel() for axes in gen_loss_plot(no_mknn).axes] == ["LM loss", "HeRA loss"]
    (axes,) = gen_loss_plot([line(step, loss=1.0) for step in range(1, 5)]).axes
    assert axes.get_ylabel() == "loss"  # the host's own plot
