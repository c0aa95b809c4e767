"""Ids of model files, against the definition in docs/format.md written out once more."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
from models import random_model, read_model, write_model
from reference import quants
from rwkv_cpp.errors import RWKVFileError
from rwkv_cpp.fingerprint import Fingerprint, exact_id, family_id
from rwkv_cpp.quantize import quantize_file

SIZES = {"n_vocab": 40, "n_embed": 32, "n_layer": 2}


@pytest.fixture
def path(tmp_path):
    write_model(tmp_path / "model.bin", random_model(1, **SIZES))
    return tmp_path / "model.bin"


def defined_ids(path, **sizes) -> tuple[str, str]:
    """What docs/format.md says, from what the tests' own reader finds in a file."""
    sizes = SIZES | sizes
    model = read_model(path)
    family = struct.pack("<3i", sizes["n_vocab"], sizes["n_embed"], sizes["n_layer"])
    for key in sorted(model):
        if len(model[key].shape) == 1:
            data = model[key].data.tobytes()
            family += struct.pack("<I", len(key)) + key.encode()
            family += struct.pack("<I", len(data) // 4) + data
    family = hashlib.blake2b(family, digest_size=16)
    exact = family.digest()
    for key in sorted(model):
        data = model[key].data.tobytes()
        exact += struct.pack("<I", len(key)) + key.encode()
        exact += struct.pack("<iQ", quants.TYPE_IDS[model[key].name], len(data))
        if len(data) <= 262144:
            exact += data
        else:
            starts = [i * (len(data) - 4096) // 63 for i in range(64)]
            exact += b"".join(data[start : start + 4096] for start in starts)
    return family.hexdigest(), hashlib.blake2b(exact, digest_size=16).hexdigest()


def test_the_definition(path, tmp_path):
    assert (family_id(path), exact_id(path)) == defined_ids(path)
    large = tmp_path / "large.bin"  # one matrix is longer than its samples
    write_model(large, random_model(2, n_vocab=2500, n_embed=32, n_layer=2))
    assert (family_id(large), exact_id(large)) == defined_ids(large, n_vocab=2500)


def test_formats_of_one_model_are_a_family(path, tmp_path):
    ids = {exact_id(path)}
    for name in "Q4_0", "Q4_1_O", "Q5_1", "Q8_0":
        quantize_file(path, tmp_path / name, name)
        assert family_id(tmp_path / name) == family_id(path)
        ids.add(exact_id(tmp_path / name))
    assert len(ids) == 5


def test_the_order_of_tensors_does_not_count(path, tmp_path):
    tensors = random_model(1, **SIZES)
    write_model(tmp_path / "other", tensors, order=sorted(tensors, reverse=True))
    assert exact_id(tmp_path / "other") == exact_id(path)


def test_other_models_have_other_ids(path, tmp_path):
    tensors = random_model(1, **SIZES)
    tensors["blocks.1.ln1.bias"][7] = np.nextafter(tensors["blocks.1.ln1.bias"][7], 9)
    write_model(tmp_path / "vector", tensors)
    assert family_id(tmp_path / "vector") != family_id(path)

    tensors = random_model(1, **SIZES)
    tensors["head.weight"][39, 31] += 1
    write_model(tmp_path / "matrix", tensors)
    assert family_id(tmp_path / "matrix") == family_id(path)
    assert exact_id(tmp_path / "matrix") != exact_id(path)


def test_ids_are_computed_once(path, monkeypatch):
    fingerprint = Fingerprint(path)
    ids = fingerprint.family, fingerprint.exact
    assert ids == (family_id(path), exact_id(path))
    monkeypatch.setattr("rwkv_cpp.fingerprint.read_index", None)
    assert (fingerprint.family, fingerprint.exact) == ids
    assert fingerprint == Fingerprint.known(*ids)
    assert pickle.loads(pickle.dumps(fingerprint)) == fingerprint


def test_the_same_file_is_compared_without_reading_it(path, monkeypatch):
    monkeypatch.setattr("rwkv_cpp.fingerprint.read_index", None)
    assert Fingerprint(path) == Fingerprint(path)


def test_a_replaced_file_is_not_taken_for_the_loaded_one(path):
    fingerprint = Fingerprint(path)
    write_model(path, random_model(2, **SIZES), "FP16")
    with pytest.raises(RWKVFileError, match="replaced since the model was loaded"):
        _ = fingerprint.exact


def test_what_is_no_model_file(tmp_path):
    (tmp_path / "text").write_text("no model")
    with pytest.raises(RWKVFileError, match="expected a ggmf model file"):
        family_id(tmp_path / "text")
