"""Packed codes in files: exact round trips; folders that contradict themselves are refused with one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import edgewright
from edgewright.errors import EdgewrightError, FormatError
from edgewright.io.packed import CODE_RANGES, PackedLinear, PackedTensor
from edgewright.io.quantized_folder import CODE_BITS, load_quantized, pack_codes, unpack_codes

from .conftest import tiny_model  # isort: skip
