"""Cluster affine correction by hand and in onnxruntime; the analyser's files, numbers and memory."""

from __future__ import annotations

import csv
import json
import tracemalloc
from math import comb
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from pow2quant import models
from pow2quant.cli import main
from pow2quant.errors import DataError, FileFormatError
from pow2quant.logits import cat, fold
from pow2quant.logits.analysis import KINDS, Analysis, Subject, calibration_error
from pow2quant.logits.cat import Correction
from pow2quant.logits.choose import best, candidates, judged
from pow2quant.logits.paired import interval, paired
from pow2quant.study import correction as corrections
from pow2quant.validation import ort


def floats(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_least_squares_by_hand() -> None:
    """Class 0: f = 2 q + 1 exactly; class 1: q 0, 1, 2 and f 0, 0, 3 has the slope 3/2; class 2 is constant."""
    q = floats([0, 0, 5], [1, 1, 5], [2, 2, 5])
    f = floats([1, 0, 6], [3, 0, 7], [5, 3, 8])
    gain, offset = cat.least_squares(q, f)
    assert gain == pytest.approx([2, 1.5, 1])
    assert offset == pytest.approx([1, -0.5, 2])


def test_two_clusters_are_told_apart_and_blended() -> None:
    """Around (0, 0) the float logits are twice the quantized, around (100, 0) they are three less."""
    rng = np.random.default_rng(0)
    near, far = (rng.normal(c, 1, (50, 2)).astype(np.float32) for c in ((0, 0), (100, 0)))
    q, f = np.concatenate([near, far]), np.concatenate([2 * near, far - 3])
    whole = cat.fit(q, f, alpha=1.0, num_clusters=2, pca_dim=1)
    assert len(set(whole.clusters(q[:50]))) == len(set(whole.clusters(q[50:]))) == 1
    assert whole.clusters(q[:1]) != whole.clusters(q[-1:])
    assert whole.apply(q) == pytest.approx(f, abs=1e-4)
    part = cat.fit(q, f, alpha=0.25, num_clusters=2, pca_dim=1)
    assert part.apply(q) == pytest.approx(0.25 * whole.apply(q) + 0.75 * q, abs=1e-4)


@pytest.mark.parametrize(("clusters", "dim"), [(1, 1), (7, 3), (16, 8)])
def test_pca_and_the_nearest_centre_are_those_of_scikit_learn(clusters: int, dim: int) -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(clusters)
    q = (rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))).astype(np.float32)
    made = cat.fit(q, q, 0.5, clusters, dim)
    theirs = PCA(dim).fit(q)
    assert np.abs(np.sum(made.components * theirs.components_, axis=1)) == pytest.approx(np.ones(dim), abs=1e-4)
    features = (q - made.mean) @ made.components.T
    distance = np.square(features[:, None] - made.centres).sum(-1)
    assert np.array_equal(made.clusters(q), distance.argmin(1))


def test_the_choice_is_judged_on_images_that_it_was_not_fitted_to() -> None:
    """Where quantized logits are noise, many clusters fit the images they know; none is taken all the same."""
    rng = np.random.default_rng(1)
    exact = rng.normal(size=(120, 6)).astype(np.float32)
    noise = rng.normal(size=(120, 6)).astype(np.float32)
    flat = cat.fit(noise, exact, 1.0, 60, 5)
    assert (flat.apply(noise).argmax(1) == exact.argmax(1)).mean() > 0.5
    found = judged(exact, exact, candidates([0.5, 1.0], [60], [5]))
    assert best(found).candidate.alpha == 0
    scaled = judged(exact * floats([1, 2, 3, 1, 1, 1]), exact, candidates([0.5, 1.0], [1], [2]))
    assert best(scaled).candidate == (1.0, 1, 2)
    assert best(scaled).agreement == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_clusters": 11}, "num_clusters 11: there are 10 images"),
        ({"pca_dim": 4}, "pca_dim 4"),
        ({"quantized": np.full((10, 3), np.nan, np.float32)}, "not finite"),
        ({"quantized": np.zeros((9, 3), np.float32)}, "expected"),
    ],
)
def test_what_cannot_be_fitted_is_said(change: dict[str, object], words: str) -> None:
    x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    values = {"quantized": x, "exact": x, "alpha": 1.0, "num_clusters": 2, "pca_dim": 2}
    with pytest.raises(DataError, match=words):
        cat.fit(**(values | change))  # type: ignore[arg-type]


@pytest.fixture
def correction() -> Correction:
    rng = np.random.default_rng(5)
    q = np.round(rng.normal(size=(300, 10)) * 16).astype(np.float32) / 16
    return cat.fit(q, (q + rng.normal(size=q.shape)).astype(np.float32), 0.4, 8, 5)


