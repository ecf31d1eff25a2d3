"""Every recipe runs on the digits, and all executors give the same bits."""

import json
from pathlib import Path

import pytest
import yaml

from pow2quant import models
from pow2quant.cli import main

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
BRIEF = {"adaround", "qdrop"}


@pytest.fixture(scope="module")
def weights() -> Path:
    return models.DIGITS_WEIGHTS


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_keeps_its_digits_and_its_bits(
    recipe: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load(recipe.read_text())
    for method in document.get("ptq", {}).get("methods", ()):
        for name, parameters in method.items() if isinstance(method, dict) else ():
            if name in BRIEF:
                parameters["iterations"] = 60
    if "search" in document:
        document["search"]["points"] = 2
    if "training" in document:
        document["training"]["epochs"] = 2  # shows that it runs, no accuracy
    short = tmp_path / "recipe.yaml"
    short.write_text(yaml.safe_dump(document))
    command = "search" if "search" in document else "qat" if "training" in document else "ptq"
    arguments = [command, "--config", str(short), "--weights", str(weights), "--output", str(tmp_path / "run")]
    limits = ["--max-calibration-batches", "4", "--max-eval-batches", "3", "--quiet", "--json"]
    assert main([*arguments, *limits]) == 0  # 1 where an element differs
    report = json.loads(capsys.readouterr().out)
    assert [a["differing"] for a in report["validation"]] == [0] * len(report["validation"])
    assert len(report["validation"]) >= 6
    assert report["final_accuracy"] >= report["initial_accuracy"] - 4 or "training" in document


def test_every_recipe_is_documented() -> None:
    page = (ROOT / "docs" / "howto" / "recipes.md").read_text()
    assert len(RECIPES) >= 6
    for recipe in RECIPES:
        assert f"`{recipe.stem}`" in page
        assert recipe.name in recipe.read_text()  # the command that uses it stands in its head
