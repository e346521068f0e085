"""The formulas, positions and choices of HARC against references that are written out naively."""

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamafactory_harc import directions as geometry
from llamafactory_harc.config import HarcConfig
from llamafactory_harc.coupler import Coupler
from llamafactory_harc.data import MixtureSampler, Row, chat_tail, named_kind, read_rows, reading_mask, template_tail
from llamafactory_harc.losses import coupling, kl_to_base

from . import tiny

CPU = torch.device("cpu")


def naive_cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def naive_read(model: Any, ids: list[int], n_prompt: int, window: int = 32) -> Tensor:
    """Returns what enters the blocks 1 to n - 1 at the three positions of an unpadded row, ``[3, n - 1, D]``."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:-1]
    tail = len(chat_tail(tiny.tokenizer()))
    return torch.stack(
        [
            torch.stack([state[0, n_prompt - 1 - tail] for state in states]),
            torch.stack([state[0, n_prompt - 1] for state in states]),
            torch.stack([state[0, n_prompt : n_prompt + window].mean(0) for state in states]),
        ]
    )


def coupler_of(folder: Path, model: Any, **keys: Any) -> Coupler:
    config = HarcConfig(**{"extract_batch_size": 3, **keys})
    return Coupler(model, config, tiny.rows(config).extract, tiny.collator(), folder)


# -- directions and layers -------------------------------------------------------------------------------------------


def test_directions_are_unit_differences_of_means_at_the_inputs_of_blocks(tmp_path: Path) -> None:
    model, config = tiny.chat_model(), HarcConfig(window=5)
    means = {
        kind: torch.stack([naive_read(model, row.ids, row.n_prompt, 5) for row in rows]).mean(0)
        for kind, rows in tiny.rows(config).extract.items()
    }
    raw = [
        means["harmful"][0] - means["harmless"][0],
        means["harmful"][1] - means["harmless"][1],
        means["compliant"][2] - means["harmless"][2],
        means["harmful"][2] - means["harmless"][2],
    ]
    expected = torch.stack([vector / vector.norm(dim=-1, keepdim=True) for vector in raw])
    found = coupler_of(tmp_path, model, window=5).extract(CPU)
    assert found.shape == (4, tiny.BLOCKS, 32)
    assert torch.allclose(found[:, :-1], expected, atol=1e-5)  # the last layer is read before the final norm


def test_layers_are_chosen_by_the_product_of_the_four_cosines() -> None:
    directions = torch.nn.functional.normalize(torch.randn(4, 12, 16), dim=-1)
    naive = {}
    for layer in range(4, 12 - 4 + 1):  # of the layers 0 to 12, the first and the last four are left out
        harm, refusal, later_harm, later_refusal = directions[:, layer - 1]
        naive[layer] = (1 - abs(naive_cosine(refusal, harm))) * (1 - abs(naive_cosine(later_refusal, later_harm)))
        naive[layer] *= abs(naive_cosine(harm, later_harm)) * abs(naive_cosine(refusal, later_refusal))
    found = geometry.scores(directions)
    assert [layer for layer in range(1, 13) if found[layer - 1].isfinite()] == [*naive]
    assert [float(found[layer - 1]) for layer in naive] == pytest.approx([*naive.values()], rel=1e-4)
    assert geometry.best_layers(directions, 3) == tuple(sorted(sorted(naive, key=naive.__getitem__)[-3:]))


def test_a_refresh_mixes_the_base_with_the_adapted_model_and_touches_no_other_state(tmp_path: Path) -> None:
    model = tiny.with_lora(tiny.chat_model(), random=True).train()
    model.base_model.model.model.layers[2].eval()
    coupler = coupler_of(tmp_path, model, refresh=1)
    expected = coupler_of(tmp_path, tiny.chat_model()).extract(CPU)
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    coupler.prepare(tiny.collator()(tiny.rows(coupler.config).train["harmful"][:2]))
    assert coupler.base is not None
    assert torch.allclose(coupler.base, expected, atol=1e-5)
    coupler.optimizer_step()
    coupler.prepare(tiny.collator()(tiny.rows(coupler.config).train["harmful"][:2]))
    coupler.after_backward()
    mixed = 0.7 * coupler.base + 0.3 * coupler.extract(CPU)
    assert coupler.directions is not None
    assert torch.allclose(coupler.directions, mixed / mixed.norm(dim=-1, keepdim=True), atol=1e-6)
    assert not torch.allclose(coupler.directions, coupler.base, atol=1e-3)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_the_directions_are_written_with_their_scores_and_are_read_again(tmp_path: Path) -> None:
    coupler = coupler_of(tmp_path, tiny.with_lora(tiny.chat_model()), n_layers=1, refresh=0)
    coupler.prepare(tiny.collator()(tiny.rows(coupler.config).train["harmless"][:1]))
    folder = tmp_path / "harc"
    content = json.loads((folder / "harc.json").read_text())
    assert content["layers"] == list(coupler.layers)
    assert [row["layer"] for row in content["by_layer"] if row["score"] is not None] == [4, 5]
    assert content["provenance"]["rows"] == {"harmful": 5, "harmless": 5, "compliant": 10}
    assert (folder / "directions.png").stat().st_size > 1000
    again = coupler_of(tmp_path, tiny.with_lora(tiny.chat_model()), directions=str(folder / "directions.safetensors"))
    assert torch.equal(again.base, coupler.base)  # type: ignore[arg-type]


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_has_the_four_losses_of_a_naive_computation(tmp_path: Path, side: str) -> None:
    model = tiny.with_lora(tiny.chat_model(), random=True)
    coupler = coupler_of(tmp_path, model, layers="4,5", margin=0.4, kl_weight=2.0, window=4)
    train = tiny.rows(coupler.config).train
    rows = [*train["harmless"][:2], *train["harmful"][:3], *train["pseudo"][3:4]]
    batch = tiny.collator(side)(rows)
    prepared = coupler.prepare(batch)
    assert prepared is not None
    lm_loss = model(**batch).loss
    term = coupler.loss(prepared)
    coupler.release()

    base, harm, refusal, kl, answers = tiny.chat_model(), [], [], [], []
    for row in rows:
        ids = torch.tensor([row.ids])
        read = naive_read(model, row.ids, row.n_prompt, 4)
        for number, layer in enumerate((4, 5)):
            vectors = coupler.directions[:, layer - 1]  # type: ignore[index]
            pairs = [(read[0], vectors[0]), (read[1], vectors[1]), (read[2], vectors[2]), (read[2], vectors[3])]
            cosines = [naive_cosine(position[layer - 1], vector) for position, vector in pairs]
            hinges = [max(0.4 - c, 0) if row.kind == "harmful" else max(c, 0) for c in cosines]
            harm.append(hinges[0] + hinges[1])
            refusal.append(hinges[2] + hinges[3])
            assert number < 2
        with torch.no_grad():
            new, old = (each(ids).logits[0].double().softmax(-1) for each in (model, base))
        if row.kind == "harmful":
            answers += [-new[i - 1, row.ids[i]].log() for i in range(row.n_prompt, len(row.ids))]
        else:
            kl += [(old[i] * (old[i] / new[i]).log()).sum() for i in range(row.n_prompt, len(row.ids))]
    mean = lambda values: float(sum(values)) / len(values)  # noqa: E731
    logs = coupler.logs()
    assert logs["harc_coupling"] == pytest.approx(mean(harm), rel=1e-4)
    assert logs["harc_response"] == pytest.approx(mean(refusal), rel=1e-4)
    assert logs["harc_kl"] == pytest.approx(mean(kl), rel=1e-4)
    assert float(lm_loss) == pytest.approx(mean(answers), rel=1e-4)
    assert float(term) == pytest.approx(mean(harm) + mean(refusal) + 2 * mean(kl), rel=1e-4)


def test_a_row_beyond_the_margin_has_no_loss_and_no_gradient() -> None:
    harm, refusal = torch.tensor([[0.6, -0.1]]), torch.tensor([[0.9, -0.2]], requires_grad=True)
    loss = coupling(refusal, harm, torch.tensor([True, False]), margin=0.5)
    loss.backward()
    assert (float(loss), refusal.grad.tolist()) == (0, [[0, 0]])  # type: ignore[union-attr]


def test_the_kl_term_without_benign_tokens_is_zero_and_finite_in_its_gradient() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = kl_to_base(logits, torch.zeros(0, 5))
    loss.backward()
    assert float(loss) == 0


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_found_with_padding_on_either_side(side: str) -> None:
    rows = [row for each in tiny.rows(HarcConfig()).train.values() for row in each[:2]]
    batch = tiny.collator(side)(rows)
    mask = reading_mask(batch["harc_positions"], batch["harc_response"], window=3).view(len(rows), 3, len(rows), -1)
    for number, row in enumerate(rows):
        ids, read = batch["input_ids"][number], mask[number, :, number]
        tail = len(chat_tail(tiny.tokenizer()))
        assert ids[read[0]].tolist() == [row.ids[row.n_prompt - 1 - tail]]
        assert ids[read[1]].tolist() == [row.ids[row.n_prompt - 1]]
        assert ids[read[2]].tolist() == row.ids[row.n_prompt : row.n_prompt + 3]
        others = [other for other in range(len(rows)) if other != number]
        assert not mask[number, :, others].any()
        labeled = batch["labels"][number] != -100
        assert ids[labeled].tolist() == (row.ids[row.n_prompt :] if row.kind == "harmful" else [])


def test_the_tail_of_a_template_follows_the_text_of_the_user() -> None:
    assert tiny.tokenizer().decode(chat_tail(tiny.tokenizer())) == "<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="template: no token follows"):
        template_tail(lambda text: tiny.tokenizer()(text)["input_ids"])


def test_long_rows_lose_the_beginning_of_the_prompt_and_the_end_of_the_response() -> None:
    config = HarcConfig(length=8)
    whole, cut = tiny.rows(HarcConfig()).train["harmful"][0], tiny.rows(config).train["harmful"][0]
    assert cut.ids[: cut.n_prompt] == whole.ids[: whole.n_prompt][-8:]
    assert cut.ids[cut.n_prompt :] == [*whole.ids[whole.n_prompt :][:8], tiny.tokenizer().eos_token_id]


def _without(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] != kind]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda rows: _without(rows, "harmful"), "0 harmful, 10 harmless, 10 pseudo, 10 compliant rows"),
        (lambda rows: _without(rows, "harmless"), "10 harmful, 0 harmless"),
        (lambda rows: _without(rows, "compliant"), "1 compliant row"),
        (lambda rows: [rows[0] | {"kind": "bad"}], "harc_column: row 0 of the data has kind: 'bad'"),
        (lambda rows: [rows[0] | {"labels": [-100] * len(rows[0]["input_ids"])}], "row 0 .harmful. has no response"),
        (lambda rows: [rows[0] | {"labels": [*rows[0]["labels"][:-3], -100, 1, 1]}], "has several turns"),
        (lambda rows: [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "kind": "harmful"}], "template's tail"),
        (lambda rows: [{"input_ids": chat_tail(tiny.tokenizer()) + [5], "kind": "harmful"}], "says nowhere where"),
        (
            lambda rows: [{"input_ids": [*(t := chat_tail(tiny.tokenizer())), 5], "kind": "harmful"}
            | {"completion_mask": [0] * len(t) + [1]}],
            "no token before the template's tail",
        ),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused(spoil: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(spoil(tiny.encoded()), chat_tail(tiny.tokenizer()), HarcConfig())


def test_the_name_of_a_dataset_tells_its_class() -> None:
    assert [named_kind(name) for name in ("my_Harmful_train", "xstest_pseudo", "alpaca")] == [
        "harmful",
        "pseudo",
        None,
    ]


def test_batches_are_fixed_mixtures_of_endless_streams_that_continue_over_epochs() -> None:
    sizes = {"harmful": 7, "harmless": 3, "pseudo": 2}
    train = {kind: [Row([], 0, kind)] * count for kind, count in sizes.items()}
    sampler = MixtureSampler(train, 6, n_processes=2, seed=1)
    indices: list[int] = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices += sampler
    assert len(indices) == 3 * len(sampler) == 3 * 4 * 6
    batches = [Counter("harmful" if i < 7 else "harmless" if i < 10 else "pseudo" for i in indices[s : s + 6])
               for s in range(0, len(indices), 6)]  # fmt: skip
    assert all(batch == {"harmful": 3, "harmless": 2, "pseudo": 1} for batch in batches)
    harmful = [i for i in indices if i < 7]
    for start in range(0, 35, 7):
        assert sorted(harmful[start : start + 7]) == [*range(7)]
    assert harmful[:7] != harmful[7:14]
    one = MixtureSampler(train, 12, n_processes=1, seed=1)
    assert sorted(islice(one, 12)) == sorted(indices[:12])
    with pytest.raises(ValueError, match="per_device_train_batch_size: 8 cannot hold"):
        MixtureSampler(train, 8, 1, 0)
