"""The flow: a recipe as a graph of steps, each one stage with its resolved config and its inputs.

Goes in: a `Recipe`. Comes out: the steps in an order in which they can run. The Kubeflow pipeline, `mint plan` and
`mint run` all read this one graph; two arms that share a step share it here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from mint_lib.recipe import Recipe, override_section


class Step(NamedTuple):
    """One execution of one stage."""

    id: str
    """Unique in the flow, for instance `alignment-sft`."""
    stage: str
    config: BaseModel
    inputs: Mapping[str, str | Mapping[str, str]]
    """Input name to the id of the step that makes it or a full reference, or to a map of names to such ids."""

    @property
    def name(self) -> str:
        """Name of the version that the step writes."""
        return str(self.config.model_dump()["name"])


def is_step(source: str) -> bool:
    """An input's source is the id of a step, and not a reference."""
    return "#" not in source


def list_steps(recipe: Recipe) -> list[Step]:
    """The steps of `recipe`, each after all of its inputs."""
    steps: dict[str, Step] = {}
    seeds = recipe.student_seeds or (None,)
    add = _StepAdder(recipe, steps)
    retrain = recipe.retrain
    cases = retrain.cases if retrain else add("data", "", {}, {})
    earlier = {"previous": retrain.rankings} if retrain and retrain.rankings else {}
    rankings = add("teacher", "", {}, {"cases": cases} | earlier)
    earlier_pairs = {"previous": retrain.preferences} if retrain and retrain.preferences else {}
    baselines = {name: add("teacher", name, changes, {"cases": cases}) for name, changes in recipe.baselines.items()}
    students: dict[str, str] = {}
    captioned = _add_captioning(add, recipe, cases, rankings)
    main_preferences = ""
    for arm_name, arm in recipe.arms.items():
        arm_rankings = add("teacher", arm_name, arm.teacher, {"cases": cases}) if arm.teacher else rankings
        for seed in seeds:
            suffix = f"{arm_name}-seed-{seed}" if seed is not None else arm_name
            seeded: dict[str, Any] = {"seed": seed} if seed is not None else {}
            own = suffix if (arm.teacher or arm.preferences) else (f"seed-{seed}" if seed is not None else "")
            pairs = add(
                "preferences",
                own,
                arm.preferences | seeded,
                {"cases": cases, "rankings": arm_rankings} | ({} if own else earlier_pairs),
            )
            main_preferences = main_preferences or pairs
            start = {"start": captioned} if captioned and arm.captioning else {}
            student = add("alignment", suffix, arm.alignment | seeded, {"preferences": pairs} | start)
            students[f"{arm_name}/seed-{seed}" if seed is not None else arm_name] = student
    if captioned:
        students["captioning"] = captioned
    report = add(
        "evaluation",
        "",
        {},
        {
            "cases": cases,
            "rankings": rankings,
            "preferences": main_preferences,
            "students": students,
            "baselines": baselines,
        },
    )
    add("registry", "", {}, {"student": next(iter(students.values())), "report": report})
    return list(steps.values())


def _add_captioning(add: "_StepAdder", recipe: Recipe, cases: str, rankings: str) -> str | None:
    """The step that teaches the image student to describe images, if the recipe has one."""
    if recipe.captioning is None:
        return None
    changes = {"pairs": "captions"} | recipe.captioning.preferences
    pairs = add("preferences", "captioning", changes, {"cases": cases, "rankings": rankings})
    changes = {"keep_best": "loss"} | recipe.captioning.alignment
    return add("alignment", "captioning", changes, {"preferences": pairs})


class _StepAdder:
    """Adds a step once: a second request for the same id must be for the same step."""

    def __init__(self, recipe: Recipe, steps: dict[str, Step]):
        self._recipe = recipe
        self._steps = steps

    def __call__(
        self, stage: str, suffix: str, changes: dict[str, Any], inputs: Mapping[str, str | Mapping[str, str]]
    ) -> str:
        config = getattr(self._recipe, stage)
        if suffix:
            changes = {"name": f"{self._recipe.name}-{suffix}"} | changes
        if changes:
            config = override_section(stage, config, changes)
        step = Step("-".join(part for part in (stage, suffix) if part), stage, config, inputs)
        known = self._steps.setdefault(step.id, step)
        if known != step:
            raise ValueError(f"two different steps are called {step.id!r}")
        return step.id
