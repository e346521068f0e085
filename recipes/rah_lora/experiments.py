"""The experiments of ``python recipes/rah_lora`` (README.md)."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from PIL import Image
from scipy.stats import pearsonr, spearmanr

from llamafactory_hera.calibration.plan import held_out_divergence
from llamafactory_hera.calibration.report import REPORT_FILE, render_summary
from llamafactory_hera.calibration.run import calibrate_heads, draw_samples
from llamafactory_hera.calibration.weights import ADAPTER_FILE, HeadWeights
from llamafactory_hera.files import PICTURE, check_replaceable, read_json, write_json
from llamafactory_hera.heads import Target
from llamafactory_hera.plots import new_figure, save_figure
from llamafactory_hera.selection.passes import Forward
from llamafactory_hera.selection.samples import Sample
from llamafactory_hera.teachers.images import image_key, load_image

logger = logging.getLogger(__name__)

# -- control ---------------------------------------------------------------------------------------------------------


def control(recipe: str, kind: str, overrides: Sequence[str] = ()) -> str:
    """Calibrates on the unchanged data and on corrupted images, and writes and returns a comparison."""
    from llamafactory_hera.integrations.llamafactory.commands import read_calibration  # imports the host

    inputs, config, folder = read_calibration(recipe, overrides)
    samples = draw_samples(inputs.source, config)
    profiled, held_out = (corrupt(part, inputs.source, kind, config.seed) for part in samples)
    model = inputs.load_model()
    inputs = replace(inputs, load_model=lambda: model)
    normal = calibrate_heads(inputs, config, folder, samples)
    folder = folder / f"control_{kind}"
    inputs = replace(inputs, dataset_name=f"{inputs.dataset_name}, {kind} images")
    other = calibrate_heads(inputs, config, folder, (profiled, held_out))
    compared = compare(normal, other)
    if (folder / ADAPTER_FILE).exists():
        features, weights = [sample.features for sample in samples[1]], HeadWeights(model)
        forward = Forward(model, autocast=inputs.autocast)
        uncorrupted = held_out_divergence(forward, weights, features, inputs.collator(model), config)
        PeftModel.from_pretrained(model, folder).merge_and_unload()
        compared["kl_control_on_uncorrupted_samples"] = uncorrupted([])
    write_json(folder / "control.json", compared)
    lines = [f"{key:<34} {value}" for key, value in compared.items()]
    return "\n".join([render_summary(normal), "", f"{kind} images", render_summary(other), "", *lines])


def corrupt(samples: Sequence[Sample], source: Any, kind: str, seed: int) -> list[Sample]:
    """Encodes samples with white images of the same sizes, or (``shuffled``) with the images of other samples."""
    stored = [source.images(sample.row) for sample in samples]
    images = [[Image.new("RGB", load_image(image).size, "white") for image in of_sample] for of_sample in stored]
    if kind == "shuffled":
        images = exchanged(stored, seed)
    return [
        Sample(sample.row, new[0], image_key(new[0]), source.encode(sample.row, new))
        for sample, new in zip(samples, images, strict=True)
    ]


def exchanged(images: Sequence[list[Any]], seed: int) -> list[list[Any]]:
    """Gives each sample the images of the next sample in a random ring of samples with the same number of images."""
    rings: dict[int, list[int]] = {}
    for index, held in enumerate(images):
        rings.setdefault(len(held), []).append(index)
    givers: dict[int, int] = {}
    for count, ring in rings.items():
        if len(ring) == 1:
            logger.warning("--control: the only sample with %d images keeps them.", count)
        random.Random(seed).shuffle(ring)
        givers |= zip(ring, [*ring[1:], ring[0]], strict=True)
    return [list(images[givers[index]]) for index in range(len(images))]


def compare(normal: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Compares the reports of two calibrations: the chosen heads, the order of all heads, and the KL divergence."""
    ours, theirs = ([head["head"] for head in report["heads"]] for report in (normal, other))
    return {
        "heads_normal": ours,
        "heads_in_both": [head for head in ours if head in theirs],
        "isal_rank_correlation": rank_correlation(normal["isal"], other["isal"]),
        "caf_rank_correlation": rank_correlation(normal["caf"], other["caf"]),
        "kl_normal": normal["kl"]["total"],
        "kl_control": other["kl"]["total"],
    }


def rank_correlation(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Averages Spearman's correlation of the heads over layers, except layers whose heads are all equal."""
    ordered = [(a, b) for a, b in zip(ours, theirs, strict=True) if len(set(a)) > 1 and len(set(b)) > 1]
    return round(float(np.mean([spearmanr(a, b).statistic for a, b in ordered])), 6) if ordered else 0.0


# -- gap -------------------------------------------------------------------------------------------------------------


def gap(measured: Sequence[str], output: Path) -> str:
    """Plots gain against gap for calibrations given as ``FOLDER=GAIN``, and returns a table with Pearson's r."""
    check_replaceable({output: PICTURE})
    points = []
    for point in measured:
        folder, _, gain = point.rpartition("=")
        try:
            points.append((folder, influence_saliency_gap(read_json(Path(folder) / REPORT_FILE)), float(gain)))
        except (ValueError, KeyError) as error:
            raise ValueError(f"gap: {point} is not FOLDER=GAIN ({error}); write e.g. saves/calibrate=1.4.") from error
    _, gaps, gains = zip(*points, strict=True)
    if len(set(gaps)) < 3 or len(set(gains)) < 2:
        raise ValueError("gap: give three or more calibrations with different gaps and gains.")
    r, p = pearsonr(gaps, gains)
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    axes.scatter(gaps, gains)
    axes.axline((float(np.mean(gaps)), float(np.mean(gains))), slope=np.polyfit(gaps, gains, 1)[0], color="0.6")
    for name, x, y in points:
        axes.annotate(Path(name).name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="influence-saliency gap", ylabel="gain, points", title=f"r = {r:.2f}")
    save_figure(figure, output)
    rows = [f"{x:8.3f} {y:+8.2f}  {name}" for name, x, y in points]
    return "\n".join([f"{'gap':>8} {'gain':>8}", *rows, f"r = {r:.3f} over {len(points)} calibrations, p = {p:.3g}"])


def influence_saliency_gap(report: dict[str, Any]) -> float:
    """Averages CAF minus I-SAL over the calibrated heads, both standardized within the layer of the head."""
    if not report["calibrated"]:
        raise ValueError("no head was calibrated")
    caf, isal = np.array(report["caf"]), np.array(report["isal"])
    deviation = caf.std(axis=1, keepdims=True)
    gaps = (caf - caf.mean(axis=1, keepdims=True)) / np.where(deviation > 0, deviation, 1) - isal
    return float(np.mean([gaps[Target.parse(head)] for head in report["calibrated"]]))
