"""JARVIS: the sampling of blocks, the mask compared with the steps of the authors' code, and training."""

from itertools import count, product
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.capture import LayerCapture
from llamafactory_hera.heads.tokens import token_positions
from llamafactory_hera.objectives import Step, TokenBatch, create
from llamafactory_hera.rivals.jarvis import Jarvis, draw_blocks, visible
from llamafactory_hera.training import Aligner
from tests.heads.test_capture_checkpointing import projector_only
from tests.terms import options
from tests.tiny_models import IMAGE, PAD, TEXT_CONFIGS, image_rows, teacher_folder

SIDE, T, D, D_TEACHER = 8, 64, 48, 6
#: The numbers of tokens of each sample: padding, text, image, text, padding.
ROWS = [(0, 3, T, 6, 0), (2, 2, T, 5, 0), (0, 0, T, 4, 5), (0, T + 4, 0, 0, 5)]
SHOWN = torch.tensor([True, True, True, False])
both_ways = pytest.mark.parametrize("two_way", [False, True], ids=["causal", "two-way"])


def objective(model: nn.Module, two_way: bool = False) -> Any:
    jarvis = create("jarvis", options(1, D, D_TEACHER, visual_attention="two_way" if two_way else "causal"))
    jarvis.attach(model)
    return jarvis


