"""Exchange of weights with other programs: torchvision, Caffe, safetensors, StableHLO."""
