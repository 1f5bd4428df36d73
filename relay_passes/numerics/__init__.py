"""The mathematics of compression in plain NumPy, away from the IR: arrays in, arrays out."""
