"""The data stage streams: what it holds does not grow with the images, and the same cases lie in the same order."""

import hashlib
import io
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from listed_rows import LABELS, ListSource, row
from PIL import Image

from mint_lib import data as data_module
from mint_lib.case_rows import Row
from mint_lib.data import DataConfig, prepare_cases
from mint_lib.records import SPLITS, Case, Reference
from mint_lib.store import Store

OFF = {"max_near_duplicate_share": None, "max_leaked_share": None, "label_flips": None}


class Streamed(ListSource):
    """Makes its rows while they are read."""

    make: Callable[[], Iterable[Row]]

    def read(self, rng: np.random.Generator) -> Iterator[Row]:
        yield from self.make()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Iterable[Row]]], None]:
    """A function that makes the stage read what another one makes."""

    def use(make: Callable[[], Iterable[Row]]) -> None:
        def open_source(config: Any, *, wanted: Any = None, where: str = "data") -> Streamed:
            source = Streamed(Streamed.Config(), wanted=wanted)
            source.make = make
            return source

        monkeypatch.setattr(data_module, "open_source", open_source)

    return use


def config(**changes: Any) -> DataConfig:
    return DataConfig.model_validate({"name": "many", "seed": 3, "source": "list", "gate": OFF} | changes)


def draw_image(seed: int, size: int) -> bytes:
    """Noise, stored without compression: three bytes a pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def digest_order(store: Store, reference: Reference) -> str:
    """Who stands where, with which label, as a few digits."""
    lines = [
        f"{split} {case.case_id} {case.label_id}"
        for split in SPLITS
        for case in store.iterate_rows(reference, split, Case)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_prepare_cases_of_many_images_holds_few_of_them(
    store: Store, stream: Callable[[Callable[[], Iterable[Row]]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_images, size = 60, 256
    peaks: list[int] = []
    write = Store.write

    def note_peak(self: Store, *arguments: Any, **options: Any) -> Any:
        """What reading, splitting and judging held at most; what a writer holds has its own bound and tests."""
        peaks.append(tracemalloc.get_traced_memory()[1])
        return write(self, *arguments, **options)

    monkeypatch.setattr(Store, "write", note_peak)
    stream(lambda: (row(number, image=draw_image(number, 8)) for number in range(20)))
    prepare_cases(config(name="imports"), store=store)
    stream(lambda: (row(number, image=draw_image(number, size)) for number in range(num_images)))
    tracemalloc.start()
    try:
        reference = prepare_cases(config(), store=store)
    finally:
        tracemalloc.stop()
    assert sum(store.record(reference).counts[f"{split}/with image"] for split in SPLITS) == num_images
    assert peaks[-1] < 0.25 * num_images * size * size * 3


def make_twins(begin: int, end: int) -> list[Row]:
    """Rows of two a patient, some with the text or image of others, some without an image."""
    return [
        row(
            number,
            group_id=f"patient-{number // 2}",
            text=f"Note {number // 5}" if number % 7 == 0 else f"note {number}",
            image=draw_image(number // 3, 8) if number % 2 else None,
            label_id=LABELS[number // 3 % 2].id,
        )
        for number in range(begin, end)
    ]


@pytest.mark.parametrize(
    ("changes", "order", "grown"),
    [
        ({}, "65babec81e25fed5", "a960f8ed2597f253"),
        ({"labelled_per_label": 5}, "026722622db9eb7d", "50be428c67a780ea"),
        ({"split_by": "image"}, "68aaa7f1ed5a8691", "529ba98b0f203584"),
    ],
    ids=["by patient", "few labels", "by image"],
)
def test_prepare_cases_same_rows_stand_in_the_order_they_always_had(
    store: Store,
    stream: Callable[[Callable[[], Iterable[Row]]], None],
    changes: dict[str, Any],
    order: str,
    grown: str,
) -> None:
    # The digests were taken from a stage that held all cases in memory.
    stream(lambda: make_twins(0, 120))
    base = prepare_cases(config(**changes), store=store)
    assert digest_order(store, base) == order
    stream(lambda: make_twins(115, 180))
    assert digest_order(store, prepare_cases(config(**changes), store=store, base=base)) == grown
