"""An address -> exit status 0 where a server answers it well, for the health checks of compose.yaml."""

import sys
from urllib.request import urlopen

try:
    urlopen(sys.argv[1], timeout=4).close()
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
