"""Seeds, of which people have wider ones than random generators take."""

import zlib


def narrow(seed: int) -> int:
    """A seed of up to 64 bits in 32: itself if it fits, else a hash of it.

    Raises:
      ValueError: if it is negative or wider.

    Example:
      >>> narrow(7), narrow(2**40) < 2**32, narrow(2**40) != narrow(2**41)
      (7, True, True)
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected a whole number from 0 below 2**64")
    return seed if seed < 2**32 else zlib.crc32(seed.to_bytes(8, "little"))
