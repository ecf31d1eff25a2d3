"""The documentation: what it shows runs, what it says of flags and keys is so, the site builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from pow2quant.cli import application
from pow2quant.errors import ConfigError
from tests import documents

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *PAGES]
RUNNING = [page for page in PAGES if any(b.language in documents.RUN for b in documents.blocks(page))]
SNIPPETS_RUN_BY = {
    "examples/own_network.py": "tests/test_examples.py",
    "examples/aimet_script.py": "tests/test_examples.py",
    "examples/check_onnx.py": "tests/test_examples.py",
    "examples/plugin_backend/pow2quant_numpy.py": "tests/conformance/test_example.py",
    "examples/plugin_backend/test_it.py": "tests/conformance/test_example.py",
}
MOST_NOT_EXECUTED = 6
GALLERY = (DOCS / "gallery.md", DOCS / "figures.md")
COMMANDS = [c.name or c.callback.__name__ for c in application().registered_commands if c.callback]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def benchmarks_flags() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    return {flag for source in sources for flag in re.findall(r'"(--[a-z-]+)', source)}


@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    expected = [b for b in documents.blocks(page) if b.language in documents.RUN or b.printed_by]
    left_out = [b for b in expected if b.skipped or (b.snippet and b.language != "yaml")]
    assert documents.run(page) == len(expected) - len(left_out)
    assert {b.snippet for b in left_out if b.snippet} <= SNIPPETS_RUN_BY.keys()


@pytest.mark.parametrize(
    "block",
    [
        "python\nassert False",
        "bash\npow2quant list --no-such-flag",
        "bash\npow2quant validate nowhere  # exit status 1",
        "bash\nls",
        "bash\npython benchmarks/methods.py --no-such-flag",
        "yaml\nquantisation: {}",
        "yaml\n# study.yaml\ngrids: []",
        "yaml\nbase: no-such-target",
    ],
)
def test_a_wrong_block_is_found(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Wrong\n\n```{block}\n```\n", encoding="utf-8")
    with pytest.raises((AssertionError, ConfigError)):
        documents.run(page)
    page.write_text(f"# Wrong\n\n<!-- not executed: it is wrong -->\n```{block}\n```\n", encoding="utf-8")
    assert documents.run(page) == 0


def test_what_a_command_is_said_to_print_is_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    said = "<!-- lines of: pow2quant targets litert -->\n```text\n{}\n```\n"
    line = documents._printed(["pow2quant", "targets", "litert"]).splitlines()[0]
    page.write_text(said.format(line), encoding="utf-8")
    assert documents.run(page) == 1
    page.write_text(said.format("another line"), encoding="utf-8")
    with pytest.raises(AssertionError):
        documents.run(page)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_no_command_stands_in_a_block_that_is_not_run(page: Path) -> None:
    for block in documents.blocks(page):
        if block.language not in documents.RUN and not block.skipped:
            assert not re.search(r"^(pow2quant|python|make|pip|git|npm) ", block.text, re.MULTILINE), block.line


def test_few_blocks_are_not_executed_and_their_flags_exist() -> None:
    skipped = [(page, b) for page in TEXTS for b in documents.blocks(page) if b.skipped]
    others = [(name(page), b.line) for page, b in skipped if page not in GALLERY]
    assert len(others) <= MOST_NOT_EXECUTED, others
    for page, block in skipped:
        assert len(block.skipped or "") > 10, f"{name(page)}, line {block.line}: no reason"
        for words, _ in documents.commands(block):
            if words[0] == "pow2quant":
                assert documents.unknown_flags(words) == [], f"{name(page)}, line {block.line}"


def test_the_gallery_has_the_page_of_each_of_its_commands() -> None:
    gallery = module(DOCS / "gallery.py")
    names = [name for name, _ in gallery.commands()]
    assert sorted(names) == sorted(path.stem for path in (DOCS / "gallery").iterdir())
    assert {"where.py", "ternary.yaml", "vit.py"} <= {name for name, _ in gallery.files()}
    given = {name for name, _ in gallery.files()}
    assert sum(given.issuperset(gallery.needed(words)) for _, words in gallery.commands()) == 5, "without --files"
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for name in names:
        page = (DOCS / "gallery" / f"{name}.html").read_text(encoding="utf-8")
        assert f"(gallery/{name}.html)" in text
        assert "default-src 'none'" in page, "it loads nothing"
        assert not re.search(r"/tmp/|/home/|/root/|\w:\\\\", page), "it names no folder of a machine"
        assert len(page) < 400_000


def test_the_page_on_figures_names_the_command_of_every_measured_table() -> None:
    measured = dict(module(DOCS / "gallery.py").measurements())
    scripts = {name: {word for words in lines for word in words} for name, lines in measured.items()}
    for page in PAGES:
        if page.name not in {"figures.md", "extending.md"}:
            text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
            used = re.findall(r"benchmarks/(?:peers/)?\w+\.py", text)
            programs = {path for path in used if "ArgumentParser" in (ROOT / path).read_text(encoding="utf-8")}
            assert programs <= scripts.get(page.relative_to(DOCS).with_suffix("").as_posix(), set()), page
    rows = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    for row in rows:
        width = f"{row['weight_bits']}:{row['activation_bits'] or 'float'}"
        needed = {row["network"], row["chain"], width}
        assert any(needed <= set(words) for words in measured["results"]), needed
    titles = {row["network"] for row in json.loads((DOCS / "accuracy.json").read_text(encoding="utf-8"))}
    assert titles <= scripts["accuracy"]


@pytest.mark.parametrize("path", sorted(set(SNIPPETS_RUN_BY.values())))
def test_included_code_is_run_elsewhere(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for snippet in (s for s, test in SNIPPETS_RUN_BY.items() if test == path):
        assert Path(snippet).name in text or Path(snippet).parent.name in text, snippet


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_commands_and_flags_in_sentences_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    anywhere = {flag for command in COMMANDS for flag in documents.flags(command)} | benchmarks_flags()
    for line in prose.splitlines():
        for code in re.findall(r"`([^`]+)`", line):
            words = shlex.split(code) if code.startswith("pow2quant ") else []
            if len(words) > 1 and words[1].islower():
                announced = "arrives" in line
                assert announced != (words[1] in COMMANDS), f"{name(page)}: {code} is there or arrives, not both"
                assert announced or documents.unknown_flags(words) == [], f"{name(page)}: {code}"
            if code.startswith("--"):
                assert re.split(r"[ =]", code)[0].replace("_", "-") in anywhere, f"{name(page)}: {code}"


def test_the_way_to_a_first_verdict_is_read_and_typed_in_five_minutes() -> None:
    """At 200 words and 200 characters a minute: slow readers, slow typists, nothing pasted."""
    page = (DOCS / "howto" / "five-minutes.md").read_text(encoding="utf-8")
    steps = page[: page.index("## How long it takes")]
    words = len(re.findall(r"[^\W_]+(?:['./:_-]+[^\W_]+)*", steps))
    typed = sum(len(b.text.strip()) for b in documents.blocks(DOCS / "howto" / "five-minutes.md"))
    seconds = round(60 * (words + typed) / 200)
    assert seconds < 300
    said = re.sub(r"\s+", " ", page)
    assert f"{words} words to read, code included, and {typed} characters to type" in said
    assert f"{seconds // 60} minutes {seconds % 60} seconds at 200 words and 200 characters a minute" in said


def test_the_site_builds_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Strict: a page that the navigation lacks, a link or an anchor that leads nowhere, are warnings too."""
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mkdocs")] == []
    assert (tmp_path / "site" / "search" / "search_index.js").stat().st_size > 10_000  # search works from disk
    pages = {p.relative_to(DOCS).with_suffix(".html") for p in PAGES}
    assert pages <= {p.relative_to(tmp_path / "site") for p in (tmp_path / "site").rglob("*.html")}
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        foreign = re.findall(
            r"<(?:script|img|iframe)[^>]*src=\"(https?:[^\"]+)|<link[^>]*stylesheet[^>]*href=\"(http[^\"]+)", text
        )
        assert foreign == [], f"{page.name} loads from elsewhere"
        assert "<!-- generated" not in text
        assert "--8&lt;--" not in text


