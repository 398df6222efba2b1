"""Trees on disk are the trees in memory; damage is refused; over-long prompts are refused or cut, never silently."""

import pathlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from tiny_preferences import TINY, make_pair

from mint_lib.errors import IntegrityError, InvalidInput, PromptTooLong, StoreError
from mint_lib.reading import ReadPrompt, TextReader, encode_answer, encode_prompt, fit_prompt
from mint_lib.records import PreferencePair, Turn
from mint_lib.student import load_tokenizer
from mint_lib.training import tree_file
from mint_lib.training.preference_trees import collate_pairs, grow_trees
from mint_lib.training.tree_file import TreeFile, write_trees

RAGGED = [
    make_pair("a", "A boy with seizures.", "epilepsy\nmigraine", "gout"),
    make_pair("a", "A boy with seizures.", "epilepsy\nmigraine", "epilepsy\ngout"),
    make_pair("a", "Another photo of him.", "epilepsy", "gout"),
    make_pair("b", "A girl.", "measles é 🧬", "epilepsy\nmigraine"),
    *(make_pair(f"c{number}", f"Text {number} " * (1 + number % 7), f"x{number}", "gout") for number in range(40)),
]


class PictureReader(TextReader):
    """Reads images as one token each, before the text; only for tests of where images go."""

    def read(self, prompt: Sequence[Turn], images: Sequence[bytes] = (), *, case_id: str = "") -> ReadPrompt:
        return ReadPrompt([7] * len(images) + encode_prompt(self.tokenizer, prompt))

    def read_images(self, images: Sequence[bytes], *, case_id: str = "") -> Any:
        import torch

        return {"pixels": torch.tensor([list(image) for image in images])} if images else None

    def collate_images(self, image_inputs: Any, trees: Any, batch: Any) -> dict[str, Any]:
        return {"found": [found and found["pixels"].tolist() for found in image_inputs], "num_trees": len(trees)}


@pytest.fixture(scope="module")
def reader() -> TextReader:
    return TextReader(load_tokenizer(TINY))


def write(pairs: Iterable[PreferencePair], path: pathlib.Path, reader: TextReader, **options: Any) -> TreeFile:
    return write_trees(pairs, path, reader=reader, **{"window_tokens": 512, **options})


@pytest.mark.parametrize("with_prompt_edges", [False, True])
@pytest.mark.parametrize("trees_per_batch", [1, 5, 256])
def test_tree_file_any_tree_equals_grow_trees(
    reader: TextReader,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    trees_per_batch: int,
    with_prompt_edges: bool,
) -> None:
    monkeypatch.setattr(tree_file, "_TREES_PER_BATCH", trees_per_batch)
    monkeypatch.setattr(tree_file, "_CACHED_ANSWERS", 3)
    monkeypatch.setattr(tree_file, "_READS_PER_RELEASE", 7)
    trees = write(iter(RAGGED), tmp_path / "trees", reader, with_prompt_edges=with_prompt_edges)
    expected = grow_trees(RAGGED, reader, window_tokens=512, with_prompt_edges=with_prompt_edges)
    assert len(trees) == len(expected) == 43
    for index in (42, 0, *range(43), 5):
        assert trees[index] == expected[index]
    assert trees.lengths.dtype == "int32"
    assert trees.lengths.tolist() == [len(item.tree.input_ids) for item in expected]
    assert (trees.num_pairs, trees.num_cases, trees.num_cut_prompts, trees.num_cut_tokens) == (44, 42, 0, 0)
    assert trees.num_tokens == sum(trees.lengths)
    for index in (43, -1):
        with pytest.raises(IndexError):
            trees[index]


