"""The network and the data of the scripts: scikit-learn's digits, a small residual network with batch norm."""

import copy
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.flatten(self.pool(self.relu2(self.bn2(self.conv2(x))))))


@cache
def _data():
    digits = load_digits()
    x = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
    return x, torch.from_numpy(digits.target)


def train_loader():
    x, y = (v[:1200] for v in _data())
    return DataLoader(TensorDataset(x, y), batch_size=64)


def images(count=256):
    return _data()[0][:count]


def train(model, epochs, learning_rate):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for x, y in train_loader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model):
    x, y = (v[1200:] for v in _data())
    return float((model(x).argmax(1) == y).float().mean())


@cache
def _trained():
    torch.manual_seed(0)
    model = Net()
    train(model, 4, 3e-3)
    return model


def trained():
    return copy.deepcopy(_trained())
