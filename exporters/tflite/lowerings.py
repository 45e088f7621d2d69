"""Every file of lowerings: importing them fills the table."""

from edgekit.exporters.tflite import (  # noqa: F401
    ops_activation,
    ops_conv,
    ops_einsum,
    ops_fourier,
    ops_index,
    ops_math,
    ops_matmul,
    ops_norm,
    ops_pool,
    ops_reduce,
    ops_resize,
    ops_rnn,
    ops_sample,
    ops_shape,
)
