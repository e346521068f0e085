"""The model class: prompts, answers, and the reuse of answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from llamafactory_hera.backbones.table import NATIVE_MODELS
from llamafactory_hera.evaluation.vlm import HeraVLM, weights_digest

from ..backbones.standins import NATIVE, save_native
from ..backbones.test_templates import encoded
from ..backbones.tiny import save_language_model

TEXTS = [
    "What is it?",
    "How many wheels does it have? Four, and a spare one.",
    "A dog?",
    "Who sits in it?\nYes or no.",
]
Parts = list[dict[str, Any]]


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (30 + 7 * seed, 40, 3), dtype=np.uint8))


def parts(seed: int, text: str) -> Parts:
    return [{"type": "image", "url": picture(seed)}, {"type": "text", "text": text}]


DOCUMENTS = [parts(seed, text) for seed, text in enumerate(TEXTS)]


def ask(model: HeraVLM, documents: list[Parts], **settings: Any) -> list[str]:
    """Returns the answers to documents in the format of lmms-eval; each document is a single user message."""
    model.task_dict = {"task": {"test": [[{"role": "user", "content": document}] for document in documents]}}
    requests = []
    for i, document in enumerate(documents):
        text = "".join(part.get("text", "") for part in document)
        arguments = (text, list, {"max_new_tokens": 6, "do_sample": False} | settings, i, "task", "test")
        requests.append(Instance("generate_until", arguments, 0, metadata={"task": "task", "doc_id": i, "repeats": 1}))
    return model.generate_until(requests)


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
    return sorted(lines, key=lambda line: line["doc_id"])


@pytest.fixture(scope="module")
def model(folder: Path) -> HeraVLM:
    return HeraVLM(str(folder), batch_size=4)


# For these models, LLaMA-Factory's template differs from the official chat template in more than the line break after
# the image (docs/evaluation.md).
DIFFERENT = ("llava_1_5_7b", "llava_next_7b", "internvl3_8b", "gemma3_4b")
DIFFERENT += ("internvl3_5_8b", "gemma4_e4b", "glm4_1v_9b")


@pytest.mark.parametrize("key", NATIVE)
def test_answers_equal_direct_generation_with_the_makers_prompts(key, tmp_path):
    folder = save_native(key, tmp_path / key)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(folder)
    direct = []
    for seed, text in enumerate(TEXTS):
        content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": text}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        direct.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    ends = model.generation_config.eos_token_id
    ask(HeraVLM(str(folder), batch_size=3, answers=str(tmp_path / "answers.jsonl")), DOCUMENTS)
    found = [line["ids"] for line in lines_of(tmp_path / "answers.jsonl")]
    assert found == [[token for token in row if token != ends] for row in direct]

    trained, labels = encoded(NATIVE_MODELS[key].template, folder, [(f"<image>\n{TEXTS[0]}", "A.")], image=picture(0))
    model = HeraVLM(str(folder), image_newline=True)
    (ids,) = model.inputs([model.conversation([{"role": "user", "content": DOCUMENTS[0]}])])["input_ids"]
    assert (ids.tolist() == trained[: labels.count(-100)]) == (key not in DIFFERENT)


@pytest.mark.parametrize("given, text", [
    ("I|A", "<image>\nA"),
    ("A|I|B", "<image>\nA B"),  # a space instead of the image
    ("A |I|I|B", "<image>\n<image>\nA B"),
    (" A", " A"),
    ("I|<image>A", "<image>\nA"),  # a literal image token would need an image
])  # fmt: skip
def test_images_come_before_one_text(model, given, text):
    image, pieces = {"type": "image", "url": picture(0)}, given.split("|")
    content = [image if piece == "I" else {"type": "text", "text": piece} for piece in pieces]
    prompt = model.prompt(model.conversation([{"role": "user", "content": content}]))
    assert f"<|end_header_id|>\n\n{text.lstrip()}<|eot_id|>" in prompt


def test_other_media_and_sampling_are_refused(model):
    with pytest.raises(ValueError, match="video: hera_vlm supports only text and images"):
        ask(model, [[{"type": "video", "url": "film.mp4"}]])
    with pytest.raises(ValueError, match="do_sample: true is not supported"):
        ask(model, DOCUMENTS[:1], do_sample=True)


def test_samples_with_and_without_images_share_a_batch(model):
    several = [{"type": "image", "url": picture(5)}, *parts(4, "A dog?")]
    documents = [DOCUMENTS[0], [{"type": "text", "text": "How many people sit on a bench?"}], several, DOCUMENTS[1]]
    assert ask(model, documents) == [ask(model, [document])[0] for document in documents]


def test_a_task_defines_the_end_of_an_answer(model):
    (whole,) = ask(model, DOCUMENTS[:1], max_new_tokens=12)
    middle = whole[len(whole) // 2]
    for until in (middle, [middle]):
        assert ask(model, DOCUMENTS[:1], max_new_tokens=12, until=until) == [whole.split(middle)[0].strip()]


def test_stored_generation_settings_affect_only_the_tokens_that_end_an_answer(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    plain = ask(HeraVLM(str(folder), answers=str(path)), DOCUMENTS[:1])
    shutil.copytree(folder, tmp_path / "copy")
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 50.0, "eos_token_id": [3]}
    (tmp_path / "copy/generation_config.json").write_text(json.dumps(settings))
    assert ask(HeraVLM(str(tmp_path / "copy")), DOCUMENTS[:1]) == plain
    settings["eos_token_id"].append(lines_of(path)[0]["ids"][0])
    (tmp_path / "copy/generation_config.json").write_text(json.dumps(settings))
    assert ask(HeraVLM(str(tmp_path / "copy")), DOCUMENTS[:1]) == [""]


def test_an_adapter_is_merged(folder, tmp_path):
    base = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    unmerged = HeraVLM(str(folder))
    before = ask(unmerged, DOCUMENTS)
    unmerged.model = adapted.eval()
    answers = ask(HeraVLM(str(tmp_path / "adapter")), DOCUMENTS)
    assert answers == ask(unmerged, DOCUMENTS)
    assert answers != before
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "down_proj" not in name}, weights)
    with pytest.raises(UserWarning, match=r"missing adapter keys .*down_proj"):
        HeraVLM(str(tmp_path / "adapter"))


def test_pad_makes_squares_in_the_mean_color(folder):
    model = HeraVLM(str(folder), image_aspect_ratio="pad")
    message = {"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (20, 10), "red")}]}
    image = model.conversation([message])[0]["content"][0]["image"]
    mean = tuple(int(255 * value) for value in model.processor.image_processor.image_mean)
    assert image.size == (20, 20)
    assert [image.getpixel((3, y)) for y in (2, 9, 17)] == [mean, (255, 0, 0), mean]


def test_answers_are_reused_if_nothing_has_changed(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    expected = ask(HeraVLM(str(folder), answers=str(path)), DOCUMENTS)
    complete = lines_of(path)
    text = path.read_text()
    path.write_text('1\n[]\n{"key": 1} \n' + text[: text.rindex('"answer"')])  # killed while writing the last line
    resumed = HeraVLM(str(folder), answers=str(path))
    assert ask(resumed, DOCUMENTS) == expected
    assert lines_of(path) == complete
    full, changed = (
        HeraVLM(str(folder), answers=str(path)),
        HeraVLM(str(folder), answers=str(path), key="other weights"),
    )
    full.model = changed.model = None
    assert ask(full, DOCUMENTS) == expected
    for model, document in ((changed, DOCUMENTS[0]), (full, parts(9, TEXTS[0]))):  # other weights, another image
        with pytest.raises(AttributeError):
            ask(model, [document])


def test_lmms_eval_finds_the_class(folder, model):
    found = get_model("hera_vlm", False)
    options = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    made = found.create_from_arg_string(f"pretrained={folder},image_aspect_ratio=none", options)
    assert (type(made), ask(made, DOCUMENTS)) == (HeraVLM, ask(model, DOCUMENTS))


def test_incomplete_models_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"qwen3 has no image.processor; give a multimodal chat model"):
        HeraVLM(str(save_language_model("qwen3", tmp_path / "qwen3")))
    shutil.copytree(folder, tmp_path / "mute", ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(ValueError, match="mute has no chat template"):
        HeraVLM(str(tmp_path / "mute"))
    shutil.copytree(folder, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    torn = {name: value for name, value in weights.items() if "v_proj.w" not in name}
    save_file(torn, tmp_path / "torn/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"torn lacks {len(weights) - len(torn)} weights, such as .*v_proj.weight"):
        HeraVLM(str(tmp_path / "torn"))
    name = next(name for name in weights if "v_proj.w" in name)
    save_file(weights | {name: weights[name] * torch.nan}, tmp_path / "torn/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"torn has weights that are NaN or infinity, such as .*v_proj.weight"):
        HeraVLM(str(tmp_path / "torn"))


def test_the_digest_depends_only_on_files_that_affect_answers(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    digests = [weights_digest([folder])]
    for name in ("README.md", "model.safetensors", "chat_template.jinja"):
        with (tmp_path / "copy" / name).open("ab") as file:
            file.write(b" ")
        digests.append(weights_digest([tmp_path / "copy"]))
    assert [len(set(digests[:n])) for n in (1, 2, 3, 4)] == [1, 1, 2, 3]
