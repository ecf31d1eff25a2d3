"""Trains the embedded digits network and writes the weights that the package ships.

    python scripts/train_digits.py

The training depends on the processor in its last bits, so the weights are committed, not made at run time.
"""

from safetensors.torch import save_file

from pow2quant import datasets, models
from pow2quant.config import DataConfig


def main() -> None:
    """Writes `pow2quant/weights/digits_cnn.safetensors`."""
    model = models.train_digits(models.digits_cnn(), datasets.load(DataConfig()), seed=0)
    models.DIGITS_WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, models.DIGITS_WEIGHTS)


if __name__ == "__main__":
    main()
