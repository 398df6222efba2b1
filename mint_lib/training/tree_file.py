"""The prompt trees of a training set, prepared once in a file on local disk and packed again at each access.

Goes in: a stream of preference pairs, of which a few hundred are in memory at a time. Comes out: a `TreeFile`, from
which a trainer takes any tree by its number. The file is an Arrow IPC file, opened memory-mapped. It is scratch of one
run and no exchange format. This module knows neither the store nor what a method makes of trees.
"""

import functools
import itertools
import mmap
import pathlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mint_lib.errors import IntegrityError, StoreError
from mint_lib.packing import pack_tree
from mint_lib.reading import OverLong, Reader, TextReader, end_of_turn_id, fit_prompt
from mint_lib.records import PreferencePair, Turn
from mint_lib.training.preference_trees import PairTree

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

_TREES_PER_BATCH = 256
"""Trees that are tokenised together and become one record batch. With SmolLM2's tokenizer, CPU time a row is the same
from 64 on."""
_IMAGE_BYTES_PER_BATCH = 32 * 2**20
"""A batch ends early once its encoded images have so many bytes."""
_CACHED_ANSWERS = 2048
"""Answers whose token ids are kept at most; answers of 100 tokens take about 8 MB."""
_READS_PER_RELEASE = 64
"""Reads after which the process lets go of the pages it has touched, or the whole file would end in its memory."""
_START_AGAIN = "Check the local disk and start the run again: the file is made anew."


