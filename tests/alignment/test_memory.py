import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment.memory import CrossBatchMemory

HEADS, D, D_TEACHER = 2, 3, 4


def pairs(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Samples numbered from ``first``; every value of a sample is its number, plus its head in the representations."""
    numbers = torch.arange(first, first + n).float()
    heads = torch.arange(HEADS).view(HEADS, 1, 1) / 10
    return numbers.view(1, n, 1).expand(HEADS, n, D) + heads, numbers.view(n, 1).expand(n, D_TEACHER).clone()


def held(memory: CrossBatchMemory) -> list[int]:
    """Numbers of the samples that are held, oldest first; representations and teacher must name the same ones."""
    if not len(memory):
        assert memory.representations is None
        return []
    assert memory.representations.shape == (HEADS, len(memory), D)
    assert memory.teacher.shape == (len(memory), D_TEACHER)
    expected, _ = pairs(0, 1)
    offsets = memory.representations - memory.teacher[:, :1]
    torch.testing.assert_close(offsets, expected.expand_as(offsets), rtol=0, atol=1e-5)
    return [int(number) for number in memory.teacher[:, 0]]


def test_it_keeps_the_last_pairs_first_in_first_out():
    memory = CrossBatchMemory(5)
    assert held(memory) == []
    memory.append(*pairs(0, 2))
    assert held(memory) == [0, 1]
    memory.append(*pairs(2, 2))
    assert held(memory) == [0, 1, 2, 3]
    memory.append(*pairs(4, 3))
    assert held(memory) == [2, 3, 4, 5, 6]
    memory.append(*pairs(7, 9))  # more than it holds
    assert held(memory) == [11, 12, 13, 14, 15]
    memory.append(*pairs(16, 0))
    assert held(memory) == [11, 12, 13, 14, 15]


def test_size_zero_keeps_nothing():
    memory = CrossBatchMemory(0)
    memory.append(*pairs(0, 3))
    assert held(memory) == []
    assert memory.state_dict() == {}


def test_what_it_holds_is_detached_and_a_copy():
    representations, teacher = (tensor.clone().requires_grad_() for tensor in pairs(0, 3))
    memory = CrossBatchMemory(2)
    memory.append(representations * 1, teacher * 1)
    assert not memory.representations.requires_grad
    assert not memory.teacher.requires_grad
    assert memory.representations.untyped_storage().nbytes() == memory.representations.nbytes  # not the whole batch
    memory = CrossBatchMemory(3)
    representations, teacher = pairs(0, 3)
    representations = representations.clone()
    memory.append(representations, teacher)
    representations.fill_(99)
    teacher.fill_(99)
    assert held(memory) == [0, 1, 2]


def test_state_round_trip():
    memory, restored = CrossBatchMemory(4), CrossBatchMemory(4)
    memory.append(*pairs(0, 3))
    state = memory.state_dict()
    restored.append(*pairs(50, 4))  # what was held before is forgotten
    restored.load_state_dict(state)
    assert held(restored) == [0, 1, 2]
    for one in (memory, restored):
        one.append(*pairs(3, 2))
    assert held(restored) == held(memory) == [1, 2, 3, 4]
    assert state["memory.teacher"][:, 0].tolist() == [0, 1, 2]  # a later step does not change a saved state


def test_an_empty_state_empties_the_memory():
    memory = CrossBatchMemory(4)
    memory.append(*pairs(0, 3))
    memory.load_state_dict(CrossBatchMemory(4).state_dict())
    assert held(memory) == []


@pytest.mark.parametrize("size, expected", [(2, [3, 4]), (9, [0, 1, 2, 3, 4]), (0, [])])
def test_a_memory_of_another_size_takes_the_newest_that_fit(size, expected):
    memory = CrossBatchMemory(5)
    memory.append(*pairs(0, 5))
    resized = CrossBatchMemory(size)
    resized.load_state_dict(memory.state_dict())
    assert held(resized) == expected
