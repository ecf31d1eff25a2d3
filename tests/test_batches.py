"""What a batch holds: which elements are inputs, bytes, names of arguments, masks, and which way a metric is good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pow2quant import quantize
from pow2quant.errors import DataError
from pow2quant.models import build
from pow2quant.reading import Signature, read
from pow2quant.tasks.choosing import task_of
from pow2quant.tasks.own import metric_of


class Tokens(nn.Module):
    """Scores of tokens, some of which do not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.scores = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(ids)
        return self.scores(x if attention_mask is None else x * attention_mask.unsqueeze(-1).float())


def test_masks_beside_tokens_are_inputs() -> None:
    ids, mask = torch.randint(0, 20, (70, 7)), torch.randint(0, 2, (70, 7))
    labels = Tokens()(ids, mask).argmax(-1)
    result = quantize(Tokens(), [(ids, mask, labels)], progress=False)
    assert result.report["metrics"]["pixel_accuracy"]["float"] == 100
    inputs, targets = read((ids, mask, labels), Signature.of(Tokens()), "")
    assert len(inputs) == 2
    assert torch.equal(targets, labels)


def test_what_may_be_an_input_or_a_target_is_refused() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, prior: Any = None) -> Tensor:
            return x

    signature = Signature.of(Optional())
    x, boxes, labels = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 4), torch.zeros(4)
    with pytest.raises(
        DataError, match=r"takes x, and may take prior: give \(\(inputs, \.\.\.\), targets\), or a dict"
    ):
        read((x, boxes, labels), signature, "here")
    assert len(read(((x, boxes), labels), signature, "here")[0]) == 2
    assert len(read((x, (boxes, labels)), signature, "here")[1]) == 2
    assert torch.equal(read((x, labels), signature, "here")[1], labels)


@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (lambda self, ids, scale=1.0, mask=None: ids, None),
        (lambda self, ids, labels=None, mask=None: ids, None),
        (lambda self, ids, token_type_ids=None, attention_mask=None: ids, None),
        (lambda self, ids=None, attention_mask=None, labels=None: ids, 2),
        (lambda self, ids, labels=None: ids, 1),
        (lambda self, ids=None: ids, 1),
    ],
)
def test_elements_are_inputs_by_their_place(forward: Any, inputs: int | None) -> None:
    network = type("Network", (nn.Module,), {"forward": forward})()
    batch = (torch.ones(4, 7).long(), torch.ones(4, 7).long(), torch.zeros(4).long())
    if inputs is None:
        with pytest.raises(DataError, match="may take"):
            read(batch, Signature.of(network), "here")
        return
    found, _ = read(batch, Signature.of(network), "here")
    assert (len(found) if isinstance(found, tuple) else 1) == inputs


def of_bytes(folder: Path) -> Path:
    """A file that takes bytes and divides by 255 itself; its input's name is no identifier."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "s": np.float32(255)}
    nodes = [
        helper.make_node("Cast", ["in:0"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["f", "s"], ["g"]),
        helper.make_node("Conv", ["g", "w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("in:0", TensorProto.UINT8, ["n", 3, 6, 6])]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 4, 4])]
    graph = helper.make_graph(
        nodes, "g", ends, results, [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    )
    path = folder / "bytes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_files_that_take_bytes_are_given_bytes(tmp_path: Path) -> None:
    path, images = of_bytes(tmp_path), np.random.default_rng(1).integers(0, 256, (32, 3, 6, 6)).astype(np.uint8)
    runs = [quantize(path, x, progress=False) for x in (images, {"in:0": images}, images.astype(np.float32))]
    probe = torch.from_numpy(images).float()
    outputs = [run.model(probe) for run in runs]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert runs[0].report["final_sqnr_db"] > 30
    with pytest.raises(DataError, match="takes bytes from 0 to 255, as they are, not scaled"):
        quantize(path, images.astype(np.float32) / 255, progress=False)
    assert build(str(path), num_classes=None, weights=None) is not None


@pytest.mark.parametrize("channels", [1, 2])
def test_masks_as_pictures_hold_them_are_no_masks_without_foreground(channels: int) -> None:
    shape = (channels, 4, 4)
    masks = (torch.rand(3, 4, 4) > 0.5).long()
    for wrong in (masks * 255, masks[:, None] * 255, masks.float() * 255)[: 4 - channels]:
        with pytest.raises(DataError, match="divide them by 255 if that is the second class"):
            task_of(None, None, wrong, [shape])
    left_out = masks.clone()
    left_out[:, 0, 0], left_out[:, 1, 1] = 255, 1
    task = task_of(None, None, left_out, [shape])
    assert (task.check(left_out, 3, "here")[:, 0, 0] == -100).all()
    later = torch.full((1, 4, 4), 255)
    later[:, :2] = 0
    assert task.check(later, 1, "a later batch").shape == (1, 4, 4)


def test_masks_with_a_channel_for_each_class() -> None:
    masks = torch.randint(0, 3, (5, 4, 4))
    hot = nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2).float()
    task = task_of(None, None, hot, [(3, 4, 4)])
    assert task.name == "segmentation"
    assert torch.equal(task.check(hot, 5, "here"), masks)
    assert task_of(None, None, hot + 0.1, [(3, 4, 4)]).name == "image-to-image"


def test_identities_are_no_classes_where_a_metric_judges() -> None:
    labels = torch.arange(12)

    def recall(outputs: Tensor, targets: Tensor) -> float:
        return float(len(outputs))

    assert task_of(None, recall, labels, [(8,)]).name == "detection"
    assert task_of(None, recall, labels, [(12,)]).name == "classification"
    assert task_of(None, None, labels, [(8,)]).name == "classification"
    assert task_of(None, "top1", labels, [(8,)]).metrics[0].name == "top1"


@pytest.mark.parametrize(
    ("name", "higher", "guessed"),
    [
        *(("logloss", False, False), ("mseloss", False, False), ("errorrate", False, False)),
        *(("wer", False, False), ("WordErrorRate", False, False), ("val_loss", False, False), ("lpips", False, False)),
        *(
            ("top1", True, False),
            ("mIoU", True, False),
            ("MulticlassF1Score", True, False),
            ("my_accuracy", True, False),
        ),
        *(("power", True, True), ("fidelity", True, True), ("evaluate", True, True)),
    ],
)
def test_which_way_a_metric_is_good_by_its_name(name: str, higher: bool, guessed: bool) -> None:
    def function(outputs: Tensor, targets: Tensor) -> float:
        return 1.0

    function.__name__ = name
    found = metric_of(function, ())
    assert (found.higher_is_better, found.guessed) == (higher, guessed)
    function.higher_is_better = not higher  # type: ignore[attr-defined]
    found = metric_of(function, ())
    assert (found.higher_is_better, found.guessed) == (not higher, False)


def test_a_guess_is_a_warning() -> None:
    def strength(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).float().mean())

    data = (torch.randn(32, 4), torch.randint(0, 3, (32,)))
    result = quantize(nn.Linear(4, 3), data, metric=strength, progress=False)
    assert any("metric strength: a larger value is taken as better" in w for w in result.report["verdict"]["warnings"])


def test_random_numbers_of_the_caller_go_on() -> None:
    network = nn.Linear(4, 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantize(network, torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), progress=False)
    assert torch.equal(torch.rand(3), expected)