def test_tree_file_texts_with_odd_characters_have_the_ids_of_one_by_one(
    reader: TextReader, tmp_path: pathlib.Path
) -> None:
    texts = ["", " a", "a ", "\n\n", "<|end|>", "<|user|>x", "é🧬\u0301", "a" * 90, "\u00a0", "a\r\nb"]
    pairs = [make_pair(str(number), text, f"{text}!", f"{text}?") for number, text in enumerate(texts)]
    trees = write(pairs, tmp_path / "trees", reader)
    for index, pair in enumerate(pairs):
        tree = trees[index].tree
        prompt_ids = encode_prompt(reader.tokenizer, pair.prompt)
        assert list(tree.input_ids[: len(prompt_ids)]) == prompt_ids
        for answer, path in zip((pair.chosen, pair.rejected), tree.paths, strict=True):
            assert [tree.targets[edge] for edge in path] == encode_answer(reader.tokenizer, answer)


def test_tree_file_settings_left_in_the_tokenizer_change_no_ids(reader: TextReader, tmp_path: pathlib.Path) -> None:
    def stream() -> Iterator[PreferencePair]:
        for pair in RAGGED:
            yield pair
            reader.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2, split_special_tokens=True)

    trees = write(stream(), tmp_path / "trees", reader)
    assert [trees[index] for index in range(43)] == grow_trees(RAGGED, reader, window_tokens=512)


def test_tree_file_prompt_that_comes_back_later_hangs_on_its_own(reader: TextReader, tmp_path: pathlib.Path) -> None:
    trees = write([RAGGED[0], RAGGED[3], RAGGED[1]], tmp_path / "trees", reader)
    assert [trees[index].case_id for index in range(3)] == ["a", "b", "a"]
    assert (trees.num_pairs, trees.num_cases) == (3, 2)


