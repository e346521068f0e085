import json
import shutil

import pytest

from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.files import teacher_fingerprint


def test_a_copy_in_another_folder_has_the_same_fingerprint(save_teacher, tmp_path, edit_json):
    folder = save_teacher("dinov2")
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    # layout of the JSON and where a model was saved from say nothing about the model
    config = json.loads((copy / "config.json").read_text()) | {"_name_or_path": "x", "transformers_version": "9.9"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert teacher_fingerprint(copy) == teacher_fingerprint(folder)
    assert VisionTeacher.from_pretrained(str(copy)).fingerprint == teacher_fingerprint(folder)


@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_one_changed_byte_of_the_weights_changes_it(at, save_teacher):
    folder = save_teacher("dinov2")
    before = teacher_fingerprint(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    position = {"first": start, "middle": (start + len(content)) // 2, "last": len(content) - 1}[at]
    content[position] ^= 1
    path.write_bytes(content)
    assert teacher_fingerprint(folder) != before


def test_swapped_blocks_of_a_large_file_change_it(save_teacher, monkeypatch):
    from llamafactory_hera.teachers import files

    monkeypatch.setattr(files, "_HASH_BLOCK", 1024)
    folder = save_teacher("dinov2")
    before = teacher_fingerprint(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    assert content[-1024:] != content[-2048:-1024]
    cut = len(content) // 1024 * 1024
    swapped = content[cut - 1024 : cut] + content[cut - 2048 : cut - 1024]
    path.write_bytes(content[: cut - 2048] + swapped + content[cut:])
    assert path.stat().st_size == len(content)
    assert teacher_fingerprint(folder) != before


def test_architecture_and_processor_settings_change_it(save_teacher, edit_json):
    folder = save_teacher("dinov2")
    seen = {teacher_fingerprint(folder)}
    edit_json(folder / "config.json", layer_norm_eps=1e-3)
    seen.add(teacher_fingerprint(folder))
    edit_json(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    seen.add(teacher_fingerprint(folder))
    assert len(seen) == 3


def test_different_teachers_have_different_fingerprints(save_teacher):
    folders = [save_teacher("dinov2"), save_teacher("dinov2", "other_seed", seed=1), save_teacher("vit")]
    assert len({teacher_fingerprint(folder) for folder in folders}) == 3


def test_one_part_of_several_weight_files_counts(save_teacher):
    import transformers

    folder = save_teacher("dinov2")
    model = transformers.Dinov2Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(folder.glob("*.safetensors"))
    before = teacher_fingerprint(folder)
    content = bytearray(parts[-1].read_bytes())
    content[-1] ^= 1
    parts[-1].write_bytes(content)
    assert teacher_fingerprint(folder) != before
