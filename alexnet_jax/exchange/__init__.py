"""Weights from and to other programs: torchvision, Caffe, safetensors, StableHLO."""
