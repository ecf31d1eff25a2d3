"""ONNX's If: the branch that constants or shapes choose is read, any other condition is one line."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pow2quant.errors import UnsupportedModelError
from pow2quant.frontends.onnx.network import read_network
from pow2quant.frontends.prepare import prepare


class Scripted(nn.Module):
    """Decides by shapes, one decision after another, with weights of its own in each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.narrow, self.wide = nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv(image)).mean([2, 3], keepdim=True)
        x = x.flatten(1) * 2 if x.shape[2] > 1 else x.squeeze(3).squeeze(2)
        if x.shape[1] == 4:
            return self.narrow(x)
        return self.wide(x)


class Squeezed(nn.Module):
    """The exporter does not know that the last two dimensions are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(self.conv(image), (image.shape[2] // 8, 1))
        return x.squeeze(3).squeeze(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Scripted, Squeezed])
def test_what_torch_decides_by_shapes_is_decided_once(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    x = torch.randn(4, 3, 8, 8)
    given = torch.jit.script(model) if kind is Scripted else model
    axes = {"image": {0: "n"} if kind is Scripted else {0: "n", 2: "h", 3: "w"}}
    names = {"input_names": ["image"], "output_names": ["y"]}
    torch.onnx.export(given, (x,), tmp_path / "n.onnx", dynamo=False, opset_version=13, dynamic_axes=axes, **names)
    file = onnx.load(tmp_path / "n.onnx")
    assert any(node.op_type == "If" for node in file.graph.node)
    for dim in file.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_value = 8
    network = read_network(file)
    prepared = prepare(network, x)
    for batch in (1, 3):
        expected = model(x[:batch])
        torch.testing.assert_close(network(x[:batch]), expected)
        torch.testing.assert_close(prepared(x[:batch]), expected)
    names_of = {name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight")}
    assert names_of == ({"conv", "narrow"} if kind is Scripted else {"conv"})


def model_of(body: str, shape: str = "n, 4") -> onnx.ModelProto:
    """A network of one input and one output in ONNX's text form."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[m, k] y) {body}'
    return onnx.parser.parse_model(text)


CHOICE = """
  {name} = If ({condition}) <
    then_branch = yes () => (float[m, k] r) <float[4] w = {{1, 2, 3, {last}}}> {{
      {part} = Add ({data}, w) r = Relu ({part})
    }},
    else_branch = no () => (float[m, k] r) {{ {part} = Neg ({data}) r = Exp ({part}) }}
  >"""
WIDTH = (
    "{ four = Constant () <value = int64[1] {4}> one = Constant () <value_int = 1> s = Shape (x) k = Gather (s, one) "
)


def choice(name: str, condition: str, data: str, last: int = 4, part: str = "t") -> str:
    return CHOICE.format(name=name, condition=condition, data=data, last=last, part=part)


@pytest.mark.parametrize("shape", ["n, 4", "2, 4"])
@pytest.mark.parametrize("width", [4, 3])
def test_branches_with_names_of_their_own_around_each_other(width: int, shape: str) -> None:
    start = WIDTH.replace("{4}", f"{{{width}}}") + "q = Equal (k, four) c = Squeeze (q) "
    outer = f"""
      y = If (c) <
        then_branch = yes () => (float[m, k] b) {{ t = Neg (a) {choice("v", "c", "t", 5, "u")} b = Mul (t, v) }},
        else_branch = no () => (float[m, k] r) {{ t = Sin (a) r = Sub (t, x) }}
      > }}"""
    network = read_network(model_of(start + choice("a", "c", "x") + outer, shape))
    x = torch.randn(4, 4)
    if width == 4:
        a = F.relu(x + torch.tensor([1.0, 2, 3, 4]))
        expected = -a * F.relu(-a + torch.tensor([1.0, 2, 3, 5]))
    else:
        expected = (-x).exp().sin() - x
    torch.testing.assert_close(network(x), expected)


def test_weights_of_a_branch_may_stand_beside_the_file(tmp_path: Path) -> None:
    model = model_of("{ c = Constant () <value = bool {1}>" + choice("y", "c", "x") + "}")
    inside = model.graph.node[1].attribute[0].g.initializer[0]
    inside.raw_data = onnx.numpy_helper.to_array(inside).tobytes()
    del inside.float_data[:]
    path, x = tmp_path / "n.onnx", torch.randn(3, 4)
    onnx.save(model, path, save_as_external_data=True, location="n.data", size_threshold=0)
    assert (tmp_path / "n.data").exists()
    torch.testing.assert_close(read_network(path)(x), F.relu(x + torch.tensor([1.0, 2, 3, 4])))


BATCH = "{ zero = Constant () <value_int = 0> one = Constant () <value_int = 1> s = Shape (x) n = Gather (s, zero) "
LOOP = "body (int64 i, bool go, float[m, k] a) => (bool go_, float[m, k] b) { go_ = Identity (go) b = Neg (a) }"
REFUSED = {
    "batch size": (model_of(BATCH + "c = Greater (n, one)" + choice("y", "c", "x") + "}"), "If.*depends on the batch"),
    "data": (
        model_of("{ a = ReduceMax <keepdims = 0> (x) b = IsNaN (a) c = Not (b)" + choice("y", "c", "x") + "}"),
        "'the choice' \\(If\\): its condition is computed from data",
    ),
    "open sizes": (
        model_of(WIDTH + "q = Equal (k, four) c = Squeeze (q)" + choice("y", "c", "x") + "}", "n, k"),
        "If.*fix all dimensions but the batch",
    ),
    "a loop": (
        model_of(f"{{ n = Constant () <value_int = 2> y = Loop (n, , x) <body = {LOOP}> }}"),
        "Loop.*control flow cannot be quantized",
    ),
    "no branch": (
        model_of("{ c = Constant () <value = bool {0}>" + choice("y", "c", "x").replace("else_branch", "other") + "}"),
        "If.*the branch that it takes is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_control_flow_is_one_line_that_names_the_node(name: str) -> None:
    model, words = REFUSED[name]
    model.graph.node[-1].name = "the choice"
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        read_network(model)
    assert "'the choice'" in str(caught.value)
    assert "\n" not in str(caught.value)
