"""A selection compared with the formulas, on several processes, and with bad input."""

import dataclasses
import json
import logging
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from llamafactory_hera.alignment import mutual_knn, nearest_neighbors
from llamafactory_hera.heads import Target, Targets
from llamafactory_hera.heads.capture import HeadCapture
from llamafactory_hera.heads.families import decoder_layers
from llamafactory_hera.selection import select
from llamafactory_hera.selection.gallery import Neighbors
from llamafactory_hera.selection.passes import Forward
from llamafactory_hera.selection.samples import draw_samples
from llamafactory_hera.selection.scores import ScoreFile
from llamafactory_hera.selection.select import fill_teacher_cache, select_targets
from tests.ranks import holder, run_ranks
from tests.tiny_models import HEADS, LAYERS, noise_images, text_model

from .tiny import Rows, captions, settings, text_inputs, vlm_inputs

ALL_HEADS = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]


def teacher_features(inputs, samples):
    """Returns the teacher's features in the cache's precision."""
    teacher = inputs.load_teacher()
    return torch.cat([teacher.encode(teacher.processor.batch([sample.image])) for sample in samples]).half()


def naive_contributions(inputs, chosen):
    """Computes the contribution of every head, ``[L * H, N, D]``, one sample at a time and without padding."""
    model = inputs.load_model()
    collate = inputs.collator(model)
    rows = []
    with HeadCapture(model, Targets.parse(ALL_HEADS)) as capture, torch.no_grad():
        for sample in draw_samples(inputs.source, chosen):
            batch = collate([dict(sample.features)])
            capture.pool(batch.pop("labels") != -100)
            model(**batch)
            rows.append(capture.representations()[:, 0])
    return torch.stack(rows, dim=1)


def naive_scores(inputs, chosen):
    teacher = teacher_features(inputs, draw_samples(inputs.source, chosen))
    heads = naive_contributions(inputs, chosen)
    return mutual_knn(heads, teacher, chosen.select_k, chosen.normalize).view(LAYERS, HEADS)


@pytest.mark.parametrize(
    ("make", "keys"),
    [(text_inputs, {}), (text_inputs, {"similarity": "dot"}), (vlm_inputs, {"select_mode": "mllm", "select_k": 3})],
    ids=["captions", "dot product", "images and text"],
)
def test_scores_match_the_formula(tmp_path, make, keys):
    inputs, chosen = make(tmp_path), settings(**keys)
    heads = select_targets(inputs, chosen, tmp_path / "heads.json")
    expected = naive_scores(inputs, chosen)
    assert heads.provenance["scores"] == [[round(score, 7) for score in row] for row in expected.tolist()]
    assert heads.provenance["samples"] == len(inputs.source)
    assert len(set(expected.flatten().tolist())) > 3
    order = sorted(range(LAYERS * HEADS), key=lambda i: (expected.flatten()[i].item(), i))
    assert [str(head) for head in heads.items] == [ALL_HEADS[i] for i in order[:3]]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_neighbors_in_the_file_match_the_formula(tmp_path, similarity):
    inputs, chosen = text_inputs(tmp_path), settings(similarity=similarity)
    select_targets(inputs, chosen, tmp_path / "heads.json")
    kept = Neighbors.load(tmp_path / "heads.json")
    assert kept.queries.tolist() == [round(place * 39 / 11) for place in range(12)]
    k, normalize = chosen.select_k, chosen.normalize
    expected = nearest_neighbors(naive_contributions(inputs, chosen), k, normalize)[:, kept.queries]
    assert torch.equal(kept.heads.flatten(0, 1), expected)
    teacher = nearest_neighbors(teacher_features(inputs, draw_samples(inputs.source, chosen)), k, normalize)
    assert torch.equal(kept.teacher, teacher[kept.queries])


