import math

import pytest
import torch
from torch import Tensor

from llamafactory_hera.alignment import chance_level, mutual_knn, nearest_neighbors
from llamafactory_hera.alignment.neighbors import shared_fraction, teacher_candidates


def naive_neighbors(features: Tensor, k: int, normalize: bool) -> list[list[int]]:
    """Ranks all other samples in float64, by decreasing similarity and then by increasing index."""
    rows = features.double().tolist()
    if normalize:
        rows = [[x / (math.sqrt(sum(y * y for y in row)) or 1.0) for x in row] for row in rows]
    found = []
    for i, row in enumerate(rows):
        scores = {j: sum(x * y for x, y in zip(row, other, strict=True)) for j, other in enumerate(rows) if j != i}
        found.append(sorted(scores, key=lambda j, s=scores: (-s[j], j))[:k])
    return found


def naive_mutual_knn(student: Tensor, teacher: Tensor, k: int, normalize: bool) -> float:
    pairs = zip(naive_neighbors(student, k, normalize), naive_neighbors(teacher, k, normalize), strict=True)
    return sum(len(set(a) & set(b)) for a, b in pairs) / (k * teacher.shape[0])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_neighbors_are_the_most_similar_others_best_first(k, normalize):
    features = torch.randn(13, 5) * torch.rand(13, 1).mul(3).exp()
    assert nearest_neighbors(features, k, normalize).tolist() == naive_neighbors(features, k, normalize)


@pytest.mark.parametrize("k", [1, 4, 7, 30])
def test_ties_break_by_increasing_index(k):
    # small integers have exact products, so ties are exact in every summation order
    features = torch.randint(-1, 2, (40, 3)).float()
    assert nearest_neighbors(features, k, normalize=False).tolist() == naive_neighbors(features, k, False)
    nothing = torch.zeros(6, 3)
    assert nearest_neighbors(nothing, 3).tolist() == naive_neighbors(nothing, 3, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_features_are_ranked_in_single_precision(dtype, normalize):
    # many cosines near 0.92 differ by less than half precision resolves, so they would tie
    features = (1 + 0.3 * torch.randn(60, 16)).to(dtype)
    assert nearest_neighbors(features, 5, normalize).tolist() == naive_neighbors(features, 5, normalize)
    assert nearest_neighbors(features, 5, normalize).dtype == torch.int64


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_mutual_knn_is_the_mean_shared_neighborhood(k, normalize):
    teacher, noise = torch.randn(14, 7), torch.randn(3, 14, 7)
    students = teacher + torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1) * noise
    scores = mutual_knn(students, teacher, k, normalize)
    expected = [naive_mutual_knn(student, teacher, k, normalize) for student in students]
    assert scores.shape == (3,)
    assert scores.tolist() == pytest.approx(expected, abs=1e-7)
    assert mutual_knn(students[1], teacher, k, normalize).item() == pytest.approx(expected[1], abs=1e-7)
    assert expected[2] < expected[0]


def naive_among(features: Tensor, allowed: Tensor, k: int, normalize: bool = True) -> list[list[int]]:
    order = naive_neighbors(features, len(features) - 1, normalize)[: len(allowed)]
    found = [[j for j in order[i] if row[j]][: min(k, sum(row) // 2)] for i, row in enumerate(allowed.tolist())]
    return [row + [-1] * (min(k, len(features)) - len(row)) for row in found]


@pytest.mark.parametrize("k", [2, 8, 20])
def test_only_allowed_candidates_are_neighbors_and_minus_one_means_none(k):
    """The first 6 samples are queries; the others are only candidates."""
    allowed = (torch.rand(6, 9) < 0.6).fill_diagonal_(False)
    allowed[3] = False
    student, teacher = torch.randn(2, 9, 4), torch.randn(9, 5)
    ours = [naive_among(head, allowed, k) for head in student]
    theirs = naive_among(teacher, allowed, k)
    of_student, of_teacher = (nearest_neighbors(side, k, allowed=allowed) for side in (student, teacher))
    assert (of_student.tolist(), of_teacher.tolist()) == (ours, theirs)
    for head, shares in zip(ours, shared_fraction(of_student, of_teacher).tolist(), strict=True):
        pairs = zip(head, theirs, strict=True)
        expected = [len((set(a) & set(b)) - {-1}) / max(1, len(set(b) - {-1})) for a, b in pairs]
        assert shares == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 9), slice(9, 20)])
