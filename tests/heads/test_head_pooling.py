import pytest
import torch
from torch import Tensor

from llamafactory_hera.heads.pooling import pool_tokens, token_mask

IMAGE, VIDEO, PAD = 60, 61, 0
IDS = torch.tensor(
    [
        [IMAGE, IMAGE, 5, 6, 7, 8, PAD, PAD],  # right padding
        [PAD, PAD, PAD, IMAGE, 5, 6, 7, 8],  # left padding
        [5, 6, VIDEO, VIDEO, 7, PAD, 8, 9],  # no padding: here 0 is a word like any other
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
    """One token at a time."""
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
def test_each_pooling_by_definition(pooling, dtype):
    mask = token_mask(pooling, IDS, ATTENTION.to(dtype), LABELS, frozenset({IMAGE, VIDEO}))
    assert mask.dtype == torch.bool
    assert mask.tolist() == naive_mask(pooling).tolist()


def test_the_answer_of_a_sample_without_one_is_empty():
    assert token_mask("answer", IDS, ATTENTION, LABELS).any(1).tolist() == [True, True, True, False]


def test_a_label_on_padding_does_not_enter():
    labels = torch.full_like(IDS, 5)
    assert torch.equal(token_mask("answer", IDS, ATTENTION, labels), ATTENTION.bool())


def test_without_an_attention_mask_nothing_is_padding():
    assert token_mask("mean", IDS).all()
    assert token_mask("last", IDS).nonzero()[:, 1].tolist() == [7] * 4
    assert torch.equal(token_mask("answer", IDS, labels=LABELS), LABELS != -100)
    assert torch.equal(token_mask("text", IDS, media_token_ids=[IMAGE]), IDS != IMAGE)


def test_a_model_without_placeholders_has_text_only():
    assert torch.equal(token_mask("text", IDS, ATTENTION), ATTENTION.bool())


def test_a_row_of_padding_alone_is_empty():
    nothing = torch.zeros_like(ATTENTION)
    for pooling in ("answer", "text", "mean", "last"):
        assert not token_mask(pooling, IDS, nothing, LABELS).any()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="hera_pooling: 'answer' averages over the tokens with a label"):
        token_mask("answer", IDS, ATTENTION)
    with pytest.raises(ValueError, match="hera_pooling: 'cls' is unknown; choose one of answer, text, mean, last"):
        token_mask("cls", IDS, ATTENTION, LABELS)


def test_pooling_is_the_mean_over_the_masked_tokens():
    hidden = torch.randn(4, 7, 3, requires_grad=True)
    mask = torch.rand(4, 7) < 0.5
    mask[2], mask[0, 0] = False, True
    for given in (mask, mask.long(), mask.float()):
        pooled = pool_tokens(hidden, given)
        for row in range(4):
            expected = hidden[row][mask[row]].mean(0) if mask[row].any() else torch.zeros(3)
            torch.testing.assert_close(pooled[row], expected)
    pooled.sum().backward()
    assert hidden.grad.isfinite().all()
    assert ((hidden.grad != 0).any(-1) == mask).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_of_many_tokens_in_half_precision_neither_overflows_nor_drifts(dtype):
    # neither their number nor their sum is one that float16 holds
    hidden = (100 + torch.randn(2, 70_001, 4)).to(dtype)
    mask = torch.rand(2, 70_001) < 0.99
    pooled = pool_tokens(hidden, mask)
    assert pooled.dtype == dtype
    expected = torch.stack([hidden[row].double()[mask[row]].mean(0) for row in range(2)])
    torch.testing.assert_close(pooled.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_pooling_in_double_precision_is_exact():
    hidden = torch.randn(1, 7, 3, dtype=torch.float64)
    expected = hidden[:, :6].mean(1)
    torch.testing.assert_close(pool_tokens(hidden, torch.arange(7)[None] < 6), expected, rtol=1e-14, atol=0)