def test_layer_scores_match_the_outputs_of_layers(tmp_path):
    inputs, chosen = text_inputs(tmp_path), settings()
    heads = select_targets(inputs, chosen, tmp_path / "heads.json")
    model = inputs.load_model()
    samples = draw_samples(inputs.source, chosen)
    outputs = []
    hook = decoder_layers(model)[0].register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.features["input_ids"]]))
    hook.remove()
    pooled = torch.stack([output[0, 1:].mean(0) for output in outputs])
    expected = mutual_knn(pooled, teacher_features(inputs, samples), chosen.select_k)
    assert heads.provenance["layer_scores"][0] == round(expected.item(), 7)


def test_layers_are_selected_by_layer_scores(tmp_path):
    inputs, path = text_inputs(tmp_path), tmp_path / "layers.json"
    keys = {"granularity": "layer", "heads": None, "layers": "auto", "select_m": 1}
    layers = select_targets(inputs, settings(**keys), path)
    assert Targets.load(path) == layers
    scores = layers.provenance["layer_scores"]
    assert len(scores) == LAYERS
    assert layers.items == (Target(scores.index(min(scores))),)
    top = select_targets(inputs, settings(**keys, select="top"), path)
    assert top.items == (Target(scores.index(max(scores))),)


def test_six_samples_are_scored_with_the_two_neighbors_that_they_allow(tmp_path):
    inputs, chosen = text_inputs(tmp_path, n=6), settings(select_k=10)
    select_targets(inputs, chosen, tmp_path / "heads.json")
    scored = ScoreFile.load(tmp_path / "heads.json")
    assert (scored.k, scored.chance) == (2, 2 / 5)
    expected = naive_scores(inputs, dataclasses.replace(chosen, select_k=2))
    assert scored.scores.tolist() == [[round(score, 7) for score in row] for row in expected.tolist()]


@pytest.mark.parametrize(("mixers", "layers"), [("attention", {1}), ("all", {0, 1})])
def test_heads_of_linear_attention_have_scores_and_are_chosen_only_on_request(tmp_path, mixers, layers):
    inputs = text_inputs(tmp_path, model=text_model("qwen3_5_text").eval())
    heads = select_targets(inputs, settings(select_m=4, select_mixers=mixers, select="top"), tmp_path / "heads.json")
    scores = heads.provenance["scores"]
    choosable = sorted((-score, layer, head) for layer in layers for head, score in enumerate(scores[layer]) if score)
    assert [tuple(head) for head in heads.items] == [place[1:] for place in choosable[:4]]
    assert [sum(score is not None for score in row) for row in scores] == [6, HEADS]


def test_the_file_records_the_origin_of_the_heads(tmp_path):
    path = tmp_path / "out/heads.json"
    heads = select_targets(text_inputs(tmp_path), settings(), path)
    assert Targets.load(path) == heads
    origin = json.loads(path.read_text())["provenance"]
    expected = {"model": "tiny/model", "adapters": [], "teacher": "tiny/teacher", "dataset": "noise", "samples": 40}
    expected |= {"batch_size": 8, "compute_dtype": "float32", "chance_level": 4 / 39}
    assert {name: origin[name] for name in expected} == expected
    keys = {"hera_select": "worst", "hera_select_m": 3, "hera_select_k": 4, "hera_select_samples": 40}
    assert origin["keys"].items() >= keys.items()
    assert {len(origin[name]) for name in ("model_fingerprint", "teacher_fingerprint", "samples_digest")} == {64}
    assert origin["versions"]["torch"] == version("torch")
    assert [len(row) for row in origin["scores"]] == [HEADS] * LAYERS
    assert {file.name for file in path.parent.iterdir()} == {"heads.json", "heads.neighbors.safetensors"}


