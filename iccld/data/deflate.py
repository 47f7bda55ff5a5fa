"""zlib's functions: those of zlib-ng if it is installed, since they are several times as fast.

Checksums and inflated bytes are the same from both; deflated bytes differ, and inflate to the same.
"""

import zlib
from typing import Any

library: Any = zlib
InflateError: type[Exception] = zlib.error
try:
    from zlib_ng import zlib_ng
except ImportError:
    pass
else:
    library, InflateError = zlib_ng, zlib_ng.error  # type: ignore[assignment]  # an instance, says its stub

compress, crc32, decompressobj = library.compress, library.crc32, library.decompressobj
