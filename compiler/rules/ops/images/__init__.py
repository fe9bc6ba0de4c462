"""Operators over windows of images: convolution, pooling, resampling."""
