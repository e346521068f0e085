"""The formulas, positions and choices of HARC compared with naive references."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamafactory_harc import directions as geometry
from llamafactory_harc.config import HarcConfig
from llamafactory_harc.coupler import Coupler
from llamafactory_harc.data import MixtureSampler, Row, chat_tail, read_rows, template_tail
from llamafactory_harc.losses import coupling

from . import tiny

CPU, TAIL = torch.device("cpu"), chat_tail(tiny.tokenizer())


def naive_cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / float(a @ a) ** 0.5 / float(b @ b) ** 0.5


def naive_read(model: Any, row: Row, window: int) -> list[Tensor]:
    """Returns the inputs of blocks 1 to n - 1 at the instruction, prompt and response of an unpadded row."""
    with torch.no_grad():
        states = torch.cat(model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1:-1])
    places = (row.n_prompt - 1 - len(TAIL), row.n_prompt - 1)
    return [*(states[:, place] for place in places), states[:, row.n_prompt : row.n_prompt + window].mean(1)]


def coupler_of(folder: Path, model: Any, **keys: Any) -> Coupler:
    config = HarcConfig(**keys)
    return Coupler(model, config, tiny.rows(config)[0], tiny.collator(), folder)


def test_directions_are_unit_differences_of_means_at_the_inputs_of_blocks(tmp_path):
    model = tiny.chat_model()
    harmful, harmless, compliant = (
        [torch.stack(each).mean(0) for each in zip(*(naive_read(model, row, 5) for row in rows), strict=True)]
        for rows in tiny.rows(HarcConfig())[0].values()
    )
    pairs = zip((*harmful[:2], compliant[2], harmful[2]), (*harmless, harmless[2]), strict=True)
    raw = torch.stack([a - b for a, b in pairs])
    found = coupler_of(tmp_path, model, window=5).extract(CPU)
    assert found.shape == (4, tiny.BLOCKS, 32)
    # the last layer is read before the final norm
    assert torch.allclose(found[:, :-1], raw / raw.norm(dim=-1, keepdim=True), atol=1e-5)


def test_layers_are_chosen_by_the_product_of_the_four_cosines():
    directions = torch.nn.functional.normalize(torch.randn(4, 12, 16), dim=-1)
    naive = {}
    for layer in range(4, 12 - 4 + 1):  # of layers 0 to 12, the first four and the last four are left out
        harm, refusal, later_harm, later_refusal = directions[:, layer - 1]
        naive[layer] = (1 - abs(naive_cosine(refusal, harm))) * (1 - abs(naive_cosine(later_refusal, later_harm)))
        naive[layer] *= abs(naive_cosine(harm, later_harm)) * abs(naive_cosine(refusal, later_refusal))
    found = {number: float(score) for number, score in enumerate(geometry.scores(directions), 1) if score.isfinite()}
    assert found == pytest.approx(naive, rel=1e-4)
    assert geometry.best_layers(directions, 3) == tuple(sorted(sorted(naive, key=naive.__getitem__)[-3:]))
    with pytest.raises(ValueError, match="harc_layers: auto needs 8 blocks, but the model has 7"):
        geometry.best_layers(directions[:, :7], 1)


def test_a_refresh_mixes_base_and_adapted_model_touches_no_other_state_and_is_written(tmp_path):
    expected = coupler_of(tmp_path, tiny.chat_model()).extract(CPU)
    model = tiny.with_lora(tiny.chat_model(), random=True).train()
    model.base_model.model.model.layers[2].eval()
    coupler = coupler_of(tmp_path, model, refresh=1, n_layers=1)
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    for _ in range(2):
        coupler.prepare(tiny.collator()(tiny.rows(coupler.config)[1]["harmful"][:2]))  # type: ignore[arg-type]
        coupler.optimizer_step()
    coupler.after_backward()
    assert coupler.base is not None
    assert torch.allclose(coupler.base, expected, atol=1e-5)
    mixed = 0.7 * coupler.base + 0.3 * coupler.extract(CPU)
    assert torch.allclose(coupler.directions, mixed / mixed.norm(dim=-1, keepdim=True), atol=1e-6)
    assert not torch.allclose(coupler.directions, coupler.base, atol=1e-3)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())

    content = json.loads((tmp_path / "harc/harc.json").read_text())
    assert [number for number, score in enumerate(content["by_layer_from_1"]["score"], 1) if score] == [4, 5]
    assert content["layers"] == [*geometry.best_layers(coupler.base, 1)]
    assert content["provenance"]["rows"] == {"harmful": 5, "harmless": 5, "compliant": 10}
    path = str(tmp_path / "harc/directions.safetensors")
    assert torch.equal(coupler_of(tmp_path, model, directions=path).base, coupler.base)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_has_the_four_losses_of_a_naive_computation(tmp_path, side):
    model, base = tiny.with_lora(tiny.chat_model(), random=True), tiny.chat_model()
    coupler = coupler_of(tmp_path, model, layers="L4,L5", margin=0.4, kl_weight=2.0, window=4)
    train = tiny.rows(coupler.config)[1]
    rows = [*train["harmless"][:2], *train["harmful"][:3], *train["pseudo"][3:4]]
    batch = tiny.collator(side)(rows)
    prepared = coupler.prepare(batch)
    assert prepared is not None
    lm_loss = model(**batch).loss.item()
    term = coupler.loss(prepared).item()
    coupler.release()

    values: dict[str, list[float]] = {"coupling": [], "response": [], "kl": [], "lm": []}
    for row in rows:
        read = naive_read(model, row, 4)
        for layer in (4, 5):
            places = zip((*read, read[2]), coupler.directions[:, layer - 1], strict=True)
            cosines = [naive_cosine(states[layer - 1], vector) for states, vector in places]
            hinges = [max(0.4 - c, 0) if row.kind == "harmful" else max(c, 0) for c in cosines]
            values["coupling"].append(hinges[0] + hinges[1])
            values["response"].append(hinges[2] + hinges[3])
        with torch.no_grad():
            new, old = (each(torch.tensor([row.ids])).logits[0].double().softmax(-1) for each in (model, base))
        for i in range(row.n_prompt, len(row.ids)):
            if row.kind == "harmful":
                values["lm"].append(-new[i - 1, row.ids[i]].log().item())
            else:
                values["kl"].append((old[i] * (old[i] / new[i]).log()).sum().item())
    means = {name: sum(each) / len(each) for name, each in values.items()}
    logs = coupler.logs() | {"harc_lm": lm_loss}
    assert {name: logs[f"harc_{name}"] for name in means} == pytest.approx(means, rel=1e-4)
    assert term == pytest.approx(means["coupling"] + means["response"] + 2 * means["kl"], rel=1e-4)


def test_a_row_beyond_the_margin_has_no_loss_and_no_gradient():
    harm, refusal = torch.tensor([[0.6, -0.1]]), torch.tensor([[0.9, -0.2]], requires_grad=True)
    loss = coupling(refusal, harm, torch.tensor([True, False]), margin=0.5)
    loss.backward()
    assert (loss.item(), refusal.grad.tolist()) == (0, [[0, 0]])  # type: ignore[union-attr]


def test_long_rows_lose_the_beginning_of_the_prompt_and_the_end_of_the_response():
    whole, cut = (tiny.rows(HarcConfig(length=length))[1]["harmful"][0] for length in (256, 8))
    assert cut.ids[: cut.n_prompt] == whole.ids[: whole.n_prompt][-8:]
    assert cut.ids[cut.n_prompt :] == [*whole.ids[whole.n_prompt :][:8], tiny.tokenizer().eos_token_id]


def test_a_template_without_a_tail_is_refused():
    assert tiny.tokenizer().decode(TAIL) == "<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="template: no token after"):
        template_tail(lambda text: tiny.tokenizer()(text)["input_ids"])


def _spoiled(**changes: Any) -> list[dict[str, Any]]:
    return [tiny.encoded()[0] | changes]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row for row in tiny.encoded() if row["kind"] != "harmful"],
            "0 harmful, 10 harmless, 10 pseudo, 10 compliant",
        ),
        ([row for row in tiny.encoded() if row["kind"] != "harmless"], "10 harmful, 0 harmless"),
        ([row for row in tiny.encoded() if row["kind"] != "compliant"], "1 compliant; add rows"),
        (_spoiled(kind="bad"), "harc_column: row 0 has kind: 'bad'"),
        (_spoiled(labels=None), r"row 0 \(harmful\) has neither labels nor TRL's completion_mask"),
        (_spoiled(labels=[-100] * 4), r"row 0 \(harmful\) has no response"),
        (_spoiled(labels=[-100, 1, -100, 1]), "has several turns"),
        (_spoiled(input_ids=[1, 2, 3, 4], labels=[-100, -100, 3, 4]), "not end with the template's tail"),
        (
            _spoiled(input_ids=[*TAIL, 5], labels=[-100] * len(TAIL) + [5]),
            "without a token before the template's tail",
        ),
    ],
)
def test_unsuitable_data_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        read_rows(rows, TAIL, HarcConfig())


def test_batches_are_fixed_mixtures_of_endless_streams_that_continue_over_epochs():
    train = {kind: [Row([], 0, kind)] * count for kind, count in (("harmful", 7), ("harmless", 3), ("pseudo", 2))}
    sampler = MixtureSampler(train, 6, n_processes=2, seed=1)
    indices: list[int] = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        indices += sampler
    assert len(indices) == 3 * len(sampler) == 3 * 4 * 6
    kinds = ["harmful" if i < 7 else "harmless" if i < 10 else "pseudo" for i in indices]
    for start in range(0, len(kinds), 6):
        assert Counter(kinds[start : start + 6]) == {"harmful": 3, "harmless": 2, "pseudo": 1}
    harmful = [i for i in indices if i < 7]
    assert all(sorted(harmful[start : start + 7]) == [*range(7)] for start in range(0, 35, 7))
    assert harmful[:7] != harmful[7:14]
    one = MixtureSampler(train, 12, n_processes=1, seed=1)
    assert sorted([*one][:12]) == sorted(indices[:12])
    with pytest.raises(ValueError, match="per_device_train_batch_size: 8 is not a multiple of 6"):
        MixtureSampler(train, 8, 1, 0)
