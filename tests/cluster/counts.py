"""How often each row is run: a few times at every change, as often as the proof says for `make test-cluster-all`."""

from __future__ import annotations

import os

ALL = os.environ.get("CLUSTER_COUNTS") == "all"

INSTALLS = 20 if ALL else 3  # in a row, for each Helm
NOTICES = 10 if ALL else 2  # in a row, to one node of three
NOTICES_ALONE = 50 if ALL else 2  # in a row, to a run's only node
