"""Describing a run: the stage, its fields, the previewed command, saved settings, languages."""

import pytest
from playwright.sync_api import expect

from llamafactory_hera.integrations.llamaboard.fields import FIELDS, default
from llamafactory_hera.integrations.llamaboard.names import texts

from .page import BoardPage

pytestmark = pytest.mark.slow


def label(name: str) -> str:
    return texts()["en"]["elements"][name]["label"]


def test_choosing_hera_opens_its_fields_with_the_declared_defaults(page: BoardPage) -> None:
    weight = page.field(label("hera_weight"))
    expect(weight).not_to_be_visible()
    page.choose("Stage", "HeRA")
    expect(weight).to_be_visible()
    page.shot("01_stage")
    for key in FIELDS:
        shown = page.field(label(key))
        if isinstance(default(key), bool):
            expect(shown).to_be_checked(checked=default(key))
        else:
            expect(shown).to_have_value(str(default(key)))


def test_preview_names_every_key_under_every_finetuning_method(page: BoardPage) -> None:
    page.describe_run("preview", Attention_heads="L4H1,L3H5", HeRA_weight="0.1", Memory="32")
    for method in ("lora", "freeze", "full"):
        page.choose("Finetuning method", method)
        command = page.command(finetuning_type=method, stage="hera")
        assert command["freeze_vision_tower"] == "True"  # the model is listed as multimodal
        assert command["template"] == "llava_qwen3"
        expected = {"hera_heads": "L4H1,L3H5", "hera_weight": "0.1", "hera_memory": "32"}
        assert {key: command[key] for key in expected} == expected
        # the host sends nothing that is false or empty
        sent = {key for key in FIELDS if key.startswith("hera_")} - {"hera_layers", "hera_fixed_temperature"}
        assert {key for key in command if key.startswith(("hera_", "rah_"))} == sent
    page.shot("02_preview")
    page.choose("Stage", "Supervised Fine-Tuning")  # the host empties the list of datasets
    page.choose("Dataset", "hera_demo")
    assert not [key for key in page.command(stage="sft") if key.startswith("hera_")]


def test_objective_and_layers_reach_the_command(page: BoardPage) -> None:
    page.describe_run("layers", Decoder_layers="middle")
    page.choose("Objective", "cka")
    page.choose("Granularity", "layer")
    command = page.command(hera_objective="cka", hera_granularity="layer")
    assert command["hera_layers"] == "middle"
    assert "hera_heads" not in command
    page.press("Select heads")
    expect(page.status).to_contain_text("write auto as decoder layers")


def test_saved_settings_come_back(page: BoardPage) -> None:
    page.describe_run("saved", Attention_heads="L4H1", Temperature="0.2", extra={"hera_max_nan": 3})
    before = page.command()
    assert before["hera_max_nan"] == "3"
    page.name("Config path", "saved.yaml")
    page.press("Save arguments")
    expect(page.page.get_by_text("Arguments have been saved at")).to_be_visible()
    page.open()
    page.name("Config path", "saved.yaml")
    page.press("Load arguments")
    expect(page.field("Temperature")).to_have_value("0.2")
    expect(page.field("Stage")).to_have_value("HeRA")
    expect(page.page.get_by_text("hera_demo", exact=True)).to_be_visible()  # the dataset is still chosen
    page.shot("03_loaded")
    after = page.command()
    assert before | {"output_dir": ""} == after | {"output_dir": ""}


def test_every_language_is_shown(page: BoardPage) -> None:
    page.choose("Stage", "HeRA")
    for lang, spoken in reversed(texts().items()):  # English, with whose labels the list is found, comes last
        languages = page.page.get_by_role("listbox").first
        languages.click()
        languages.fill(lang)
        page.page.get_by_role("option", name=lang, exact=True).click()
        expect(page.page.get_by_text(spoken["elements"]["hera_tab"]["label"])).to_be_visible()
        shown = page.page.locator("body").inner_text()
        # pictures and report are not seen before heads are scored
        elements = [texts for name, texts in spoken["elements"].items() if name not in ("hera_gallery", "hera_report")]
        assert [word for texts in elements for word in texts.values() if word.strip("*") not in shown] == []
        page.shot(f"04_language_{lang}")


def test_the_tab_key_goes_through_fields_and_buttons_in_order_and_each_has_a_name(page: BoardPage) -> None:
    names = [label(key) for key in FIELDS]
    names.insert(1, label("hera_heads_file"))
    names.insert(names.index(label("hera_eval")) + 1, label("hera_compare"))
    buttons = (f"hera_{button}_btn" for button in ("select", "compare", "calibrate", "stop"))
    names += [texts()["en"]["elements"][button]["value"] for button in buttons]
    page.choose("Stage", "HeRA")
    page.field(names[0]).click()
    told = []
    for _ in names:
        name = "element.ariaLabel || element.labels?.[0]?.innerText || element.innerText"
        told.append(page.page.locator(":focus").evaluate(f"element => ({name}).split('\\n')[0]"))
        page.page.keyboard.press("Tab")
    assert told == names
