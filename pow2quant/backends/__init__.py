"""The seam (`base`), what all share (`prepare`, `fold`, `placement`, `calibration`, `export`), and each backend."""
