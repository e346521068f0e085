"""A custom loop with the Aligner: it aligns, resumes bit for bit, and reports if it has no effect."""

import logging
import math
import re
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import mean_over_ranks
from llamafactory_hera.training import Aligner
from llamafactory_hera.training.collator import CACHED, PIXELS
from llamafactory_hera.training.watch import RunningMeans
from tests.tiny_models import collate_rows, image_rows, same, student_processor, teacher_folder, vlm

LAYER = {"heads": None, "granularity": "layer", "layers": "L1"}
BATCH = 4


def make(model: nn.Module, **keys: object) -> Aligner:
    config = HeraConfig(**{"heads": "L1H0,L0H2", "teacher": teacher_folder(), "k": 2, "memory": 0, **keys})
    return Aligner(model, config, image_processor=student_processor())


class Run:
    """A custom loop: a model with its optimizer, an aligner, and a dataset of two batches."""

    def __init__(self, rows: int = 2 * BATCH, with_images: bool = True, freeze: bool = False, **keys: object) -> None:
        self.model = vlm("llava-llama")
        if freeze:
            self.model.requires_grad_(False)
            self.model.lm_head.requires_grad_(True)
        self.rows = image_rows(self.model, rows, with_images)
        self.aligner = make(self.model, **{"weight": 1.0, **keys})
        self.collate = self.aligner.collator(collate_rows, drop=("images",))
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=3e-3)
        self.seen = 0

    def step(self) -> float:
        """Takes a training step, and returns the value of the term."""
        start = BATCH * self.seen % len(self.rows)
        batch = self.collate(self.rows[start : start + BATCH])
        self.seen += 1
        micro_batch = self.aligner.prepare(batch)
        loss = self.model(**batch).loss
        term = self.aligner.loss(micro_batch)
        (loss + term).backward()
        self.aligner.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.aligner.optimizer_step(3e-3)
        return term.item()


def without_the_term(run: Run, graph: bool = True) -> None:
    batch = run.collate(run.rows[:BATCH])
    micro_batch = run.aligner.prepare(batch)
    with torch.set_grad_enabled(graph):
        loss = run.model(**batch).loss
    (loss + 0 * run.aligner.loss(micro_batch)).backward()
    run.aligner.after_backward()


# -- it trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"objective": "cka"},
        LAYER,
        {"objective": "feature", "projector": "separate"},
        {**LAYER, "objective": "viral"},
    ],
    ids=["contrastive", "cka", "layers", "feature", "viral"],
)
def test_a_custom_loop_aligns(keys):
    def losses(weight: float, n_steps: int = 16) -> tuple[float, float, dict[str, Tensor]]:
        run = Run(weight=weight, **keys)
        logs = []
        for _ in range(n_steps):
            run.step()
            logs.append(run.aligner.logs())
        first, last = (sum(line["hera_loss"] for line in pair) for pair in (logs[:2], logs[-2:]))
        if "hera_temperature" in logs[0]:
            assert logs[0]["hera_mknn_chance"] == pytest.approx(1 / 3)
            assert (logs[-1]["hera_temperature"] == pytest.approx(0.07, rel=1e-6)) == (weight == 0)
        return first, last, run.aligner.objective.state_dict()

    first, last, trained = losses(weight=1.0)
    _, without, untrained = losses(weight=0.0)
    assert last < 0.9 * first
    assert last < without - 0.05 * first
    assert trained.keys() == untrained.keys()
    assert all(not torch.equal(trained[name], untrained[name]) for name in trained)


