# SPDX-License-Identifier: Apache-2.0
"""Sizes of the classifier's tables, as bpf/classify.h has them, and what is raised when rules do not fit."""

NR_RULES = 16384
NR_CLASSES = 32768
NR_CLASS_WORDS = 524288
NR_TRIE_CHUNKS = 8192
NR_BUCKETS6 = 8192
MAX_LENGTHS6 = 16
MAX_PROBES6 = 4
NR_PORT_PAGES = 4096
NR_PORT_GROUPS = 16
SEGMENT_WORDS = 16
ROW_SEGMENTS = NR_RULES // 64 // SEGMENT_WORDS
SEGMENT_RULES = 64 * SEGMENT_WORDS
# leaf and port root entries: go on in that chunk, that page
LEAF_CHUNK = 0x80000000
PORT_PAGE = 0x8000


class LimitExceeded(Exception):
    """The rules do not fit a table; says which, how much was needed, and how much there is."""

    def __init__(self, what: str, needed: int, limit: int) -> None:
        super().__init__(f"{what}: {needed} needed, at most {limit} are possible")
        self.what = what
        self.needed = needed
        self.limit = limit
