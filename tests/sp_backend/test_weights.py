"""Loading weights: each rank its slices, from one file or several; what is wrong with a folder is said plainly."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from sp_backend.models import checkpoint
from sp_backend.models.checkpoint import SINGLE, Checkpoint
from sp_backend.models.config import ModelConfig
from sp_backend.models.decoder import Decoder
from sp_backend.models.linear import can_pack
from sp_backend.models.weights import fill_dummy, load_weights, tensor_specs
from sp_backend.parallel import NoCollectives, Shard
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.sp_backend.collectives_ranks import NUM_RANKS, OwnValues, compare_split_with_whole

torch.set_num_threads(1)

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SPLITS = [(1, 1, "tokens"), (2, 1, "tokens"), (4, 2, "tokens"), (2, 2, "heads"), (1, 3, "heads")]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def folder(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(originals["llama3"], tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "sharded", "llama3", max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def read(
    folder: Path, shard: Shard | None = None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's tensors by name, and the bytes read."""
    specs = list(tensor_specs(ModelConfig.load(folder), shard or Shard()))
    tensors = {spec.name: torch.empty(spec.local_shape, dtype=dtype) for spec in specs}
    return tensors, load_weights(tensors, specs, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_reads_every_tensor_of_the_file(family, originals):
    stored = load_file(originals[family] / "model.safetensors")
    tensors, num_bytes = read(originals[family])
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert num_bytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp_size", "sp_size", "layout"), SPLITS)
def test_parts_of_a_group_make_up_the_whole(family, tp_size, sp_size, layout, originals):
    folder = originals[family]
    whole, _ = read(folder)
    unread = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in whole.items()}
    for rank in Shard.of_rank(0, tp_size, sp_size, layout).group_ranks():
        shard = Shard.of_rank(rank, tp_size, sp_size, layout)
        tensors, num_bytes = read(folder, shard)
        assert num_bytes == sum(tensor.nbytes for tensor in tensors.values())
        for spec in tensor_specs(ModelConfig.load(folder), shard):
            assert torch.equal(tensors[spec.name], whole[spec.name][spec.slices])
            unread[spec.name][spec.slices] = False
    assert not any(rows.any() for rows in unread.values())


def test_a_rank_reads_only_its_part(originals):
    whole, part = read(originals["llama2"])[1], read(originals["llama2"], Shard(1, 4))[1]
    assert whole / 4 < part < whole / 3.9


def test_several_files_hold_the_same_model(originals, sharded):
    one, several = read(originals["llama3"]), read(sharded)
    assert one[1] == several[1]
    assert all(torch.equal(several[0][name], tensor) for name, tensor in one[0].items())


