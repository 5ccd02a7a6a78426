"""Stores of keys and values: in device or host memory, on disk or as objects, optionally quantized."""
