"""A whole selection against the formulas written out; killed, resumed and shared out; given what it cannot use."""

import dataclasses
import json
import logging
import math
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from llamafactory_hera.alignment import mutual_knn, nearest_neighbors
from llamafactory_hera.heads import HeadCapture, Target, Targets
from llamafactory_hera.heads.families import decoder_layers
from llamafactory_hera.selection import select
from llamafactory_hera.selection.gallery import Neighbors, neighbors_file
from llamafactory_hera.selection.passes import Forward
from llamafactory_hera.selection.samples import draw_samples
from llamafactory_hera.selection.select import fill_teacher_cache, select_targets
from tests.ranks import holder, run_ranks
from tests.tiny_models import HEADS, LAYERS, text_model

from .tiny import Rows, captions, layer_settings, noise_images, settings, text_inputs, vlm_inputs

ALL_HEADS = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]


def teacher_features(inputs, samples):
    """As the cache holds them."""
    teacher = inputs.load_teacher()
    return torch.cat([teacher.encode(teacher.processor.batch([sample.image])) for sample in samples]).half()


def naive_contributions(inputs, chosen):
    """Each sample alone, no padding: D-sized contributions of every head ``[L * H, N, D]``."""
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
    """MKNN of the dense formula."""
    teacher = teacher_features(inputs, draw_samples(inputs.source, chosen))
    heads = naive_contributions(inputs, chosen)
    return mutual_knn(heads, teacher, chosen.select.k, chosen.normalize).view(LAYERS, HEADS)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (text_inputs, {}),
        (text_inputs, {"similarity": "dot"}),
        (vlm_inputs, {"select_mode": "mllm", "select_k": 3}),
    ],
    ids=["captions", "dot product", "images and text"],
)
def test_scores_are_those_of_the_formula(tmp_path, make, keys):
    inputs, chosen = make(tmp_path), settings(**keys)
    heads = select_targets(inputs, chosen, tmp_path / "heads.json")
    expected = naive_scores(inputs, chosen)
    assert heads.provenance["scores"] == [[round(score, 7) for score in row] for row in expected.tolist()]
    assert heads.provenance["samples"] == len(inputs.source)
    assert len(set(expected.flatten().tolist())) > 3
    order = sorted(range(LAYERS * HEADS), key=lambda i: (expected.flatten()[i].item(), i))
    assert [str(head) for head in heads.items] == [ALL_HEADS[i] for i in order[:3]]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_neighbors_kept_beside_the_file_are_those_of_the_formula(tmp_path, similarity):
    inputs, chosen = text_inputs(tmp_path), settings(similarity=similarity)
    select_targets(inputs, chosen, tmp_path / "heads.json")
    kept = Neighbors.load(tmp_path / "heads.json")
    assert kept.queries.tolist() == [round(place * 39 / 11) for place in range(12)]
    k, normalize = chosen.select.k, chosen.normalize
    expected = nearest_neighbors(naive_contributions(inputs, chosen), k, normalize)[:, kept.queries]
    assert torch.equal(kept.heads.flatten(0, 1), expected)
    teacher = nearest_neighbors(teacher_features(inputs, draw_samples(inputs.source, chosen)), k, normalize)
    assert torch.equal(kept.teacher, teacher[kept.queries])
    # of twelve samples all are queries: what they share with the teacher on average is the score
    everyone = text_inputs(tmp_path)
    scores = select_targets(everyone, settings(select_samples=12), tmp_path / "all.json").provenance["scores"]
    kept = Neighbors.load(tmp_path / "all.json")
    shared = (kept.heads[..., None] == kept.teacher[:, None, :]).any(-1).float().mean((-1, -2))
    torch.testing.assert_close(shared, torch.tensor(scores), atol=1e-6, rtol=0)


