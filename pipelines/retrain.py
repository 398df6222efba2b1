"""Retraining: what an earlier run of a recipe left that a run on grown data can go on from.

Goes in: a recipe, a version of cases and the store. Comes out: the recipe with its section `retrain` filled.
"""

from collections.abc import Iterator

from mint_lib.errors import InvalidInput, MintError
from mint_lib.recipe import Recipe, Retrain
from mint_lib.records import Kind, Reference
from mint_lib.store import Store
from mint_lib.teacher import check_previous


def prepare_retraining(recipe: Recipe, cases_text: str, *, store: Store) -> Recipe:
    """`recipe` on the version of cases that `cases_text` names, with the rankings and pairs of what it grew from.

    Raises:
        InvalidInput: it is not a version of cases.
        NotFound: there is no such version.
    """
    cases = store.resolve(cases_text)
    if cases.kind != "cases":
        raise InvalidInput(f"{cases} is not a version of cases. Name one: cases/NAME or cases/NAME@v000002.")
    ancestors = list_ancestors(cases, store=store)
    made = _made_from(ancestors, "rankings", recipe.teacher.name, store)
    rankings = next((found for found in made if _fits(recipe, found, cases, store)), None)
    preferences = next(_made_from(ancestors, "preferences", recipe.preferences.name, store), None)
    retrain = Retrain(
        cases=str(cases),
        rankings=str(rankings) if rankings else None,
        preferences=str(preferences) if preferences else None,
    )
    return recipe.model_copy(update={"retrain": retrain})


def list_ancestors(cases: Reference, *, store: Store) -> list[Reference]:
    """The versions that `cases` grew from and that are still there, the nearest first: its shards lie in them."""
    written_in = {entry.stored_in for entry in store.files(cases).values()}
    versions = [version for version in store.list_versions("cases", cases.name) if version in written_in]
    return [store.resolve(f"cases/{cases.name}@{version}") for version in reversed(versions)]


def _made_from(ancestors: list[Reference], kind: Kind, name: str, store: Store) -> Iterator[Reference]:
    """Versions of `kind/name` made from one of the ancestors, the newest first."""
    for version in reversed(store.list_versions(kind, name)):
        reference = store.resolve(f"{kind}/{name}@{version}")
        if Reference.parse(store.record(reference).inputs["cases"]) in ancestors:
            yield reference


def _fits(recipe: Recipe, rankings: Reference, cases: Reference, store: Store) -> bool:
    try:
        check_previous(recipe.teacher, store=store, cases=cases, previous=rankings)
    except MintError:
        return False
    return True
