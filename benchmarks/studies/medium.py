"""Plug-in of studies on a CPU: products of bfloat16 factors, summed in float32, and one thread a process.

bayeslora --plugin benchmarks/studies/medium.py compare STUDY.yaml
"""

import torch

torch.set_float32_matmul_precision("medium")
torch.set_num_threads(1)