def test_a_correction_comes_back_from_its_file(correction: Correction, tmp_path: Path) -> None:
    path = tmp_path / "correction.safetensors"
    cat.save(correction, path)
    back = cat.load(path)
    assert back.alpha == 0.4
    for name in cat.ARRAYS:
        assert np.array_equal(getattr(back, name), getattr(correction, name))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileFormatError, match="not a correction"):
        cat.load(path)
    cat.save(Correction(*(getattr(correction, n)[..., :-1] for n in cat.ARRAYS), alpha=0.4), path)
    with pytest.raises(FileFormatError, match="expected finite float32"):
        cat.load(path)


def test_the_nodes_compute_what_numpy_computes(correction: Correction) -> None:
    rng = np.random.default_rng(6)
    q = np.round(rng.normal(size=(500, 10)) * 16).astype(np.float32) / 16
    model = fold.alone(correction)
    for executor in (ort.plain(model), ort.optimized(model)):
        assert np.array_equal(executor.run([q])[0], correction.apply(q))
    assert {n.op_type for n in model.graph.node} == {"MatMul", "Add", "ArgMin", "Gather", "Mul"}
    with pytest.raises(FileFormatError, match="already"):
        fold.folded(model, correction)
    other = onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, ["N", 10])
    model.graph.output.append(other)
    with pytest.raises(FileFormatError, match="2 outputs"):
        fold.folded(model, correction)


