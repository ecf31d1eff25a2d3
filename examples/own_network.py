"""Your own network and data through the Python API: prepare, simulate, calibrate, export, validate.

python examples/own_network.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from pow2quant import QuantPlan, prepare, simulate
from pow2quant.adapters import onnx_qdq
from pow2quant.integer.certificate import certify
from pow2quant.runs import simulation_executor
from pow2quant.validation import ort
from pow2quant.validation.agreement import compare

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_network")

# Your data: float32 images (N, C, H, W) as the network wants them, and their classes.
digits = load_digits(return_X_y=True)
images, labels = torch.from_numpy(digits[0]).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(digits[1])
train, test = slice(0, 1400), slice(1400, None)

# Your network, trained as you train it.
torch.manual_seed(0)
network = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
)
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for _ in range(60):
    chosen = torch.randint(0, 1400, (128,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
    optimizer.step()
network.eval()

# Quantized: four-bit weights, eight-bit activations, every scale a power of two.
sim = simulate(prepare(network, images[:1]), images[:1], QuantPlan.default(weight_bits=4))
sim.calibrate(images[train].split(100))

# Written, read back by onnxruntime, and compared bit for bit.
artifact = sim.export(images[:1])
written = onnx_qdq.export_qdq(artifact, folder)
batches = ([batch.numpy()] for batch in images[test].split(100))
simulation = simulation_executor(sim, "custom", torch.device("cpu"))
for found in compare(simulation, ort.executors(written), batches, artifact, proof=certify(artifact)):
    print(f"{found.executor}: {found.differing} of {found.elements} elements differ: {found.claim}")
with torch.no_grad():
    before, after = ((net(images[test]).argmax(1) == labels[test]).float().mean() for net in (network, sim.model))
print(f"accuracy {before:.2%} -> {after:.2%}, written to {written}")
