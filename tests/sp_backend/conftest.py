"""One thread: kernels give the same bits here as on the ranks, and tests run side by side."""

import torch

torch.set_num_threads(1)
