"""What the CUDA device promises, measured on whatever NVIDIA GPU is there: `python -m bench.gpu`."""