def test_numbers_of_an_analysis_by_hand(tmp_path: Path) -> None:
    """Three images, two classes: float is right twice, quantized once, corrected (plus 2 for class 1) twice."""
    alone = Correction(*map(np.float32, ([0, 0], [[1, 0]], [[0]], [[1, 1]], [[0, 2]])), alpha=1.0)
    analysis = Analysis(tmp_path, Subject("net", 2, None), alone)
    labels = np.array([0, 1, 1])
    exact, quantized = floats([3, 0], [0, 3], [2, 0]), floats([3, 0.5], [1, 0], [4, 0])
    analysis.add(labels[:2], exact[:2], quantized[:2])
    analysis.add(labels[2:], exact[2:], quantized[2:])
    summary = analysis.finish()
    suffix = "alpha1_clusters1_pca1_net_w2bit_a32bit"
    networks = summary["networks"]
    assert [round(networks[k]["top1"]) for k in KINDS] == [67, 33, 67]
    assert networks["quantized"]["agreement"] == pytest.approx(200 / 3, abs=1e-3)
    assert networks["fullprecision"]["sqnr_db"] is None
    assert networks["quantized"]["sqnr_db"] == pytest.approx(10 * np.log10(22 / (0.25 + 10 + 4)), abs=1e-3)
    assert networks["corrected"]["gain"] == pytest.approx(100 / 3, abs=1e-3)
    assert networks["corrected"]["gain_standard_error"] == pytest.approx(100 / 3, abs=1e-3)
    for kind, logits in (("fullprecision", exact), ("quantized", quantized), ("corrected", quantized + floats([0, 2]))):
        rows = np.loadtxt(tmp_path / f"logits_{suffix}_{kind}.csv", delimiter=",", skiprows=1)
        assert np.array_equal(rows[:, 0], [0, 1, 2])
        assert np.array_equal(rows[:, 1], labels)
        assert np.array_equal(rows[:, 2:], logits)
    with (tmp_path / f"logits_{suffix}_metadata.csv").open() as file:
        metadata = list(csv.DictReader(file))
    assert [row["corrected_top1"] for row in metadata] == ["0", "1", "0"]
    assert [float(row["quantized_margin"]) for row in metadata] == [2.5, 1, 4]
    assert {row["arch"] for row in metadata} == {"net"}
    for name in ("confusion", "margin", "agreement", "calibration"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_by_hand() -> None:
    mean, error = paired(np.array([1.0, 0, 0, 0]))
    assert (mean, error) == (0.25, 0.25)
    confidence, right = np.array([0.9, 0.91, 0.5], np.float32), np.array([True, False, True])
    assert calibration_error(confidence, right) == pytest.approx((abs(1 - 1.81) + 0.5) / 3, abs=1e-6)


def test_the_interval_of_no_change_by_hand() -> None:
    low, high = interval(np.zeros(450))
    assert (low, high) == pytest.approx((-1.959964 / 452, 1.959964 / 452))
    assert interval(np.ones(1)) == (pytest.approx(1 / 3 - 1.959964 * np.sqrt((2 / 3 - 1 / 9) / 3)), 1.0)


@pytest.mark.parametrize(("better", "worse"), [(0.01, 0.01), (0.02, 0.1), (0.1, 0.1), (0.05, 0.4)])
def test_the_interval_holds_the_truth_95_times_in_100(better: float, worse: float) -> None:
    """Exactly, over every outcome of 60 images that become right or wrong with these probabilities."""
    count, held = 60, 0.0
    for up in range(count + 1):
        for down in range(count - up + 1):
            ways = comb(count, up) * comb(count - up, down)
            probability = ways * better**up * worse**down * (1 - better - worse) ** (count - up - down)
            low, high = interval(np.repeat([1.0, -1.0, 0.0], [up, down, count - up - down]))
            held += probability * (low <= better - worse <= high)
    assert held > 0.935


def test_logits_stream_through_little_memory(tmp_path: Path) -> None:
    """An image leaves less than 100 bytes behind, however many classes; the benchmark does 50,000 x 1,000."""
    rng = np.random.default_rng(0)
    images, classes = 64, 400
    small = rng.normal(size=(64, classes)).astype(np.float32)
    analysis = Analysis(tmp_path, Subject("net", 4, 4), cat.fit(small, small, 0.5, 4, 4))
    peaks = []
    tracemalloc.start()
    try:
        for _ in range(18):
            tracemalloc.reset_peak()
            logits = rng.standard_normal((images, classes), np.float32)
            analysis.add(rng.integers(classes, size=images), logits, logits)
            peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
        analysis.close()
    assert peaks[-1] - peaks[2] < 15 * images * 100, peaks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network that is trained a little, and quantized hard."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("logits")
    weights = folder / "digits.safetensors"
    save_file({k: v.contiguous() for k, v in models.digits_cnn().state_dict().items()}, weights)
    command = ["ptq", "--weights", str(weights), "--weight-bits", "2", "--activation-bits", "4", "--method", "none"]
    assert main([*command, "--max-eval-batches", "1", "--quiet", "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_is_corrected_and_the_nodes_are_in_its_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["--alpha", "0.5,1", "--num-clusters", "1,4", "--pca-dim", "3", "--max-eval-batches", "4", "--quiet"]
    capsys.readouterr()
    assert main(["correct", str(run), *lists, "--fold", "--json", "--output", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["candidates"]) == 5
    assert record["test"]["images"] == 256
    assert record["onnxruntime"]["differing"] == 0
    made = cat.load(tmp_path / "correction.safetensors")
    assert record["chosen"] == {"alpha": made.alpha, "num_clusters": made.num_clusters, "pca_dim": 3}
    images = next(iter(ort.random_batches(run / "model.onnx", 16)))
    raw, corrected = (ort.plain(f).run(images)[0] for f in (run / "model.onnx", tmp_path / "model_corrected.onnx"))
    assert np.array_equal(corrected, made.apply(raw))
    assert not np.array_equal(corrected, raw)
    assert main(["correct", str(run), *lists, "--output", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_runs_logits_are_written_for_every_correction(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["--alpha", "0.4", "--num-clusters", "1,4", "--pca-dim", "3", "--max-eval-batches", "2", "--quiet"]
    command = ["logits", str(run), *lists, "--output", str(tmp_path)]
    assert main(command) == 0
    folders = sorted(tmp_path.iterdir())
    assert [f.name for f in folders] == [f"results_alpha0.4_clusters{n}_pca3_digits-cnn_w2bit_a4bit" for n in (1, 4)]
    for folder in folders:
        suffix = folder.name.removeprefix("results_")
        for kind in (*KINDS, "metadata"):
            assert (folder / f"logits_{suffix}_{kind}.csv").read_text().count("\n") == 1 + 128
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
    assert main(["logits", str(tmp_path)]) == 2
    assert "holds no model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["correct", "logits"])
def test_overwriting_that_fails_loses_nothing(
    run: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays until the new is complete, whenever the command ends before that."""
    lists = ["--alpha", "0.5", "--num-clusters", "1", "--pca-dim", "3", "--max-eval-batches", "1", "--quiet"]
    arguments = [command, str(run), *lists, "--output", str(tmp_path)]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    monkeypatch.setattr(Analysis, "finish", interrupted)
    monkeypatch.setattr(corrections, "evaluated", interrupted)
    assert main([*arguments, "--overwrite"]) == 130
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_correction_without_fold_takes_the_folded_network_of_an_earlier_one_away(run: Path, tmp_path: Path) -> None:
    lists = ["--alpha", "1", "--num-clusters", "1", "--pca-dim", "3", "--max-eval-batches", "1", "--quiet"]
    (tmp_path / "mine").touch()
    for more in (["--fold"], ["--overwrite"]):
        assert main(["correct", str(run), *lists, "--output", str(tmp_path), *more]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["correction.json", "correction.safetensors", "mine"]


CHANGED = """
import torch
from torch import nn

def network():
    torch.manual_seed({seed})
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_run_is_not_compared_with_another_float_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(CHANGED.format(seed=0), encoding="utf-8")
    assert main(["ptq", "--model", "mine.py:network", "--output", "run", "--max-eval-batches", "1", "--quiet"]) == 0
    short = ["--max-eval-batches", "1", "--max-calibration-batches", "2", "--quiet"]
    assert main(["logits", "run", "--output", "same", *short]) == 0
    Path("mine.py").write_text(CHANGED.format(seed=1), encoding="utf-8")
    for command in ("logits", "correct"):
        assert main([command, "run", "--output", command, *short]) == 2
        assert "run: was made of a float network with other weights" in capsys.readouterr().err
        assert not Path(command).exists()
