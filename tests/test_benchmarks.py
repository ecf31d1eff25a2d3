"""The benchmarks that write docs/results.md and docs/accuracy.md: what they measure, and their pages."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pow2quant import datasets, models
from pow2quant.config import DataConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import defaults  # noqa: E402
import held_back  # noqa: E402
import kinds  # noqa: E402
import methods as bench  # noqa: E402
import rules  # noqa: E402
import targets as target_bench  # noqa: E402
import tax  # noqa: E402
import vendors  # noqa: E402
from peers import compare, tools  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

CHAINS = ["none", "bias_correction"]
QUICK = ["--network", "digits-cnn", "--data", "digits", "--calibration-batches", "2", "--test-batches", "2"]
EMPTY = f"# Results\n\nAbove.\n\n{bench.BEGIN}{bench.END}\n\nBelow.\n"


def test_the_page_shows_the_rows() -> None:
    page = ROOT / "docs" / "results.md"
    assert page.read_text(encoding="utf-8") == bench.put(
        page, bench.rendered(bench.load(ROOT / "docs" / "results.json"))
    )


def test_the_page_on_the_default_shows_its_rows() -> None:
    page = ROOT / "docs" / "accuracy.md"
    rows = bench.load(ROOT / "docs" / "accuracy.json")
    assert page.read_text(encoding="utf-8") == bench.put(page, defaults.rendered(rows))


def test_the_default_is_measured_beside_what_it_must_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text(EMPTY, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["defaults.py", *QUICK, "--rows", str(rows), "--page", str(page)])
    defaults.main()
    found = bench.load(rows)
    assert {row.experiment.table for row in found} == {f"digits-cnn: {widths}" for widths in defaults.WIDTHS}
    for name, (weight, _, per_tensor) in defaults.WIDTHS.items():
        chains = [row.experiment.chain for row in found if row.experiment.table == f"digits-cnn: {name}"]
        assert chains == list(dict.fromkeys(["none", "bias_correction", defaults.default(weight, per_tensor)]))
        (line,) = (text for text in page.read_text().splitlines() if text.startswith(f"| digits-cnn | {name} |"))
        assert line.count(" dB") == 3
    alone = next(row for row in found if row.experiment.chain == "bias_correction" and row.experiment.weight_bits == 4)
    other = replace(alone.experiment, chain=defaults.default(4, False))
    assert defaults.worse([alone, replace(alone, experiment=other)]) == []
    low = replace(alone, experiment=other, accuracy=alone.accuracy - 2 * alone.interval - 1)
    assert len(defaults.worse([alone, low])) == 1


NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
"""


def test_images_that_are_held_back_become_halves_with_the_classes_of_the_float_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (30, 4))
    np.savez(tmp_path / "cifar10.npz", train_x=train, train_y=np.arange(30) % 10, test_x=test, test_y=np.zeros(4, int))
    (tmp_path / "net.py").write_text(NET)
    network = models.build(f"{tmp_path}/net.py:net")
    torch.save(network.state_dict(), tmp_path / "net.pt")
    given = ["--network", f"{tmp_path}/net.py:net", "--weights", str(tmp_path / "net.pt"), "--train", "20"]
    made = ["--data-path", str(tmp_path), "--held-back", "8", "--output", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["held_back.py", *given, *made])
    held_back.main()
    with np.load(tmp_path / "other" / "cifar10.npz") as archive:
        assert np.array_equal(archive["train_x"], train[:20])
        assert np.array_equal(archive["train_y"], np.arange(20) % 10)
        left, right = ([x.tobytes() for x in part] for part in (train[-8:, :, :16], train[-8:, :, 16:]))
        assert len(archive["test_x"]) == 40
        assert all(x[:, :16].tobytes() == left[i % 8] for i, x in enumerate(archive["test_x"]))
        partners = [right.index(x[:, 16:].tobytes()) for x in archive["test_x"]]
    assert all(partner != i % 8 for i, partner in enumerate(partners))
    assert len({(i % 8, partner) for i, partner in enumerate(partners)}) == 40
    data = datasets.load(DataConfig("cifar10", str(tmp_path / "other")))
    with torch.no_grad():
        assert all(torch.equal(network(images).argmax(1), labels) for images, labels in data.test)


