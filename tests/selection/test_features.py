"""Pooled outputs on disk: in the order of the samples, whole or not there."""

import pytest
import torch

from llamafactory_hera.selection.features import FeatureBlocks

LAYERS = 3
ROWS = [[4, 1], [0, 3], [2]]


def written(folder, dtype="fp32"):
    heads, layers = torch.randn(5, 3, 2, 4), torch.randn(5, 3, 5)
    blocks = FeatureBlocks(folder, "a" * 64, ROWS, LAYERS, dtype)
    for block, rows in enumerate(ROWS):
        blocks.write(block, heads[rows], layers[rows])
    return blocks, heads, layers


def read(blocks, kind="heads"):
    return torch.stack(list(blocks.read(kind, torch.device("cpu"))), 1)


def test_what_is_read_is_in_the_order_of_the_samples(tmp_path):
    blocks, heads, layers = written(tmp_path)
    assert torch.equal(read(blocks), heads)
    assert torch.equal(read(blocks, "layer"), layers)


def test_fp16_is_stored_rounded_and_refused_by_key_where_it_cannot_hold_a_value(tmp_path):
    blocks, heads, layers = written(tmp_path, "fp16")
    assert torch.equal(read(blocks), heads.half())
    blocks._path(0).unlink()
    with pytest.raises(ValueError, match=r"hera_select_dtype: fp16 .* 7e\+04"):
        blocks.write(0, heads[:2] * 0 + 7e4, layers[:2])
    assert blocks.missing() == [0]
    heads[0, 0, 0, 0] = torch.inf  # of the model itself
    blocks.write(0, heads[:2], layers[:2])
    assert blocks.missing() == []


def test_another_run_goes_on_with_the_blocks_that_are_there_and_whole(tmp_path, caplog):
    blocks, heads, layers = written(tmp_path)
    blocks._path(1).unlink()
    damaged = blocks._path(2)
    damaged.write_bytes(damaged.read_bytes()[:-7])
    again = FeatureBlocks(tmp_path, "a" * 64, ROWS, LAYERS, "fp32")
    assert again.missing() == [1, 2]
    assert "block-00002" in caplog.text
    for block in (1, 2):
        again.write(block, heads[ROWS[block]], layers[ROWS[block]])
    assert torch.equal(read(again), heads)


def test_features_of_another_key_are_not_seen_and_not_cleared(tmp_path):
    blocks, *_ = written(tmp_path)
    other = FeatureBlocks(tmp_path, "b" * 64, ROWS, LAYERS, "fp32")
    assert other.missing() == [0, 1, 2]
    (tmp_path / "features-mine").mkdir()
    blocks.clear()
    assert sorted(tmp_path.iterdir()) == [other.folder, tmp_path / "features-mine"]


def test_a_block_that_cannot_be_written_names_the_key(tmp_path):
    blocks, heads, layers = written(tmp_path)
    blocks.clear()
    blocks.folder.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"output_dir: .*block-00000"):
        blocks.write(0, heads[:2], layers[:2])
