"""Others read our data: `datasets` and pyarrow the shards as they lie in the store, TRL's trainers what is exported."""

import copy
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from tiny_data import case_record, encode_image, make_cases, make_pairs, write_cases, write_preferences
from tiny_image_students import make_student

from mint_lib.export import export_dataset
from mint_lib.records import Case, PreferencePair, Reference
from mint_lib.rows import case_schema
from mint_lib.store import Store
from mint_lib.student import StudentConfig, load_student, load_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_length": 128,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}


@pytest.fixture
def load_dataset(tmp_path: pathlib.Path) -> Any:
    """`datasets.load_dataset` with a cache of its own."""
    import datasets

    def load(*arguments: Any, **options: Any) -> Any:
        return datasets.load_dataset(*arguments, cache_dir=str(tmp_path / "cache"), **options)

    return load


@pytest.fixture
def text_pairs(store: Store, tmp_path: pathlib.Path, load_dataset: Any) -> Any:
    """Exported pairs of text, as `datasets` reads them."""
    folder = tmp_path / "text"
    export_dataset(store, write_preferences(store, with_images=False), folder, to="hf")
    return load_dataset(str(folder))


def test_cases_as_they_lie_in_the_store_are_read_by_datasets(store: Store, tmp_path: pathlib.Path, load_dataset: Any):
    import datasets

    reference = write_cases(store)
    folder = store.download(reference, tmp_path / "version")
    files = {split: str(folder / split / "*.parquet") for split in ("train", "validation", "test")}
    loaded = load_dataset("parquet", data_files=files)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 8, "validation": 4, "test": 4}
    first = loaded["train"].cast_column("image", datasets.Image())[0]
    case = store.read_rows(reference, "train", Case)[0]
    assert first["text"] == case.text
    assert first["findings"] == [finding.model_dump() for finding in case.findings]
    assert first["image"].size == (16, 16)
    assert loaded["train"][1]["attributes"] == [{"key": "sex", "value": "female"}, {"key": "age", "value": "1"}]


@pytest.mark.parametrize("with_images", [False, True])
def test_pairs_as_they_lie_in_the_store_are_read_by_datasets(
    store: Store, tmp_path: pathlib.Path, load_dataset: Any, with_images: bool
):
    import datasets

    reference = write_preferences(store, with_images=with_images)
    folder = store.download(reference, tmp_path / "version")
    rows = load_dataset("parquet", data_files=str(folder / "train" / "*.parquet"), split="train")
    pair = store.read_rows(reference, "train", PreferencePair)[0]
    assert rows[0]["prompt"] == [turn.model_dump() for turn in pair.prompt]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (pair.chosen, pair.rejected)
    decoded = rows.cast_column("images", datasets.List(datasets.Image()))[0]["images"]
    assert [image.size for image in decoded] == [(16, 16)] * with_images


def test_shards_are_read_from_the_server_without_a_copy(store: Store):
    import fsspec.implementations.arrow
    import pyarrow.dataset
    import pyarrow.parquet

    reference = write_preferences(store, with_images=True)
    settings = store.settings
    place = f"{settings.bucket}/{settings.prefix}/preferences/demo/{reference.version}/train"
    filesystem = store.arrow_filesystem()
    table = pyarrow.dataset.dataset(place, filesystem=filesystem, format="parquet").to_table()
    assert table.num_rows == 8
    wrapped = fsspec.implementations.arrow.ArrowFSWrapper(filesystem)
    assert pyarrow.parquet.read_table(f"{place}/000000.parquet", filesystem=wrapped).equals(table)


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_exported_text_pairs_train_a_student_for_one_step(text_pairs: Any, tmp_path: pathlib.Path, trainer: str):
    import trl
    import trl.experimental.orpo

    tiny = StudentConfig(model="tiny")
    classes: dict[str, Any] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "orpo": (trl.experimental.orpo.ORPOTrainer, trl.experimental.orpo.ORPOConfig),
    }
    trainer_class, config_class = classes[trainer]
    model = load_student(tiny)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = trainer_class(
        model=model,
        args=config_class(output_dir=str(tmp_path / "out"), **_STEP),
        train_dataset=text_pairs["train"],
        eval_dataset=text_pairs["validation"],
        processing_class=load_tokenizer(tiny),
    )
    result = trained.train()
    assert result.global_step == 1
    assert result.training_loss > 0
    assert any(not value.equal(before[name]) for name, value in trained.model.named_parameters())


def test_exported_image_pairs_train_a_student_that_sees_for_one_step(
    store: Store, tmp_path: pathlib.Path, load_dataset: Any
):
    import transformers
    import trl

    export_dataset(store, write_preferences(store, with_images=True), tmp_path / "images", to="hf")
    rows = load_dataset(str(tmp_path / "images"), split="train")
    student = make_student("idefics3")
    processor = transformers.Idefics3Processor(
        student.reader.family.image_processor, student.reader.tokenizer, image_seq_len=4
    )
    processor.chat_template = student.reader.tokenizer.chat_template
    before = {name: value.detach().clone() for name, value in student.model.named_parameters()}
    trained = trl.DPOTrainer(
        model=student.model,
        ref_model=copy.deepcopy(student.model),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), **(_STEP | {"max_length": None})),
        train_dataset=rows,
        processing_class=processor,
    )
    result = trained.train()
    assert result.global_step == 1
    changed = {name for name, value in trained.model.named_parameters() if not value.equal(before[name])}
    assert any("vision" in name for name in changed), "the images reached the loss"


def test_exported_lines_with_image_files_are_read_by_datasets(store: Store, tmp_path: pathlib.Path, load_dataset: Any):
    import datasets

    folder = tmp_path / "lines"
    export_dataset(store, write_preferences(store, with_images=True), folder, to="jsonl")
    rows = load_dataset(str(folder), split="train")
    pair = next(make_pairs("train", 1, with_images=True))
    assert rows[0]["chosen"] == [{"role": "assistant", "content": pair.chosen}]
    assert (folder / rows[0]["images"][0]).read_bytes() == encode_image(0)
    placed = rows.map(lambda row: {"images": [str(folder / path) for path in row["images"]]})
    assert placed.cast_column("images", datasets.List(datasets.Image()))[0]["images"][0].size == (16, 16)


_MEASURE = """
import pathlib, sys
from mint_lib.export import export_dataset
from mint_lib.store import Store
store = Store.from_environment()
export_dataset(store, store.resolve(sys.argv[1]), pathlib.Path(sys.argv[2]), to=sys.argv[3])
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def write_shards(store: Store, num_shards: int) -> Reference:
    """Cases in shards of about 16 MB of images each."""
    image = encode_image(0, size=400)
    with store.write("cases", f"shards-{num_shards}") as version:
        for number in range(num_shards):
            cases = [case.model_copy(update={"image": image}) for case in make_cases(f"shard-{number}", 33)]
            version.add_rows("train", cases, case_schema())
        return version.commit(case_record())


@pytest.mark.parametrize("to", ["hf", "jsonl"])
def test_export_of_ten_times_the_rows_takes_the_same_memory(store: Store, tmp_path: pathlib.Path, to: str):
    def measure_kib(num_shards: int) -> int:
        reference = write_shards(store, num_shards)
        command = [sys.executable, "-c", _MEASURE, str(reference), str(tmp_path / str(num_shards)), to]
        root = pathlib.Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout)

    # Holding all rows would add 570 MiB to some 250. Below four shards the allocator still takes its working set.
    assert measure_kib(40) < 1.1 * measure_kib(4)
