"""How far text in a note moves a student: every student of a stored report, with the base, on the same notes.

    OMP_NUM_THREADS=2 python tests/benchmarks/prompt_injection.py --report report/quickstart --cases 20

Needs a run of a text recipe in the configured store, or in `.mint` of the folder that it is started in. The report's
own answers are those to the notes as they are; each case costs twelve more. `evaluation.injections` of a recipe gives
the same figures of the main student alone.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, cast

from mint_lib.records import Reference
from mint_lib.report_records import Estimate, Prediction
from mint_lib.reporting.assembly import resampling_of
from mint_lib.reporting.injections import Injections, InjectionsConfig, measure_injections
from mint_lib.reporting.material import read_material
from mint_lib.reporting.note_answers import ask_notes, fit_window
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.reporting.task import BASE
from mint_lib.store import Store
from mint_lib.student import load_reader, load_student
from pipelines.stores import open_store


def measure_students(store: Store, report: Reference, *, num_cases: int, systems: Sequence[str]) -> None:
    """Print the figures of each student of `report`, base first, or of those of `systems`."""
    record = store.record(report)
    config = EvaluationConfig.model_validate(record.config)
    reader = load_reader(config.student)
    material, _ = read_material(
        store,
        reader,
        cases=Reference.parse(record.inputs["cases"]),
        rankings=Reference.parse(record.inputs["rankings"]),
        preferences=Reference.parse(record.inputs["preferences"]),
        reads="text",
        window_tokens=config.student.window_tokens,
        max_refused_share=config.max_refused_share,
        seed=config.seed,
    )
    answers: dict[str, list[Prediction]] = {}
    for row in store.read_rows(report, "predictions", Prediction):
        answers.setdefault(row.system, []).append(row)
    students = {
        name.removeprefix("students."): Reference.parse(text)
        for name, text in record.inputs.items()
        if name.startswith("students.")
    }
    for name, student in ({BASE: None} | students).items():
        if systems and name not in systems:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            model = load_student(config.student, store.download(student, folder, prefix="adapter") if student else None)
        started = time.perf_counter()
        found = measure_injections(
            material.cases,
            answers[name],
            ask_notes(material, model, reader, description=name),
            fit_window(material, reader, window_tokens=config.student.window_tokens),
            labels=material.labels,
            config=InjectionsConfig(cases=num_cases),
            student=str(student or BASE),
            resampling=resampling_of(config),
        )
        if found is None:
            sys.stdout.write(f"{name}: no note has room for more text\n")
        else:
            write_figures(name, found, seconds=time.perf_counter() - started)


def write_figures(name: str, found: Injections, *, seconds: float) -> None:
    """A line for each kind of text."""
    sys.stdout.write(
        f"{name}: {found.num_cases} cases, {found.num_too_long} too long, top-1 {format_estimate(found.top_1)}, "
        f"{seconds:.0f} s\n"
    )
    for item in found.kinds:
        parts = [
            f"{title} {format_estimate(injected)}, neutral {format_estimate(neutral)}"
            for title, injected, neutral in (
                ("asked for is first", item.injected.followed, item.neutral.followed),
                ("changed", item.injected.changed, item.neutral.changed),
                ("rank", item.injected.rank_change, item.neutral.rank_change),
            )
        ]
        flag = "FLAGGED " if item.flagged else ""
        sys.stdout.write(f"  {item.kind}: {flag}{'; '.join(parts)}\n")
    sys.stdout.flush()


def format_estimate(estimate: Estimate) -> str:
    """A value with its interval."""
    value, low, high = (cast(Any, part) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:.2f}" if low is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Measure the students of one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", default="report/quickstart")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--systems", nargs="*", default=(), help="base, or names of students; all if left out")
    arguments = parser.parse_args()
    with open_store() as store:
        measure_students(store, store.resolve(arguments.report), num_cases=arguments.cases, systems=arguments.systems)


if __name__ == "__main__":
    main()
