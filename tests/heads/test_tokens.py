"""The tokens of a representation, their mean, and the tokens of an image."""

import pytest
import torch
from tests.tiny_models import VLMS, vlm
from torch import Tensor
from transformers import Dinov2Config

from llamafactory_hera.heads.tokens import check_image_tokens, grid_side, pool_tokens, token_mask, token_positions

IMAGE, VIDEO, PAD = 60, 61, 0
IDS = torch.tensor(
    [
        [IMAGE, IMAGE, 5, 6, 7, 8, PAD, PAD],  # right padding
        [PAD, PAD, PAD, IMAGE, 5, 6, 7, 8],  # left padding
        [5, 6, VIDEO, VIDEO, 7, PAD, 8, 9],  # no padding: here, 0 is an ordinary token
        [IMAGE, IMAGE, 5, 6, PAD, PAD, PAD, PAD],  # no answer
    ]
)
ATTENTION = torch.tensor([[1] * 6 + [0] * 2, [0] * 3 + [1] * 5, [1] * 8, [1] * 4 + [0] * 4])
LABELS = torch.tensor(
    [
        [-100, -100, -100, -100, 7, 8, -100, -100],
        [-100, -100, -100, -100, -100, 6, 7, 8],
        [-100, 6, -100, -100, 7, -100, 8, 9],
        [-100] * 8,
    ]
)


def naive_mask(pooling: str) -> Tensor:
    """Marks the tokens one by one."""
    rows = []
    for ids, attention, labels in zip(IDS.tolist(), ATTENTION.tolist(), LABELS.tolist(), strict=True):
        kept = [t for t, attended in enumerate(attention) if attended]
        if pooling == "answer":
            kept = [t for t in kept if labels[t] != -100]
        if pooling == "text":
            kept = [t for t in kept if ids[t] not in (IMAGE, VIDEO)]
        if pooling == "last":
            kept = kept[-1:]
        rows.append([t in kept for t in range(len(ids))])
    return torch.tensor(rows)