def test_the_command_line_page_has_every_flag() -> None:
    hooks = module(DOCS / "hooks.py")
    for section in hooks.command_line().split("## ")[1:]:
        command = section.split("\n")[0]
        assert documents.flags(command) - {"--help"} == set(re.findall(r"^\| `(--[a-z-]+)`", section, re.MULTILINE))


def test_the_configuration_page_has_every_key() -> None:
    from pow2quant import config

    written = module(DOCS / "hooks.py").configuration()
    for line in config.dump(config.RunConfig()).splitlines():
        key = line.strip().partition(":")[0]
        if not line.startswith("-") and key not in config.ROLES and not line.strip().startswith("-"):
            assert re.search(rf"`[a-z.]*{key}`|## {key}", written), key


def test_the_files_page_has_every_key_of_a_report(tmp_path: Path) -> None:
    from pow2quant.cli import main

    assert main(["ptq", "--output", str(tmp_path / "run"), "--max-eval-batches", "1", "--quiet"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    detail = report["final_quantization_details"]["fc.weight"]
    keys = {*report, *report["validation"][0], *report["certificate"], *report["certificate"]["layers"][0], *detail}
    assert sorted(key for key in keys if f"`{key}`" not in page) == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if f"`{p.name}`" not in page) == []


def test_every_key_and_every_method_has_its_meaning() -> None:
    from pow2quant import config, plugins

    hooks = module(DOCS / "hooks.py")
    sections = [f.type for f in dataclasses.fields(config.RunConfig) if str(f.type).endswith("Config")]
    assert len(sections) >= 7
    for cls in (config.TensorSpec, *(getattr(config, str(section)) for section in sections)):
        roles = {*config.ROLES} if cls is config.QuantizationConfig else set()  # they have a table of their own
        assert set(hooks.meanings(cls)) == {f.name for f in dataclasses.fields(cls)} - roles, cls
    assert list(hooks.USE) == list(plugins.TABLES["methods"])


@pytest.mark.parametrize("picture", ["shift", "lattice", "placement", "zero-points"])
def test_pictures_are_what_the_script_draws(picture: str) -> None:
    drawn = module(DOCS / "draw.py").PICTURES[picture]()
    assert (DOCS / "pictures" / f"{picture}.svg").read_text(encoding="utf-8") == drawn
