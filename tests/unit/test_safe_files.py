"""Damaged, lying and hostile files: refused by their headers and keys, before a tensor is read or code is run."""

import json
import os
import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_files import TensorFacts, check_safetensors, read_json_object

DATA = bytes(range(48))


def entry(begin: int, end: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write(path: pathlib.Path, header: Any, *, data: bytes = DATA, length: int | None = None) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.close, (os.open(self.path, os.O_CREAT | os.O_WRONLY),)


GOOD = {"a": entry(0, 16, shape=[2, 2]), "b": entry(16, 40), "c": entry(40, 48, dtype="BF16", shape=[4])}
BAD_HEADERS: dict[str, Any] = {
    "overlap": {"a": entry(0, 32), "b": entry(16, 48)},
    "same place twice": {"a": entry(0, 48), "b": entry(0, 48)},
    "gap": {"a": entry(0, 16), "b": entry(32, 48)},
    "does not start at 0": {"a": entry(4, 48)},
    "beyond the end": {"a": entry(0, 64)},
    "ends before the end": {"a": entry(0, 44)},
    "begin after end": {"a": entry(48, 0, shape=[0])},
    "negative": {"a": entry(-4, 44)},
    "2^63": {"a": entry(0, 2**63, shape=[2**61])},
    "product of sizes wraps around 2^64": {"a": entry(0, 48, shape=[2**32, 2**32, 12])},
    "shape larger than its place": {"a": entry(0, 48, shape=[13])},
    "negative sizes that multiply": {"a": entry(0, 48, shape=[-3, -4])},
    "fraction": {"a": entry(0, 48, shape=[12.0])},
    "bool": {"a": entry(0, 48, shape=[True, 12])},
    "too many dimensions": {"a": entry(0, 48, shape=[1] * 8 + [12])},
    "shape is text": {"a": entry(0, 48, shape="12")},
    "unknown type": {"a": entry(0, 48, dtype="F8")},
    "integers": {"a": entry(0, 48, dtype="I32")},
    "type is a list": {"a": entry(0, 48, dtype=["F32"])},
    "three offsets": {"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 24, 48]}},
    "further key": {"a": entry(0, 48) | {"loader": "os.system"}},
    "missing key": {"a": {"dtype": "F32", "shape": [12]}},
    "tensor is no object": {"a": 3},
    "metadata is no map of strings": {"a": entry(0, 48), "__metadata__": {"format": 1}},
    "list": [entry(0, 48)],
    "key twice": b'{"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48], "dtype": "F16"}}',
    "name twice": b'{"a": {"dtype": "F32", "shape": [12], "data_offsets": [0, 48]}, '
    b'"a": {"dtype": "F32", "shape": [0], "data_offsets": [48, 48]}}',
    "NaN": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 48]}}',
    "no JSON": b"{" * 40,
    "deep": b"[" * 100_000,
    "huge number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 48]}}',
    "not UTF-8": b'{"\xff": 1}',
}


def test_safetensors_in_order_gives_its_table(tmp_path: pathlib.Path) -> None:
    found = check_safetensors(write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}, **GOOD}))
    assert found == {"a": TensorFacts("F32", (2, 2)), "b": TensorFacts("F32", (6,)), "c": TensorFacts("BF16", (4,))}


def test_safetensors_of_the_library_itself_is_taken(tmp_path: pathlib.Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"x": torch.zeros(3, 5), "empty": torch.zeros(0, 4, dtype=torch.float16), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = check_safetensors(tmp_path / "m.safetensors")
    assert {name: facts.shape for name, facts in found.items()} == {"x": (3, 5), "empty": (0, 4), "scalar": ()}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_safetensors_that_lie_are_refused_without_repeating_them(tmp_path: pathlib.Path, header: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^m\.safetensors is refused") as caught:
        check_safetensors(write(tmp_path / "m.safetensors", header))
    assert "os.system" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63, 2**64 - 1])
def test_safetensors_with_a_header_length_that_cannot_be_are_refused(tmp_path: pathlib.Path, length: int) -> None:
    with pytest.raises(InvalidInput, match="header"):
        check_safetensors(write(tmp_path / "m.safetensors", GOOD, length=length))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_safetensors_cut_in_the_header_are_refused(tmp_path: pathlib.Path, size: int) -> None:
    path = write(tmp_path / "m.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InvalidInput):
        check_safetensors(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_safetensors_with_a_byte_too_few_or_too_many_are_refused(tmp_path: pathlib.Path, change: int) -> None:
    data = DATA[:change] if change < 0 else DATA + b"\0"
    with pytest.raises(InvalidInput, match="tensors end"):
        check_safetensors(write(tmp_path / "m.safetensors", GOOD, data=data))


def test_safetensors_header_with_any_byte_changed_never_gives_a_tensor_outside_the_file(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.safetensors", GOOD)
    whole = path.read_bytes()
    for place in range(len(whole) - len(DATA)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = check_safetensors(path)
        except InvalidInput:
            continue
        # A changed name or a swapped type of the same size may pass; what it describes is still the file's 48 bytes.
        sizes = {"F32": 4, "F16": 2, "BF16": 2}
        total = 0
        for facts in found.values():
            count = 1
            for length in facts.shape:
                count *= length
            total += count * sizes[facts.dtype]
        assert total == len(DATA)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_named_safetensors_is_refused_and_not_opened(tmp_path: pathlib.Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary), protocol=protocol)
    canary.unlink()
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InvalidInput):
        check_safetensors(tmp_path / "m.safetensors")
    assert not canary.exists()


def test_archive_of_torch_save_named_safetensors_is_refused(tmp_path: pathlib.Path) -> None:
    import torch

    torch.save({"a": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(InvalidInput, match="pickle or a zip"):
        check_safetensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 2}}', '{"a": Infinity}', "[]", "3", "", "{" * 10_000, "\udcff"]
)
def test_json_that_is_ambiguous_or_no_object_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInput, match=r"config\.json is refused"):
        read_json_object(tmp_path / "config.json")


def test_json_that_is_missing_or_too_large_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="missing"):
        read_json_object(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(InvalidInput, match="more than"):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize(("shape", "is_taken"), [([], True), ([1], False), ([2, 2], False)])
def test_safetensors_holds_integers_as_single_counters_only(
    tmp_path: pathlib.Path, shape: list[int], is_taken: bool
) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "counter.safetensors"
    save_file({"num_batches_tracked": torch.zeros(shape, dtype=torch.int64)}, path)
    if is_taken:
        assert check_safetensors(path)["num_batches_tracked"].shape == ()
    else:
        with pytest.raises(InvalidInput, match="element type"):
            check_safetensors(path)
