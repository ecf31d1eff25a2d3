"""Transformers and recurrent networks that people know, at the size they have; for `benchmarks/zoo.py`.

python benchmarks/zoo.py benchmarks/sequence_networks.py recurrent encoders --results sequences.jsonl --inputs 225
python benchmarks/zoo.py benchmarks/sequence_networks.py --results sequences.jsonl --page docs/sequence-networks.md \\
    --each --title "Transformers and recurrent networks" --engine-macs 1e11 --c-macs 1e11 --timeout 3600

Needs timm and transformers. The weights are random, but for the LSTM and the GRU, which learn scikit-learn's digits row
by row in seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIXELS = (3, 224, 224)


def torchvision_network(name: str) -> nn.Module:
    """With random weights in the head too, which torchvision's vision transformer has zeros in."""
    import torchvision

    model: Any = torchvision.models.get_model(name, weights=None)
    head = model.heads.head if hasattr(model, "heads") else model.head
    nn.init.normal_(head.weight, std=head.in_features**-0.5)
    nn.init.normal_(head.bias, std=0.1)
    return model


def timm_network(name: str) -> nn.Module:
    """With heads whose results are not all about the same: timm starts some of them at a standard deviation of 0.02."""
    import timm

    model: Any = timm.create_model(name, pretrained=False)
    for head in [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1000]:
        nn.init.normal_(head.weight, std=head.in_features**-0.5)
    return model


def bert_tiny() -> nn.Module:
    """BERT-tiny's sizes, for two classes."""
    import transformers

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **sizes))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` on 32 steps, and a layer on their mean."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 32, 64) -> (N, 10)."""
        return self.head(self.encoder(x).mean(1))


class Rows(nn.Module):
    """A recurrent layer that reads a digit row by row, and a layer on its last state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, 8) -> (N, 10)."""
        return self.head(self.recurrent(x)[0][:, -1])


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 8, 8) of 0 to 1 and labels, for training and for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    return images[train], labels[train], images[test], labels[test]


def trained(kind: type[nn.LSTM | nn.GRU]) -> nn.Module:
    """`Rows` that learned the digits."""
    torch.manual_seed(0)
    model, (images, labels, _, _) = Rows(kind), digits()
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(40):
        for part in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


def lstm() -> nn.Module:
    """As a network of a run: `--model benchmarks/sequence_networks.py:lstm`."""
    return trained(nn.LSTM)


def gru() -> nn.Module:
    """The same of a GRU."""
    return trained(nn.GRU)


def data() -> Any:
    """(training, test), as data of a run."""
    from torch.utils.data import TensorDataset

    images, labels, test_images, test_labels = digits()
    return TensorDataset(images, labels), TensorDataset(test_images, test_labels)


def some_digits(count: int, seed: int) -> Tensor:
    """Images of the test set for an even seed, of the training set for an odd one."""
    images = digits()[0 if seed % 2 else 2]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


ZOO: dict[str, tuple[str, Any, tuple[tuple[int, ...], ...], Any]] = {
    "LSTM, digits by rows": ("recurrent", lstm, ((8, 8),), some_digits),
    "GRU, digits by rows": ("recurrent", gru, ((8, 8),), some_digits),
    "nn.TransformerEncoder, norm last": ("encoders", lambda: Encoder(False), ((32, 64),), "rand"),
    "nn.TransformerEncoder, norm first": ("encoders", lambda: Encoder(True), ((32, 64),), "rand"),
    "BERT-tiny, tokens (transformers)": ("encoders", bert_tiny, ((32,),), "tok"),
    "mobilevit_s (timm)": ("vision", lambda: timm_network("mobilevit_s"), ((3, 256, 256),), "img"),
    "levit_256 (timm)": ("vision", lambda: timm_network("levit_256"), (PIXELS,), "img"),
    "deit_tiny_patch16_224 (timm)": ("vision", lambda: timm_network("deit_tiny_patch16_224"), (PIXELS,), "img"),
    "swin_t (torchvision)": ("vision", lambda: torchvision_network("swin_t"), (PIXELS,), "img"),
    "vit_b_16 (torchvision)": ("vision", lambda: torchvision_network("vit_b_16"), (PIXELS,), "img"),
}
"""As `benchmarks/zoo.py` reads it."""