class TreeFile:
    """Pair trees by number. It pickles by its path: each process of a data loader maps the file for itself."""

    def __init__(
        self, path: pathlib.Path, *, with_prompt_edges: bool = False, unpredicted_ids: Collection[int] = frozenset()
    ):
        """Map the file that `write_trees` left at `path`; trees are packed with what `pack_tree` is told here.

        Raises:
            IntegrityError: it is not a whole tree file.
        """
        import pyarrow as pa
        import pyarrow.compute

        self.path = path
        self._with_prompt_edges = with_prompt_edges
        self._unpredicted_ids = unpredicted_ids
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(self._map))
            if reader.schema != _tree_schema():
                raise pa.ArrowInvalid("it has other columns")
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise IntegrityError(f"{path} is no whole file of prompt trees. {_START_AGAIN}") from error
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._columns = [dict(zip(batch.schema.names, batch.columns, strict=True)) for batch in batches]
        table = pa.Table.from_batches(batches, schema=_tree_schema())
        self.lengths = table["num_places"].to_numpy()
        """Places of each tree, int32."""
        num_cut = table["num_cut_tokens"].to_numpy()
        self.num_cut_prompts = int((num_cut > 0).sum())
        """Prompts that were too long and lost the beginning of their text."""
        self.num_cut_tokens = int(num_cut.sum())
        self.num_pairs = int(table["num_pairs"].to_numpy().sum())
        self.num_cases: int = pa.compute.count_distinct(table["case_id"]).as_py()
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        """Places of all trees together."""
        self._num_reads = 0

    def __reduce__(self) -> tuple[Any, ...]:
        options: dict[str, Any] = {
            "with_prompt_edges": self._with_prompt_edges,
            "unpredicted_ids": self._unpredicted_ids,
        }
        return functools.partial(TreeFile, self.path, **options), ()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> PairTree:
        """The tree at `index`, packed afresh.

        Raises:
            IndexError: there is none.
            IntegrityError: the file was damaged after it was written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no tree {index}, only 0 to {len(self) - 1}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = index - int(self._starts[number])
        self._num_reads += 1
        if self._num_reads % _READS_PER_RELEASE == 0:
            self._map.madvise(mmap.MADV_DONTNEED)
        row = {name: _read_value(column[place]) for name, column in self._columns[number].items()}
        if row["checksum"] != _checksum(row):
            raise IntegrityError(f"{self.path} is damaged at tree {index}. {_START_AGAIN}")
        ends = list(itertools.accumulate(row["num_ids"].tolist()))
        ids = row["ids"].tolist()
        prompt_ids, *answers = (ids[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
        return PairTree(
            case_id=row["case_id"],
            tree=pack_tree(
                prompt_ids,
                answers,
                with_prompt_edges=self._with_prompt_edges,
                unpredicted_ids=self._unpredicted_ids,
            ),
            chosen=tuple(row["chosen"].tolist()),
            rejected=tuple(row["rejected"].tolist()),
            images=tuple(row["images"]),
        )


def write_trees(
    pairs: Iterable[PreferencePair],
    path: pathlib.Path,
    *,
    reader: Reader,
    window_tokens: int,
    with_prompt_edges: bool = False,
    over_long: OverLong = "refuse",
) -> TreeFile:
    """Prepare `pairs` in a new file at `path`. The same pairs give the same bytes.

    Pairs that stand together and share case, prompt and images become one tree, in which equal answers are stored
    once. The preferences stage writes the pairs of a case together. Pairs of a prompt that comes back later hang from a
    tree of their own: all are trained on, but the prompt is computed twice.

    `with_prompt_edges` predicts the prompt's tokens too. Memory does not grow with the number of pairs, but for a few
    bytes a tree.

    Raises:
        PromptTooLong: as `fit_prompt`.
        InvalidInput: the reader refuses a prompt or its images.
        StoreError: the file cannot be written.
    """
    import pyarrow as pa

    encoder = _AnswerEncoder(reader)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _tree_schema()) as writer:
            for prompts in _batch_prompts(pairs):
                writer.write_batch(_prepare(prompts, encoder, window_tokens=window_tokens, over_long=over_long))
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error}). Free some space there.") from error
    return TreeFile(path, with_prompt_edges=with_prompt_edges, unpredicted_ids=reader.unpredicted_ids)


class _PromptPairs(NamedTuple):
    """The pairs of one prompt as texts."""

    case_id: str
    prompt: tuple[Turn, ...]
    images: tuple[bytes, ...]
    sides: list[tuple[str, str]]
    """Chosen and rejected answer of each pair."""


class _AnswerEncoder:
    """Token ids of answers as `encode_answer` gives them, many texts at a time, the latest ones kept."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self._end_of_turn_id = end_of_turn_id(reader.tokenizer)
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Iterable[str]) -> Mapping[str, list[int]]:
        """The ids of `texts`, and of some others."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            for text, ids in zip(new, _encode_texts(self.reader.tokenizer, new), strict=True):
                self._known[text] = [*ids, self._end_of_turn_id]
        found = self._known
        if len(found) > _CACHED_ANSWERS:
            self._known = dict(itertools.islice(found.items(), len(found) - _CACHED_ANSWERS // 2, None))
        return found


def _batch_prompts(pairs: Iterable[PreferencePair]) -> Iterator[list[_PromptPairs]]:
    """Neighbouring pairs of one prompt together, and as many prompts as are prepared at a time."""
    prompts: list[_PromptPairs] = []
    num_image_bytes = 0
    for (case_id, prompt, images), members in itertools.groupby(
        pairs, key=lambda pair: (pair.case_id, pair.prompt, pair.images)
    ):
        prompts.append(_PromptPairs(case_id, prompt, images, [(pair.chosen, pair.rejected) for pair in members]))
        num_image_bytes += sum(map(len, images))
        if len(prompts) == _TREES_PER_BATCH or num_image_bytes >= _IMAGE_BYTES_PER_BATCH:
            yield prompts
            prompts, num_image_bytes = [], 0
    if prompts:
        yield prompts


def _prepare(
    prompts: Sequence[_PromptPairs], encoder: _AnswerEncoder, *, window_tokens: int, over_long: OverLong
) -> "pyarrow.RecordBatch":
    """One record batch of the file."""
    import pyarrow as pa

    ids_of = encoder.encode(text for item in prompts for side in item.sides for text in side)
    rows: list[dict[str, Any]] = []
    for item, prompt_ids in zip(prompts, _read_prompts(prompts, encoder.reader), strict=True):
        texts = list(dict.fromkeys(text for side in item.sides for text in side))
        answers = [ids_of[text] for text in texts]
        room_tokens = window_tokens - max(map(len, answers))
        num_cut_tokens = 0
        if len(prompt_ids) > room_tokens:
            fitted = fit_prompt(
                encoder.reader,
                item.prompt,
                item.images,
                room_tokens=room_tokens,
                over_long=over_long,
                case_id=item.case_id,
            )
            prompt_ids, num_cut_tokens = fitted.read.ids, fitted.num_cut_tokens
        row: dict[str, Any] = {
            "case_id": item.case_id,
            "ids": np.array([*prompt_ids, *itertools.chain(*answers)], dtype=np.int32),
            "num_ids": np.array([len(prompt_ids), *map(len, answers)], dtype=np.int32),
            "chosen": np.array([texts.index(chosen) for chosen, _ in item.sides], dtype=np.int32),
            "rejected": np.array([texts.index(rejected) for _, rejected in item.sides], dtype=np.int32),
            "images": item.images,
            "num_pairs": len(item.sides),
            "num_places": len(prompt_ids) + _count_answer_places(answers),
            "num_cut_tokens": num_cut_tokens,
        }
        rows.append({**row, "checksum": _checksum(row)})
    schema = _tree_schema()
    columns = [pa.array([row[field.name] for row in rows], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _read_prompts(prompts: Sequence[_PromptPairs], reader: Reader) -> list[list[int]]:
    """Token ids of whole prompts."""
    if type(reader) is not TextReader or any(item.images for item in prompts):
        return [reader.read(item.prompt, item.images, case_id=item.case_id).ids for item in prompts]
    turns = [[turn.model_dump() for turn in item.prompt] for item in prompts]
    return _encode_texts(
        reader.tokenizer, reader.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    )


def _encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of `texts` without added special tokens.

    The tokenizers library is asked itself: `encode_batch_fast` makes nothing but ids, in two thirds of the CPU time of
    the tokenizer's own call, which would make offsets and masks too.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids
    backend.no_padding()  # the tokenizer's own call sets these three each time, too
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _count_answer_places(answers: Sequence[list[int]]) -> int:
    """Places of a tree beside its prompt: the different beginnings of the answers without their last tokens."""
    inner = sorted(answer[:-1] for answer in answers)
    num_shared = 0
    for one, next_one in itertools.pairwise(inner):
        same = itertools.takewhile(lambda tokens: tokens[0] == tokens[1], zip(one, next_one, strict=False))
        num_shared += sum(1 for _ in same)
    return sum(map(len, inner)) - num_shared


@functools.cache
def _numbers() -> "pyarrow.DataType":
    import pyarrow as pa

    return pa.list_(pa.int32())


@functools.cache
def _tree_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    numbers = _numbers()
    fields = [
        ("case_id", pa.string()),
        ("ids", numbers),  # of the prompt and of every answer, one after another
        ("num_ids", numbers),  # of each of them
        ("chosen", numbers),
        ("rejected", numbers),
        ("images", pa.list_(pa.binary())),
        ("num_pairs", pa.int32()),
        ("num_places", pa.int32()),
        ("num_cut_tokens", pa.int32()),
        ("checksum", pa.uint32()),  # of the row's other columns: a flipped bit would be trained on unnoticed
    ]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def _read_value(scalar: "pyarrow.Scalar") -> Any:
    """A value as Python has it; a list of numbers as an array, without a copy."""
    if scalar.type == _numbers():
        return scalar.values.to_numpy()
    return scalar.as_py()


def _checksum(row: Mapping[str, Any]) -> int:
    """CRC-32 of a row, itself left out."""
    numbers = (row["num_pairs"], row["num_places"], row["num_cut_tokens"], *map(len, row["images"]))
    parts = [row["case_id"].encode(), repr(numbers).encode(), *row["images"]]
    parts += [row[name].tobytes() for name in ("ids", "num_ids", "chosen", "rejected")]
    return functools.reduce(lambda value, part: zlib.crc32(part, value), parts, 0)
