"""Settings that must stand before torch is imported."""

import os

# Threads that wait for others sleep instead of spinning: on a machine shared with other work, spinning makes a test take
# minutes where it needs seconds. Results do not depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from hypothesis import settings  # noqa: E402

# The default run draws the same examples everywhere; `make test-slow` draws new ones each time.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fresh", deadline=None)
settings.load_profile("fresh" if os.environ.get("THINKERNEL_FRESH_EXAMPLES") == "1" else "same")
