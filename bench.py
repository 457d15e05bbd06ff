"""Speed and memory: the step of every method, its parts by themselves, a peer's trainer, and what a rank will need.

    python bench.py                               CPU: a toy size, then a wide vocabulary
    python bench.py --shape scaled                CPU: Gemma-2-2B, every width an eighth
    python bench.py --shape gemma-2-2b --compile --checkpointing        CUDA; random weights, nothing is downloaded
    python bench.py --shape gemma-2-9b --rank_of 4 --checkpointing      one rank of four, on one card
    python bench.py --head_only | --reference_pass | --updates | --peer trl

The step is the real one: `data.collate`, `fpo.Policy`, `fpo.method_loss`, backward, clip, optimizer. Methods take turns
within a round (A B C, A B C, …) and a figure is the median over rounds, so that ratios hold on a busy machine too.
Memory, on CUDA: the allocator's peak in a step. On CPU: the resident set's peak in a step, less what the process held
before it made the model, each method in a process of its own (what one leaves in malloc's heap is not the next one's).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, Gemma2Config

import fpo
from data import Pairs, collate
from plan import plan, print_plan  # noqa: F401
