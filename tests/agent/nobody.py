# SPDX-License-Identifier: Apache-2.0
"""Commands run as a user without any rights, from a checkout that may be where only root can look (as in /root)."""

import stat
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]
_DROP_RIGHTS = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
# In a mount namespace of its own: the checkout stays at its path, and what is above it lets everyone pass.
_UNCOVER = (
    'closed=$1; checkout=$2; shift 2; mount --bind "$checkout" /mnt; '
    'mount -t tmpfs -o mode=755 none "$closed"; mkdir -p "$checkout"; '
    'mount --bind /mnt "$checkout"; umount /mnt; cd "$checkout"; exec "$@"'
)


def _prefix(checkout: Path) -> list[str]:
    """What has to stand before a command."""
    above = reversed(checkout.parents)
    closed = next((each for each in above if not each.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return _DROP_RIGHTS
    uncover = ["unshare", "--mount", "sh", "-ec", _UNCOVER, "uncover", str(closed), str(checkout)]
    return [*uncover, *_DROP_RIGHTS]


NOBODY = _prefix(_CHECKOUT)