def inputs() -> dict[str, Tensor]:
    """Three samples with an image and one without, padded on the left, on the right, or not at all."""
    ids = torch.randint(3, 50, (4, T + 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, (left, before, image, _, right) in enumerate(ROWS):
        mask[row, :left] = 0
        mask[row, T + 9 - right :] = 0
        ids[row, left + before : left + before + image] = IMAGE
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def step(number: int = 0, rank: int = 0, seed: int = 0) -> Step:
    batch, image = inputs(), torch.tensor([[0, 1]] * 3 + [[0, 0]])
    positions = token_positions(batch["input_ids"], batch["attention_mask"], image, IMAGE, T)
    positions[~SHOWN] = torch.arange(T)  # positions of a sample without an image may be anything
    return Step(
        batch["input_ids"], batch["attention_mask"].bool(), positions, SHOWN, image[:, 1], SIDE, seed, rank, number
    )


def first_step(jarvis: Any, plain: bool) -> Step:
    """Finds the first plain micro-batch, or the first masked one if ``plain`` is False."""
    return next(now for now in map(step, count()) if bool(jarvis.prepare(now).valid.any()) != plain)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_block_sizes_follow_the_formula_and_no_block_reaches_the_last_row_or_column():
    sizes, heights = set(), set()
    for seed in range(60):
        targets, context = draw_blocks(27, 3, torch.Generator().manual_seed(seed))
        rows, columns = (targets // 27).flatten(0, 1), (targets % 27).flatten(0, 1)
        assert max(rows.max(), columns.max()) <= 25
        height, width = ((x.amax(1) - x.amin(1) + 1).unique().item() for x in (rows, columns))
        assert all(len(set(block)) == height * width for block in targets.flatten(0, 1).tolist())
        sizes.add((height, width))
        for kept in context.view(3, 27, 27).any(dim=2):
            heights.add(int(kept.nonzero().max() - kept.nonzero().min()) + 1)
    # the formula allows 9 x 12 to 15 x 10
    assert {(9, 12), (15, 10)} <= sizes <= {(h, w) for h in range(9, 16) for w in (10, 11, 12)}
    assert heights == {25, 26}  # of the contexts


@pytest.mark.parametrize("side", [2, 3, 5, 6])
def test_the_context_of_a_small_grid_keeps_the_last_targets(side):
    targets, context = draw_blocks(side, 40, torch.Generator().manual_seed(0))
    least = side - 1  # the context fills all but the last row and column, so its place is not drawn
    for blocks, kept in zip(targets.tolist(), context, strict=True):
        square = {row * side + column for row in range(least) for column in range(least)}
        rests = [square - {place for block in blocks[:n] for place in block} for n in (4, 3, 2, 1, 0)]
        expected = next((rest for rest in rests if len(rest) > 10), square)
        assert set(kept.nonzero()[:, 0].tolist()) == expected


def test_draws_can_be_repeated_and_processes_share_only_the_choice_of_plain_micro_batches():
    jarvis = objective(llava())
    plans = [[jarvis.prepare(step(n, rank)) for n in range(200)] for rank in (0, 1)]
    plain = [[not plan.valid.any() for plan in of_rank] for of_rank in plans]
    assert plain[0] == plain[1]
    assert 0.1 < sum(plain[0]) / 200 < 0.3
    again = jarvis.prepare(step(7)).positions
    assert torch.equal(again, plans[0][7].positions)
    for other in (plans[1][7], plans[0][8], jarvis.prepare(step(7, seed=1))):
        assert not torch.equal(again[:, :8], other.positions[:, :8])


# -- the mask --------------------------------------------------------------------------------------------------------


def naive_mask(row: int, attended: Tensor, targets: list[list[int]], context: Tensor, two_way: bool) -> Tensor:
    """Follows the steps of the authors' code for one sample, token by token."""
    length = len(attended)
    start = ROWS[row][0] + ROWS[row][1]
    end = start + ROWS[row][2]
    sees = [[j <= i and bool(attended[j]) for j in range(length)] for i in range(length)]
    if start < end:
        for i, j in product(range(length), range(start, end)):  # close all visual columns
            sees[i][j] = False
        for i, j in product(range(start, length), range(start, end)):  # from the image on, open the context
            sees[i][j] = bool(context[j - start])
        for block in targets:  # each target block sees itself
            for i, j in product(block, block):
                sees[start + i][start + j] = True
        for i, block in product(range(end, length), targets):  # rows after the image see all targets
            for j in block:
                sees[i][start + j] = True
    return torch.tensor([[sees[i][j] and (two_way or j <= i) for j in range(length)] for i in range(length)])


@both_ways
def test_the_mask_equals_that_of_the_authors_code(two_way):
    jarvis = objective(llava(), two_way)
    now = first_step(jarvis, plain=False)
    drawn = draw_blocks(SIDE, 4, now.generator())
    # blocks that overlap, and a context that contains parts of them
    other = torch.randint(0, T, (4, 4, 9)), torch.rand(4, T) < 0.5
    masks = (jarvis._inputs._attention, drawn), (visible(now, SHOWN, *other, two_way), other)
    for (found, (targets, context)), row in product(masks, range(4)):
        expected = naive_mask(row, now.attention_mask[row], targets[row].tolist(), context[row], two_way)
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize(
    ("config", "attention", "message"),
    [
        (tf.Qwen3Config(), "flash_attention_2", "attn_implementation: flash_attention_2 accepts no mask, .* set sdpa"),
        (tf.MistralConfig(), "sdpa", "hera_objective: jarvis .* mistral has layers with a sliding window"),
    ],
)
def test_attention_without_a_mask_of_tokens_is_refused(config, attention, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Jarvis.check_model(config, attention)
    Jarvis.check_model(tf.Qwen3Config(), "sdpa")


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_one_minus_the_mean_cosine_over_the_tokens_of_the_targets():
    jarvis = objective(llava())
    now = first_step(jarvis, plain=False)
    plan = jarvis.prepare(now)
    drawn, _ = draw_blocks(SIDE, 4, now.generator())
    tokens, teacher = torch.randn(1, 4, drawn[0].numel(), D), torch.randn(4, T, D_TEACHER)
    loss = jarvis(TokenBatch(tokens, None, teacher, SHOWN, plan.context))
    assert loss.shape == (1, 4)
    assert torch.equal(plan.positions[SHOWN], now.positions[SHOWN].gather(1, drawn[SHOWN].flatten(1)))
    predicted = nn.functional.gelu(tokens[0] @ jarvis.head[0].weight.T) @ jarvis.head[2].weight.T
    for row in range(4):
        cosines = nn.functional.cosine_similarity(predicted[row], teacher[row, drawn[row].flatten()], dim=-1)
        torch.testing.assert_close(loss[0, row], 1 - cosines.mean())


def test_parameters_are_initialized_as_in_the_authors_code():
    jarvis = create("jarvis", options(1, 4096, 64, initializer_range=0.3))
    shapes = {name: list(p.shape) for name, p in jarvis.named_parameters()}
    assert shapes == {"z": [4096], "head.0.weight": [64, 4096], "head.2.weight": [64, 64]}
    assert jarvis.z.std().item() == pytest.approx(0.3, rel=0.05)
    assert jarvis.head[0].weight.abs().max().item() == pytest.approx(1 / 64, rel=0.01)


# -- a real model ----------------------------------------------------------------------------------------------------


def llava(attention: str = "sdpa") -> nn.Module:
    """Makes a LLaVA with 8 x 8 tokens per image."""
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tf.CLIPVisionConfig(**size, image_size=8 * SIDE, patch_size=8)
    torch.manual_seed(0)
    text = TEXT_CONFIGS["qwen3"](initializer_range=0.2)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )
    model.set_attn_implementation(attention)
    return model.train()


def batch() -> dict[str, Tensor]:
    return inputs() | {"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))}


def forward(model: nn.Module, jarvis: Any, now: Step) -> tuple[Tensor, Tensor]:
    """Returns the logits, and the first layer's outputs at the targets."""
    with LayerCapture(model, "L0") as capture:
        capture.tokens(jarvis.prepare(now).positions)
        return model(**batch()).logits, capture.representations()[0]


@both_ways
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_image_embeddings_in_the_context_influence_text_and_targets(attention, two_way):
    model = llava(attention)
    jarvis = objective(model, two_way)
    now = first_step(jarvis, plain=False)
    targets, context = draw_blocks(SIDE, 4, now.generator())
    features = torch.randn(3, T, D, requires_grad=True)
    model.model.multi_modal_projector.register_forward_hook(lambda *_: features)
    read: dict[str, Tensor] = {}
    model.model.language_model.register_forward_pre_hook(lambda _, __, given: read.update(given), with_kwargs=True)
    logits, predicted = forward(model, jarvis, now)
    hidden = now.positions.gather(1, targets.flatten(1))[:3]
    assert (read["inputs_embeds"][torch.arange(3).unsqueeze(1), hidden] == jarvis.z).all()
    text = now.attention_mask & (now.input_ids != IMAGE)
    read = (logits[text] * torch.randn_like(logits[text])).sum()
    (of_text,) = torch.autograd.grad(read, features, retain_graph=True)
    (of_targets,) = torch.autograd.grad((predicted * torch.randn_like(predicted)).sum(), features)
    last = targets.flatten(1).max(dim=1, keepdim=True).values
    before = context if two_way else context & (torch.arange(T) < last)
    assert torch.equal((of_text != 0).any(-1), context[:3])
    assert torch.equal((of_targets != 0).any(-1), before[:3])


def test_samples_without_an_image_and_plain_micro_batches_have_the_logits_of_plain_training():
    model = llava()
    attended, logits = inputs()["attention_mask"].bool(), model(**batch()).logits
    jarvis = objective(model)
    assert torch.equal(forward(model, jarvis, first_step(jarvis, plain=True))[0], logits)
    masked = forward(model, jarvis, first_step(jarvis, plain=False))[0]
    torch.testing.assert_close(masked[3][attended[3]], logits[3][attended[3]])
    assert not torch.allclose(masked[0], logits[0], atol=1e-2)


def test_an_aligner_trains_jarvis_and_logs_no_plain_micro_batch():
    model = projector_only(llava())
    keys = {"granularity": "layer", "layers": "L0", "objective": "jarvis", "weight": 1.0, "teacher": teacher_folder()}
    processor = tf.SiglipImageProcessor(size={"height": 64, "width": 64})
    aligner = Aligner(model, HeraConfig(**keys, visual_attention="two_way"), image_processor=processor)
    assert aligner.objective.options.initializer_range == 0.2
    collate = aligner.collator(lambda rows: batch())
    rows, terms = image_rows(model, 3) + image_rows(model, 1, with_images=False), []
    for _ in range(20):
        collated = collate(rows)
        micro_batch = aligner.prepare(collated)
        logits = model(**collated).logits
        terms.append(aligner.loss(micro_batch))
        (logits.sum() * 0 + terms[-1]).backward()
        aligner.after_backward()
        aligner.optimizer_step(1e-2)
    masked = [term.item() for term in terms if term > 0]
    logs = aligner.logs()
    assert 0 < len(masked) < 20 == len(terms)
    assert "hera_empty_batches" not in logs  # plain micro-batches are not counted
    assert logs["hera_loss"] == pytest.approx(sum(masked) / len(masked))
    assert masked[-1] < 0.8 * masked[0]
