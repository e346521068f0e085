"""The model class: its answers are those of direct generation from what training saw, whatever is in a batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from lmms_eval.api.instance import Instance
from PIL import Image
from safetensors.torch import load_file, save_file

from llamafactory_hera.backbones.build import build_backbone
from llamafactory_hera.backbones.table import NATIVE_MODELS
from llamafactory_hera.evaluation.vlm import HeraVLM

from ..backbones.standins import NATIVE, save_native
from ..backbones.test_templates import encoded
from ..backbones.tiny import FAMILIES, save_language_model, save_tower

TEXTS = [
    "What is it?",
    "How many wheels does it have? Four, and a spare one.",
    "A dog?",
    "Who sits in it?\nYes or no.",
]
SETTINGS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1}


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    size = (30 + 7 * seed, 40, 3)
    return Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))


def ask(model: HeraVLM, documents: list[list[dict[str, Any]]], **settings: Any) -> list[str]:
    """Answers to messages of one user, in lmms-eval's form."""
    model.task_dict = {"task": {"test": [[{"role": "user", "content": parts}] for parts in documents]}}
    arguments = [
        ("".join(part.get("text", "") for part in parts), list, SETTINGS | settings, i, "task", "test")
        for i, parts in enumerate(documents)
    ]
    facts = [{"task": "task", "doc_id": i, "repeats": 1} for i in range(len(documents))]
    return model.generate_until(
        [Instance("generate_until", args, 0, metadata=each) for args, each in zip(arguments, facts, strict=True)]
    )


def parts(seed: int, text: str) -> list[dict[str, Any]]:
    return [{"type": "image", "url": picture(seed)}, {"type": "text", "text": text}]


def trained_prompt(template: str, folder: Path, seed: int) -> list[int]:
    """What the host makes in training of the picture and the text with a number, up to the answer."""
    ids, labels = encoded(template, folder, [(f"<image>\n{TEXTS[seed]}", "An answer.")], image=picture(seed))
    return ids[: next(i for i, label in enumerate(labels) if label != -100)]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tower("siglip", tmp_path_factory.mktemp("towers") / "siglip")


def answers_of(path: Path) -> list[list[int]]:
    return [line["ids"] for line in sorted(read_json_lines(path), key=lambda line: line["doc_id"])]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_direct_generation_from_what_training_saw(family: str, towers: Path, tmp_path: Path) -> None:
    backbone = build_backbone(str(save_language_model(family, tmp_path / "llm")), str(towers), tmp_path / "built")
    model = tf.AutoModelForImageTextToText.from_pretrained(backbone.folder, dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(backbone.folder)
    direct = []
    for seed in range(len(TEXTS)):
        prompt = torch.tensor([trained_prompt(backbone.template, backbone.folder, seed)])
        pixels = processor.image_processor(picture(seed), return_tensors="pt")["pixel_values"]
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels, max_new_tokens=6, do_sample=False
        )
        direct.append(generated[0, prompt.shape[1] :].tolist())
    ask(
        HeraVLM(str(backbone.folder), batch_size=3, answers=tmp_path / "answers.jsonl"),
        [parts(seed, text) for seed, text in enumerate(TEXTS)],
    )
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    assert answers_of(tmp_path / "answers.jsonl") == [[i for i in row if i not in ends] for row in direct]
    assert len(set(map(tuple, direct))) > 1


#: Native model -> what the host's template renders otherwise than its maker's, beside the line break behind an image.
OTHERWISE = {
    "llava_1_5_7b": "the system message of Vicuna",
    "llava_next_7b": "no space in front of [/INST]",
    "internvl3_8b": "a system message, and one tile for an image",
    "gemma3_4b": "the line break, which its maker's template strips",
}