def _select_on_a_rank(folder: Path, n: int, rank: int) -> tuple:
    read, ran = [], []
    fingerprint, run = select.model_fingerprint, Forward.run
    select.model_fingerprint = lambda *args: read.append(rank) or fingerprint(*args)
    Forward.run = lambda forward, batch: ran.append(len(batch["input_ids"])) or run(forward, batch)
    heads = select_targets(text_inputs(folder), settings(select_samples=n), folder / "two/heads.json")
    n_samples = sum(ran)
    # a single batch, so that all other processes have none
    few = select_targets(text_inputs(folder), settings(select_samples=8), folder / "few/heads.json")
    return str(heads), heads.provenance["scores"], heads.provenance["layer_scores"], str(few), len(read), n_samples


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "shares"), [(40, (24, 16)), (37, (13, 8, 8, 8))])
def test_several_processes_share_the_work_and_select_like_one(tmp_path, samples, shares):
    inputs = text_inputs(tmp_path)
    one = select_targets(inputs, settings(select_samples=samples), tmp_path / "one/heads.json")
    few = select_targets(inputs, settings(select_samples=8), tmp_path / "one/few.json")
    (tmp_path / "ranks").mkdir()
    results = run_ranks(partial(_select_on_a_rank, tmp_path, samples), len(shares), tmp_path / "ranks")
    expected = (str(one), one.provenance["scores"], one.provenance["layer_scores"], str(few))
    assert [tuple(result[:4]) for result in results] == [expected] * len(shares)
    assert [result[4] for result in results] == [2, 0, 0, 0][: len(shares)]  # only the first process reads the weights
    assert sorted(result[5] for result in results) == sorted(shares)


def test_teacher_only_fills_the_cache_for_the_complete_dataset(tmp_path):
    images = [[image] for image in noise_images(30)]
    inputs = dataclasses.replace(text_inputs(tmp_path), source=Rows(images + images[:5] + [[]], captions(36)))
    cached = settings(teacher_cache=str(tmp_path / "cache"), select_samples=6)
    assert fill_teacher_cache(inputs, cached) == 30
    with pytest.raises(ValueError, match="hera_teacher_cache: it is not set"):
        fill_teacher_cache(inputs, settings())
    with pytest.raises(ValueError, match="dataset: noise contains no image"):
        fill_teacher_cache(dataclasses.replace(inputs, source=Rows([[]], captions(1))), cached)


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_head_with_nan_has_no_score_and_is_never_chosen_and_nan_everywhere_is_an_error(tmp_path, caplog):
    model = text_model("qwen3").eval()
    with torch.no_grad():
        # head 1 of the last layer, so that no head comes after it
        decoder_layers(model)[1].self_attn.o_proj.weight[0, 16] = math.nan
    inputs = text_inputs(tmp_path, model=model)
    with caplog.at_level(logging.WARNING):
        heads = select_targets(inputs, settings(select_m=7), tmp_path / "heads.json")
    assert "L1H1" in caplog.text
    assert heads.provenance["scores"][1][1] is None
    assert sum(score is None for row in heads.provenance["scores"] for score in row) == 1
    assert Target(1, 1) not in heads.items
    assert (Neighbors.load(tmp_path / "heads.json").heads[1, 1] == -1).all()
    assert len(heads.items) == 7
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^model: the output of every head"):
        select_targets(inputs, settings(), tmp_path / "none.json")


def test_a_second_selection_for_the_same_run_is_refused_before_anything_is_loaded(tmp_path):
    unused = dataclasses.replace(text_inputs(tmp_path), load_teacher=lambda: 1 / 0, load_model=lambda: 1 / 0)
    with holder(tmp_path / "run"), pytest.raises(ValueError, match=r"output_dir: .*run is in use by another"):
        select_targets(unused, settings(), tmp_path / "run/hera/heads.json")


@pytest.mark.parametrize(("strategy", "m"), [("worst", 9), ("middle", 5)])
def test_choosing_more_heads_than_the_model_has_is_refused_before_the_passes(tmp_path, monkeypatch, strategy, m):
    monkeypatch.setattr(Forward, "run", None)
    with pytest.raises(ValueError, match=f"hera_select_m: {m} is more than"):
        select_targets(text_inputs(tmp_path), settings(select=strategy, select_m=m), tmp_path / "heads.json")
