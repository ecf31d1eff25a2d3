"""The pages of sweeps, comparisons and searches: every point with its interval, and no drama from small changes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pow2quant.errors import FileFormatError
from pow2quant.report import forest, pages, parallel, study, trade
from pow2quant.report.points import FILE, Point

HOSTILE = "<script>alert(1)</script>$x_1$"


def row(trial: int, bits: int, change: float, half: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "trial": trial,
        "state": "complete",
        "quantization.weight.bitwidth": bits,
        "network": "net",
        "dataset": "digits",
        "metric": "top1",
        "unit": "%",
        "higher_is_better": True,
        "original": 90.0,
        "quantized": 90.0 + change,
        "change": change,
        "sqnr_db": 3.0 * bits,
        "change_low": change - half,
        "change_high": change + half,
        "sample": "ab",
        "images": 450,
        "of_images": 450,
        "classes": 10,
        "duration_seconds": 1.5,
        "error": "",
        **more,
    }


def written(folder: Path, rows: list[dict[str, Any]], **more: Any) -> str:
    axes = ["quantization.weight.bitwidth", "method"]
    document = {"study": "mine", "trials": len(rows), "axes": axes, "best": None, "rows": rows, **more}
    (folder / "study.json").write_text(json.dumps(document))
    assert pages.rebuild(folder) == [folder / "report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


def names(page: str) -> list[str]:
    return [text(head) for head in re.findall(r"<th scope=\"row\">(.*?)</th>", page)]


def text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", "", page).split())


def test_a_study_has_its_best_first_and_says_which_may_be_as_good(tmp_path: Path) -> None:
    failed = {"trial": 3, "state": "failed", "error": "no such thing", "quantization.weight.bitwidth": 1}
    page = written(tmp_path, [row(0, 2, -3.0), row(1, 4, -0.2), row(2, 8, 0.1), failed])
    assert names(page) == ["bitwidth 8", "bitwidth 4", "bitwidth 2", "trial 3"]
    said = text(page)
    assert "Best top-1: bitwidth 8, 90.10 %, +0.10 (-0.40 to +0.60) points against float." in said
    assert "1 of the other 2 may be as good: its 95 % interval reaches this change." in said
    assert "best.yaml is the configuration of bitwidth 8" in said
    assert "no such thing" in said
    assert page.count('class="good-row"') == 2
    assert page.count('class="lost"') == 1, "the interval of -3 points ends below 0"


def test_equal_points_are_in_the_order_of_their_noise(tmp_path: Path) -> None:
    assert names(written(tmp_path, [row(i, bits, 0.0) for i, bits in enumerate((4, 8, 6))])) == [
        f"bitwidth {bits}" for bits in (8, 6, 4)
    ]


def test_trials_on_other_images_are_compared_by_their_change(tmp_path: Path) -> None:
    page = text(written(tmp_path, [row(0, 8, -1.0), row(1, 4, -0.5, original=80.0, quantized=79.5, sample="cd")]))
    assert "Best change against float: bitwidth 4, -0.50 (-1.00 to +0.00) points." in page
    assert "their values cannot be compared" in page


def test_a_smaller_error_is_better(tmp_path: Path) -> None:
    mae = {"metric": "mae", "unit": "", "higher_is_better": False, "original": 0.5}
    rows = [
        row(0, 2, 0.4, 0.1, **mae, quantized=0.9),
        row(1, 4, 0.01, 0.02, **mae, quantized=0.51),
    ]
    page = written(tmp_path, rows)
    assert "Best mae: bitwidth 4, 0.51, +0.01 (-0.01 to +0.03) against float." in text(page)
    assert "The 95 % interval of no other trial reaches this change." in text(page)
    assert page.count('class="lost"') == 1


def test_a_metric_without_an_interval_says_so(tmp_path: Path) -> None:
    none = {"metric": "miou", "change_low": None, "change_high": None}
    page = text(written(tmp_path, [row(i, bits, -1.0 / bits, **none) for i, bits in enumerate((2, 8))]))
    assert "mIoU is not a mean over images, so it has no interval" in page
    assert "may be as good" not in page


def test_what_is_no_number_is_shown_and_not_drawn(tmp_path: Path) -> None:
    nan = dict.fromkeys(("quantized", "change", "change_low", "change_high"), float("nan"))
    page = written(tmp_path, [row(0, 2, 0.0) | nan, row(1, 4, -0.5), row(2, 8, 0.0)])
    assert names(page) == ["bitwidth 8", "bitwidth 4", "bitwidth 2"]
    assert "Parallel coordinates" in page
    assert names(written(tmp_path, [row(i, i, 0.0) | nan for i in (2, 4)])) == ["bitwidth 4", "bitwidth 2"]
    assert text(written(tmp_path, [{"trial": 0, "state": "failed", "error": "broken"}])).count("broken") == 1


def test_without_targets_the_noise_is_compared(tmp_path: Path) -> None:
    none = dict.fromkeys(("original", "change", "change_low", "change_high")) | {"metric": "sqnr", "unit": "dB"}
    page = written(tmp_path, [row(i, bits, 0.0, quantized=6.0 * bits) | none for i, bits in enumerate((2, 8))])
    assert "Best SQNR: bitwidth 8, 48.00 dB." in text(page)
    assert "Parallel coordinates" in page


def test_a_page_loads_nothing_and_escapes_what_it_shows(tmp_path: Path) -> None:
    page = written(tmp_path, [row(i, 2 + i, -1.0 - i, method=HOSTILE + str(i)) for i in range(3)])
    assert HOSTILE not in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "default-src 'none'" in page
    labels = re.findall(r'aria-label="([^"]*)"', page)
    assert {"Trials", "Parallel coordinates: a line for every trial through its settings and results"} <= {*labels}


def test_a_study_links_to_its_runs_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "runs" / "0001-8").mkdir(parents=True)
    (tmp_path / "runs" / "0001-8" / "report.html").write_text("")
    runs = [row(i, bits, 0.0, run=f"elsewhere/runs/000{i}-{bits}", agrees=True) for i, bits in enumerate((2, 8))]
    page = written(tmp_path, runs)
    assert re.findall(r'href="([^#"][^"]*)"', page) == ["runs/0001-8/report.html"]
    assert "No output element differs in any run" in page


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"rows": 3}')
    with pytest.raises(FileFormatError, match=r"study\.json"):
        pages.rebuild(tmp_path)
    with pytest.raises(FileFormatError, match=r"empty/report\.json: cannot be read"):
        pages.rebuild(tmp_path / "empty")


def cell(widths: str, method: str, change: float, network: str = "net") -> dict[str, Any]:
    return {
        "network": network,
        "widths": widths,
        "method": method,
        "seeds": 2,
        "failed": 0,
        "metric": "top1",
        "unit": "%",
        "higher_is_better": True,
        "original": 90.0,
        "value": 90 + change,
        "spread": 0.25,
        "sqnr_db": 20.0,
        "seconds": 3.0,
        "change": change,
        "change_low": change - 0.5,
        "change_high": change + 0.5,
        "images": 320,
        "of_images": 450,
        "classes": 10,
    }


def test_a_comparison_names_the_best_of_each_network(tmp_path: Path) -> None:
    cells = [cell("W4A8", "gpfq", -0.5), cell("W4A8", "none", -2.0), cell("W8A8", "none", -4.0, "other")]
    (tmp_path / "comparison.json").write_text(json.dumps({"cells": cells, "errors": ["it broke"]}))
    pages.rebuild(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert names(page) == ["net W4A8 gpfq", "net W4A8 none", "other W8A8 none", "a trial"]
    assert "net: Best top-1: net W4A8 gpfq, 89.50 ± 0.25 %" in text(page)
    assert "it broke" in page


def plan(kind: str, size: float, accuracy: float, interval: list[float] | None, **more: Any) -> dict[str, Any]:
    costs = {"size": size, "average_bits": 3.0, "bops": 1e6 * size}
    known = {"change": accuracy - 99.0, "change_interval": interval}
    return {"kind": kind, "accuracy": accuracy, **costs, **known, "chosen": False, "on_front": True, **more}


def test_a_search_shows_its_plans_with_their_costs(tmp_path: Path) -> None:
    search = {
        "objective": "size",
        "constraints": ["accuracy_drop=1%"],
        "sensitivity": "kl",
        "evaluated": "all 450 images",
        "metric": "top1",
        "unit": "%",
        "higher_is_better": True,
        "float_accuracy": 99.0,
        "points": [
            plan("uniform 2", 1000, 95.0, [-6.0, -2.0]),
            plan("found", 1500, 98.5, [-1.0, 0.0], chosen=True),
            plan("uniform 8", 4000, 99.0, [-0.4, 0.4]),
        ],
    }
    (tmp_path / "search.json").write_text(json.dumps(search))
    assert pages.rebuild(tmp_path) == [tmp_path / "search.html"]
    page = (tmp_path / "search.html").read_text(encoding="utf-8")
    assert names(page) == ["uniform 2", "plan 2 (chosen)", "uniform 8"]
    assert "Chosen: plan 2, 98.50 % (change -0.50 (-1.00 to +0.00)): plan.yaml" in text(page)
    assert [title for title in re.findall(r"<h2[^>]*>([^<]*)", page) if "against" in title] == [
        "top-1 against packed weights, KiB",
        "top-1 against bit operations, M",
    ]
    for name in ("uniform 2", "plan 2 (chosen)", "uniform 8"):
        assert page.count(f">{name}</text>") == 3, "beside its point in each figure, and at its line"


def point(change: float, half: float = 0.5, unit: str = "%", name: str = "p", size: float = 10.0) -> Point:
    return Point(name, "top1", unit, True, 90.0, 90 + change, change, change - half, change + half, facts={FILE: size})


changes = st.floats(-90, 9, allow_nan=False).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(changes, st.floats(0, 20)), min_size=1, max_size=12), st.sampled_from(["%", "dB", ""]))
def test_drawings_stay_on_an_axis_that_makes_small_changes_small(found: list[tuple[float, float]], unit: str) -> None:
    drawn = [point(change, half, unit) for change, half in found]
    axis = forest.axis_of(drawn)
    assert axis is not None
    assert axis.low < 0 < axis.high
    for p, bar in zip(drawn, forest.bars(drawn, axis), strict=True):
        assert bar is not None
        assert 0 <= bar.low <= bar.middle <= bar.high <= forest.WIDTH
        if p.change is not None and unit and abs(p.change) <= 0.2:
            assert abs(bar.middle - axis.at(0)) <= forest.WIDTH / 10
    assert all(0 <= x <= forest.WIDTH for x, _ in axis.ticks)
    assert 1 <= len(axis.ticks) <= 6


def test_one_that_lies_far_out_does_not_shrink_the_others() -> None:
    drawn = [point(-90.0), *(point(-0.1 * i) for i in range(5))]
    axis = forest.axis_of(drawn)
    assert axis is not None
    bars = list(forest.bars(drawn, axis))
    assert [bar and bar.beyond for bar in bars] == [-1, 0, 0, 0, 0, 0]
    assert all(bar and bar.high - bar.low > 5 for bar in bars[1:])


def test_figures_take_any_number_of_points_and_equal_values() -> None:
    for count in (2, 60):
        drawn = [point(0.0, name=f"run {i}", size=10.0 + i) for i in range(count)]
        assert trade.draw(drawn, FILE, "change").startswith("<svg")
        columns = [parallel.column("bits", [4] * count), parallel.column("method", ["a", None] * (count // 2))]
        assert parallel.draw(columns, drawn, "change", "change", set()).startswith("<svg")


def test_numbers_stand_by_their_size_and_words_evenly() -> None:
    assert parallel.column("k", [2, 4, 8]).places == pytest.approx([0.06, 0.06 + 0.88 / 3, 0.94])
    assert parallel.column("rate", [1e-5, 1e-3, 1e-1]).places == pytest.approx([0.06, 0.5, 0.94])
    assert parallel.column("method", ["a", "b", None]).places == [0.75, 0.25, None]
    assert parallel.column("per channel", [True, False]).places == [0.75, 0.25]


def test_more_points_than_a_page_holds_are_left_out_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MOST", 3)
    page = written(tmp_path, [row(i, i + 2, -0.1 * i) for i in range(5)])
    assert "The first 3 of 5 are shown; results.csv has all." in text(page)
    assert len(names(page)) == 3
