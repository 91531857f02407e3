"""For every test: hypothesis looks for wrong answers, not for slow ones, since other work may run beside."""

import os

from hypothesis import settings

# Before NumPy is imported: threads of a matrix product wait for each other by spinning, which on a busy machine costs ten times
# the product, and the trainer has threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
