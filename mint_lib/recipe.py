"""The recipe: one YAML file that says everything a run does.

Goes in: a path and `key=value` overrides. Comes out: a validated `Recipe` whose sections are the stages' own configs,
with every plug-in's config resolved to its defaults. Loads without torch; knows neither the store nor Kubeflow.
"""

import pathlib
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mint_lib.data import DataConfig, DataSource
from mint_lib.errors import RecipeError
from mint_lib.pairing.settings import PreferencesConfig
from mint_lib.placement import StepsOnCluster
from mint_lib.plugins import describe_validation_error, load_plugin, parse_plugin_config
from mint_lib.records import Name, Reference
from mint_lib.registry import RegistryConfig
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.reporting.task import EvaluationTask
from mint_lib.serving import ServingConfig
from mint_lib.student import StudentConfig
from mint_lib.teacher import Teacher, TeacherConfig
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.settings import AlignmentConfig

M = TypeVar("M", bound=BaseModel)
SHARED_KEYS = ("name", "seed", "student")
_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataConfig,
    "teacher": TeacherConfig,
    "preferences": PreferencesConfig,
    "alignment": AlignmentConfig,
    "evaluation": EvaluationConfig,
    "registry": RegistryConfig,
}
# Section -> (plug-in folder, key that names the file, key that holds its config, base class).
_PLUGINS: dict[str, tuple[str, str, str, type[Any]]] = {
    "data": ("data_sources", "source", "config", DataSource),
    "teacher": ("teachers", "model", "config", Teacher),
    "alignment": ("alignment_methods", "method", "method_config", AlignmentMethod),
    "evaluation": ("evaluation_tasks", "task", "config", EvaluationTask),
}


class Arm(BaseModel):
    """One student to make: what differs from the recipe's own sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    teacher: dict[str, Any] = {}
    """Keys of the `teacher` section that differ."""
    preferences: dict[str, Any] = {}
    """Keys of the `preferences` section that differ."""
    alignment: dict[str, Any] = {}
    """Keys of the `alignment` section that differ."""
    captioning: bool = True
    """Start from the student that learned to describe images, where the recipe has such a stage."""


class Captioning(BaseModel):
    """A stage before the alignment: the image student learns to describe images (PeFoMed's first of two stages)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preferences: dict[str, Any] = {}
    """Keys of the `preferences` section that differ, beside `pairs: captions`."""
    alignment: dict[str, Any] = {}
    """Keys of the `alignment` section that differ; `keep_best: loss` unless it says otherwise."""


class Retrain(BaseModel):
    """An earlier run on fewer cases, to go on from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cases: str
    """Full reference of the version of cases to train on; the recipe's source is not read."""
    rankings: str | None = None
    """Rankings of the version that the cases grew from: their teacher ranks what was added, and nothing else. None: the
    teacher is made anew."""
    preferences: str | None = None
    """The pairs before: the gate compares with them."""

    @model_validator(mode="after")
    def _has_references(self) -> Self:
        for kind in ("cases", "rankings", "preferences"):
            text = getattr(self, kind)
            if text is not None and Reference.parse(text).kind != kind:
                raise ValueError(f"retrain.{kind} is a reference of another kind")
        return self


class Recipe(BaseModel):
    """Everything a run does. `name`, `seed` and `student` are copied into the sections that have these keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of every version this recipe writes; lower-case letters, digits and hyphens."""
    description: str = ""
    """What the recipe is for, shown by `mint plan`."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of all randomness."""
    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig
    baselines: dict[Name, dict[str, Any]] = {}
    """Further teachers that are only measured: keys of the `teacher` section that differ."""
    preferences: PreferencesConfig
    alignment: AlignmentConfig
    captioning: Captioning | None = None
    """What image students learn first; None: they are aligned from their base. It is measured as `captioning`."""
    arms: dict[Name, Arm] = Field(default={"orpo": Arm()}, min_length=1)
    """The students to make on this data; the first is the main one, which is registered."""
    retrain: Retrain | None = None
    """Train on cases that are in the store, as `mint run --cases` fills it in. None: the source is read."""
    student_seeds: tuple[int, ...] = ()
    """Make every arm once for each of these seeds. Empty: once, with `seed`."""
    evaluation: EvaluationConfig
    registry: RegistryConfig
    serving: ServingConfig = ServingConfig()
    """How the registered model is served by `mint run --serve`; no step of the flow."""
    cluster: StepsOnCluster = StepsOnCluster()
    """What the steps need on a cluster; a run on this machine does not look at it."""

    @model_validator(mode="before")
    @classmethod
    def _copy_shared_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        shared = {key: values[key] for key in SHARED_KEYS if key in values}
        arms = values.get("arms") or {"orpo": {}}
        for section, model in _SECTIONS.items():
            given = values.get(section)
            if not isinstance(given, dict | None):
                continue
            injected = {key: value for key, value in shared.items() if key in model.model_fields}
            if section == "evaluation" and isinstance(arms, dict):
                injected["main"] = next(iter(arms))
            values[section] = injected | (given or {})
        return values

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.captioning is not None and self.student.reads != "image":
            raise ValueError("captioning is for students that read images: set student.reads to image, or leave it out")
        if "captioning" in self.arms:
            raise ValueError("an arm cannot be called captioning: the stage before the alignment is measured as that")
        if len(set(self.student_seeds)) != len(self.student_seeds):
            raise ValueError("student_seeds holds a seed twice")
        return self


def load_recipe(path: pathlib.Path, *, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in the YAML file at `path`, with `section.key=value` overrides applied.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown (the nearest valid one is named), a value is
            not allowed, or a plug-in does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"Cannot read the recipe {path}: {error.strerror}. Give the path of a YAML file.") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader that refuses double keys
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values; see pipelines/recipes/ for examples.")
    for override in overrides:
        apply_override(values, override)
    return parse_recipe(values, where=path.name)


def parse_recipe(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """`values` as a recipe with every plug-in config resolved. Raises RecipeError as `load_recipe` does."""
    if "{{$" in str(values):
        raise RecipeError(f"{where}: '{{{{$' is a Kubeflow placeholder and would be replaced; keep it out of recipes.")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, Recipe, where="")) from None
    resolved = {section: resolve_section(section, getattr(recipe, section)) for section in _SECTIONS}
    return recipe.model_copy(update=resolved)


