"""A whole selection that is given what it cannot use: named, early, and with nothing lost."""

import dataclasses
import logging
import math

import pytest
import torch

from llamafactory_hera.heads import HeadId
from llamafactory_hera.heads.families import decoder_layers
from llamafactory_hera.selection.run import select_heads
from tests.tiny_models import text_model

from .tiny import settings, text_material, vlm_material


def test_a_head_with_nan_is_named_and_never_taken(tmp_path, caplog):
    model = text_model("qwen3").eval()
    with torch.no_grad():
        # head 1 of the last layer: nothing comes behind it
        decoder_layers(model)[1].self_attn.o_proj.weight[0, 16] = math.nan
    material = text_material(tmp_path, model=model)
    with caplog.at_level(logging.WARNING):
        heads = select_heads(material, settings(m=7), tmp_path / "heads.json")
    assert "L1H1" in caplog.text
    assert heads.provenance["scores"][1][1] is None
    assert sum(score is None for row in heads.provenance["scores"] for score in row) == 1
    assert HeadId(1, 1) not in heads.heads
    assert len(heads.heads) == 7


def test_nan_everywhere_is_an_error(tmp_path):
    model = text_model("qwen3").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="model_name_or_path: the output of every head"):
        select_heads(text_material(tmp_path, model=model), settings(), tmp_path / "heads.json")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    material = text_material(tmp_path)
    (tmp_path / "out").write_text("a file")
    unused = dataclasses.replace(material, load_teacher=lambda: 1 / 0, load_model=lambda: 1 / 0)
    with pytest.raises(ValueError, match=r"output_dir: .*out cannot be written"):
        select_heads(unused, settings(), tmp_path / "out/heads.json")


def test_too_little_memory_names_the_key_and_keeps_the_features(tmp_path):
    with pytest.raises(ValueError, match=r"hera_select_memory_gb: 1e-06 .*give at least"):
        select_heads(text_material(tmp_path), settings(memory_gb=1e-6), tmp_path / "out/heads.json")
    assert list((tmp_path / "out").glob("features-*/block-*"))


def test_the_vision_tower_as_teacher_is_warned_of(tmp_path, caplog):
    material = vlm_material(tmp_path)
    chosen = settings(mode="mllm", k=3)
    select_heads(material, chosen, tmp_path / "heads.json")
    assert "vision tower" not in caplog.text
    own = dataclasses.replace(material, model_folder=tmp_path / "teacher")
    with pytest.raises(ValueError, match="no decoder layer"):  # only the comparison is of interest
        select_heads(own, chosen, tmp_path / "heads.json")
    assert "hera_teacher: tiny/teacher is the model's own vision tower" in caplog.text


@pytest.mark.parametrize(("strategy", "m", "number"), [("worst", 9, 8), ("middle", 5, 4)])
def test_more_heads_than_there_are_is_said_before_the_passes(tmp_path, strategy, m, number):
    with pytest.raises(ValueError, match=f"hera_select_m: {m} .* hera_select: {strategy} has {number} to choose"):
        select_heads(text_material(tmp_path), settings(strategy=strategy, m=m), tmp_path / "out/heads.json")
    assert not list((tmp_path / "out").glob("features-*/block-*"))
