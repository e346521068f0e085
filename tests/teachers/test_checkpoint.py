import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as tf

from llamafactory_hera.teachers import checkpoint
from llamafactory_hera.teachers.encoder import FAMILIES, check_teacher, teacher_fingerprint


def write_sharded(folder):
    model = tf.Dinov2Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("*.safetensors"))


# check


def test_it_says_what_the_teacher_is_also_what_its_config_leaves_out(save_teacher, edit_json):
    folder = save_teacher("siglip")
    edit_json(folder / "config.json", vision_config={"model_type": "siglip_vision_model"})
    info = check_teacher(str(folder))
    assert (info.family, info.path, info.name) == (FAMILIES["siglip"], folder, str(folder))
    assert info.config.hidden_size == tf.SiglipVisionConfig().hidden_size


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            remove("config.json"),
            r"the folder .* holds no config\.json\. Give the folder or the hub id of a vision model",
        ),
        (write("config.json", "{"), r"config\.json is not JSON .*again, whole"),
        (write("config.json", "[]"), r"again, whole"),
        (write("config.json", '{"model_type": "qwen2"}'), r"is not a vision model.*'qwen2'.*dinov2.*the paper's is"),
        (write("config.json", '{"architecture": "vit_large"}'), r"is not a vision model.*model_type is None"),
        (remove("preprocessor_config.json"), r"holds no image processor \(preprocessor_config\.json or"),
        (
            lambda folder: (folder / "preprocessor_config.json").rename(folder / "processor_config.json"),
            "holds no image processor",  # but one of text
        ),
        (remove("model.safetensors"), r"holds no weights \(looked for model\.safetensors.*again, whole"),
        (cut_weights, r"model\.safetensors is not a whole safetensors file.*again, whole"),
        (
            write("preprocessor_config.json", '{"size": {"height": 200000}}'),
            r"asks for images of \[200000\] pixels, not 1 ",
        ),
        (write("config.json", '{"model_type": ["dinov2"]}'), "is not a vision model"),
        (write("config.json", '{"model_type": "dinov2", "hidden_size": "x"}'), "cannot be loaded .*again, whole"),
        (
            lambda folder: (
                (folder / "model.safetensors")
                .rename(folder / "model.safetensors.index.json")
                .write_text('{"weight_map": {"a": "/etc/passwd"}}')
            ),
            "/etc/passwd lies outside of its folder.*again, whole",
        ),
        (lambda folder: write_sharded(folder)[1].unlink(), r"model-00002-of-.* is missing.*again, whole"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_with_key_value_and_remedy(damage, message, save_teacher):
    folder = save_teacher("dinov2")
    damage(folder)
    with pytest.raises(ValueError, match=f"^hera_teacher: .*{message}") as caught:
        check_teacher(str(folder))
    assert str(folder) in str(caught.value)


def test_of_a_hub_model_the_weights_are_fetched_last_and_not_loaded(save_teacher, monkeypatch):
    folder = save_teacher("dinov2")
    (folder / "preprocessor_config.json").rename(folder / "elsewhere.json")
    fetched = []

    def local_folder(name, key, what, patterns, weights):
        fetched.append(weights)
        return folder

    monkeypatch.setattr(checkpoint, "local_folder", local_folder)
    with pytest.raises(ValueError, match="holds no image processor"):
        check_teacher("some-org/teacher")
    assert fetched == [False]
    (folder / "elsewhere.json").rename(folder / "preprocessor_config.json")
    for owner in (tf.PreTrainedModel, torch.nn.Module):  # no model is made
        monkeypatch.setattr(owner, "__init__", None)
    assert check_teacher("some-org/teacher").path == folder
    assert fetched == [False, False, True]


def test_importing_the_checks_loads_neither_torch_nor_transformers():
    code = "import sys, llamafactory_hera.teachers.encoder; print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"


# fingerprint


def test_the_fingerprint_of_the_same_files_never_changes(tmp_path, monkeypatch):
    # caches, heads.json and checkpoints hold it
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 32, "_name_or_path": "x"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 4}')
    header = json.dumps({"a": {"dtype": "U8", "shape": [3000], "data_offsets": [0, 3000]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(i % 251 for i in range(3000))
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert teacher_fingerprint(tmp_path) == "3e7a5bd11c4ad0cdb58e4a403b3191491204fa5998e546b937363ed13c873168"
    # of three blocks
    monkeypatch.setattr(checkpoint, "_HASH_BLOCK", 1024)
    checkpoint._file_digest.cache_clear()
    assert teacher_fingerprint(tmp_path) == "ca4e3b15e1e1ae44be48838f169c8c8409ffc9568ec647cc487786e8ee62b5b8"
    checkpoint._file_digest.cache_clear()


def test_a_copy_in_another_folder_has_the_same_fingerprint(save_teacher, tmp_path):
    folder = save_teacher("dinov2")
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    # layout of the JSON and where a model was saved from say nothing about the model
    config = json.loads((copy / "config.json").read_text()) | {"_name_or_path": "x", "transformers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert teacher_fingerprint(copy) == teacher_fingerprint(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_changed_byte_of_the_weights_or_a_setting_changes_it(sharded, save_teacher, edit_json):
    folder = save_teacher("dinov2")
    path = write_sharded(folder)[-1] if sharded else folder / "model.safetensors"
    seen = [teacher_fingerprint(other) for other in (folder, save_teacher("dinov2", "other", 1), save_teacher("vit"))]
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for at in (start, (start + path.stat().st_size) // 2, -1):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        seen.append(teacher_fingerprint(folder))
    edit_json(folder / "config.json", layer_norm_eps=1e-3)
    seen.append(teacher_fingerprint(folder))
    edit_json(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    seen.append(teacher_fingerprint(folder))
    assert len(set(seen)) == 8
