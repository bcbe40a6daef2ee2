"""Before any test module imports Triton: interpret its kernels, unless told to use the GPU."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
