"""The confidence network: layers, scoring, calibration, its weights file, training."""
