"""Data sets as one directory: videos as records of a tensorflow-datasets builder, without TensorFlow.

`contents` says what is written and reads it back, `builder` writes it, the command line is `__main__`; what trains from
it is `re2tal_jax.data.prepared`.
"""
