import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TREE = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
MODULES = [
    path
    for folder in ("mint_lib", "components", "pipelines")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_stands_in_the_tree(path):
    assert re.search(rf"(?<![\w/]){re.escape(path.name)}(?!\w)", TREE)


def test_every_file_of_the_tree_exists():
    names = {path.name for path in ROOT.rglob("*") if ".git/" not in str(path)}
    assert set(re.findall(r"[\w-]+\.(?:py|yaml|html|txt)", TREE)) <= names


def test_every_test_that_the_readme_names_exists():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in sources, name
    for path in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)`", README):
        assert list((ROOT / "tests").rglob(pathlib.Path(path).name)), path


def test_every_recipe_stands_in_the_readme():
    for path in (ROOT / "pipelines" / "recipes").glob("*.yaml"):
        assert f"`{path.name}`" in README


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"sed -n '(.+)' README.md", script).group(1)
    found = subprocess.run(["sed", "-n", pattern, str(ROOT / "README.md")], capture_output=True, text=True, check=True)
    assert found.stdout.count("\n") == 1
    assert found.stdout.rstrip().endswith("pytest")
