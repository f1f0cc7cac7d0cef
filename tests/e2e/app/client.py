# SPDX-License-Identifier: Apache-2.0
"""The demo's client: asks the web service for a page a few times a second and says how it went."""

import os
import time
import urllib.error
import urllib.request

URL = f"http://{os.environ['WEB_SERVICE_HOST']}:{os.environ['WEB_SERVICE_PORT']}/page"
PERIOD_S = 0.2
TIMEOUT_S = 3.0

while True:
    started = time.monotonic()
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as answer:  # noqa: S310 (our own service)
            outcome = f"{answer.status} {len(answer.read())} bytes"
    except (OSError, urllib.error.URLError) as error:
        outcome = f"failed: {error}"
    print(f"{outcome} {(time.monotonic() - started) * 1000:.1f} ms", flush=True)  # noqa: T201
    time.sleep(PERIOD_S)