def test_a_file_that_was_read_does_not_stay_mapped(tmp_path, monkeypatch):
    """The resident memory of a rank that loads is its weights, not twice that."""

    def mapped_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssFile")))

    names = [f"{i}" for i in range(16)]
    size = 4 << 20
    save_file({name: torch.zeros(size, dtype=torch.uint8).view(torch.bfloat16) for name in names}, tmp_path / SINGLE)
    monkeypatch.setattr(checkpoint, "MOST_MAPPED", 2 * size)
    file, most, before = Checkpoint(tmp_path), 0, mapped_bytes()
    for name in names:
        file.read(name, (size // 2,), (slice(None),)).sum()
        most = max(most, mapped_bytes() - before)
    assert size <= most < 6 * size


def test_weights_are_cast_to_the_asked_dtype(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    assert ModelConfig.load(folder).dtype == "bfloat16"
    stored = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors, num_bytes = read(folder, dtype=dtype)
        assert all(torch.equal(tensors[name], stored[name].to(dtype)) for name in stored)
        assert num_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_a_decoder_reports_what_it_holds_and_read(originals):
    config = ModelConfig.load(originals["qwen3"])
    decoder = Decoder(config, Shard(), torch.bfloat16, "cpu", NoCollectives())
    assert decoder.load(originals["qwen3"]) == 2 * decoder.weight_bytes  # fp32 on disk


def test_progress_is_told_tensor_by_tensor(originals):
    decoder = Decoder(ModelConfig.load(originals["llama2"]), Shard(), torch.float32, "cpu", NoCollectives())
    told = []
    decoder.load(originals["llama2"], progress=lambda *counts: told.append(counts))
    assert told == [(i, len(told)) for i in range(1, len(told) + 1)] and len(told) > 10


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model: no weights: neither model.safetensors nor model.safetensors.index"):
        read(folder)


def test_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[Q_PROJ]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf'model.safetensors: tensor "{Q_PROJ}" is missing'):
        read(folder)


def test_wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[Q_PROJ] = tensors[Q_PROJ][:-16].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf'"{Q_PROJ}" has shape \[176, 192\], but .* implies \[192, 192\]'):
        read(folder)


def test_wrong_dtype(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf'"{Q_PROJ}" has dtype I8; supported: F64, F32, F16, BF16'):
        read(folder)


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_truncated_file(folder, size):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated or not a safetensors file"):
        read(folder)


def test_missing_shard_file(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    (sharded / index[Q_PROJ]).unlink()
    with pytest.raises(ValueError, match=rf"{index[Q_PROJ]}: weight file is missing"):
        read(sharded)


def test_tensor_missing_from_the_index(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][Q_PROJ]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf'model.safetensors.index.json: tensor "{Q_PROJ}" is missing'):
        read(sharded)


def test_tensor_missing_from_the_file_that_the_index_names(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q_PROJ] = next(file for file in index["weight_map"].values() if "00001" in file)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf'model-00001-of-.*: tensor "{Q_PROJ}" is missing'):
        read(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_unreadable_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: unreadable: expected a JSON object with"):
        read(sharded)


def dummy(folder: Path, shard: Shard, seed: int = 0) -> dict[str, torch.Tensor]:
    specs = list(tensor_specs(ModelConfig.load(folder), shard))
    tensors = {spec.name: torch.empty(spec.local_shape) for spec in specs}
    fill_dummy(tensors, specs, seed)
    return tensors


@pytest.mark.parametrize(("tp_size", "sp_size", "layout"), SPLITS)
def test_dummy_weights_are_one_model_however_split(tp_size, sp_size, layout, originals):
    folder = originals["qwen2"]
    whole = dummy(folder, Shard())
    for rank in range(tp_size * sp_size):
        shard = Shard.of_rank(rank, tp_size, sp_size, layout)
        parts = dummy(folder, shard)
        for spec in tensor_specs(ModelConfig.load(folder), shard):
            assert torch.equal(parts[spec.name], whole[spec.name][spec.slices])


def test_dummy_weights_follow_the_seed(originals):
    first, again, other = (dummy(originals["llama2"], Shard(), seed) for seed in (1, 1, 2))
    assert torch.equal(first[Q_PROJ], again[Q_PROJ])
    assert not torch.equal(first[Q_PROJ], other[Q_PROJ])
    assert not torch.equal(first[Q_PROJ], first[Q_PROJ.replace("q_proj", "o_proj")])


def test_dummy_weights_need_only_a_config_and_give_usable_logits(originals, tmp_path):
    shutil.copy(originals["qwen3"] / "config.json", tmp_path)
    decoder = Decoder(ModelConfig.load(tmp_path), Shard(), torch.bfloat16, "cpu", NoCollectives())
    decoder.fill_dummy(3)
    logits = decoder.logits(decoder.forward(torch.arange(64), torch.arange(64), OwnValues()))
    assert 0.5 < float(logits.std()) < 20


def test_group_collectives_join_uneven_parts_over_gloo(originals, tmp_path):
    mp.spawn(compare_split_with_whole, (str(tmp_path / "store"), originals["qwen2"]), nprocs=NUM_RANKS)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_held_once_but_for_a_tied_output_matrix(tied, tmp_path):
    """Lookups need its plain rows, products its packed ones; what is reported counts both."""
    folder = make_checkpoint(tmp_path, "llama2", tie_word_embeddings=tied)
    config = ModelConfig.load(folder)
    decoder = Decoder(config, Shard(), torch.float32, "cpu", NoCollectives())
    copies = config.vocab_size * config.hidden_size * 4 if tied and can_pack(torch.empty(1)) else 0
    assert decoder.weight_bytes == decoder.load(folder) + copies


@pytest.mark.skipif(not can_pack(torch.empty(1)), reason="this torch has no oneDNN")
def test_loading_lets_the_plain_matrices_go(originals):
    decoder = Decoder(ModelConfig.load(originals["llama2"]), Shard(), torch.float32, "cpu", NoCollectives())
    matrices = [weakref.ref(view._base) for name, view in decoder._parameters.by_name.items() if "proj" in name]
    assert matrices and all(matrix() is not None for matrix in matrices)
    decoder.load(originals["llama2"])
    assert all(matrix() is None for matrix in matrices)
