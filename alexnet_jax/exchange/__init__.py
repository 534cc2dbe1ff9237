"""Weights to and from other programs: torchvision, Caffe, safetensors, StableHLO."""
