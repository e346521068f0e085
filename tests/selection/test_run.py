"""A whole selection against the formulas written out; killed, resumed and shared out."""

import dataclasses
import json

import pytest
import torch

from llamafactory_hera.alignment import mutual_knn
from llamafactory_hera.heads import HeadCapture, HeadSet, LayerSet
from llamafactory_hera.heads.families import decoder_layers
from llamafactory_hera.selection import forward
from llamafactory_hera.selection.run import select_heads, select_layers
from llamafactory_hera.selection.samples import draw_samples
from llamafactory_hera.selection.teacher import fill_teacher_cache, nearest_in_blocks
from tests.ranks import run_ranks
from tests.tiny_models import HEADS, LAYERS

from .tiny import Rows, captions, noise_images, settings, text_material, vlm_material

ALL_HEADS = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]


def naive_scores(material, chosen):
    """Each sample alone, no padding: D-sized contributions of every head, then MKNN of the dense formula."""
    model = material.load_model()
    samples = draw_samples(material.source, chosen)
    collate = material.collator(model)
    rows = []
    with HeadCapture(model, ALL_HEADS) as capture, torch.no_grad():
        for sample in samples:
            batch = collate([dict(sample.features)])
            capture.pool(batch.pop("labels") != -100)
            model(**batch)
            rows.append(capture.representations()[:, 0])
    heads = torch.stack(rows, dim=1)
    teacher = material.load_teacher()
    features = torch.cat([teacher.encode(teacher.processor.batch([sample.image])) for sample in samples])
    return mutual_knn(heads, features.half(), chosen.k, chosen.similarity == "cosine").view(LAYERS, HEADS)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_scores_are_those_of_the_formula_for_captions(tmp_path, similarity):
    material, chosen = text_material(tmp_path), settings(similarity=similarity)
    heads = select_heads(material, chosen, tmp_path / "heads.json")
    expected = naive_scores(material, chosen)
    assert heads.provenance["scores"] == [[round(score, 7) for score in row] for row in expected.tolist()]
    assert len(set(expected.flatten().tolist())) > 3
    order = sorted(range(LAYERS * HEADS), key=lambda i: (expected.flatten()[i].item(), i))
    assert [str(head) for head in heads.heads] == [ALL_HEADS[i] for i in order[:3]]


def test_scores_are_those_of_the_formula_for_images_and_text(tmp_path):
    material, chosen = vlm_material(tmp_path), settings(mode="mllm", k=3)
    heads = select_heads(material, chosen, tmp_path / "heads.json")
    assert heads.provenance["scores"] == [
        [round(score, 7) for score in row] for row in naive_scores(material, chosen).tolist()
    ]
    assert heads.provenance["samples"] == 16


def test_layer_scores_are_those_of_the_layers_output(tmp_path):
    material, chosen = text_material(tmp_path), settings()
    heads = select_heads(material, chosen, tmp_path / "heads.json")
    model = material.load_model()
    samples = draw_samples(material.source, chosen)
    outputs = []
    hook = decoder_layers(model)[0].register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.features["input_ids"]]))
    hook.remove()
    pooled = torch.stack([output[0, 1:].mean(0) for output in outputs])
    teacher = material.load_teacher()
    features = torch.cat([teacher.encode(teacher.processor.batch([sample.image])) for sample in samples])
    expected = mutual_knn(pooled, features.half(), chosen.k)
    assert heads.provenance["layer_scores"][0] == round(expected.item(), 7)


def test_layers_are_chosen_by_their_own_scores(tmp_path):
    material = text_material(tmp_path)
    target = tmp_path / "layers.json"
    layers = select_layers(material, settings(m=1), target)
    assert LayerSet.load(target) == layers
    scores = layers.provenance["layer_scores"]
    assert len(scores) == LAYERS
    assert layers.layers == (scores.index(min(scores)),)
    top = select_layers(material, settings(m=1, strategy="top"), target)
    assert top.layers == (scores.index(max(scores)),)
    with pytest.raises(ValueError, match=rf"hera_select_m: {LAYERS + 1} layers are asked for.* lower it"):
        select_layers(material, settings(m=LAYERS + 1), target)


def test_the_file_says_where_the_heads_come_from(tmp_path):
    target = tmp_path / "out/heads.json"
    heads = select_heads(text_material(tmp_path), settings(), target)
    assert HeadSet.load(target) == heads
    said = json.loads(target.read_text())["provenance"]
    assert said["chance_level"] == 4 / 39
    assert (said["model"], said["teacher"], said["dataset"]) == ("tiny/model", "tiny/teacher", "noise")
    assert (said["samples"], said["k"], said["m"], said["seed"]) == (40, 4, 3, 0)
    assert (said["mode"], said["strategy"], said["pooling"]) == ("llm", "worst", "answer")
    assert {len(said["model_fingerprint"]), len(said["teacher_fingerprint"])} == {64}
    assert said["versions"]["torch"] == torch.__version__.split("+")[0] or said["versions"]["torch"]
    assert [len(row) for row in said["scores"]] == [HEADS] * LAYERS
    assert [path.name for path in target.parent.iterdir()] == ["heads.json"]


def test_the_batch_size_does_not_matter(tmp_path):
    material = text_material(tmp_path)
    one = select_heads(material, settings(batch_size=1), tmp_path / "one.json")
    many = select_heads(material, settings(batch_size=40), tmp_path / "many.json")
    assert one.provenance["scores"] == many.provenance["scores"]


