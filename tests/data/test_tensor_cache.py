"""Cached tensors: read back, computed again when damaged, returned when they cannot be stored."""

import torch

from src.data.tensor_cache import cached


def counted():
    calls = []

    def make():
        calls.append(1)
        return {"a": torch.arange(12).reshape(3, 4).half(), "b": torch.tensor([], dtype=torch.int64)}

    return make, calls


def same(found, made):
    return all(
        torch.equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made
    )


def test_computed_once(tmp_path):
    make, calls = counted()
    path = tmp_path / "new" / "x.safetensors"
    for _ in range(3):
        assert same(cached(path, make), make())
    assert len(calls) == 1 + 3  # once by `cached`, three times by the comparison
    assert [each.name for each in path.parent.iterdir()] == ["x.safetensors"]


def test_a_damaged_file_is_computed_again(tmp_path, caplog):
    make, calls = counted()
    path = tmp_path / "x.safetensors"
    cached(path, make)
    content = bytearray(path.read_bytes())
    for damaged in (bytes(content[:-1]), content[:-20] + bytes([content[-20] ^ 1]) + content[-19:], b""):
        path.write_bytes(damaged)
        before = len(calls)
        assert same(cached(path, make), counted()[0]())
        assert len(calls) == before + 1
        assert path.read_bytes() == content
    assert caplog.text.count("is damaged") == 3


def test_without_a_place_to_write(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    make, _ = counted()
    assert same(cached(tmp_path / "file" / "x.safetensors", make), make())
    assert "cannot be written" in caplog.text
