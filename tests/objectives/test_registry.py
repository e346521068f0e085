"""The example objectives of CONTRIBUTING.md are registered, accepted as values of the key, and trained."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llamafactory_hera.config import OBJECTIVE_KEYS, HeraConfig
from llamafactory_hera.objectives import TokenObjective, base, create, find, names, register
from llamafactory_hera.training import Aligner
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.optimizer import ObjectiveOptimizer
from llamafactory_hera.training.term import HeraTerm
from tests.terms import D_TEACHER, OPTIONS, TARGETS, D, N
from tests.tiny_models import image_rows, student_processor, teacher_folder, vlm, vlm_batch

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Registers both objectives of the page for one test, and returns the name of the first."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        assert len(code.strip().splitlines()) <= 36
        exec(code, {})
    return "distances"


def test_the_example_of_the_page_trains(example):
    objective = create(example, OPTIONS)
    optimizer, term = ObjectiveOptimizer(objective), HeraTerm(objective, 2, True, CrossBatchMemory(0))
    z = torch.randn(TARGETS, N, D, requires_grad=True)
    teacher, valid = torch.randn(N, D_TEACHER), torch.ones(N, dtype=torch.bool)
    student, losses = torch.optim.Adam([z], lr=0.05), []
    for _ in range(60):
        loss = term(z, teacher, valid).loss
        loss.backward()
        student.step()
        student.zero_grad()
        optimizer.step(0.05)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_example_with_a_plan_trains_through_the_model(example):
    model = vlm("llava-qwen3")
    config = HeraConfig(granularity="layer", layers="L1", objective="quarter", weight=1.0, teacher=teacher_folder())
    aligner = Aligner(model, config, image_processor=student_processor())
    collate = aligner.collator(lambda rows: vlm_batch(model, len(rows)))
    optimizer, terms = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(12):
        batch = collate(image_rows(model, 4))
        micro_batch = aligner.prepare(batch)
        model(**batch)
        term = aligner.loss(micro_batch)
        term.backward()
        aligner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.optimizer_step(3e-3)
        terms.append(term.item())
    assert sum(terms[-3:]) < 0.8 * sum(terms[:3])
    assert aligner.objective.get_parameter("projector.bias").abs().max() > 0


def test_the_key_accepts_the_name_of_the_example(example):
    HeraConfig(heads="L0H1", objective=example)
    with pytest.raises(ValueError, match=f"hera_objective: 'nothing' is unknown; .*{example}, .*or give"):
        HeraConfig(heads="L0H1", objective="nothing")


def test_all_objectives_are_registered():
    ours = {"contrastive", "feature", "cka", "viral", "ross", "jarvis", "gram"}
    assert ours <= set(names())
    on_tokens = {name for name in ours if issubclass(find(name), TokenObjective)}
    assert on_tokens == {"feature", "viral", "ross", "jarvis", "gram"}
    assert {name for name in ours if "hera_memory" in find(name).reads} == {"contrastive"}
    assert all({*find(name).reads} <= {*OBJECTIVE_KEYS} for name in ours)


def test_a_registered_name_cannot_be_used_again():
    with pytest.raises(ValueError, match="hera_objective: 'cka' is already CKA"):
        register("cka")(find("feature"))
