"""Lets numba-cuda be imported beside NumPy 2.5, which no longer has what some of its versions look up."""

import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack
