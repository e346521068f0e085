import pytest
import torch
from torch import Tensor

from llamafactory_hera.training.memory import CrossBatchMemory

HEADS, D, D_TEACHER = 2, 3, 4


def pairs(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Makes samples numbered from ``first``. Values are this number; students add a tenth of the head's number."""
    numbers = torch.arange(first, first + n).float()
    heads = torch.arange(HEADS).view(HEADS, 1, 1) / 10
    return numbers.view(1, n, 1).expand(HEADS, n, D) + heads, numbers.view(n, 1).expand(n, D_TEACHER).clone()


def add(memory: CrossBatchMemory, first: int, n: int) -> None:
    memory.append(*pairs(first, n), torch.ones(n, dtype=torch.bool))


def held(memory: CrossBatchMemory) -> list[int]:
    """Returns the numbers of the stored samples, oldest first; both tensors must contain the same samples."""
    if memory.pairs is None:
        return []
    representations, teacher, filled, _ = memory.pairs
    assert representations.shape == (HEADS, memory.size, D)
    assert teacher.shape == (memory.size, D_TEACHER)
    for values in (representations.transpose(0, 1), teacher):
        assert not values[~filled].any()
    expected, _ = pairs(0, 1)
    offsets = (representations - teacher[:, :1])[:, filled]
    torch.testing.assert_close(offsets, expected.expand_as(offsets), rtol=0, atol=1e-5)
    return [int(number) for number in teacher[filled, 0]]


def test_the_memory_keeps_the_newest_pairs():
    memory = CrossBatchMemory(5)
    assert held(memory) == []
    add(memory, 0, 2)
    assert held(memory) == [0, 1]
    add(memory, 2, 2)
    assert held(memory) == [0, 1, 2, 3]
    add(memory, 4, 3)
    assert held(memory) == [2, 3, 4, 5, 6]
    add(memory, 7, 9)  # more than fit
    assert held(memory) == [11, 12, 13, 14, 15]
    add(memory, 16, 0)
    assert held(memory) == [11, 12, 13, 14, 15]


def test_invalid_pairs_are_not_kept_even_if_they_are_not_finite():
    memory = CrossBatchMemory(5)
    representations, teacher = (tensor.clone() for tensor in pairs(0, 8))
    representations[:, 1], teacher[1], teacher[6] = torch.nan, torch.inf, torch.nan
    valid = torch.tensor([True, False, True, True, False, False, False, True])
    memory.append(representations, teacher, valid)
    assert held(memory) == [0, 2, 3, 7]
    memory.append(representations, teacher, valid)
    assert held(memory) == [7, 0, 2, 3, 7]


def test_stored_pairs_are_detached_and_keep_no_batch_alive():
    representations, teacher = (tensor.clone().requires_grad_() for tensor in pairs(0, 3))
    memory = CrossBatchMemory(2)
    valid = torch.ones(3, dtype=torch.bool)
    memory.append(representations * 1, teacher * 1, valid)
    for values in memory.pairs:
        assert not values.requires_grad
        assert values.untyped_storage().nbytes() == values.nbytes


def test_a_restored_memory_has_the_saved_pairs_and_continues():
    memory, restored = CrossBatchMemory(4), CrossBatchMemory(4)
    add(memory, 0, 3)
    state = memory.state_dict()
    add(restored, 50, 4)  # loading replaces these pairs
    restored.load_state_dict(CrossBatchMemory(4).state_dict())
    assert held(restored) == []
    restored.load_state_dict(state)
    assert held(restored) == [0, 1, 2]
    for one in (memory, restored):
        add(one, 3, 2)
    assert held(restored) == held(memory) == [1, 2, 3, 4]
    assert state["memory.teacher"][:, 0].tolist() == [0, 1, 2]  # a later step does not change a saved state


def test_an_automatic_size_is_that_of_the_checkpoint():
    memory, resumed = CrossBatchMemory(None, 8), CrossBatchMemory(None, 8)
    memory.settle(4)
    add(memory, 0, 3)
    resumed.load_state_dict(memory.state_dict())
    resumed.settle(2)
    assert (memory.size, resumed.size) == (5, 5)
    add(resumed, 3, 3)
    assert held(resumed) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("size, expected", [(2, [3, 4]), (9, [0, 1, 2, 3, 4]), (0, [])])
def test_a_memory_of_another_size_takes_the_newest_pairs_that_fit(size, expected):
    memory = CrossBatchMemory(5)
    add(memory, 0, 5)
    resized = CrossBatchMemory(size)
    resized.load_state_dict(memory.state_dict())
    assert held(resized) == expected
