"""Choices are files: a recipe names a file of a plug-in folder, and that file defines exactly one subclass.

Goes in: the folder's base class and the name a recipe gives. Comes out: the subclass. No entry points, no dotted
paths and no registry, so a recipe cannot name an arbitrary callable.
"""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mint_lib.errors import RecipeError

T = TypeVar("T")


def list_plugins(folder: str) -> list[str]:
    """Names of the plug-ins in `mint_lib/<folder>`, sorted."""
    package = importlib.import_module(f"mint_lib.{folder}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def load_plugin(folder: str, name: str, *, base: type[T]) -> type[T]:
    """The one subclass of `base` that `mint_lib/<folder>/<name>.py` defines.

    Raises:
        RecipeError: there is no such file; the message names the nearest one.
        TypeError: the file does not define exactly one subclass with a nested pydantic `Config`.
    """
    names = list_plugins(folder)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise RecipeError(f"There is no {name!r} in mint_lib/{folder}.{hint} Choose one of: {', '.join(names)}.")
    module = importlib.import_module(f"mint_lib.{folder}.{name}")
    found = [
        item
        for _, item in inspect.getmembers(module, inspect.isclass)
        if issubclass(item, base) and item is not base and item.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one subclass of {base.__name__}, not {len(found)}")
    config = getattr(found[0], "Config", None)
    if not (
        isinstance(config, type) and issubclass(config, BaseModel) and config.model_config.get("extra") == "forbid"
    ):
        raise TypeError(f"{found[0].__qualname__} needs a nested pydantic Config with extra='forbid'")
    return found[0]


def parse_plugin_config(plugin: type[Any], values: dict[str, Any], *, where: str) -> Any:
    """`values` as the plug-in's own `Config`.

    Raises:
        RecipeError: a key is unknown or a value is not allowed; `where` is the recipe section it stands in.
    """
    try:
        return plugin.Config.model_validate(values)
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, plugin.Config, where=where)) from None


def describe_validation_error(error: ValidationError, model: type[BaseModel], *, where: str) -> str:
    """One line per problem: the key's place, what is wrong, and for an unknown key the nearest valid one."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join([where, *(str(part) for part in problem["loc"])]).strip(".")
        if problem["type"] == "extra_forbidden":
            allowed = _fields_at(model, problem["loc"][:-1])
            nearest = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"allowed here: {', '.join(sorted(allowed))}."
            lines.append(f"{place}: unknown key; {hint}")
        else:
            value = problem.get("input")
            shown = f" (given: {value!r})" if isinstance(value, (str, int, float, bool)) or value is None else ""
            lines.append(f"{place}: {problem['msg']}{shown}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that stands at `path` below `model`."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        nested = [
            item
            for item in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(item, type) and issubclass(item, BaseModel)
        ]
        if nested:
            model = nested[0]
    return list(model.model_fields)
