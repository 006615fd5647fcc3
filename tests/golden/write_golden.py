"""Write the golden files beside this script: `python tests/golden/write_golden.py`.

They were written under PyTorch 2.13.0, in float64. Each holds a case of `oracle.GOLDEN_CASES`.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import oracle  # noqa: E402

if __name__ == "__main__":  # pytest looks into every module for doctests
    for name, case in oracle.GOLDEN_CASES.items():
        np.savez_compressed(HERE / f"{name}.npz", **oracle.run_torch(case))
