"""One thread a process, and the profiles of Hypothesis.

`ci` (the default) draws the same examples every time; `soak` draws 50 times as many, afresh; `few`, a quarter of them,
is for `make quick` and for repeating tests in another setting.

No test may rest on bits that a BLAS or LAPACK is free to change: docs/testing.md says when bits may be compared.
"""

import os

from hypothesis import settings

# Matrices are tiny here: threads that wait for each other cost more than they bring, and there are other processes to
# use the cores. Set before NumPy and torch are loaded, and inherited by every process that a test starts.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

CI_EXAMPLES = 40

# Without x64 JAX has no double precision; tests/promises/test_jax.py runs without it too.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# No health check is switched off: what is too slow or too picky here would be so for users of mpo_tn.testing.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=CI_EXAMPLES)
settings.register_profile("soak", deadline=None, max_examples=50 * CI_EXAMPLES)
settings.register_profile("few", derandomize=True, deadline=None, max_examples=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
