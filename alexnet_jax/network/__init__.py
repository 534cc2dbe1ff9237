"""The networks and their layers: convolution, LRN, pooling, dropout.

The rest of the package relies on these properties of every network (`build.NETWORKS`; a test checks them):

- `network.apply({"params": params}, images, dropout_keys)` gives float32 logits [B, classes] from images [B, H, W, 3];
  `dropout_keys` [B, 2] has a key per example and dropout layer in training and is None in evaluation.
- The first layer is `conv1`, with a kernel [height, width, 3, N]: plots show it, and --conv1-slow-epoch and
  --conv1-stop-epoch apply to it.
- The last layer is `logits`, with a bias of one number per class.
- Dense layers that hybrid parallelism splits are called `fc1`, `fc2` and `logits`.
- Layers are called in the alphabetical order of their names: JAX's trees sort their keys, and health checks and plots
  take the order of the layers from the parameters.
- Operations after a layer are applied by `operations.apply_operations`, which stores them (`sow`) for inspection.
"""
