"""Models of the tiny student as the store holds them, for tests that load or serve one."""

import json
import pathlib
import tempfile
from typing import Any

import pytest

from mint_lib.reading import TextReader
from mint_lib.records import Case, Label, Reference, StageRecord
from mint_lib.report_records import Calibration, Estimate, ModelCard
from mint_lib.rows import case_schema
from mint_lib.server.asking import rank_case
from mint_lib.server.students import ServedStudent
from mint_lib.store import Store
from mint_lib.student import StudentConfig, load_tokenizer, rank_labels, student_digest
from mint_lib.student import load_student as load_model
from mint_lib.template import Template
from mint_lib.training.tuning import place_tuned

STUDENT = StudentConfig(model="tiny", window_tokens=1024)
NAMES = ("Noonan syndrome 1", "Noonan syndrome 4", "Kabuki syndrome 1", "Robinow syndrome", "Costello syndrome")
LABELS = tuple(Label(id=f"OMIM:{n}", name=name) for n, name in enumerate(NAMES))
TEMPLATE = Template.load("rare_disease").with_num_answers(2)
TEXT = "A boy of 5 years with short stature, a heart defect and hearing loss."
FACTS: dict[str, Any] = {
    "student": STUDENT.model_dump(mode="json"),
    "template_digest": TEMPLATE.digest,
    "method": "orpo",
    "method_config": {},
    "lora": {"rank": 4},
    "best_step": 5,
    "keep_best": "agreement_mrr",
    "num_trainable_parameters": 1,
}


def make_adapter(folders: pathlib.Path, number: int) -> pathlib.Path:
    """The folder of a random adapter of the tiny student; another number, another adapter."""
    import peft
    import torch

    folder = folders / str(number)
    if not folder.is_dir():
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(load_model(STUDENT), config).save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    return folder


def make_whole(folders: pathlib.Path, number: int) -> pathlib.Path:
    """The folder of a whole tiny student with weights of its own; another number, another student."""
    import torch

    version = folders / f"whole-{number}"
    if not version.is_dir():
        torch.manual_seed(number)
        model = load_model(STUDENT)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(version / "saved")
        place_tuned(version / "saved", version, student=STUDENT)
    return version / "weights"


def make_record(stage: str, **inputs: str) -> StageRecord:
    return StageRecord(stage=stage, config={}, inputs=inputs, code_version="test")


def write_cases(store: Store, num_cases: int = 60) -> Reference:
    with store.write("cases", "tiny") as version:
        for split in ("validation", "test"):
            rows = [
                Case(
                    case_id=f"{split}-{n}",
                    group_id=f"{split}-{n}",
                    text=f"A girl of {n} years with short stature.",
                    label_id="OMIM:1",
                    source="test",
                    synthetic=True,
                )
                for n in range(num_cases // 2)
            ]
            version.add_rows(split, rows, case_schema())
        return version.commit(make_record("data"))


def write_model(
    store: Store,
    tuned: pathlib.Path,
    *,
    facts: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
    labels: tuple[Label, ...] = LABELS,
    template: bytes = TEMPLATE.data,
    calibration: float | None = None,
    cases: Reference | None = None,
    kind: Any = "model",
) -> Reference:
    digest = student_digest(STUDENT)
    is_whole = (tuned / "config.json").is_file()
    known_facts = FACTS | {"base_digest": digest, "tuning": "full" if is_whole else "adapter"}
    with store.write(kind, "tiny") as version:
        version.add_folder("weights" if is_whole else "adapter", tuned)
        version.add_json("student.json", known_facts | (facts or {}))
        version.add_bytes("template.yaml", template)
        version.add_json("labels.json", [label.model_dump(mode="json") for label in labels])
        if kind == "model":
            known = ModelCard(
                name="tiny",
                base_model="tiny",
                base_digest=digest,
                method="orpo",
                student="student/tiny@v000001",
                inputs={"cases": str(cases)} if cases else {},
                teacher_digest="sha256:0",
                headline="A headline.",
                metrics={"top_1": Estimate(value=0.5, low=None, high=None, n=4)},
                gate_passed=True,
                synthetic="all",
                licence="Apache-2.0",
                intended_use="Tests.",
                limits=("Not a medical device.",),
            )
            version.add_json("card.json", known.model_dump(mode="json") | (card or {}))
        if calibration is not None:
            figures = dict.fromkeys(("nll_before", "nll_after", "ece_before", "ece_after"), 0.1)
            made = Calibration(student="s", split="validation", num_cases=9, temperature=calibration, **figures)
            version.add_json("calibration.json", made.model_dump(mode="json"))
        return version.commit(make_record("registry"))


class Blind:
    """Sees nothing."""

    def see_step(self, *, kind: str, num_rows: int, num_tokens: int) -> None: ...

    def see_queue(self, *, num_queued: int, num_running: int) -> None: ...

    def see_prefix_cache(self, *, num_bytes: int, num_evicted_blocks: int) -> None: ...

    def see_isolation(self) -> None: ...


def expected_scores(tuned: pathlib.Path, text: str = TEXT) -> list[float]:
    """Of the code that training and evaluation use."""
    model = load_model(STUDENT, tuned)
    scores = rank_labels(model, TextReader(load_tokenizer(STUDENT)), TEMPLATE, LABELS, [TEMPLATE.prompt(text)])
    return [float(value) for value in scores[0]]


def scores_of(student: ServedStudent) -> list[float]:
    return list(rank_case(student, TEXT, timeout_seconds=60).log_probabilities)


def close_to(scores: list[float]) -> Any:
    # float32 sums in another order: 1e-4 nats is the issue's own tolerance for rankings.
    return pytest.approx(scores, abs=1e-4)


def flip_bit(store: Store, reference: Reference, path: str) -> None:
    """Damage one object behind the store's back."""
    key = store._key(reference, path, store.files(reference)[path])
    data, _ = store._s3.get(key)
    store._s3.put(key, data[:-1] + bytes([data[-1] ^ 1]))


def list_scratch() -> set[str]:
    return {path.name for path in pathlib.Path(tempfile.gettempdir()).glob("mint-*")}
