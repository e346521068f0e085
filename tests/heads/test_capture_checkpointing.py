"""Gradient checkpointing and torch.compile change neither captures nor gradients."""

from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.head_reference import CAPTURES, HEADS, both, check_layers, checkpoint, checkpointed, gradients, weighted_sum
from tests.tiny_models import VLMS, answer_labels, text_batch, text_model, vlm, vlm_batch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from llamafactory_hera.alignment import contrastive_loss, nearest_neighbors
from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import decoder_layers

ROWS = 4


def host(model: nn.Module, reentrant: bool) -> None:
    # the host cannot be imported if the newest TRL is installed
    hparams = pytest.importorskip("llamafactory.hparams", exc_type=ImportError)
    checkpointing = pytest.importorskip("llamafactory.model.model_utils.checkpointing", exc_type=ImportError)
    arguments = hparams.ModelArguments(model_name_or_path="tiny", use_reentrant_gc=reentrant)
    checkpointing.prepare_model_for_training(model, arguments)


in_both_modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def full(model: nn.Module) -> nn.Module:
    return model


def projector_only(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name)
    return model


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False))


def term(z: Tensor) -> Tensor:
    teacher = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(5))
    return contrastive_loss(z, nearest_neighbors(teacher, 2), 0.2)


def step(model: nn.Module, names: str) -> dict[str, Tensor]:
    """Returns the LM loss, the representations and the gradients of one training step."""
    batch, mask = inputs(model)
    model.zero_grad()
    with CAPTURES[names](model, names) as capture:
        capture.pool(mask)
        lm_loss = model(**batch).loss
        z = capture.representations()
        if names != HEADS:  # layers need no hook in the recomputation
            capture.remove()
        (lm_loss + 0.5 * term(z)).backward()
    return {"lm loss": lm_loss.detach(), "z": z.detach(), **gradients(model)}


def compare(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got[name], expected, rtol=0, atol=2e-6 * scale)


def inputs(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    batch = vlm_batch(model, rows=ROWS)
    batch["labels"] = answer_labels(batch)
    return batch, batch["labels"] != -100


@both
@in_both_modes
@pytest.mark.parametrize("enable", [host, checkpoint])
@pytest.mark.parametrize("training", [full, projector_only, lora], ids=lambda function: function.__name__)
def test_gradients_equal_those_without_checkpointing(enable, reentrant, training, names):
    model = vlm("llava-qwen3")
    enable(model, reentrant)
    model = training(model)
    assert all(layer.gradient_checkpointing for layer in decoder_layers(model))
    compare(step(model, names), step(training(vlm("llava-qwen3")), names))


@pytest.mark.parametrize("name", VLMS)
def test_checkpointing_changes_nothing_in_any_kind_of_decoder_layer(name):
    model = vlm(name)
    if name == "llama4":  # reentrant checkpointing does not support the keywords of its vision layers
        model.vision_model.requires_grad_(False)
    plain = {names: step(model, names) for names in CAPTURES}
    for reentrant in (True, False):
        checkpoint(model, reentrant)
        for names in CAPTURES:
            compare(step(model, names), plain[names])
        check_layers(model, *inputs(model))


@both
@in_both_modes
@pytest.mark.parametrize("before", [True, False], ids=["anew", "first"])
def test_checkpointing_may_be_enabled_inside_the_context(reentrant, before, names):
    model = vlm("llava-qwen3")
    batch, mask = inputs(model)
    plain = step(model, names)
    if before:
        checkpoint(model, not reentrant)
    with CAPTURES[names](model, names) as capture:
        capture.pool(mask)
        model(**batch)
        checkpoint(model, reentrant)
        functions = [layer._gradient_checkpointing_func for layer in decoder_layers(model)]
        for _ in range(2):
            model.zero_grad()
            capture.pool(mask)
            lm_loss = model(**batch).loss
            z = capture.representations()
            (lm_loss + 0.5 * term(z)).backward()
            # the recomputation must not replace the captured pass
            assert torch.equal(capture.representations(), z)
            compare(gradients(model), {name: plain[name] for name, _ in model.named_parameters()})
    assert [layer._gradient_checkpointing_func for layer in decoder_layers(model)] == functions


@in_both_modes
def test_leaving_the_context_before_the_backward_pass_is_refused(reentrant):
    model = vlm("llava-qwen3")
    checkpoint(model, reentrant)
    batch, mask = inputs(model)
    with HeadCapture(model, HEADS) as capture:
        capture.pool(mask)
        loss = model(**batch).loss + term(capture.representations())
    with pytest.raises(RuntimeError, match=r"left before the backward pass, .*; stay inside the context until `loss"):
        loss.backward()


@checkpointed
@pytest.mark.parametrize("names", ["L0H1,L1H2", "L0,L1"], ids=["heads", "layers"])
def test_gradient_seen_lists_the_layers_that_received_a_gradient(checkpointing, names):
    model = vlm("llava-qwen3")
    checkpoint(model, checkpointing)
    batch, mask = inputs(model)
    with (HeadCapture if "H" in names else LayerCapture)(model, names) as capture:
        capture.watch_gradients = True
        for factors, expected in (((1.0, 1.0), {0, 1}), ((0.0, 1.0), {1}), ((0.0, 0.0), set())):
            capture.pool(mask)
            model(**batch)
            (capture.representations() * torch.tensor(factors).view(2, 1, 1)).sum().backward()
            assert capture.gradient_seen == expected


WITH_FINAL = CAPTURES | {"final": LayerCapture}


@pytest.fixture
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(checkpointing: bool | None) -> nn.Module:
    model = text_model("qwen3", attention_bias=True, use_cache=False)
    checkpoint(model, checkpointing)
    return model


def compiled_step(
    model: nn.Module, call: nn.Module, capture: HeadCapture | LayerCapture, seed: int
) -> dict[str, Tensor]:
    """Returns the representations and the gradients of one training step."""
    batch = text_batch(seed=seed)
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    model.zero_grad()
    capture.pool(mask)
    loss = call(**batch, labels=batch["input_ids"]).loss
    z = capture.representations()
    (loss + weighted_sum(z)).backward()
    return {"z": z.detach(), **gradients(model)}


@pytest.mark.parametrize("names", WITH_FINAL, ids=["heads", "layers", "final"])
@checkpointed
@pytest.mark.usefixtures("anew")
def test_a_compiled_model_has_the_same_values_without_a_graph_break(checkpointing, names):
    plain, model = build(checkpointing), build(checkpointing)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(**text_batch(), labels=text_batch()["input_ids"])  # compiled before it is hooked
    assert len(graphs) == 1
    with WITH_FINAL[names](plain, names) as expected, WITH_FINAL[names](model, names) as capture:
        for seed in range(3):
            want, got = compiled_step(plain, plain, expected, seed), compiled_step(model, compiled, capture, seed)
            for name, values in want.items():
                scale = max(1.0, values.abs().max().item())
                torch.testing.assert_close(got[name], values, rtol=0, atol=1e-6 * scale)
    assert sum(counters["graph_break"].values()) == 0
    assert len(graphs) == 2  # a new mask does not cause a recompilation