@pytest.mark.parametrize("pooling", ["answer", "text", "mean", "last"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_each_pooling_marks_the_tokens_of_its_definition(pooling, dtype):
    mask = token_mask(pooling, IDS, ATTENTION.to(dtype), LABELS, frozenset({IMAGE, VIDEO}))
    assert mask.dtype == torch.bool
    assert mask.tolist() == naive_mask(pooling).tolist()
    padding_alone = torch.zeros_like(ATTENTION)
    assert not token_mask(pooling, IDS, padding_alone, LABELS).any()


def test_answers_need_labels_and_labels_on_padding_and_on_placeholders_are_ignored():
    labels, text = torch.full_like(IDS, 5), token_mask("text", IDS, ATTENTION, None, [IMAGE])
    assert torch.equal(token_mask("answer", IDS, ATTENTION, labels, [IMAGE]), text)
    with pytest.raises(ValueError, match="hera_pooling: answer averages over labeled tokens"):
        token_mask("answer", IDS, ATTENTION)


def test_without_an_attention_mask_no_token_is_padding():
    assert token_mask("mean", IDS).all()
    assert token_mask("last", IDS).nonzero()[:, 1].tolist() == [7] * 4
    assert torch.equal(token_mask("answer", IDS, labels=LABELS), LABELS != -100)
    assert torch.equal(token_mask("text", IDS, media_token_ids=[IMAGE]), IDS != IMAGE)


# -- the mean over tokens --------------------------------------------------------------------------------------------


def naive_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages in double precision, one row at a time; zero for a row without tokens."""
    rows = zip(hidden.double(), mask, strict=True)
    return torch.stack([row[keep].mean(0) if keep.any() else torch.zeros_like(row[0]) for row, keep in rows])


@pytest.mark.parametrize("elsewhere", [1.0, torch.nan])
def test_the_average_covers_only_the_marked_tokens(elsewhere):
    mask = torch.rand(4, 7) < 0.5
    mask[2], mask[0, 0] = False, True
    hidden = torch.randn(4, 7, 3).masked_fill(~mask.unsqueeze(-1), elsewhere).requires_grad_()
    for given in (mask, mask.long(), mask.float()):
        pooled = pool_tokens(hidden, given)
        torch.testing.assert_close(pooled.double(), naive_mean(hidden, mask), atol=1e-6, rtol=1e-5)
    pooled.sum().backward()
    assert hidden.grad.isfinite().all()
    assert ((hidden.grad != 0).any(-1) == mask).all()
    double = hidden.detach()[:1].double()
    torch.testing.assert_close(pool_tokens(double, mask[:1]), naive_mean(double, mask[:1]), rtol=1e-14, atol=1e-15)


def test_autocast_does_not_round_the_average_of_an_fp32_residual_stream():
    hidden, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_tokens(hidden, mask)
    torch.testing.assert_close(pooled, hidden.mean(1))


@pytest.mark.parametrize("wide", [False, True], ids=["training", "scoring"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_tokens_in_half_precision_neither_overflow_nor_drift(dtype, wide):
    # float16 can represent neither the number of tokens nor their sum
    hidden = (100 + torch.randn(2, 70_001, 4)).to(dtype)
    mask = torch.rand(2, 70_001) < 0.99
    pooled = pool_tokens(hidden.double() if wide else hidden, mask)
    assert pooled.dtype == (torch.float64 if wide else dtype)
    info = torch.finfo(pooled.dtype)  # the weight 1 / 70,001 is subnormal in float16, in steps of tiny * eps
    bound = max(1e-6, info.eps + 70_001 * info.tiny * info.eps / 2)
    torch.testing.assert_close(pooled.double(), naive_mean(hidden, mask), rtol=bound, atol=0)


# -- the tokens of an image ------------------------------------------------------------------------------------------

MARK, PER_IMAGE = 9, 4


def sequence(*parts: object) -> list[int]:
    """Makes token ids: a number is a text token, and ``"image"`` becomes the tokens of an image."""
    return [token for part in parts for token in ([MARK] * PER_IMAGE if part == "image" else [part])]


def test_positions_are_those_of_the_image_that_the_teacher_sees():
    texts = [(1, "image", 2, 3), ("image", 4, "image", 5), (1, 2, "image", "image"), (1, 2, 3)]
    rows = [sequence(*parts) for parts in texts]
    images = [(0, 1), (1, 2), (0, 2), (0, 0)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    check_image_tokens(ids, attended, torch.tensor(images), MARK, PER_IMAGE)
    found = token_positions(ids, attended, torch.tensor(images), MARK, PER_IMAGE)
    for row, (index, count), positions in zip(rows, images, found.tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token == MARK]
        if count:
            assert positions == places[index * PER_IMAGE : (index + 1) * PER_IMAGE]
    assert found.max() < width  # a sample without an image gets arbitrary positions


def test_image_tokens_that_were_cut_off_are_refused_and_the_dummy_image_of_the_host_is_not_counted():
    ids = torch.tensor([sequence(1, 2, "image")])
    attended = torch.tensor([[1, 1, 0, 0, 0, 0]])
    check_image_tokens(ids, attended, torch.tensor([[0, 0]]), MARK, PER_IMAGE)
    ids = torch.tensor([sequence("image", 1, "image")[:-1]])
    with pytest.raises(ValueError, match=r"^dataset: a sample with 2 images has 7 image tokens instead of 8"):
        check_image_tokens(ids, None, torch.tensor([[1, 2]]), MARK, PER_IMAGE)


@pytest.mark.parametrize("name", ["llava-llama", *(name for name in VLMS if not name.startswith("llava-"))])
def test_models_without_a_fixed_square_grid_are_refused(name):
    config = vlm(name).config
    if config.model_type == "llava":
        assert grid_side(config, "viral") ** 2 == PER_IMAGE
        config.vision_config = Dinov2Config(image_size=[16, 32])  # CLIP's config accepts only one number
        problem = r"vision tower is \[16, 32\], not one number"
    else:
        problem = f"{config.model_type!r} models do not create such a grid"
    with pytest.raises(ValueError, match=f"^hera_objective: viral needs .*{problem}; use a"):
        grid_side(config, "viral")