def test_tree_file_same_pairs_give_the_same_bytes(reader: TextReader, tmp_path: pathlib.Path) -> None:
    write(RAGGED, tmp_path / "one", reader)
    write(RAGGED, tmp_path / "two", TextReader(load_tokenizer(TINY)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tree_file_no_pairs_is_empty(reader: TextReader, tmp_path: pathlib.Path) -> None:
    trees = write([], tmp_path / "trees", reader)
    assert (len(trees), trees.lengths.tolist(), trees.num_cases) == (0, [], 0)


def test_tree_file_holds_few_pairs_at_a_time(
    reader: TextReader, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last pair is asked for, all but the latest batches are on disk."""
    monkeypatch.setattr(tree_file, "_TREES_PER_BATCH", 4)
    path, sizes = tmp_path / "trees", []

    def stream() -> Iterator[PreferencePair]:
        for pair in RAGGED:
            sizes.append(path.stat().st_size)
            yield pair

    write(stream(), path, reader)
    assert sizes[-1] > 0.7 * path.stat().st_size


def test_tree_file_pickled_is_opened_again_by_its_path(reader: TextReader, tmp_path: pathlib.Path) -> None:
    trees = write(RAGGED, tmp_path / "trees", reader, with_prompt_edges=True)
    data = pickle.dumps(trees)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy.path == trees.path
    assert [copy[index] for index in range(43)] == [trees[index] for index in range(43)]
    trees.path.unlink()
    with pytest.raises(IntegrityError):
        pickle.loads(data)


def test_tree_file_cut_short_is_refused(reader: TextReader, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trees"
    write(RAGGED, path, reader)
    data = path.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(IntegrityError, match="no whole file"):
            TreeFile(path, with_prompt_edges=False)


def test_tree_file_flipped_bit_is_refused_or_without_effect(reader: TextReader, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trees"
    expected = [write(RAGGED[:9], path, reader)[index] for index in range(8)]
    data = bytearray(path.read_bytes())
    num_refused = 0
    for position in range(0, len(data), 11):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        data[position] ^= 1 << position % 8
        try:
            trees = TreeFile(path, with_prompt_edges=False)
            assert [trees[index] for index in range(8)] == expected
        except (IntegrityError, IndexError):  # IndexError: the number of batches became 0
            num_refused += 1
    assert num_refused > len(data) / 11 / 4


def test_tree_file_folder_that_is_missing_is_a_store_error(reader: TextReader, tmp_path: pathlib.Path) -> None:
    with pytest.raises(StoreError, match="Free some space"):
        write(RAGGED, tmp_path / "nowhere" / "trees", reader)


def test_tree_file_images_come_back_and_reach_the_batch(reader: TextReader, tmp_path: pathlib.Path) -> None:
    pairs = [
        RAGGED[0].model_copy(update={"images": (b"\x01\x02",)}),
        RAGGED[1].model_copy(update={"images": (b"\x01\x02",)}),
        RAGGED[1].model_copy(update={"images": (b"\x03\x04", b"\x05\x06")}),
        RAGGED[3],
    ]
    pictures = PictureReader(reader.tokenizer)
    trees = write(pairs, tmp_path / "trees", pictures)
    items = [trees[index] for index in range(len(trees))]
    assert items == grow_trees(pairs, pictures, window_tokens=512)
    assert [item.images for item in items] == [(b"\x01\x02",), (b"\x03\x04", b"\x05\x06"), ()]
    batch = collate_pairs(items, pad_token_id=0, reader=pictures)
    assert batch["image_inputs"] == {"found": [[[1, 2]], [[3, 4], [5, 6]], None], "num_trees": 3}
    with pytest.raises(ValueError, match="reader"):
        collate_pairs(items, pad_token_id=0)


def test_tree_file_images_for_a_text_student_are_refused(reader: TextReader, tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match=r"Case a has 1 images"):
        write([RAGGED[0].model_copy(update={"images": (b"png",)})], tmp_path / "trees", reader)


def test_tree_file_many_images_end_a_batch_early(
    reader: TextReader, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_file, "_IMAGE_BYTES_PER_BATCH", 300)
    pairs = [make_pair(str(number), "x", "y", "z").model_copy(update={"images": (b"i" * 100,)}) for number in range(8)]
    batches = [len(prompts) for prompts in tree_file._batch_prompts(pairs)]
    assert batches == [3, 3, 2]


def test_collate_pairs_totals_are_those_of_the_batch(reader: TextReader) -> None:
    trees = grow_trees(RAGGED[:4], reader, window_tokens=512, with_prompt_edges=True)
    batch = collate_pairs(trees, pad_token_id=0, reader=reader)
    num_labelled = sum(
        len(encode_prompt(reader.tokenizer, pair.prompt)) - 1 + len(encode_answer(reader.tokenizer, pair.chosen))
        for pair in RAGGED[:4]
    )
    assert batch["pair_total"].item() == 4.0
    assert batch["nll_total"].item() == num_labelled
    assert "image_inputs" not in batch


def test_collate_pairs_one_row_has_no_padding(reader: TextReader) -> None:
    trees = grow_trees(RAGGED[:4], reader, window_tokens=512)
    batch = collate_pairs(trees, pad_token_id=0, one_row=True)
    assert batch["input_ids"].shape == (1, batch["num_real_tokens"])


LONG = (
    Turn(role="system", content="Name the disease."),
    Turn(role="user", content="An example."),
    Turn(role="assistant", content="An answer."),
    Turn(role="user", content=" ".join(f"finding-{number} é" for number in range(60))),
)


@pytest.mark.parametrize("num_less", [1, 2, 3, 50, 300])
def test_fit_prompt_cut_keeps_template_turns_and_the_end_of_the_text(reader: TextReader, num_less: int) -> None:
    whole = encode_prompt(reader.tokenizer, LONG)
    room_tokens = len(whole) - num_less
    read, _, num_cut = fit_prompt(reader, LONG, room_tokens=room_tokens, over_long="cut_prompt", case_id="a")
    assert room_tokens - 4 <= len(read.ids) <= room_tokens
    assert num_cut == len(whole) - len(read.ids)
    text = LONG[-1].content
    fitting = [
        rest
        for rest in (text[start:] for start in range(1, len(text)))
        if encode_prompt(reader.tokenizer, [*LONG[:-1], Turn(role="user", content=rest)]) == read.ids
    ]
    assert fitting, "the ids are those of no real prompt"


def test_fit_prompt_that_fits_is_left_alone(reader: TextReader) -> None:
    whole = encode_prompt(reader.tokenizer, LONG)
    for over_long in ("refuse", "cut_prompt"):
        read, _, num_cut = fit_prompt(reader, LONG, room_tokens=len(whole), over_long=over_long, case_id="a")
        assert (read.ids, num_cut) == (whole, 0)


def test_fit_prompt_nothing_left_is_refused(reader: TextReader) -> None:
    bare = encode_prompt(reader.tokenizer, [*LONG[:-1], Turn(role="user", content="")])
    for room_tokens in (len(bare), 5, -3):
        with pytest.raises(PromptTooLong, match=r"case a.*Nothing of the last user turn"):
            fit_prompt(reader, LONG, room_tokens=room_tokens, over_long="cut_prompt", case_id="a")
    with pytest.raises(PromptTooLong, match="Nothing of the last user turn"):
        fit_prompt(reader, LONG[:1], room_tokens=5, over_long="cut_prompt", case_id="a")


def test_fit_prompt_white_space_is_nothing(reader: TextReader) -> None:
    prompt = [Turn(role="user", content="fever" + " " * 20)]
    room_tokens = len(encode_prompt(reader.tokenizer, prompt)) - 10
    with pytest.raises(PromptTooLong, match="Nothing of the last user turn"):
        fit_prompt(reader, prompt, room_tokens=room_tokens, over_long="cut_prompt", case_id="a")


def test_fit_prompt_rest_of_more_tokens_is_cut_again(reader: TextReader) -> None:
    class WideReader(TextReader):
        """Splits a text with another beginning into five tokens more."""

        def read(self, prompt: Sequence[Turn], images: Sequence[bytes] = (), *, case_id: str = "") -> ReadPrompt:
            num_more = 0 if prompt[-1].content.startswith("finding-0") else 5
            return ReadPrompt(encode_prompt(self.tokenizer, prompt) + [9] * num_more)

    wide = WideReader(reader.tokenizer)
    room_tokens = len(wide.read(LONG).ids) - 1
    read, _, num_cut = fit_prompt(wide, LONG, room_tokens=room_tokens, over_long="cut_prompt", case_id="a")
    assert (len(read.ids), num_cut) == (room_tokens, 1)


def test_fit_prompt_with_images_is_never_cut(reader: TextReader) -> None:
    pictures = PictureReader(reader.tokenizer)
    with pytest.raises(PromptTooLong, match="images is never cut"):
        fit_prompt(pictures, LONG, [b"png"], room_tokens=100, over_long="cut_prompt", case_id="a")


def test_write_trees_over_long_prompts_are_refused_or_cut_and_counted(
    reader: TextReader, tmp_path: pathlib.Path
) -> None:
    pair = make_pair("long", "A very long story. " * 20, "short", "a somewhat longer answer")
    prompt_ids = encode_prompt(reader.tokenizer, pair.prompt)
    num_answer = len(encode_answer(reader.tokenizer, pair.rejected))
    window_tokens = len(prompt_ids) + num_answer - 10
    with pytest.raises(PromptTooLong, match=rf"case long has {len(prompt_ids)} tokens.*{len(prompt_ids) - 10} of"):
        write([RAGGED[3], pair], tmp_path / "trees", reader, window_tokens=window_tokens)
    options: Any = {"window_tokens": window_tokens, "over_long": "cut_prompt"}
    trees = write([RAGGED[3], pair], tmp_path / "trees", reader, **options)
    assert trees[1] == grow_trees([pair], reader, **options)[0]
    assert trees.num_cut_prompts == 1
    assert 10 <= trees.num_cut_tokens <= 13
    assert len(trees[1].tree.prompt_path) == 0
    assert trees[1].tree.paths[0] == tuple(range(len(trees[1].tree.paths[0])))
    cut = write([pair], tmp_path / "whole", reader, window_tokens=10 + window_tokens, over_long="cut_prompt")
    assert (cut.num_cut_prompts, cut.num_cut_tokens) == (0, 0)