@pytest.mark.parametrize("key", NATIVE)
def test_a_native_model_is_asked_as_its_maker_does_and_once_trained_as_in_training(key: str, tmp_path: Path) -> None:
    folder = save_native(key, tmp_path / key)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = tf.AutoProcessor.from_pretrained(folder)
    documents, direct = [parts(seed, text) for seed, text in enumerate(TEXTS)], []
    for seed, text in enumerate(TEXTS):
        shown = {"type": "image", "image": picture(seed)}
        message = {"role": "user", "content": [shown, {"type": "text", "text": text}]}
        inputs = processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        direct.append(generated[0, inputs["input_ids"].shape[1] :].tolist())
    ends = model.generation_config.eos_token_id
    ask(HeraVLM(str(folder), batch_size=3, answers=tmp_path / "answers.jsonl"), documents)
    assert answers_of(tmp_path / "answers.jsonl") == [[i for i in row if i != ends] for row in direct]

    (folder / "trainer_log.jsonl").touch()
    trained = HeraVLM(str(folder))
    (ids,) = trained.inputs([trained.conversation([{"role": "user", "content": parts(0, TEXTS[0])}])])["input_ids"]
    assert (ids.tolist() == trained_prompt(NATIVE_MODELS[key].template, folder, 0)) == (key not in OTHERWISE)


def test_the_demos_model_is_asked_as_in_training(world: Path) -> None:
    folder = world / "hera_demo/model"
    model = HeraVLM(str(folder))
    (ids,) = model.inputs([model.conversation([{"role": "user", "content": parts(0, TEXTS[0])}])])["input_ids"]
    assert ids.tolist() == trained_prompt("llava_qwen3", folder, 0)


@pytest.fixture(scope="module")
def model(folder: Path) -> HeraVLM:
    return HeraVLM(str(folder), batch_size=4)


@pytest.mark.parametrize(
    "given, text",
    [
        ("I|A", "<image>\nA"),
        ("A|I|B", "<image>\nA B"),  # a blank where the image was
        ("A |I|B", "<image>\nA B"),
        ("A|I|I|B", "<image>\n<image>\nA B"),
        ("A", "A"),
        ("I|<image>A", "<image>\nA"),  # a literal image token would ask for an image of its own
    ],
)
def test_images_come_first_and_texts_are_one(model: HeraVLM, given: str, text: str) -> None:
    content = [
        {"type": "image", "url": picture(0)} if piece == "I" else {"type": "text", "text": piece}
        for piece in given.split("|")
    ]
    prompt = model.prompt(model.conversation([{"role": "user", "content": content}]))
    assert f"<|end_header_id|>\n\n{text}<|eot_id|>" in prompt


def test_a_sample_without_image_is_answered_beside_others_as_it_is_alone(model: HeraVLM) -> None:
    text_alone = [{"type": "text", "text": "How many people sit on a bench?"}]
    several = [{"type": "image", "url": picture(5)}, *parts(4, "A dog?")]
    documents = [parts(0, "What is it?"), text_alone, several, parts(1, "Who?")]
    assert ask(model, documents) == [ask(model, [document])[0] for document in documents]


def test_other_media_and_sampling_are_refused(model: HeraVLM) -> None:
    with pytest.raises(ValueError, match="video: hera_vlm takes text and images alone"):
        model.conversation([{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}])
    with pytest.raises(ValueError, match="do_sample"):
        ask(model, [parts(0, "Why?")], do_sample=True, temperature=0.7)


def test_stored_sampling_settings_do_not_act_and_every_stored_end_ends(folder: Path, tmp_path: Path) -> None:
    plain = ask(HeraVLM(str(folder), answers=tmp_path / "plain/answers.jsonl"), [parts(0, "What is it?")])
    (first, *_), *_ = answers_of(tmp_path / "plain/answers.jsonl")
    copied = tf.AutoModelForImageTextToText.from_pretrained(folder)
    copied.generation_config = tf.GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=50.0, eos_token_id=[3], pad_token_id=3
    )
    copied.save_pretrained(tmp_path / "copy")
    tf.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert ask(HeraVLM(str(tmp_path / "copy")), [parts(0, "What is it?")]) == plain
    settings = tmp_path / "copy/generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [3, first]}))
    assert ask(HeraVLM(str(tmp_path / "copy")), [parts(0, "What is it?")]) == [""]