def test_fp16_features_agree_up_to_a_neighbour(tmp_path):
    material = text_material(tmp_path)
    exact = select_heads(material, settings(), tmp_path / "a.json").provenance["scores"]
    rounded = select_heads(material, settings(stored_dtype="fp16"), tmp_path / "b.json").provenance["scores"]
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), atol=2 / 160, rtol=0)


@pytest.fixture
def kill_after(monkeypatch):
    """kill_after(n) -> the sizes of the batches that go through the model; the one behind the n-th ends the run."""
    real = forward.forward_call

    def kill(limit):
        sizes = []

        def counting(model, mode):
            call = real(model, mode)

            def run(batch):
                if len(sizes) == limit:
                    raise KeyboardInterrupt
                sizes.append(batch["input_ids"].shape[0])
                call(batch)

            return run

        monkeypatch.setattr(forward, "forward_call", counting)
        return sizes

    return kill


def test_a_killed_run_goes_on_where_it_was(tmp_path, kill_after, caplog):
    material, chosen = text_material(tmp_path, n=100), settings(samples=100)
    whole = select_heads(material, chosen, tmp_path / "whole/heads.json")
    target = tmp_path / "killed/heads.json"
    kill_after(9)  # two blocks of four batches, and one batch of the third
    with pytest.raises(KeyboardInterrupt):
        select_heads(material, chosen, target)
    assert not target.exists()
    sizes = kill_after(1000)
    again = select_heads(material, chosen, target)
    assert sum(sizes) == 100 - 64
    assert "2 of 4 blocks are there" in caplog.text
    assert again.provenance["scores"] == whole.provenance["scores"]
    assert [path.name for path in target.parent.iterdir()] == ["heads.json"]


def test_nothing_of_a_killed_run_is_used_for_other_captions_or_another_model(tmp_path, kill_after):
    material, chosen = text_material(tmp_path), settings()
    kill_after(4)
    with pytest.raises(KeyboardInterrupt):
        select_heads(material, chosen, tmp_path / "heads.json")
    others = [feature | {"input_ids": feature["input_ids"][::-1]} for feature in captions(40)]  # of the same lengths
    material.source._features[:] = others
    sizes = kill_after(1000)
    select_heads(material, chosen, tmp_path / "heads.json")
    assert sum(sizes) == 40

    kill_after(4)
    with pytest.raises(KeyboardInterrupt):
        select_heads(material, chosen, tmp_path / "heads.json")
    with torch.no_grad():
        decoder_layers(material.load_model())[0].mlp.up_proj.weight.mul_(2)
    material.load_model().save_pretrained(material.model_folder)
    sizes = kill_after(1000)
    select_heads(material, chosen, tmp_path / "heads.json")
    assert sum(sizes) == 40


def _select_on_a_rank(rank: int) -> tuple:
    import os
    from pathlib import Path

    folder = Path(os.environ["SELECTION_TEST_FOLDER"])
    material = text_material(folder, n=100)
    heads = select_heads(material, settings(samples=100), folder / "two/heads.json")
    return str(heads), heads.provenance["scores"], heads.provenance["layer_scores"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    one = select_heads(text_material(tmp_path, n=100), settings(samples=100), tmp_path / "one/heads.json")
    monkeypatch.setenv("SELECTION_TEST_FOLDER", str(tmp_path))
    (tmp_path / "ranks").mkdir()
    results = run_ranks(_select_on_a_rank, 2, tmp_path / "ranks")
    expected = (str(one), one.provenance["scores"], one.provenance["layer_scores"])
    assert [tuple(result) for result in results] == [expected, expected]


def test_the_cache_that_selection_fills_is_the_one_that_is_read(tmp_path):
    material = dataclasses.replace(text_material(tmp_path), teacher_cache=str(tmp_path / "cache"))
    select_heads(material, settings(), tmp_path / "heads.json")
    teacher = material.load_teacher()

    class Seen(Exception):
        pass

    def encode(pixels):
        raise Seen

    teacher.encode = encode
    again = dataclasses.replace(material, load_teacher=lambda: teacher)
    select_heads(again, settings(), tmp_path / "heads.json")
    without = dataclasses.replace(again, teacher_cache=None)
    with pytest.raises(Seen):
        select_heads(without, settings(), tmp_path / "heads.json")


def test_teacher_only_fills_the_cache_for_the_whole_dataset(tmp_path):
    images = [[image] for image in noise_images(30)]
    source = Rows(images + images[:5] + [[]], captions(36))
    material = dataclasses.replace(text_material(tmp_path), source=source, teacher_cache=str(tmp_path / "cache"))
    assert fill_teacher_cache(material, settings(samples=5)) == 30
    with pytest.raises(ValueError, match="hera_teacher_cache: it is not set"):
        fill_teacher_cache(dataclasses.replace(material, teacher_cache=None), settings())
    with pytest.raises(ValueError, match="dataset: noise holds no image"):
        fill_teacher_cache(dataclasses.replace(material, source=Rows([[]], captions(1))), settings())


@pytest.mark.parametrize("normalize", [True, False])
def test_neighbours_by_blocks_are_those_of_the_whole(normalize, monkeypatch):
    from llamafactory_hera.alignment import nearest_neighbors

    features = torch.randn(50, 6)
    features[10:20] = features[:10]  # exact ties
    monkeypatch.setattr("llamafactory_hera.selection.teacher._ROWS", 7)
    assert torch.equal(nearest_in_blocks(features, 5, normalize), nearest_neighbors(features, 5, normalize))
