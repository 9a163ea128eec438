"""Names for private texts in reports: an index and a hash that cannot be turned back.

A plain hash of a short word can be guessed by hashing a dictionary, so the hash is keyed (HMAC-SHA256) with random
bytes that are made for one report and kept nowhere. Within a report equal texts have equal hashes; between reports
hashes do not compare: there the index does, which is the place in the file of private texts.
"""

import hashlib
import hmac
import secrets

_KEY_BYTES = 32
_HASH_DIGITS = 8


class Redactor:
    """Names texts for one report."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: for tests; otherwise new random bytes."""
        self._key = secrets.token_bytes(_KEY_BYTES) if key is None else key

    def name(self, group: str, index: int, text: str) -> str:
        """Such as `keyword 3 (5f0c91ab)`; `index` counts from 1."""
        digest = hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
        return f"{group} {index} ({digest[:_HASH_DIGITS]})"
