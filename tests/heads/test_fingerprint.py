"""The fingerprint identifies a language model in any checkpoint that contains it."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny_models import teacher_folder, text_model, vlm

from llamafactory_hera.heads.families import decoder_layers, head_layout
from llamafactory_hera.heads.fingerprint import model_fingerprint


def fingerprint(model, folder, adapters=()):
    model.save_pretrained(folder)
    return model_fingerprint(folder, head_layout(model.config), adapters)


@pytest.fixture
def llm():
    return text_model("qwen3")


@pytest.fixture
def plain(llm, tmp_path):
    return fingerprint(llm, tmp_path / "plain")


@pytest.mark.parametrize("kind", ["shards", "pickled", "half precision"])
def test_a_copy_has_the_same_fingerprint(llm, plain, tmp_path, kind):
    copy = tmp_path / "copy"
    save = {"max_shard_size": "20KB"} if kind == "shards" else {}
    (llm.bfloat16() if kind == "half precision" else llm).save_pretrained(copy, **save)
    assert (len(list(copy.glob("*.safetensors"))) > 1) == (kind == "shards")
    if kind == "pickled":
        torch.save(llm.state_dict(), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    assert model_fingerprint(copy, head_layout(llm.config)) == plain


@pytest.mark.parametrize("name", ["llava-qwen3", "gemma3", "qwen3_vl", "internvl-qwen2"])
def test_a_vlm_has_its_language_models_fingerprint_with_any_vision_tower(name, tmp_path):
    model = vlm(name)
    decoder = model.get_decoder()
    state = {f"model.{key}": value.contiguous() for key, value in decoder.state_dict().items()}
    (tmp_path / "llm").mkdir()
    save_file(state, tmp_path / "llm/model.safetensors")
    expected = model_fingerprint(tmp_path / "llm", head_layout(decoder.config))
    assert fingerprint(model, tmp_path / "vlm") == expected
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.data_ptr() not in {p.data_ptr() for p in decoder.parameters()}:
                parameter.add_(1)
    assert fingerprint(model, tmp_path / "other_tower") == expected


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_training_any_weight_changes_the_fingerprint(plain, tmp_path, name):
    model = text_model("qwen3")
    with torch.no_grad():  # for o_proj, only the weights of the last head
        decoder_layers(model)[1].get_submodule(name).weight[..., -head_layout(model.config).head_dim :].mul_(1.02)
    assert fingerprint(model, tmp_path / "trained") != plain


def test_another_layout_changes_the_fingerprint(llm, plain, tmp_path):
    llm.config.num_attention_heads *= 2
    llm.config.head_dim //= 2
    assert fingerprint(llm, tmp_path / "layout") != plain


def test_an_adapter_and_its_training_change_the_fingerprint(llm, plain, tmp_path):
    lora, layout = tmp_path / "lora", head_layout(llm.config)
    get_peft_model(text_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(lora)
    new = model_fingerprint(tmp_path / "plain", layout, [lora])
    weights = lora / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    assert len({plain, new, model_fingerprint(tmp_path / "plain", layout, [lora])}) == 3


@pytest.mark.parametrize("name", ["llava-qwen3", "qwen3_vl"])
def test_a_loaded_model_has_its_checkpoints_fingerprint_until_an_adapter_trains(name, tmp_path):
    model = vlm(name)
    layout = head_layout(model.config)
    saved = fingerprint(model, tmp_path / "saved")
    assert model_fingerprint(model, layout) == saved
    assert model_fingerprint(type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16), layout) == saved
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model_fingerprint(adapted, layout) == saved
    with torch.no_grad():
        next(p for key, p in adapted.named_parameters() if "lora_B" in key).add_(1)
    assert model_fingerprint(adapted, layout) != saved


def test_weights_without_a_decoder_are_refused():
    with pytest.raises(ValueError, match=r"model: the weights of .*teacher.* contain no decoder layer"):
        model_fingerprint(Path(teacher_folder()), head_layout(text_model("qwen3").config))