def test_the_page_of_targets_shows_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = target_bench.load(ROOT / "docs" / "targets.json")
    for name, tables in (("targets.md", target_bench.summary), ("targets-measured.md", target_bench.rendered)):
        page = ROOT / "docs" / name
        assert page.read_text(encoding="utf-8") == target_bench.put(page, tables(rows))
    own, none = tmp_path / "rows.json", str(tmp_path / "none.md")
    quick = [*QUICK, "--targets", "generic-shift", "--rows", str(own), "--page", none, "--details", none]
    monkeypatch.setattr(sys, "argv", ["targets.py", *quick])
    target_bench.main()
    target_bench.main()  # what is there is not measured again
    (row,) = target_bench.load(own)
    assert (row.target, row.images, [run.differing for run in row.runs]) == ("generic-shift", 128, [0, 0])
    assert "| `generic-shift` |" in target_bench.rendered([row])
    default = replace(row, target="onnxruntime", accuracy=row.accuracy + 1)
    assert f"| 0 in 128; {row.accuracy:.2f} % (-1.00) |" in target_bench.summary([row, default])


def test_the_table_of_wrong_rules_shows_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, rows = ROOT / "docs" / "targets.md", rules.load(ROOT / "docs" / "rules.json")
    assert page.read_text(encoding="utf-8") == rules.put(page, rows)
    assert [row.executor for row in rows if row.right or not all(row.wrong.values())] == []
    assert {row.executor for row in rows} == set(rules.CASES)
    own = tmp_path / "rules.json"
    quick = ["--executors", "engine", "--rows", str(own), "--page", str(tmp_path / "none.md")]
    monkeypatch.setattr(sys, "argv", ["rules.py", *quick])
    rules.main()
    (row,) = rules.load(own)
    assert (row.target, row.right, row.wrong.keys()) == ("onnxruntime", 0, rules.CASES["engine"].nodes.keys())


def test_the_table_of_vendors_shows_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, rows = ROOT / "docs" / "targets.md", ROOT / "docs" / "vendors.json"
    assert page.read_text(encoding="utf-8") == vendors.put(page, vendors.load(rows))
    own = tmp_path / "rows.json"
    quick = [
        *QUICK,
        "--title",
        "digits",
        "--vendors",
        "onnxruntime",
        "--rows",
        str(own),
        "--page",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr(sys, "argv", ["vendors.py", *quick])
    vendors.main()
    (row,) = vendors.load(own)
    assert (row.vendor, row.images) == ("onnxruntime", 128)
    assert row.accuracy > 95
    assert row.sqnr_db > 20


def test_the_page_of_peers_shows_its_rows() -> None:
    page = ROOT / "docs" / "peers.md"
    assert page.read_text(encoding="utf-8") == compare.put(page, compare.load(ROOT / "docs" / "peers.json"))
    row = compare.Row("net", "4:8", "auto", "bias_correction", 9, 4, "top1", 90.0, 89.0, 20.0, 0.25, 0.5, "2026-11-28")
    other = replace(row, tool="brevitas 1.0", chain=None, sqnr_db=21.0, behind=None, error=None)
    nothing = replace(other, tool="esp-ppq 1.0", value=None, sqnr_db=None, reason="no weights of 4 bits")
    lines = compare.rendered([nothing, row, other]).splitlines()
    assert lines[0] == "### net, W4A8"
    assert [line for line in lines if line.endswith("2026-11-28 |")] == [
        "| brevitas 1.0 | 89.00 | 21.0 | 2026-11-28 |",
        "| **`auto`**: `bias_correction` | 89.00 | 20.0 (by hand +0.25 ± 0.50) | 2026-11-28 |",
        "| esp-ppq 1.0 | no weights of 4 bits | | 2026-11-28 |",
    ]


def test_what_a_tool_does_not_take_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(given: object, bits: int) -> None:
        raise KeyError("an operation")

    bench = compare.Bench("digits", {"ptq.calibration_batches": 1}, "8:8")
    for tool, reason in ((fails, "fails: KeyError"), (tools.esp_ppq, "no weights of 4 bits")):
        monkeypatch.setitem(compare.TOOLS, "tool", (tool, "torch"))
        bench.weight = 4
        row = bench.other("tool")
        assert (row.value, row.sqnr_db, row.reason) == (None, None, reason)


def test_the_page_on_powers_of_two_shows_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = ROOT / "docs" / "concepts" / "powers-of-two.md", tmp_path / "rows.json"
    assert page.read_text(encoding="utf-8") == bench.put(page, tax.rendered(tax.load(ROOT / "docs" / "tax.json")))
    quick = [*QUICK, "--title", "digits", "--rows", str(file), "--page", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["tax.py", *quick, "--widths", "3:8", "--chains", "none", "bias_correction"])
    tax.main()
    tax.main()  # what is there is not measured again
    plain, corrected = tax.load(file)
    assert [(row.chain, row.chosen, row.free_chosen) for row in (plain, corrected)] == [(c, c, c) for c in CHAINS]
    assert plain.images == 128
    assert plain.gain_db == pytest.approx(plain.sqnr_db - plain.free_db, abs=0.02)
    assert plain.gain_db + plain.gain_interval < 0  # at 3 bits 2^k is coarser, beyond doubt
    assert plain.difference == pytest.approx(plain.value - plain.free_value, abs=0.002)
    assert corrected.sqnr_db > plain.sqnr_db
    assert "| digits | W3A8 | none | top1 " in tax.rendered([plain])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=60)
    value, half = tax.jackknife(lambda kept: float(x[kept].mean()), len(x))
    assert value == pytest.approx(x.mean())
    assert half == pytest.approx(1.959964 * x.std(ddof=1) / 60**0.5)


