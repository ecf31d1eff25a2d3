"""The drop-in for AIMET's QuantizationSimModel."""
