"""Training: what is learned how fast, on which devices, how a step and a run go, and what is kept of them.

optim       parameter groups, learning-rate schedule, AdamW, clipping, moving average
sharding    the device mesh, and where batches, parameters and optimizer state lie on it
state       everything that a step changes, and how it is created on the mesh
step        one step of training and of evaluation, as pure functions
checkpoint  saving and restoring a run: atomic, latest and best, on any mesh
metrics     console, JSONL and TensorBoard; memory
loop        the run itself
"""
