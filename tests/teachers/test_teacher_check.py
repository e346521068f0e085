import subprocess
import sys

import pytest
import torch
import transformers as tf

from llamafactory_hera.teachers.check import check_teacher
from llamafactory_hera.teachers.families import FAMILIES


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_says_what_the_teacher_is(kind, save_teacher):
    folder = save_teacher(kind)
    info = check_teacher(str(folder))
    assert (info.model_type, info.hidden_size, info.path, info.name) == (kind, 32, folder, str(folder))
    assert info.has_cls == ("siglip" not in kind)


def test_the_hidden_size_that_a_config_leaves_out_is_the_default(save_teacher, edit_json):
    folder = save_teacher("siglip")
    edit_json(folder / "config.json", vision_config={"model_type": "siglip_vision_model"})
    assert check_teacher(str(folder)).hidden_size == tf.SiglipVisionConfig().hidden_size


def test_no_weights_are_loaded(save_teacher, monkeypatch):
    folder = save_teacher("dinov2")

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    check_teacher(str(folder))


def test_a_home_folder_may_be_given_with_a_tilde(save_teacher, tmp_path, monkeypatch):
    save_teacher("dinov2")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_teacher("~/dinov2").path == tmp_path / "dinov2"


@pytest.mark.parametrize("value", ["/no/such/folder", "./teacher", "../a/b", "~/teacher", "teacher", "a/b/c", "a b/c"])
def test_a_missing_folder_is_named_with_key_and_remedy(value):
    with pytest.raises(ValueError) as caught:
        check_teacher(value, key="my_key")
    message = str(caught.value)
    assert message.startswith(f"my_key: the folder {value} does not exist.")
    assert "hub id such as facebook/dinov2-large" in message


def test_a_file_is_not_a_folder(save_teacher):
    with pytest.raises(ValueError, match=r"hera_teacher: .*config\.json is a file; give the folder"):
        check_teacher(str(save_teacher("vit") / "config.json"))


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"hera_teacher: the folder .* holds no config\.json"):
        check_teacher(str(tmp_path))


def test_a_config_that_is_not_json_is_named(save_teacher):
    folder = save_teacher("vit")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        check_teacher(str(folder))


def test_a_language_model_is_not_a_teacher(tmp_path):
    tf.Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hera_teacher: .* is not a vision model.*'qwen2'.*dinov2"):
        check_teacher(str(tmp_path))


def test_a_config_without_model_type_is_not_a_teacher(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_large"}')
    with pytest.raises(ValueError, match=r"is not a vision model.*model_type is None"):
        check_teacher(str(tmp_path))


def test_a_teacher_without_image_processor(save_teacher):
    folder = save_teacher("dinov2")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"hera_teacher: .* holds no image processor \(preprocessor_config\.json"):
        check_teacher(str(folder))
    # a text processor alone does not help
    (folder / "processor_config.json").write_text('{"processor_class": "X"}')
    with pytest.raises(ValueError, match="holds no image processor"):
        check_teacher(str(folder))


def test_a_teacher_without_weights(save_teacher):
    folder = save_teacher("dinov2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"hera_teacher: .* holds no weights \(looked for model\.safetensors"):
        check_teacher(str(folder))


def test_a_part_that_is_missing_is_named(save_teacher):
    folder = save_teacher("dinov2")
    model = tf.Dinov2Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert check_teacher(str(folder)).model_type == "dinov2"
    part = sorted(folder.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ValueError, match=f"hera_teacher: .*{part.name} is missing"):
        check_teacher(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_that_were_not_downloaded_whole_are_named(keep, save_teacher):
    folder = save_teacher("dinov2")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"hera_teacher: .*model\.safetensors .*again, whole"):
        check_teacher(str(folder))


def test_a_git_lfs_pointer_is_told_from_weights(save_teacher):
    folder = save_teacher("dinov2")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"git lfs pull"):
        check_teacher(str(folder))


def test_pytorch_weights_are_accepted(save_teacher):
    folder = save_teacher("dinov2")
    torch.save(tf.Dinov2Model.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert check_teacher(str(folder)).model_type == "dinov2"


def test_importing_the_checks_loads_neither_torch_nor_transformers():
    code = "import sys, llamafactory_hera.teachers.check; print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"
