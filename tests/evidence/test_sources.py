"""What counts as a part of a recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from headway.evidence.recipes import dhsa, posir
from headway.evidence.sources import own_files, source_digest


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder / "recipe.py"


def digest(file):
    spec = importlib.util.spec_from_file_location("a_recipe", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return source_digest(module.run)


BODY = "def run():\n    from folder._near import x\n"


def test_private_modules_count_through_each_other_and_no_others(tmp_path):
    file = written(tmp_path, recipe=BODY, _near="from folder import _far\n", _far="y = 1\n", _idle="", public="")
    assert {f.name for f in own_files(file)} == {"recipe.py", "_near.py", "_far.py"}


def test_a_change_far_away_changes_the_digest(tmp_path):
    file = written(tmp_path, recipe=BODY, _near="from folder import _far\n", _far="y = 1\n", _idle="")
    before = digest(file)
    written(tmp_path, _idle="z = 1\n")
    assert digest(file) == before
    written(tmp_path, _far="y = 2\n")
    assert digest(file) != before


def test_the_modules_of_real_recipes_are_found():
    for recipe, parts in ((dhsa, {"_dhsa_text", "_dhsa_planted"}), (posir, {"_posir_claims", "_posir_toy"})):
        assert parts <= {f.stem for f in own_files(Path(recipe.__file__))}


def test_a_function_without_a_file_has_no_digest():
    assert source_digest(len) is None