def test_a_part_of_the_batch_has_the_same_candidates_as_in_the_whole_batch(rows):
    """Features are small integers, so that many similarities tie."""
    teacher, student = torch.randint(-1, 2, (26, 3)).float(), torch.randint(-1, 2, (2, 26, 3)).float()
    valid, filled, ids = torch.rand(20) < 0.8, torch.rand(6) < 0.8, torch.randint(0, 9, (26, 2)).float()
    found, whole = (teacher_candidates(teacher, valid, 3, False, filled, ids, part) for part in (rows, slice(0, 20)))
    for name in ("allowed", "neighbors", "has_neighbor", "chance"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[rows])
    assert torch.equal(found.agreement(student, False), whole.agreement(student, False)[:, rows])
    parts = [teacher_candidates(teacher, valid, 3, False, filled, ids, part) for part in (slice(0, 7), slice(7, 20))]
    assert sum(part.duplicates for part in parts) == whole.duplicates > 0


def test_copies_of_a_file_are_no_candidates_even_if_their_features_differ():
    teacher, numbers = torch.randn(6, 9), torch.tensor([[5, 1], [5, 2], [5, 1], [0, 0], [0, 0], [5, 2]]).float()
    valid, filled = torch.ones(5, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    candidates = teacher_candidates(teacher, valid, 3, True, filled, numbers)
    missing = [sorted(set(range(6)) - set(row.nonzero().flatten().tolist())) for row in candidates.allowed]
    assert missing == [[0, 2], [1, 5], [0, 2], [3], [4]]
    assert candidates.duplicates == 1


def test_candidates_are_the_other_valid_images_of_the_batch_and_the_memory():
    teacher = torch.randint(-9, 10, (7, 9)).float()  # a batch of 5 and 2 remembered samples; products are exact
    teacher[3] = 2 * teacher[0]  # the same image
    teacher[6] = teacher[1]
    teacher[4] = torch.nan
    valid = torch.tensor([True, True, True, True, False])
    candidates = teacher_candidates(teacher, valid, 3, False, torch.ones(2, dtype=torch.bool))
    allowed = [[1, 2, 5, 6], [0, 2, 3, 5], [0, 1, 3, 5, 6], [1, 2, 5, 6], []]
    assert [row.nonzero().flatten().tolist() for row in candidates.allowed] == allowed
    teacher[4] = 0
    assert candidates.neighbors.tolist() == naive_among(teacher, candidates.allowed, 3, normalize=False)
    assert candidates.duplicates == 1
    assert candidates.has_neighbor.tolist() == valid.tolist()
    half = teacher_candidates(teacher, valid, 3, False, torch.tensor([False, True])).allowed
    assert torch.equal(half[:, :5], candidates.allowed[:, :5])
    assert torch.equal(half[:, 6], candidates.allowed[:, 6])
    assert not half[:, 5].any()
    assert candidates.chance.tolist() == pytest.approx([2 / 4, 2 / 4, 2 / 5, 2 / 4, 0])


def test_unrelated_features_score_at_chance_level():
    scores = mutual_knn(torch.randn(200, 50, 8), torch.randn(50, 8), 10)
    assert chance_level(50, 10) == 10 / 49
    assert scores.mean().item() == pytest.approx(chance_level(50, 10), abs=0.01)


@pytest.mark.parametrize("k", [0, -1, 5, 6])
def test_a_k_that_does_not_fit_is_refused_with_the_range(k):
    with pytest.raises(ValueError, match=rf"k={k} does not fit 5 samples; choose 1 <= k <= 4"):
        nearest_neighbors(torch.randn(5, 3), k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    features = torch.randn(5, 3)
    features[2, 1] = value
    for student, teacher in ((features, torch.randn(5, 3)), (torch.randn(5, 3), features)):
        with pytest.raises(ValueError, match="features contain NaN or infinity"):
            mutual_knn(student, teacher, 2)


def test_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="student has 6 samples and teacher 5; give the same samples to both"):
        mutual_knn(torch.randn(6, 3), torch.randn(5, 3), 2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(50, 6), (3, 50, 6)])
def test_neighbors_do_not_depend_on_the_number_of_rows_ranked_at_once(normalize, shape, monkeypatch):
    features = torch.randn(shape)
    features[..., 10:20, :] = features[..., :10, :]  # exact ties
    at_once = nearest_neighbors(features, 5, normalize)
    monkeypatch.setattr("llamafactory_hera.alignment.neighbors.ROWS", 7)
    assert torch.equal(nearest_neighbors(features, 5, normalize), at_once)
    sets = features.view(-1, 50, 6)
    assert torch.equal(at_once.view(-1, 50, 5), torch.stack([nearest_neighbors(each, 5, normalize) for each in sets]))