def resolve_section(section: str, config: Any) -> Any:
    """`config` with its plug-in's config validated and filled with that plug-in's defaults."""
    if section not in _PLUGINS:
        return config
    folder, name_key, config_key, base = _PLUGINS[section]
    plugin = load_plugin(folder, getattr(config, name_key), base=base)
    plugin_config = parse_plugin_config(plugin, getattr(config, config_key), where=f"{section}.{config_key}")
    update: dict[str, Any] = {config_key: plugin_config.model_dump(mode="json")}
    if getattr(config, "test_source", None) is not None:
        update["test_source"] = resolve_section(section, config.test_source)
    return config.model_copy(update=update)


def override_section(section: str, config: Any, changes: dict[str, Any]) -> Any:
    """`config` with `changes` merged in, validated again. A changed plug-in starts from its own defaults."""
    values = config.model_dump(mode="json")
    if section in _PLUGINS:
        _, name_key, config_key, _ = _PLUGINS[section]
        if changes.get(name_key, values[name_key]) != values[name_key]:
            values[config_key] = {}
    model = _SECTIONS[section]
    try:
        changed = model.model_validate(_merge(values, changes))
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, model, where=section)) from None
    return resolve_section(section, changed)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` (value read as YAML) in `values`.

    Raises:
        RecipeError: `override` has no `=`, or its path runs through something that is not a section.
    """
    path, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(
            f"--set {override!r} has no '='. Write section.key=value, for instance teacher.floor.value=0.5."
        )
    *parents, last = path.split(".")
    here: Any = values
    for part in parents:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise RecipeError(f"--set {override!r}: {part!r} is a value, not a section.")
    here[last] = yaml.safe_load(value)


def parse_section(name: str, model: type[M], overrides: tuple[str, ...]) -> M:
    """The section `name` from `key=value` overrides alone. Raises RecipeError as `load_recipe` does."""
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, model, where=name)) from None


def recipe_json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors. Keys that the recipe copies into a section are not required there."""
    schema = Recipe.model_json_schema()
    copied = {*SHARED_KEYS, "main"}
    for model in _SECTIONS.values():
        section = schema["$defs"][model.__name__]
        section["required"] = [key for key in section.get("required", []) if key not in copied]
    schema["required"] = [
        key
        for key in schema["required"]
        if key not in _SECTIONS or schema["$defs"][_SECTIONS[key].__name__]["required"]
    ]
    return schema


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        both = isinstance(change, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], change) if both else change
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, which YAML would settle silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key given twice: {', '.join(sorted(twice))}", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)
