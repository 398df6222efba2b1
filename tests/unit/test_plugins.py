import pytest
from pydantic import BaseModel

from mint_lib.data import DataSource
from mint_lib.errors import RecipeError
from mint_lib.plugins import list_plugins, load_plugin, parse_plugin_config
from mint_lib.reporting.task import EvaluationTask
from mint_lib.teacher import Teacher
from mint_lib.training.method import AlignmentMethod

FOLDERS = {
    "data_sources": DataSource,
    "teachers": Teacher,
    "alignment_methods": AlignmentMethod,
    "evaluation_tasks": EvaluationTask,
}
EVERY_PLUGIN = [(folder, name) for folder in FOLDERS for name in list_plugins(folder)]


@pytest.mark.parametrize(("folder", "name"), EVERY_PLUGIN)
def test_every_plugin_is_one_class_with_a_strict_documented_config(folder, name):
    plugin = load_plugin(folder, name, base=FOLDERS[folder])
    assert plugin.__doc__
    undocumented = [key for key, field in plugin.Config.model_fields.items() if not field.description]
    assert undocumented == []


def test_plugin_with_a_misspelt_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'ontology'"):
        load_plugin("teachers", "ontolgy", base=Teacher)


@pytest.mark.parametrize("name", ["os", "..plugins", "ontology.Config", ""])
def test_plugin_named_by_anything_but_a_file_is_refused(name):
    with pytest.raises(RecipeError, match="There is no"):
        load_plugin("teachers", name, base=Teacher)


def test_plugin_config_with_a_misspelt_key_is_refused_with_the_nearest():
    class Plugin:
        class Config(BaseModel, extra="forbid"):
            learning_rate: float = 0.1

    with pytest.raises(RecipeError, match=r"teacher\.config\.learning_rat: unknown key; did you mean 'learning_rate'"):
        parse_plugin_config(Plugin, {"learning_rat": 1}, where="teacher.config")
