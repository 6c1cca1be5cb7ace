"""The jobs of nomad/patterns/ against Nomad's blocks, the services' settings, and the compose files of the same patterns.

No Nomad runs here: the files are parsed by python-hcl2, as in test_jobs.py.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang_patterns
from baton_runtime.lifecycle import CLOSE_LIMIT_S
from sglang_patterns import WORKERS, flags, loaded

sys.path.insert(0, str(Path(__file__).parent))
