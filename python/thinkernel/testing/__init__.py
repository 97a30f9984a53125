"""What tests, `thinkernel validate` and the benches share: the comparator, input generators, timing."""

from thinkernel.testing.compare import Comparison, assert_bitwise, check, compare

__all__ = ["Comparison", "assert_bitwise", "check", "compare"]
