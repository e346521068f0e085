"""Captures of heads and layers: the order of targets, the captured passes, and the removal of hooks."""

import copy
import gc
import weakref

import pytest
import torch
from tests.head_reference import (
    CAPTURES,
    HEADS,
    blocks,
    both,
    checkpoint,
    checkpointed,
    gradients,
    mean_over,
    weighted_sum,
)
from tests.tiny_models import text_batch, text_model
from torch import Tensor, nn

from llamafactory_hera.heads import Target, Targets
from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import decoder_layers
from llamafactory_hera.rivals.decoder_inputs import DecoderInputs


@pytest.fixture
def model() -> nn.Module:
    return text_model("qwen3", attention_bias=True)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return text_batch()


@pytest.fixture
def mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    return mask


def captured(model: nn.Module, batch: dict[str, Tensor], mask: Tensor, targets=HEADS, capture=HeadCapture) -> Tensor:
    with capture(model, targets) as reader:
        reader.pool(mask)
        model(**batch)
        return reader.representations()


def gradients_of(z: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Differentiates a fixed weighted sum of the values by each parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(weighted_sum(z), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def state_of(model: nn.Module) -> dict[str, tuple]:
    """The state of each module that hooks may change."""
    return {
        name: (set(vars(module)), vars(module).get("_gradient_checkpointing_func"), dict(module._forward_hooks))
        for name, module in model.named_modules()
    }


# -- representations -------------------------------------------------------------------------------------------------


@both
def test_representations_have_the_order_of_the_targets_in_every_notation(model, batch, mask, names):
    capture, listed = CAPTURES[names], names.split(",")
    by_name = {name: captured(model, batch, mask, name, capture)[0] for name in listed}
    for order in (listed, sorted(listed), listed[::-1]):
        together = captured(model, batch, mask, ",".join(order), capture)
        torch.testing.assert_close(together, torch.stack([by_name[name] for name in order]), rtol=0, atol=1e-6)
    assert not torch.allclose(by_name[listed[0]], by_name[listed[1]], atol=1e-3)
    expected = captured(model, batch, mask, names, capture)
    targets = [Target.parse(name, "head" if "H" in name else "layer") for name in listed]
    for given in (targets, listed, Targets(tuple(targets))):
        assert torch.equal(captured(model, batch, mask, given, capture), expected)


@both
def test_the_gradient_is_that_of_the_definition(model, batch, mask, names):
    """Compares with slices of the plain model's weights and hidden states, which autograd differentiates."""
    read, output = blocks(model, {**batch, "output_hidden_states": True}, grad=True)
    if names == HEADS:
        names = "L1H3,L1H0"
        weight, pooled = decoder_layers(model)[1].self_attn.o_proj.weight, mean_over(read[1].entered, mask)
        parts = [slice(head * 16, head * 16 + 16) for head in (3, 0)]
        expected = torch.stack([pooled[:, part] @ weight[:, part].T for part in parts])
        capture = HeadCapture
    else:
        names, capture = "L0", LayerCapture  # the last hidden state of a decoder has passed the final norm
        expected = mean_over(output.hidden_states[1], mask).unsqueeze(0)
    got = captured(model, batch, mask, names, capture)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model), rtol=1e-5, atol=1e-5)


@both
@checkpointed
@pytest.mark.parametrize("order", ["graph first", "graph last"])
def test_a_pass_without_a_graph_does_not_replace_a_pass_with_a_graph(model, batch, mask, names, checkpointing, order):
    """A trainer may run the model twice in a step, for metrics or for gradient caching."""
    capture = CAPTURES[names]
    expected = gradients_of(captured(model, batch, mask, names, capture), model)
    checkpoint(model, checkpointing)
    other = {name: values.flip(0) for name, values in batch.items()}
    with capture(model, names) as reader:
        reader.pool(mask)
        if order == "graph first":
            model(**batch)
        with torch.no_grad():
            model(**other)
        if order == "graph last":
            assert not reader.representations().requires_grad
            model(**batch)
        weighted_sum(reader.representations()).backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-5)


@both
def test_representations_need_a_forward_pass_after_pool(model, batch, mask, names):
    capture = CAPTURES[names](model, names)

    def refused() -> None:
        with pytest.raises(RuntimeError, match=r"^No pass through layers \[0, 1\] was captured; call pool\(mask\)"):
            capture.representations()

    with capture:
        refused()
        capture.pool(mask)
        model(**batch)
        capture.representations()
        capture.pool(mask)
        refused()
        capture.pool(None)
        model(**batch)
        refused()
    refused()


# -- the model is left as it was -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_the_models_output_and_gradients_do_not_change(kind, names, batch, mask):
    model = text_model(kind)
    plain = model(**batch, labels=batch["input_ids"])
    wanted = torch.autograd.grad(plain.loss, list(model.parameters()))
    with CAPTURES[names](model, names) as capture:
        assert torch.equal(model(**batch).logits, plain.logits)
        capture.pool(mask)
        output = model(**batch, labels=batch["input_ids"])
        got = torch.autograd.grad(output.loss, list(model.parameters()))
    torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@both
@checkpointed
def test_hooks_are_removed_after_a_pass_and_after_an_exception(model, batch, mask, names, checkpointing):
    checkpoint(model, checkpointing)
    before, output = state_of(model), model(**batch).logits
    captured(model, batch, mask, names, CAPTURES[names])
    assert state_of(model) == before
    for wrong in (mask[:, :4], mask[0]):
        with pytest.raises(ValueError, match=r"^mask: its shape \[.*\] does not fit a layer that returns \[3, 10, "):
            captured(model, batch, wrong, names, CAPTURES[names])
        assert state_of(model) == before
    assert torch.equal(model(**batch).logits, output)


def test_the_context_keeps_nothing_of_a_pass_alive(model, batch, mask):
    entered = []
    handle = decoder_layers(model)[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: entered.append(weakref.ref(args[0]))
    )
    with HeadCapture(model, HEADS) as capture:
        capture.pool(mask)
        model(**batch)
        z = capture.representations()
    del z
    handle.remove()
    gc.collect()
    assert entered[0]() is None


@both
@checkpointed
def test_a_copy_of_a_captured_model_runs_alone(model, batch, mask, names, checkpointing):
    """EMA and SWA copy a model in this way."""
    checkpoint(model, checkpointing)
    clean = text_model("qwen3", seed=1, attention_bias=True)
    with CAPTURES[names](model, names) as capture, DecoderInputs(model):
        capture.pool(mask)
        model(**batch)
        z = capture.representations()
        copied = copy.deepcopy(copy.deepcopy(model))
        copied.load_state_dict(clean.state_dict())
        output = copied(**batch).logits
        output.square().mean().backward()
        assert torch.equal(capture.representations(), z)
    assert torch.equal(output, clean(**batch).logits)
    ours, theirs = (captured(each, batch, mask, names, CAPTURES[names]) for each in (copied, clean))
    assert torch.equal(ours, theirs)


def test_a_model_whose_heads_do_not_add_up_to_the_projection_is_refused_in_its_first_pass(model, batch, mask):
    projection: nn.Linear = decoder_layers(model)[1].self_attn.o_proj
    linear = projection.forward
    projection.forward = lambda hidden: linear(hidden).relu()
    with pytest.raises(ValueError, match=r"L1 is an attention layer with 4 heads of 16, but .* self_attn.o_proj"):
        captured(model, batch, mask)
