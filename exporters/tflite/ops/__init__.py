"""Lowerings, one file for each family of ops: importing this package fills the table of `registry`."""

from edgekit.exporters.tflite.ops import (  # noqa: F401
    activation,
    arithmetic,
    convolution,
    einsum,
    fourier,
    indexing,
    matmul,
    normalization,
    pooling,
    recurrent,
    reduction,
    resize,
    sampling,
    shape,
)