def test_layer_scores_are_those_of_the_layers_output(tmp_path):
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
    expected = mutual_knn(pooled, teacher_features(inputs, samples), chosen.select.k)
    assert heads.provenance["layer_scores"][0] == round(expected.item(), 7)


def test_layers_are_chosen_by_their_own_scores(tmp_path):
    inputs, path = text_inputs(tmp_path), tmp_path / "layers.json"
    layers = select_targets(inputs, layer_settings(select_m=1), path)
    assert Targets.load(path) == layers
    scores = layers.provenance["layer_scores"]
    assert len(scores) == LAYERS
    assert layers.items == (Target(scores.index(min(scores))),)
    top = select_targets(inputs, layer_settings(select_m=1, select="top"), path)
    assert top.items == (Target(scores.index(max(scores))),)
    with pytest.raises(ValueError, match=f"hera_select_m: {LAYERS + 1} layers are asked for, .* lower it"):
        select_targets(inputs, layer_settings(select_m=LAYERS + 1), path)


def test_the_file_says_where_the_heads_come_from(tmp_path):
    path = tmp_path / "out/heads.json"
    heads = select_targets(text_inputs(tmp_path), settings(), path)
    assert Targets.load(path) == heads
    facts = json.loads(path.read_text())["provenance"]
    expected = {"model": "tiny/model", "adapters": [], "teacher": "tiny/teacher", "dataset": "noise", "samples": 40}
    expected |= {"samples_asked": 40, "mode": "llm", "k": 4, "pooling": "answer", "similarity": "cosine", "m": 3}
    expected |= {"strategy": "worst", "seed": 0, "stored_dtype": "fp32", "batch_size": 8, "compute_dtype": "float32"}
    assert {name: facts[name] for name in expected} == expected
    assert facts["chance_level"] == 4 / 39
    assert (
        {len(facts[f"{what}_fingerprint"]) for what in ("model", "teacher")} == {len(facts["samples_digest"])} == {64}
    )
    assert facts["versions"]["torch"] == version("torch")
    assert [len(row) for row in facts["scores"]] == [HEADS] * LAYERS
    assert {file.name for file in path.parent.iterdir()} == {"heads.json", "heads.neighbors.safetensors"}


def test_the_batch_size_does_not_matter_and_fp16_changes_a_neighbor_at_most(tmp_path):
    inputs = text_inputs(tmp_path)
    rows = {"select_batch_size": 1}, {"select_batch_size": 40}, {"select_dtype": "fp16"}
    one, many, rounded = (
        select_targets(inputs, settings(**keys), tmp_path / "heads.json").provenance["scores"] for keys in rows
    )
    assert one == many
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(one), atol=2 / 160, rtol=0)


@pytest.fixture
def kill_after(monkeypatch):
    """kill_after(n) -> the sizes of the batches that go through the model; the one behind the n-th ends the run."""
    run = Forward.run

    def kill(limit):
        sizes = []

        def counting(forward, batch):
            if len(sizes) == limit:
                raise KeyboardInterrupt
            sizes.append(batch["input_ids"].shape[0])
            run(forward, batch)

        monkeypatch.setattr(Forward, "run", counting)
        return sizes

    return kill


def test_a_killed_run_goes_on_where_it_was(tmp_path, kill_after, caplog):
    inputs, chosen = text_inputs(tmp_path, n=100), settings(select_samples=100)
    whole = select_targets(inputs, chosen, tmp_path / "whole/heads.json")
    target = tmp_path / "killed/heads.json"
    kill_after(9)  # two blocks of four batches, and one of the third
    with pytest.raises(KeyboardInterrupt):
        select_targets(inputs, chosen, target)
    assert not target.exists()
    sizes = kill_after(1000)
    again = select_targets(inputs, chosen, target)
    assert sum(sizes) == 100 - 64
    assert "2 of 4 blocks are there" in caplog.text
    assert again.provenance["scores"] == whole.provenance["scores"]
    assert {path.name for path in target.parent.iterdir()} == {"heads.json", "heads.neighbors.safetensors"}