def test_a_task_says_where_an_answer_ends(model: HeraVLM) -> None:
    (whole,) = ask(model, [parts(0, "What is it?")], max_new_tokens=12)
    middle = whole[len(whole) // 2]
    assert ask(model, [parts(0, "What is it?")], max_new_tokens=12, until=[middle]) == [whole.split(middle)[0].strip()]


def test_an_adapter_is_asked_with_what_it_learned(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    documents = [parts(seed, text) for seed, text in enumerate(TEXTS)]
    unmerged = HeraVLM(str(folder))
    unmerged.model = adapted.eval()
    answers = ask(HeraVLM(str(tmp_path / "adapter")), documents)
    assert answers == ask(unmerged, documents)
    assert answers != ask(HeraVLM(str(folder)), documents)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "down_proj" not in name}, weights)
    with pytest.raises(ValueError, match=r"adapter .*adapter is not whole, .*down_proj.*; copy it again"):
        HeraVLM(str(tmp_path / "adapter"))


def test_pad_makes_squares_in_the_mean_color(folder: Path) -> None:
    padded = HeraVLM(str(folder), image_aspect_ratio="pad")
    message = {"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (20, 10), "red")}]}
    (told,) = padded.conversation([message])
    image = told["content"][0]["image"]
    mean = tuple(int(255 * value) for value in padded.processor.image_processor.image_mean)
    assert image.size == (20, 20)
    assert [image.getpixel((3, y)) for y in (2, 9, 17)] == [mean, (255, 0, 0), mean]


def test_answers_that_are_there_are_not_made_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    documents = [parts(seed, text) for seed, text in enumerate(TEXTS)]
    expected = ask(HeraVLM(str(folder), answers=path), documents)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == len(documents)
    path.write_text("".join(lines[:2]) + lines[2][:30])  # killed while it wrote the third
    resumed = HeraVLM(str(folder), answers=path)
    assert ask(resumed, documents) == expected
    assert path.read_text().splitlines(keepends=True)[3:] == lines[2:]
    resumed.model = None
    assert ask(resumed, documents) == expected  # from the file alone
    for changed in (
        HeraVLM(str(folder), answers=path, key="other weights"),
        HeraVLM(str(folder), answers=path, image_aspect_ratio="pad"),
    ):
        changed.model = None
        with pytest.raises(AttributeError):
            ask(changed, documents)
    with pytest.raises(AttributeError):  # another picture under the same question
        ask(resumed, [parts(9, TEXTS[0])])


def test_what_cannot_be_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen3 has no image processor, with which it is asked"):
        HeraVLM(str(save_language_model("qwen3", tmp_path / "qwen3")))
    shutil.copytree(folder, tmp_path / "mute", ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(ValueError, match="mute has no chat template"):
        HeraVLM(str(tmp_path / "mute"))
    for options, message in (
        ({"batch_size": "auto"}, "batch_size: auto is not a number of samples"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio: 'square' is unknown; choose none or pad"),
    ):
        with pytest.raises(ValueError, match=message):
            HeraVLM(str(folder), **options)


def test_missing_weights_are_refused_and_tied_ones_are_not_missing(towers: Path, tmp_path: Path) -> None:
    llm = save_language_model("qwen2_5", tmp_path / "llm", tie_word_embeddings=True)
    tied = build_backbone(str(llm), str(towers), tmp_path / "tied").folder
    HeraVLM(str(tied))
    weights = load_file(tied / "model.safetensors")
    assert not any("lm_head" in name for name in weights)
    save_file({name: value for name, value in weights.items() if "v_proj.w" not in name}, tied / "model.safetensors")
    lacking = sorted(name for name in weights if "v_proj.w" in name)
    with pytest.raises(ValueError, match=rf"tied lack {len(lacking)} tensors .*, first .*v_proj.weight, .*; copy or"):
        HeraVLM(str(tied))
