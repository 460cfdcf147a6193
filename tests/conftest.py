"""For every test: one thread, so that results do not depend on the machine's cores, and no network."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
