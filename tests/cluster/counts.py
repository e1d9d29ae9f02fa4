"""How often each row is run: a few times at every change, as often as the proof says for `make test-cluster-all`."""

from __future__ import annotations

import os

ALL = os.environ.get("CLUSTER_COUNTS") == "all"

INSTALLS = 20 if ALL else 3  # in a row, in each of SERIES
SERIES = [  # which Helm, and whether another run is there
    *(("helm3", False), ("helm4", True)),
    *([("helm3", True), ("helm4", False)] if ALL else []),
]
GANGS = 20 if ALL else 5  # that queue for a capacity of two
NOTICES = 10 if ALL else 2  # in a row, to one node of three
NOTICES_ALONE = 50 if ALL else 2  # in a row, to a run's only node
LATER = 30 if ALL else 6  # seconds from the first node's end to the last one's
