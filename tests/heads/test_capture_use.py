"""How HeadCapture is used: the two ways, the order of heads, and what is left behind."""

import gc
import weakref

import pytest
import torch
from tests.tiny_models import text_batch, text_model, vlm, vlm_batch
from torch import Tensor, nn

from llamafactory_hera.heads import HeadCapture, Target, Targets
from llamafactory_hera.heads.families import decoder_layers

HEADS = "L1H3,L0H2,L1H0,L1H1"


@pytest.fixture
def model() -> nn.Module:
    return text_model("qwen3", attention_bias=True)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return text_batch()


@pytest.fixture
def mask(batch) -> Tensor:
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    return mask


def captured(model: nn.Module, batch: dict[str, Tensor], mask: Tensor, heads=HEADS) -> Tensor:
    with HeadCapture(model, heads) as capture:
        capture.pool(mask)
        model(**batch)
        return capture.representations()


def gradients_of(z: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of a fixed weighted sum of the values with respect to each parameter; zero where none arrives."""
    direction = torch.linspace(-1, 1, z.numel()).view_as(z)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((z * direction).sum(), parameters, allow_unused=True, materialize_grads=True)
    found = dict(zip(names, gradients, strict=True))
    assert found["model.layers.0.self_attn.o_proj.weight"].abs().max() > 1e-3
    return found


def instance_attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


# -- what is given and what comes back -------------------------------------------------------------------------------


def test_representations_come_in_the_order_of_the_heads(model, batch, mask):
    by_name = {name: captured(model, batch, mask, name)[0] for name in HEADS.split(",")}
    for names in (HEADS.split(","), sorted(HEADS.split(",")), HEADS.split(",")[::-1]):
        together = captured(model, batch, mask, ",".join(names))
        assert together.shape == (len(names), batch["input_ids"].shape[0], 48)
        torch.testing.assert_close(together, torch.stack([by_name[name] for name in names]), rtol=0, atol=1e-6)
    assert not torch.allclose(by_name["L1H3"], by_name["L1H0"], atol=1e-3)


def test_heads_are_given_as_text_ids_or_a_head_set(model, batch, mask):
    expected = captured(model, batch, mask)
    ids = [Target(1, 3), Target(0, 2), Target(1, 0), Target(1, 1)]
    for heads in (ids, [str(head) for head in ids], Targets(tuple(ids)), "L1H3 L0H2\nL1H0, L1H1"):
        assert torch.equal(captured(model, batch, mask, heads), expected)


@pytest.mark.parametrize("heads, message", [("L2H0", "L2H0 does not exist"), ("L0H4,L1H1", "L0H4 does not exist")])
def test_a_head_outside_the_model_is_refused(model, heads, message):
    with pytest.raises(ValueError, match=rf"hera_heads: {message}: this model has layers L0 to L1 .* H0 to H3"):
        HeadCapture(model, heads)


def test_naming_the_tokens_before_or_after_the_forward_pass_is_the_same(model, batch, mask):
    with HeadCapture(model, HEADS) as capture:
        model(**batch)
        after = capture.representations(mask)
        assert torch.equal(capture.representations(mask), after)
        other = capture.representations(batch["attention_mask"])  # another mask for the same pass
    torch.testing.assert_close(after, captured(model, batch, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(other, captured(model, batch, batch["attention_mask"]), rtol=0, atol=1e-6)

    got, wanted = gradients_of(after, model), gradients_of(captured(model, batch, mask), model)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_definition(model, batch, mask):
    """Against slices of the plain model's weight and inputs, which autograd differentiates without the plugin."""
    projection = decoder_layers(model)[1].self_attn.o_proj
    entered = []
    handle = projection.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(**batch)
    handle.remove()
    weights = mask.float() / mask.sum(1, keepdim=True)
    pooled = torch.einsum("bt,btx->bx", weights, entered[0])
    parts = [slice(head * 16, head * 16 + 16) for head in (3, 0)]
    expected = torch.stack([pooled[:, part] @ projection.weight[:, part].T for part in parts])
    got = captured(model, batch, mask, "L1H3,L1H0")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients_of(got, model), gradients_of(expected, model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["mask afterwards", "mask once", "mask each time"])
def test_every_forward_pass_is_captured_anew(model, mask, way):
    batches = [text_batch(seed=1), text_batch(seed=2)]
    expected = [captured(model, batch, mask) for batch in batches]
    got = []
    with HeadCapture(model, HEADS) as capture:
        for step, batch in enumerate(batches):
            if way == "mask each time" or (way == "mask once" and step == 0):
                capture.pool(mask)
            model(**batch)
            got.append(capture.representations(mask if way == "mask afterwards" else None))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_asking_before_a_forward_pass_says_what_to_do(model, batch, mask):
    with HeadCapture(model, HEADS) as capture:
        with pytest.raises(RuntimeError, match=r"No forward pass through layers \[0, 1\] .* call the model inside"):
            capture.representations()
        with pytest.raises(RuntimeError, match="No forward pass"):
            capture.representations(mask)
        capture.pool(mask)
        model(**batch)
        capture.representations()
        capture.pool(mask)  # a new pass is to come: the old one is forgotten
        with pytest.raises(RuntimeError, match="No forward pass"):
            capture.representations()


# -- the model is left as it was -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_the_models_output_and_gradients_do_not_change(kind, pool_first, batch, mask):
    model = text_model(kind)
    plain = model(**batch, labels=batch["input_ids"])
    wanted = torch.autograd.grad(plain.loss, list(model.parameters()))
    with HeadCapture(model, HEADS) as capture:
        capture.pool(mask if pool_first else None)
        seen = model(**batch, labels=batch["input_ids"])
        got = torch.autograd.grad(seen.loss, list(model.parameters()))
    torch.testing.assert_close(seen.logits, plain.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    if not pool_first:
        assert torch.equal(seen.logits, plain.logits)


def test_hooks_are_gone_after_the_context(model, batch, mask):
    before, output = instance_attributes(model), model(**batch).logits
    with HeadCapture(model, HEADS) as capture:
        assert instance_attributes(model) != before
        capture.pool(mask)
        model(**batch)
    assert instance_attributes(model) == before
    assert torch.equal(model(**batch).logits, output)
    with pytest.raises(RuntimeError, match="No forward pass"):
        capture.representations()


@pytest.mark.parametrize("reentrant", [True, False])
def test_hooks_are_gone_after_an_exception(model, batch, mask, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layers = decoder_layers(model)
    before, functions = instance_attributes(model), [layer._gradient_checkpointing_func for layer in layers]

    def fail(*_):
        raise ZeroDivisionError

    handle = layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        captured(model, batch, mask)
    handle.remove()
    assert instance_attributes(model) == before
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert captured(model, batch, mask).shape[0] == 4


def test_what_was_hooked_before_is_restored(model, batch, mask):
    projection = decoder_layers(model)[1].self_attn.o_proj
    original = projection.forward
    projection.forward = lambda hidden: original(hidden) * 2
    doubled = projection.forward
    with HeadCapture(model, "L1H0") as capture:
        capture.pool(mask)
        model(**batch)
        twice = capture.representations()
    assert projection.forward is doubled
    del projection.forward
    torch.testing.assert_close(twice, 2 * captured(model, batch, mask, "L1H0"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool_first", [True, False])
def test_nothing_of_a_pass_is_kept_alive_after_the_context(model, batch, mask, pool_first):
    entered = []
    handle = decoder_layers(model)[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: entered.append(weakref.ref(args[0]))
    )
    with HeadCapture(model, HEADS) as capture:
        if pool_first:
            capture.pool(mask)
        model(**batch)
        z = capture.representations(None if pool_first else mask)
        assert pool_first or entered[0]() is not None
    del z
    handle.remove()
    gc.collect()
    assert entered[0]() is None


def test_pool_none_captures_nothing(model, batch, mask):
    with HeadCapture(model, HEADS) as capture:
        capture.pool(mask)
        capture.pool(None)
        model(**batch)
        with pytest.raises(RuntimeError, match="No forward pass"):
            capture.representations()


def test_it_says_which_layers_got_a_gradient():
    model = vlm("llava-qwen3")
    batch = vlm_batch(model)
    with HeadCapture(model, "L0H1,L1H2") as capture:
        capture.watch_gradients = True
        for factors, expected in (((1.0, 1.0), {0, 1}), ((0.0, 1.0), {1}), ((0.0, 0.0), set())):
            capture.pool(batch["attention_mask"])
            model(**batch)
            (capture.representations() * torch.tensor(factors).view(2, 1, 1)).sum().backward()
            assert capture.gradient_seen == expected


def test_naming_the_tokens_before_keeps_no_activations_afterwards(model, batch, mask):
    # a trainer leaves the hooks in place while it evaluates
    with HeadCapture(model, HEADS) as capture:
        capture.pool(mask)
        model(**batch)
        capture.pool(None)
        model(**batch)
        with pytest.raises(RuntimeError, match="No forward pass"):
            capture.representations(mask)
