"""Entry for a peer that runs inside another program: `tools.bench.worker` with that program's arguments."""

import sys

from tools.bench import worker

sys.exit(worker.main(sys.argv))