@pytest.mark.parametrize("changed", ["captions", "model"])
def test_nothing_of_a_killed_run_is_used_for_other_captions_or_another_model(tmp_path, kill_after, changed):
    inputs, chosen = text_inputs(tmp_path), settings()
    kill_after(4)
    with pytest.raises(KeyboardInterrupt):
        select_targets(inputs, chosen, tmp_path / "heads.json")
    if changed == "captions":  # of the same lengths
        inputs.source._features[:] = [feature | {"input_ids": feature["input_ids"][::-1]} for feature in captions(40)]
    else:
        with torch.no_grad():
            decoder_layers(inputs.load_model())[0].mlp.up_proj.weight.mul_(2)
        inputs.load_model().save_pretrained(inputs.weights)
    sizes = kill_after(1000)
    select_targets(inputs, chosen, tmp_path / "heads.json")
    assert sum(sizes) == 40


def _select_on_a_rank(rank: int) -> tuple:
    folder, read = Path(os.environ["SELECTION_TEST_FOLDER"]), []
    fingerprint = select.model_fingerprint
    select.model_fingerprint = lambda *args: read.append(rank) or fingerprint(*args)
    heads = select_targets(text_inputs(folder, n=100), settings(select_samples=100), folder / "two/heads.json")
    try:
        select_targets(text_inputs(folder), settings(select_memory_gb=1e-6), folder / "little/heads.json")
    except ValueError as error:  # which only the first process can see
        refused = str(error)
    return str(heads), heads.provenance["scores"], heads.provenance["layer_scores"], refused, len(read)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    """The first one reads the model's fingerprint, and its refusal is that of all."""
    one = select_targets(text_inputs(tmp_path, n=100), settings(select_samples=100), tmp_path / "one/heads.json")
    monkeypatch.setenv("SELECTION_TEST_FOLDER", str(tmp_path))
    (tmp_path / "ranks").mkdir()
    first, second = (tuple(result) for result in run_ranks(_select_on_a_rank, 2, tmp_path / "ranks"))
    assert first[:3] == second[:3] == (str(one), one.provenance["scores"], one.provenance["layer_scores"])
    assert first[3] == second[3]
    assert first[3].startswith("hera_select_memory_gb")
    assert (first[4], second[4]) == (2, 0)


def test_a_fingerprint_that_is_given_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "model_fingerprint", None)
    heads = select_targets(text_inputs(tmp_path), settings(), tmp_path / "heads.json", fingerprint="a" * 64)
    assert heads.provenance["model_fingerprint"] == "a" * 64


def test_the_cache_that_selection_fills_is_the_one_that_is_read(tmp_path):
    inputs, cached = text_inputs(tmp_path), settings(teacher_cache=str(tmp_path / "cache"))
    select_targets(inputs, cached, tmp_path / "heads.json")
    teacher = inputs.load_teacher()

    class Seen(Exception):
        pass

    def encode(pixels):
        raise Seen

    teacher.encode = encode
    again = dataclasses.replace(inputs, load_teacher=lambda: teacher)
    select_targets(again, cached, tmp_path / "heads.json")
    with pytest.raises(Seen):
        select_targets(again, settings(), tmp_path / "heads.json")


def test_teacher_only_fills_the_cache_for_the_whole_dataset(tmp_path):
    images = [[image] for image in noise_images(30)]
    inputs = dataclasses.replace(text_inputs(tmp_path), source=Rows(images + images[:5] + [[]], captions(36)))
    cached = settings(teacher_cache=str(tmp_path / "cache"), select_samples=6)
    assert fill_teacher_cache(inputs, cached) == 30
    with pytest.raises(ValueError, match="hera_teacher_cache: it is not set"):
        fill_teacher_cache(inputs, settings())
    with pytest.raises(ValueError, match="dataset: noise holds no image"):
        fill_teacher_cache(dataclasses.replace(inputs, source=Rows([[]], captions(1))), cached)


