"""The README's examples run as they are written, and its tables are those of the committed results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rtl.report import comparison, markdown, read_results, summary

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TABLES = re.findall(r"<!-- (table|published): ([\w-]+) -->\n(.*?)<!-- end -->", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_as_written(number, tmp_path):
    file = tmp_path / "example.py"
    file.write_text(EXAMPLES[number])
    done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_is_an_example_of_each_package_and_of_both_together():
    assert len(EXAMPLES) == 3
    assert ["import rtl\n" in example for example in EXAMPLES] == [True, True, False]
    assert ["import rtl_kernels" in example for example in EXAMPLES] == [False, True, True]


@pytest.mark.parametrize(("kind", "recipe", "text"), TABLES, ids=[f"{kind} {recipe}" for kind, recipe, _ in TABLES])
def test_table_is_that_of_the_committed_results(kind, recipe, text):
    results, _ = read_results(ROOT / "results" / recipe)
    assert results["recipe"] == recipe
    assert text == (markdown(summary(results["rows"])) if kind == "table" else comparison(results))


def test_every_table_of_a_recipe_is_looked_at():
    marks = re.findall(r"<!-- (table|published): (.*) -->", README)
    assert marks == [(kind, recipe) for kind, recipe, _ in TABLES]


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_what_the_readme_links_to_exists(target):
    assert (ROOT / target).is_file()