@pytest.mark.parametrize("memory", [5, "auto"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, memory):
    straight, resumed = Run(memory=memory), Run(memory=memory)
    for _ in range(3):
        straight.step()
    straight.aligner.save(tmp_path)
    assert {path.name for path in (tmp_path / "hera").iterdir()} == {"state.safetensors", "heads.json", "run.json"}
    for source, copy in ((straight.model, resumed.model), (straight.optimizer, resumed.optimizer)):
        copy.load_state_dict(deepcopy(source.state_dict()))
    resumed.seen = straight.seen
    resumed.aligner.load(tmp_path)
    straight.aligner.logs()
    assert [resumed.step() for _ in range(4)] == [straight.step() for _ in range(4)]
    assert resumed.aligner.logs() == straight.aligner.logs()
    for run, name in ((straight, "one"), (resumed, "two")):
        run.aligner.save(tmp_path / name)
    one, two = (load_file(tmp_path / name / "hera/state.safetensors") for name in ("one", "two"))
    assert any("optimizer" in name for name in one)
    assert any("memory" in name for name in one)
    assert same(one, two)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*hera_heads was L1H0,L0H2, is L0H2"):
        make(straight.model, heads="L0H2").load(tmp_path)


def test_cached_features_equal_computed_ones(tmp_path):
    first = Run(rows=BATCH, teacher_cache=str(tmp_path / "cache"))
    batch = first.collate(first.rows)
    assert batch["hera_source"].tolist() == [PIXELS] * BATCH
    computed = first.aligner.teacher.features(first.aligner.prepare(batch).inputs)
    exact = make(vlm("llava-llama")).teacher.features(first.collate(first.rows))
    torch.testing.assert_close(computed, exact, rtol=1e-3, atol=1e-3)
    first.aligner.close()  # writes the features that are still in memory
    second = Run(rows=BATCH, teacher_cache=str(tmp_path / "cache"))
    batch = second.collate(second.rows)
    assert batch["hera_source"].tolist() == [CACHED] * BATCH
    assert second.aligner.teacher.features({"hera_source": batch["hera_source"]}).isnan().all()  # no features
    # the cast that transformers' Trainer makes under DeepSpeed
    batch = {name: values.bfloat16() if values.is_floating_point() else values for name, values in batch.items()}
    assert torch.equal(second.aligner.teacher.features(second.aligner.prepare(batch).inputs), computed)


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    run = Run(rows=BATCH, teacher_cache=str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(run.aligner.teacher.cache), "put", full)
    assert [run.step() > 0 for _ in range(2)] == [True, True]
    assert caplog.text.count("hera_teacher_cache: ") == 1
    assert "cannot be written (No space left on device); the run continues" in caplog.text


def test_a_batch_of_another_loader_is_not_changed():
    run = Run()
    run.step()
    batch = collate_rows([{k: v for k, v in row.items() if k != "images"} for row in run.rows])
    keys = set(batch)
    expected = run.model(**batch).loss
    assert run.aligner.prepare(batch) is None
    assert set(batch) == keys
    assert torch.equal(run.model(**batch).loss, expected)
    run.aligner.close()
    assert not [name for name, module in run.model.named_modules() if "forward" in vars(module)]


def test_labels_of_the_last_tokens_alone_do_not_change_the_term():
    run = Run()
    terms = []
    for shortened in (False, True):
        batch = run.collate(run.rows[:BATCH])
        if shortened:
            batch |= {"hera_labels": batch["labels"], "labels": batch["labels"][:, -3:]}
        prepared = run.aligner.prepare(batch)
        assert batch.pop("labels").shape[1] == (3 if shortened else batch["input_ids"].shape[1])
        run.model(**batch)
        terms.append(run.aligner.loss(prepared))
    assert terms[0] == terms[1] > 0


def test_a_configuration_names_its_targets_and_auto_needs_a_trainer():
    model = vlm("llava-llama", num_hidden_layers=5)
    for named, layers in (("middle", (2,)), ("penultimate", (3,)), ("L4,L0", (0, 4))):
        assert make(model, **{**LAYER, "layers": named}).targets.layers == layers
    for keys, key in (({"heads": "auto"}, "hera_heads"), ({**LAYER, "layers": "auto"}, "hera_layers")):
        with pytest.raises(
            ValueError, match=rf"^{key}: auto works only in a Trainer.*call llamafactory_hera.select_heads"
        ):
            make(model, **keys)


# -- never a silent no-op --------------------------------------------------------------------------------------------


def test_a_run_that_cannot_change_its_targets_is_refused():
    with pytest.raises(
        ValueError, match=r"cannot change L1H0,L0H2: no trained parameter influences them \(trained: lm_head"
    ):
        Run(freeze=True)
    for graph, why in ((False, "their outputs carry no"), (True, "the first backward pass brought")):
        with pytest.raises(
            RuntimeError, match=rf"^hera_heads: the HeRA term cannot change .*: {why} .*Train earlier parameters"
        ):
            without_the_term(Run(), graph)
    without_the_term(Run(weight=0.0))  # a weight of 0 may have no effect


@pytest.mark.parametrize(
    ("keys", "why"),
    [({}, "no sample with an image .* hera_memory: 8"), ({"objective": "cka"}, "no batch had 3 samples")],
)
def test_a_run_whose_samples_never_enter_the_term_gives_one_warning(keys, why, caplog):
    run = Run(rows=BATCH, with_images=False, **keys)
    for _ in range(12):
        assert run.step() == 0
    assert run.aligner.logs()["hera_empty_batches"] == 12
    ours = [record for record in caplog.records if record.name.startswith("llamafactory_hera")]
    assert [record.levelno for record in ours] == [logging.WARNING]
    assert re.search(f"was 0 in all 10 micro-batches so far: {why}", caplog.text)
    short = Run(rows=BATCH, with_images=False, **keys)
    short.step()
    short.aligner.close()  # a shorter run gives the warning at its end
    assert "was 0 in all 1 micro-batches so far" in caplog.text
    good = Run()
    good.step()
    caplog.clear()
    good.aligner.close()
    assert not [record for record in caplog.records if record.name.startswith("llamafactory_hera")]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_too_many_consecutive_non_finite_terms_stop_the_run(side, monkeypatch):
    run = Run(max_nan=3)
    run.step()
    source = run.aligner.capture if side == "student" else run.aligner.teacher
    name = "representations" if side == "student" else "features"
    original = getattr(source, name)

    def broken(*args: object) -> Tensor:
        values = original(*args).clone()
        values[0] = math.nan  # the first head, or the first sample
        return values

    def steps(n: int) -> None:
        for _ in range(n):
            run.step()

    monkeypatch.setattr(source, name, broken)
    temperature = run.aligner.objective.values()
    steps(2)
    assert run.aligner.objective.values() == temperature  # momentum does not move it either
    monkeypatch.setattr(source, name, original)
    steps(1)  # the count starts again
    assert run.aligner.logs()["hera_nan_batches"] == 2
    monkeypatch.setattr(source, name, broken)
    steps(3)  # the error comes later, because a step does not wait for the device
    monkeypatch.setattr(source, name, original)
    steps(1)  # a good step does not hide the heads of the bad steps
    where = (
        "L1H0. Lower the learning rate" if side == "student" else "the teacher's features. Check the teacher's weights"
    )
    with pytest.raises(
        RuntimeError, match=rf"not finite in 3 consecutive micro-batches \(hera_max_nan\), because of {where}"
    ):
        run.aligner.logs()


def test_a_teacher_feature_that_is_not_finite_is_not_cached(tmp_path, monkeypatch):
    run = Run(teacher_cache=str(tmp_path))
    encode = run.aligner.teacher.encoder.encode
    monkeypatch.setattr(
        run.aligner.teacher.encoder, "encode", lambda images: encode(images).index_fill(0, torch.tensor([0]), math.nan)
    )
    run.step()
    assert run.aligner.logs()["hera_nan_batches"] == 1
    assert len(run.aligner.teacher.cache) == BATCH - 1


def test_the_error_says_that_a_model_was_nan_from_the_start():
    run = Run(max_nan=2)
    with torch.no_grad():
        run.model.get_input_embeddings().weight.fill_(math.nan)
    run.step()
    with pytest.raises(RuntimeError, match="No term was finite: the model's weights may be NaN"):
        run.step()


def test_values_are_means_and_counts_since_they_were_last_taken():
    statistics = RunningMeans()
    for loss, mknn in ((1.0, 0.5), (2.0, math.nan), (6.0, 0.1)):
        statistics.add(loss=torch.tensor(loss), mknn=torch.tensor(mknn))
    for counts in ({"duplicates": 2, "skipped": 0}, {"duplicates": 1}):
        statistics.count(**{name: torch.tensor(n) for name, n in counts.items()})
    assert statistics.take() == pytest.approx({"loss": 3.0, "mknn": 0.3, "duplicates": 3})
    assert statistics.take() == {}
    for value in (1e8, *([1.0] * 100)):  # the sum is in double precision
        statistics.add(loss=torch.tensor(value), mknn=torch.tensor(math.nan))
    taken = statistics.take()
    assert taken["loss"] == pytest.approx((1e8 + 100) / 101, rel=1e-12)
    assert math.isnan(taken["mknn"])
    assert mean_over_ranks(taken, torch.device("cpu")).keys() == {"loss"}  # a value that is always NaN is not reported


def test_a_batch_without_a_row_for_each_sample_is_refused():
    run = Run()
    collate = run.aligner.collator(lambda rows: collate_rows(rows[1:]), drop=("images",))
    with pytest.raises(ValueError, match=r"^data_collator: it makes 3 rows from 4 samples; keep one row"):
        run.aligner.prepare(collate(run.rows[:BATCH]))


@pytest.mark.parametrize("gradcache", [False, True])
def test_copies_of_a_file_are_found_although_the_teacher_is_imprecise(gradcache):
    run = Run()
    rows = [{**row, "images": run.rows[image]["images"]} for row, image in zip(run.rows, (0, 0, 1, 2), strict=False)]
    batch = run.collate(rows)
    batch["hera_pixels"] += torch.randn_like(batch["hera_pixels"])
    prepared = run.aligner.prepare(batch)
    run.model(**batch)
    if gradcache:
        run.aligner.collect(prepared)
        run.aligner.solve()
    else:
        run.aligner.loss(prepared)
    assert run.aligner.logs()["hera_duplicates"] == 1
