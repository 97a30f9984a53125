"""Settings that must stand before torch is imported."""

import os

# Threads that wait for others sleep instead of spinning: on a machine shared with other work, spinning makes a test take
# minutes where it needs seconds. Results do not depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