def test_a_digit_is_found_with_its_place_and_class() -> None:
    _, test = kinds.detector_data()
    targets = test.tensors[1]
    logits = bench.torch.nn.functional.one_hot(targets[:, 3].long(), 10).movedim(-1, 1).float()
    perfect = bench.torch.cat([targets[:, :1] - 0.5, targets[:, 1:3], logits], 1)
    assert kinds.found(perfect, targets) == 100
    elsewhere = perfect.clone()
    elsewhere[:, 1] += 0.3  # more than one of a cell's eight pixels
    assert kinds.found(elsewhere, targets) == 0
    assert kinds.found(perfect - 1, targets) == 0


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ("none", "none"),
        ("output_mse+bias_correction", "output_mse, bias_correction"),
        ("gpfq: {lambda_: 2, regularizer: L0}", "gpfq: {lambda_: 2, regularizer: L0}"),
    ],
)
def test_chains_are_written_one_way(chain: str, expected: str) -> None:
    found = bench.written(bench.methods(chain))
    assert found == bench.written(bench.methods(found)) == expected


def test_a_chain_that_continues_another_is_what_it_is_alone() -> None:
    """What is kept comes before the first random number; the seed still decides what follows."""
    x = bench.torch.rand(16, 1, 8, 8, generator=bench.torch.Generator().manual_seed(0))
    model, plan = bench.models.digits_cnn().eval(), bench.QuantPlan.default(3, 8)
    chain = "output_mse, adaround: {iterations: 3}, bias_correction"
    with bench.torch.random.fork_rng(devices=[]):
        shared = bench.Chains(model, [x])
        shared.simulation("output_mse, adaround: {iterations: 3}", plan)
        assert [key[2] for key in shared._kept] == ["none", "output_mse"]
        found, alone, other = (
            chains.simulation(chain, plan, seed=seed)[0]
            for chains, seed in ((shared, 1), (bench.Chains(model, [x]), 1), (shared, 2))
        )
    names = [name for name, _ in found.network.named_parameters()]
    assert found.encodings() == alone.encodings()
    assert all(bench.torch.equal(found.parameter(name), alone.parameter(name)) for name in names)
    assert not all(bench.torch.equal(found.parameter(name), other.parameter(name)) for name in names)


def test_what_is_measured_and_that_it_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of an untrained network: no method at 2 bits does harm, and a second call adds only what is not there."""
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text(EMPTY, encoding="utf-8")

    def call(*more: str) -> list[bench.Row]:
        files = ["--rows", str(rows), "--page", str(page)]
        monkeypatch.setattr(sys, "argv", ["methods.py", *QUICK, *files, *more])
        with bench.torch.random.fork_rng(devices=[]):
            bench.torch.manual_seed(0)
            bench.main()
        return bench.load(rows)

    first = call("--widths", "2:4", "8:float")
    assert [row.experiment.activation_bits for row in first] == [4, None]
    coarse, fine = first
    assert coarse.sqnr_db + 20 < fine.sqnr_db
    assert coarse.zeros > fine.zeros
    assert coarse.difference == pytest.approx(coarse.accuracy - coarse.float_accuracy, abs=0.002)
    assert 0 < coarse.interval < 100

    chain = "adaround: {iterations: 2}"
    both = call("--widths", "2:4", "--chains", "none", chain, "output_mse", "--seeds", "0", "1")
    assert both[:2] == first
    assert [(row.experiment.chain, row.experiment.seed) for row in both[2:]] == [
        (chain, 0),
        (chain, 1),
        ("output_mse", None),
    ]
    shown = page.read_text(encoding="utf-8")
    assert shown.startswith("# Results\n\nAbove.\n\n")
    assert shown.endswith("\n\nBelow.\n")
    assert "## digits-cnn: W2A4\n" in shown
    assert "## digits-cnn: W8, activations float\n" in shown
    assert f"| `{chain}` | 0, 1 |" in shown
    assert "| `output_mse` | any |" in shown
    assert shown == bench.put(page, bench.rendered(both)), "written again, nothing changes"