# -- what it cannot use: named, early, and with nothing lost ---------------------------------------------------------


def test_a_head_with_nan_is_named_and_never_taken(tmp_path, caplog):
    model = text_model("qwen3").eval()
    with torch.no_grad():
        # head 1 of the last layer: nothing comes behind it
        decoder_layers(model)[1].self_attn.o_proj.weight[0, 16] = math.nan
    inputs = text_inputs(tmp_path, model=model)
    with caplog.at_level(logging.WARNING):
        heads = select_targets(inputs, settings(select_m=7), tmp_path / "heads.json")
    assert "L1H1" in caplog.text
    assert heads.provenance["scores"][1][1] is None
    assert sum(score is None for row in heads.provenance["scores"] for score in row) == 1
    assert Target(1, 1) not in heads.items
    assert (Neighbors.load(tmp_path / "heads.json").of(Target(1, 1)) == -1).all()
    assert len(heads.items) == 7


def test_nan_everywhere_is_an_error(tmp_path):
    model = text_model("qwen3").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="model_name_or_path: the output of every head"):
        select_targets(text_inputs(tmp_path, model=model), settings(), tmp_path / "heads.json")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    inputs = text_inputs(tmp_path)
    (tmp_path / "out").write_text("a file")
    unused = dataclasses.replace(inputs, load_teacher=lambda: 1 / 0, load_model=lambda: 1 / 0)
    with pytest.raises(ValueError, match=r"output_dir: .*out cannot be written"):
        select_targets(unused, settings(), tmp_path / "out/heads.json")


def test_a_selection_leaves_what_is_another_s_and_keeps_out_a_second_one(tmp_path):
    inputs, path = text_inputs(tmp_path), tmp_path / "out/heads.json"
    others = [tmp_path / "out" / name for name in ("features-mine/notes.txt", f"features-{'0' * 16}/block-00000")]
    for file in others:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    with holder(path.with_name(".lock")) as process, pytest.raises(ValueError, match=f"process {process.pid} on "):
        select_targets(inputs, settings(), path)
    assert not path.exists()
    select_targets(inputs, settings(), path)
    assert sorted(path.parent.iterdir()) == sorted([*(file.parent for file in others), path, neighbors_file(path)])


def test_too_little_memory_names_the_key_and_keeps_the_features(tmp_path):
    with pytest.raises(ValueError, match=r"hera_select_memory_gb: 1e-06 .*give at least"):
        select_targets(text_inputs(tmp_path), settings(select_memory_gb=1e-6), tmp_path / "out/heads.json")
    assert list((tmp_path / "out").glob("features-*/block-*"))


def test_the_vision_tower_as_teacher_is_warned_of(tmp_path, caplog):
    inputs = vlm_inputs(tmp_path)
    chosen = settings(select_mode="mllm", select_k=3)
    select_targets(inputs, chosen, tmp_path / "heads.json")
    assert "vision tower" not in caplog.text
    own = dataclasses.replace(inputs, weights=tmp_path / "teacher")
    with pytest.raises(ValueError, match="no decoder layer"):  # only the comparison is of interest
        select_targets(own, chosen, tmp_path / "heads.json")
    assert "hera_teacher: tiny/teacher is the model's own vision tower" in caplog.text


@pytest.mark.parametrize(("strategy", "m", "number"), [("worst", 9, "8"), ("middle", 5, "4 in layer L1")])
def test_more_heads_than_there_are_is_said_before_the_passes(tmp_path, strategy, m, number):
    with pytest.raises(ValueError, match=f"hera_select_m: {m} .* hera_select: {strategy} has {number} to choose"):
        select_targets(text_inputs(tmp_path), settings(select=strategy, select_m=m), tmp_path / "out/heads.json")
    assert not list((tmp_path / "out").glob("features-*/block-*"))
