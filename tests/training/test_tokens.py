"""Objectives on visual tokens of a real model: reading tokens, the teacher's view, and plans."""

from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import FINAL, decoder_layers, trainable_upstream
from llamafactory_hera.rivals.decoder_inputs import DecoderInputs
from llamafactory_hera.rivals.ross import Ross
from llamafactory_hera.training import Aligner
from llamafactory_hera.training.collator import CACHED
from llamafactory_hera.training.token_term import StudentImages
from tests.heads.test_capture_adapters import adapt
from tests.tiny_models import (
    IMAGE,
    autoencoder_folder,
    collate_rows,
    image_rows,
    student_processor,
    teacher_folder,
    vlm,
    vlm_batch,
)

HEADS = "L1H2,L0H1,L1H0"


def positions(batch: dict[str, Tensor]) -> Tensor:
    return (batch["input_ids"] == IMAGE).nonzero()[:, 1].view(len(batch["input_ids"]), -1)


def aligner_of(model: nn.Module, **keys: Any) -> Aligner:
    keys = {"teacher": teacher_folder(), "weight": 1.0, **keys}
    return Aligner(model, HeraConfig(**keys), image_processor=student_processor())


# -- heads at tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "bias", "lora", "dora"])
def test_heads_at_tokens_equal_slices_of_the_weight(kind, rows):
    model = vlm("llava-llama", attention_bias=True) if kind == "bias" else vlm("llava-qwen2")
    if kind in ("lora", "dora"):
        model = adapt(model, use_dora=kind == "dora")
    batch = vlm_batch(model, rows)
    read: dict[int, Tensor] = {}
    layers = decoder_layers(model)
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, i=i: read.update({i: given[0]}))
        for i, layer in enumerate(layers)
    ]
    logits = model(**batch).logits
    for hook in hooks:
        hook.remove()
    with HeadCapture(model, HEADS) as capture:
        capture.tokens(positions(batch))
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)
        outputs, projections = capture.representations(), capture.projections()
    torch.manual_seed(0)
    upstream = torch.randn(len(outputs), rows, 4, projections.shape[-1])
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((outputs @ projections.unsqueeze(1) * upstream).sum(), trained, allow_unused=True)
    expected = []
    for head in Targets.parse(HEADS).items:
        module = layers[head.layer].self_attn.o_proj
        weight = module.weight
        if kind in ("lora", "dora"):
            delta = 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            weight = weight + delta
            if kind == "dora":
                length = weight.norm(dim=1, keepdim=True).detach()
                weight = module.lora_magnitude_vector["default"].weight.unsqueeze(1) * weight / length
        size = projections.shape[1]
        part = slice(size * head.head, size * head.head + size)
        tokens = [[read[head.layer][row, p, part] for p in line] for row, line in enumerate(positions(batch))]
        expected.append(torch.stack([torch.stack([weight[:, part] @ o for o in line]) for line in tokens]))
    formed = torch.stack(expected)
    torch.testing.assert_close(outputs @ projections.unsqueeze(1), formed, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad((formed * upstream).sum(), trained, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs is None or ours is not None
        if ours is not None:  # the bias is added and subtracted again
            wanted_here = torch.zeros_like(ours) if theirs is None else theirs
            torch.testing.assert_close(ours, wanted_here, rtol=1e-3, atol=1e-4)


def test_the_representations_of_heads_are_never_formed():
    model = vlm("llava-llama")
    aligner = aligner_of(model, heads=HEADS, objective="feature")
    batch = aligner.collator(lambda rows: vlm_batch(model, len(rows)))(image_rows(model, 3))
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            shapes.extend(tuple(tensor.shape) for tensor in [result] if isinstance(tensor, Tensor))
            return result

    micro_batch = aligner.prepare(batch)
    model(**batch)
    with Watch():
        aligner.loss(micro_batch)
    tokens, size, head_dim = 4, 48, 16
    assert (3, 3, tokens, head_dim) in shapes
    assert not [shape for shape in shapes if shape[-2:] == (tokens, size)]


# -- layers at tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "index"), [("L0", 1), ("final", 2)])
def test_tokens_of_a_layer_are_its_hidden_state_bit_for_bit(layer, index):
    model = vlm("llava-qwen3")
    batch = vlm_batch(model)
    with LayerCapture(model, layer) as capture:
        capture.tokens(positions(batch))
        hidden = model(**batch, output_hidden_states=True).hidden_states
        found = capture.representations()
    at = positions(batch).unsqueeze(-1).expand(-1, -1, hidden[0].shape[-1])
    assert torch.equal(found[0], hidden[index].gather(1, at))
    assert Targets.parse(layer, "layer").names == (layer,)


def test_all_parameters_except_the_output_embeddings_affect_the_final_norm():
    model = vlm("llava-qwen3")
    missing = {name for name, _ in model.named_parameters()} - set(trainable_upstream(model, FINAL, True))
    assert missing == {"lm_head.weight"}


# -- the teacher's view ----------------------------------------------------------------------------------------------


def test_a_bright_cell_of_a_wide_image_lights_the_same_cell_for_student_and_teacher():
    side, cell = 4, (1, 2)
    image = Image.new("RGB", (640, 480))
    width, height = 640 // side, 480 // side
    image.paste((255, 255, 255), (cell[1] * width, cell[0] * height, (cell[1] + 1) * width, (cell[0] + 1) * height))
    processor = tf.SiglipImageProcessor(size={"height": 8 * side, "width": 8 * side})
    batch = processor(images=[image], return_tensors="pt")
    student = StudentImages(side, processor)
    pixels = student.pixels(dict(batch), torch.tensor([[0, 1]]))
    seen: dict[str, Tensor] = {}
    model = vlm("llava-llama")
    teacher = aligner_of(model, heads="L0H0", objective="feature").teacher.encoder
    teacher._model.register_forward_pre_hook(lambda _, given: seen.update(pixels=given[0]))
    assert teacher.patch_features(pixels, side).shape == (1, side * side, teacher.dim)
    for values in (batch["pixel_values"], seen["pixels"]):
        cells = nn.functional.adaptive_avg_pool2d(values.mean(1), side)[0]
        assert divmod(int(cells.argmax()), side) == cell
    restored = seen["pixels"] * teacher.processor.std + teacher.processor.mean
    assert restored.max() == pytest.approx(1, abs=0.02)
    assert restored.min() == pytest.approx(0, abs=0.02)


def test_each_sample_is_matched_with_its_own_image():
    processor = student_processor()
    values = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2) / 10
    image = torch.tensor([[1, 2], [0, 0], [0, 1], [-0, 0], [1, 2]])
    found = StudentImages(1, processor).pixels({"pixel_values": values}, image)
    assert ((found[[0, 2, 4], 0, 0, 0] - 0.5) * 20).tolist() == pytest.approx([1, 2, 4], abs=1e-4)
    assert StudentImages(1, processor).pixels({}, image).shape == (5, 3, 1, 1)


def test_patch_features_are_cached_by_content_grid_and_processor(tmp_path):
    model = vlm("llava-llama")
    rows = image_rows(model, 3)

    def step() -> tuple[list[int], float]:
        aligner = aligner_of(model, heads=HEADS, objective="feature", teacher_cache=str(tmp_path))
        batch = aligner.collator(collate_rows, drop=("images",))(rows)
        source = batch["hera_source"].tolist()
        micro_batch = aligner.prepare(batch)
        model(**batch)
        term = aligner.loss(micro_batch).item()
        aligner.close()
        return source, term

    first, second = step(), step()
    assert second[0] == [CACHED] * 3 != first[0]
    assert second[1] == pytest.approx(first[1], abs=1e-4)


def test_the_collator_refuses_an_image_that_was_cut_off():
    model = vlm("llava-llama")
    collate = aligner_of(model, heads=HEADS, objective="feature").collator(lambda rows: vlm_batch(model, len(rows)))
    rows = image_rows(model, 2)
    assert len(collate(rows)["hera_rows"]) == 2
    with pytest.raises(ValueError, match=r"^dataset: a sample with 2 images has 4 image tokens instead of 8"):
        collate([rows[0], {**rows[1], "images": 2 * rows[1]["images"]}])


def test_two_way_attention_is_the_same_in_training_and_evaluation():
    model = vlm("llava-qwen3").eval()
    batch = vlm_batch(model, 3)
    keys = {"granularity": "layer", "layers": "L0", "objective": "jarvis", "visual_attention": "two_way"}
    aligner = aligner_of(model, **keys | {"weight": 0.0})  # stage 2: only the attention, without masks
    rows = aligner.collator(lambda rows: vlm_batch(model, len(rows)))(image_rows(model, 3))
    micro_batch = aligner.prepare(rows)
    trained = model(**rows).logits
    aligner.loss(micro_batch)
    aligner.after_backward()
    assert aligner.prepare(dict(batch)) is None  # evaluation during training
    assert torch.equal(model(**batch).logits, trained)
    aligner.objective._inputs.remove()
    plain = model(**batch).logits
    with DecoderInputs(model, two_way=True):
        evaluated = model(**batch).logits
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(trained[mask], evaluated[mask])
    assert not torch.allclose(plain[mask], evaluated[mask], atol=1e-3)
    assert torch.equal(model(**batch).logits, plain)


# -- the objective's parameters --------------------------------------------------------------------------------------


def test_ross_is_not_reported_idle_if_the_first_batches_have_no_image():
    model = vlm("llava-llama")
    keys = {"granularity": "layer", "layers": "final", "teacher": autoencoder_folder()}
    aligner = aligner_of(model, objective=f"{__name__}:SmallRoss", **keys)
    collate = aligner.collator(lambda rows: vlm_batch(model, len(rows)))
    for with_images in (False, False, True, True, True, True):
        batch = collate(image_rows(model, 2, with_images))
        if not with_images:
            batch["input_ids"][batch["input_ids"] == IMAGE] = 5
        micro_batch = aligner.prepare(batch)
        hidden = model.model.language_model(input_ids=batch["input_ids"]) if not with_images else model(**batch)
        (aligner.loss(micro_batch) + 0 * hidden[0].sum()).backward()
        aligner.after_backward()
        aligner.optimizer_step(1e-3)
        assert ("hera_mknn" in aligner.logs()) is False


class SmallRoss(Ross):
    """A small ROSS for tests."""

    width, depth, heads = 16, 1, 2


def test_an_objective_starts_from_an_earlier_run_with_its_own_learning_rate(tmp_path):
    model, earlier = vlm("llava-llama"), {"heads": HEADS, "objective_from": str(tmp_path)}
    first = aligner_of(model, heads=HEADS, objective="contrastive", temperature=0.3)
    first.save(tmp_path)
    second = aligner_of(model, **earlier, objective_lr=1e-2)
    assert second.logs()["hera_temperature"] == pytest.approx(0.3)
    parameter = second.objective.get_parameter("log_temperature")
    parameter.grad = torch.ones(())
    before = parameter.item()
    with pytest.raises(
        ValueError, match=r"^hera_objective_lr: 0.01 is a peak .* optimizer_step\(learning_rate, peak="
    ):
        second.optimizer_step(5e-4)
    second.optimizer_step(5e-4, peak=1e-3)  # half of the peak
    assert before - parameter.item() == pytest.approx(5e-3, rel=1e-3)
    with pytest.raises(ValueError, match=r"^hera_objective_from: .* hera_objective was contrastive, is feature; give"):
        aligner_of(model, **earlier, objective="feature")
    aligner_of(model, heads=HEADS, objective="feature", projector="separate").save(tmp_path)
    wide = vlm("llava-llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"^hera_objective_from: projectors.0.0.weight does not have the shape"):
        aligner_of(wide, **earlier, objective="feature", projector="separate")
    with pytest.raises(ValueError, match=r"^hera_objective_from: nowhere has no complete hera/ folder"):
        aligner_of(model, heads=HEADS, objective_from="nowhere")
