"""Puts this folder on the path: its helper modules also serve benchmarks/quality.py and run as scripts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
