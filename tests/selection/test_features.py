"""Pooled outputs on disk: in the order of the samples, whole or not there."""

import pytest
import torch

from llamafactory_hera.selection.features import FeatureBlocks

LAYERS = 3
ROWS = [[4, 1], [0, 3], [2]]
CPU = torch.device("cpu")


def values():
    return torch.randn(5, 3, 2, 4), torch.randn(5, 3, 5)


def written(folder, dtype="fp32", key="a" * 64):
    heads, layers = values()
    blocks = FeatureBlocks(folder, key, ROWS, LAYERS, dtype)
    for block, rows in enumerate(ROWS):
        blocks.write(block, heads[rows], layers[rows])
    return blocks, heads, layers


def test_what_is_read_is_in_the_order_of_the_samples(tmp_path):
    blocks, heads, layers = written(tmp_path)
    assert torch.equal(torch.stack(list(blocks.read("heads", CPU)), 1), heads)
    assert torch.equal(torch.stack(list(blocks.read("layer", CPU)), 1), layers)


def test_fp16_is_stored_rounded(tmp_path):
    blocks, heads, _ = written(tmp_path, "fp16")
    assert torch.equal(torch.stack(list(blocks.read("heads", CPU)), 1), heads.half())


def test_what_fp16_cannot_hold_names_the_key_and_infinity_of_the_model_itself_is_stored(tmp_path):
    blocks = FeatureBlocks(tmp_path, "a" * 64, ROWS, LAYERS, "fp16")
    heads, layers = values()
    with pytest.raises(ValueError, match=r"hera_select_dtype: fp16 .* 7e\+04"):
        blocks.write(0, heads[:2] * 0 + 7e4, layers[:2])
    assert blocks.missing() == [0, 1, 2]
    heads[0, 0, 0, 0] = torch.inf
    blocks.write(0, heads[:2], layers[:2])
    assert blocks.missing() == [1, 2]


def test_another_run_goes_on_with_the_blocks_that_are_there(tmp_path):
    blocks, heads, layers = written(tmp_path)
    blocks._path(1).unlink()
    again = FeatureBlocks(tmp_path, "a" * 64, ROWS, LAYERS, "fp32")
    assert again.missing() == [1]
    again.write(1, heads[ROWS[1]], layers[ROWS[1]])
    assert torch.equal(torch.stack(list(again.read("heads", CPU)), 1), heads)


def test_a_damaged_block_is_missing(tmp_path, caplog):
    blocks, _, _ = written(tmp_path)
    path = blocks._path(2)
    path.write_bytes(path.read_bytes()[:-7])
    assert blocks.missing() == [2]
    assert "block-00002" in caplog.text


def test_features_of_another_key_are_not_seen_and_all_are_cleared_together(tmp_path):
    written(tmp_path)
    assert FeatureBlocks(tmp_path, "b" * 64, ROWS, LAYERS, "fp32").missing() == [0, 1, 2]
    (tmp_path / "heads.json").write_text("{}")
    FeatureBlocks.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.json"]


def test_a_block_that_cannot_be_written_names_the_key(tmp_path):
    blocks = FeatureBlocks(tmp_path, "a" * 64, ROWS, LAYERS, "fp32")
    blocks.folder.rmdir()
    blocks.folder.write_text("a file where the folder should be")
    heads, layers = values()
    with pytest.raises(ValueError, match=r"output_dir: .*block-00000"):
        blocks.write(0, heads[:2], layers[:2])
